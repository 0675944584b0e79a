//! Inside a machine: a block device of the kernel's NBD client, attached by nbd-client over netlink.

use crate::machine::ok;
use harness::{Endpoint, wait_until};

/// An attached `/dev/nbd0`.
pub(crate) struct NbdDevice;

/// The path of the device.
pub(crate) const DEVICE: &str = "/dev/nbd0";

impl NbdDevice {
    /// Attaches the default export of a server, with this many connections, and blocks of so many
    /// bytes.
    #[track_caller]
    pub(crate) fn attach(server: &Endpoint, connections: u32, block_size: u32) -> NbdDevice {
        let server = match server {
            Endpoint::Tcp(address) => format!("{} {}", address.ip(), address.port()),
            Endpoint::Unix(path) => format!("-unix {}", path.display()),
        };
        ok(&format!("nbd-client {server} {DEVICE} -b {block_size} -C {connections}"));
        let device = NbdDevice;
        assert_ne!(device.attribute("size"), "0", "it is attached");
        device
    }

    /// One of its attributes in sysfs.
    #[track_caller]
    pub(crate) fn attribute(&self, name: &str) -> String {
        let text = std::fs::read_to_string(format!("/sys/block/nbd0/{name}"));
        text.unwrap_or_else(|e| panic!("{name}: {e}")).trim().to_owned()
    }

    /// The number of writes that the server has answered so far.
    #[track_caller]
    pub(crate) fn writes(&self) -> u64 {
        // The fifth field, see Documentation/block/stat.rst of the kernel.
        self.attribute("stat").split_whitespace().nth(4).unwrap().parse().unwrap()
    }

    /// Waits until the server has answered this many more writes.
    #[track_caller]
    pub(crate) fn wait_for_writes(&self, number: u64) {
        let goal = self.writes() + number;
        wait_until("the device to complete writes", || self.writes() >= goal);
    }

    /// Detaches it, and waits until the kernel has closed the connections.
    #[track_caller]
    pub(crate) fn detach(self) {
        ok(&format!("nbd-client -d {DEVICE}"));
        wait_until("the device to be free", || self.attribute("size") == "0");
    }
}

//! A network link between two network namespaces, which a test can take down.

use std::process::Command;

/// The name of the interface at both ends.
const INTERFACE: &str = "veth0";

/// Two network namespaces joined by a veth pair (veth(4)). Dropping it deletes both.
pub(crate) struct VethPair {
    /// The namespace of the source.
    pub(crate) source: String,
    /// The namespace of the destination.
    pub(crate) destination: String,
}

impl VethPair {
    pub(crate) const SOURCE_IP: &str = "10.209.0.1";
    pub(crate) const DESTINATION_IP: &str = "10.209.0.2";

    pub(crate) fn new() -> VethPair {
        let name = |end| format!("flexnbd-{}-{end}", std::process::id());
        let pair = VethPair { source: name("source"), destination: name("dest") };
        let ends = [(&pair.source, Self::SOURCE_IP), (&pair.destination, Self::DESTINATION_IP)];
        for (namespace, _) in ends {
            ip(&["netns", "add", namespace]);
        }
        let peer = ["type", "veth", "peer", "name", INTERFACE, "netns", &pair.destination];
        ip(&[&["-n", &pair.source, "link", "add", INTERFACE], &peer[..]].concat());
        for (namespace, address) in ends {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", INTERFACE]);
            ip(&["-n", namespace, "link", "set", INTERFACE, "up"]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        pair
    }

    /// Sets the interface of the destination `up` or `down`.
    #[track_caller]
    pub(crate) fn set_state(&self, state: &str) {
        ip(&["-n", &self.destination, "link", "set", INTERFACE, state]);
    }

    /// Bytes sent by the interface of the source.
    pub(crate) fn bytes_sent(&self) -> u64 {
        let file = format!("/sys/class/net/{INTERFACE}/statistics/tx_bytes");
        let read = ["netns", "exec", &self.source, "cat", &file];
        let output = Command::new("ip").args(read).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }
}

impl Drop for VethPair {
    fn drop(&mut self) {
        for namespace in [&self.source, &self.destination] {
            let _ = Command::new("ip").args(["netns", "delete", namespace]).status();
        }
    }
}

#[track_caller]
fn ip(arguments: &[&str]) {
    harness::run("ip", arguments);
}

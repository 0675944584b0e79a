//! A file system on the kernel's client, which does not reconnect, while the disk moves to another server.

use crate::machine::{KernelLog, ok};
use crate::nbd_device::{DEVICE, NbdDevice};
use crate::session::with_kernel;
use harness::fio::Fio;
use harness::host::Host;
use harness::nested::report;
use harness::{Endpoint, MIB, sparse_file, temp_dir};

const SIZE: u64 = 320 * MIB;
const CONNECTIONS: u32 = 4;
const BLOCK_SIZE: u32 = 4096;
/// Writes before and after each step.
const WRITES: u64 = 200;

#[test]
fn mounted_file_system_lives_through_a_migration_with_relay() {
    with_kernel(|| {
        let dir = temp_dir();
        let hosts = ["a", "b"].map(|name| Host::new(dir.path(), name));
        hosts.iter().for_each(|host| sparse_file(&host.image, SIZE));
        let [source, destination] = &hosts;
        let mut serving = source.mode("serve").args(["--quiet"]).start();
        let log = KernelLog::from_now();
        let endpoint = Endpoint::Tcp(source.address);
        let device = NbdDevice::attach(&endpoint, CONNECTIONS, BLOCK_SIZE);
        ok(&format!("mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt"));
        let words = "--directory=/mnt --ioengine=libaio --iodepth=16 --direct=1 --bsrange=4k-64k \
            --size=64m --fsync=128";
        let mut fio = Fio::start(words.split_whitespace());
        device.wait_for_writes(WRITES);
        let mut listening = destination.listen();
        let reply = source.mirror_to(destination.address, &["exit", "0.0.0.0", "0", "relay"]);
        assert_eq!(reply, harness::host::MIRROR_STARTED);
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        let _destination = destination.serve();
        source.wait_for_status("relaying_to", &destination.address.to_string());
        device.wait_for_writes(WRITES);
        fio.assert_running();
        report(&fio.stop());
        ok(&format!("umount /mnt && e2fsck -fn {DEVICE}"));
        device.detach();
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        log.assert_no_error();
        let check = format!("e2fsck -fn {}", destination.image.display());
        ok(&check);
    });
}

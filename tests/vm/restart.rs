//! A file system on the kernel's client, which does not reconnect, while the service restarts, confined by
//! Debian's kernel.

use crate::host::{DISK, Host, PORT};
use crate::machine::{KernelLog, ok, sh};
use crate::nbd_device::{DEVICE, NbdDevice};
use crate::session::on_host;
use harness::Endpoint;
use harness::fio::Fio;
use harness::nested::report;

const RESTARTS: usize = 6;
const CONNECTIONS: u32 = 4;
const BLOCK_SIZE: u32 = 4096;
/// Writes under each process, so that requests are in flight at each restart.
const WRITES: u64 = 200;

/// fio on the file system in `/mnt`, past the page cache, so that each request reaches the device.
#[track_caller]
fn start_fio() -> Fio {
    let words = "--directory=/mnt --ioengine=libaio --iodepth=16 --direct=1 --bsrange=4k-64k \
        --size=64m --fsync=128";
    Fio::start(words.split_whitespace())
}

/// Fails unless the service is confined, and refuses to read a configuration in another directory, which its
/// unit lets it read.
#[track_caller]
fn assert_confined() {
    let status = ok("flexnbd status --instance disk");
    assert!(status.contains(" sandbox=landlock,seccomp"), "{status}");
    ok(
        "cd /etc/flexnbd && mkdir -p /srv/other && cp disk.conf /srv/other && ln -sf /srv/other/disk.conf .",
    );
    let (reloads, text) = sh("flexnbd reload --instance disk");
    assert!(!reloads && text.contains("permission denied"), "{text}");
    ok("mv /srv/other/disk.conf /etc/flexnbd/ && flexnbd reload --instance disk");
}

#[test]
fn restarts_disturb_no_mounted_file_system() {
    on_host(|| {
        let host = Host::installed();
        host.configure_disk();
        ok("modprobe nbd");
        let log = KernelLog::from_now();
        let device = NbdDevice::attach(&Endpoint::localhost(PORT), CONNECTIONS, BLOCK_SIZE);
        ok(&format!("mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt"));
        let mut fio = start_fio();
        for _ in 0..RESTARTS {
            device.wait_for_writes(WRITES);
            let before = host.pid(DISK);
            host.systemctl(&format!("restart {DISK}"));
            assert_ne!(host.pid(DISK), before, "it runs another process");
            fio.assert_running();
            assert_confined();
        }
        device.wait_for_writes(WRITES);
        report(&fio.stop());
        ok(&format!("umount /mnt && e2fsck -fn {DEVICE}"));
        device.detach();
        log.assert_no_error();
    });
}

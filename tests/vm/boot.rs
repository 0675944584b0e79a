//! A file system on an attached device: `/etc/fstab` mounts it, restarts and an upgrade do not disturb it,
//! and a reboot unmounts and detaches it before its server ends, and mounts it again.

use crate::attach::{ATTACH, DEVICE, installed, kernel_name};
use crate::host::{DISK, Host};
use crate::machine::{KernelLog, ok};
use crate::session::on_host;
use harness::fio::Fio;
use harness::{package, wait_until};
use std::fs;
use std::path::Path;

/// The whole `/etc/fstab`.
const FSTAB: &str = "/dev/flexnbd/disk /mnt ext4 _netdev,nofail 0 0\n";
/// The unit of that mount.
const MOUNT: &str = "mnt.mount";
const FILE: &str = "/mnt/file";
/// fio's report of the first boot.
const REPORT: &str = "/root/report";
const RESTARTS: usize = 2;
/// Writes under each process, so that requests are in flight at each restart.
const WRITES: u64 = 200;

/// The number of writes that the server of a device has answered; see `NbdDevice::writes`.
#[track_caller]
fn writes(device: &str) -> u64 {
    let stat = ok(&format!("cat /sys/block/{device}/stat"));
    stat.split_whitespace().nth(4).unwrap().parse().unwrap()
}

#[track_caller]
fn wait_for_writes(device: &str) {
    let goal = writes(device) + WRITES;
    wait_until("the device to complete writes", || writes(device) >= goal);
}

/// Restarts and upgrades the service under a file system that fio writes to.
#[track_caller]
fn restart_under_load(host: &Host) {
    let device = kernel_name(DEVICE);
    let words = "--directory=/mnt --ioengine=libaio --iodepth=16 --direct=1 --bsrange=4k-64k \
        --size=16m --fsync=128";
    let mut fio = Fio::start(words.split_whitespace());
    for number in 0..=RESTARTS {
        wait_for_writes(&device);
        let before = host.pid(DISK);
        if number < RESTARTS {
            host.systemctl(&format!("restart {DISK}"));
        } else {
            host.install(package::NEXT);
        }
        assert_ne!(host.pid(DISK), before, "it runs another process");
        assert_eq!(host.state(ATTACH), "active");
        fio.assert_running();
    }
    wait_for_writes(&device);
    fs::write(REPORT, fio.stop()).unwrap();
}

/// Mounts the device, uses it, and reboots the host; never returns.
fn first_boot() {
    let host = installed();
    fs::write("/etc/fstab", FSTAB).unwrap();
    host.systemctl("daemon-reload");
    host.systemctl(&format!("start {ATTACH}"));
    ok(&format!("mkfs.ext4 -q {DEVICE}"));
    host.systemctl(&format!("stop {ATTACH}"));
    assert!(!Path::new(DEVICE).exists(), "it is detached");
    let log = KernelLog::from_now();
    // Starts the service, too.
    host.systemctl(&format!("start {MOUNT}"));
    assert_eq!(host.state(ATTACH), "active");
    restart_under_load(&host);
    log.assert_no_error();
    // Not flushed.
    fs::write(FILE, vec![7; 4 << 20]).unwrap();
    host.systemctl("--no-block reboot");
    loop {
        std::thread::park();
    }
}

#[test]
fn a_mounted_device_survives_restarts_and_a_reboot() {
    on_host(|| {
        if !Path::new(REPORT).exists() {
            first_boot();
        }
        harness::nested::report(&fs::read_to_string(REPORT).unwrap());
        let host = Host;
        // With `nofail` the boot does not wait for it.
        wait_until("the boot to mount it", || host.state(MOUNT) == "active");
        assert_eq!(fs::read(FILE).unwrap(), vec![7; 4 << 20]);
        let kernel = ok("dmesg");
        assert!(!kernel.contains("recovery complete"), "it was not unmounted: {kernel}");
        let before = ok("journalctl --boot=-1 --output=cat");
        assert!(!before.contains("I/O error"), "{before}");
        let before: Vec<&str> = before.lines().collect();
        let position = |part: &str| {
            let found = before.iter().rposition(|message| message.contains(part));
            found.unwrap_or_else(|| panic!("no {part:?} in {before:#?}"))
        };
        let unmounted = position("Unmounted mnt.mount");
        let detached = position("/dev/flexnbd/disk is detached");
        let stopping = position("stopping: received SIGTERM");
        assert!(unmounted < detached && detached < stopping, "{:#?}", &before[unmounted..]);
        // Unmounts and detaches first.
        host.systemctl("stop flexnbd@disk.socket");
        assert_eq!([host.state(MOUNT), host.state(ATTACH)], ["inactive", "inactive"]);
        ok("e2fsck -fn /var/lib/flexnbd/disk.img");
    });
}

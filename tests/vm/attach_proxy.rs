//! `flexnbd-attach@.service` on a proxy: a file system that outlives its server, its proxy and their upgrade.

use crate::attach::kernel_name;
use crate::host::{DISK, Host, PORT};
use crate::machine::{KernelLog, ok};
use crate::session::on_host;
use harness::fio::Fio;
use harness::nested::report;
use harness::{package, wait_until};

const ATTACH: &str = "flexnbd-attach@far.service";
const PROXY: &str = "flexnbd-proxy@far.service";
const DEVICE: &str = "/dev/flexnbd/far";
const KILLS: usize = 3;
/// Writes between two events, so that requests are in flight at each.
const WRITES: u64 = 50;

/// Waits until the device has completed this many more writes.
#[track_caller]
fn wait_for_writes() {
    let stat = format!("/sys/block/{}/stat", kernel_name(DEVICE));
    let writes = || -> u64 {
        // The fifth field, see Documentation/block/stat.rst of the kernel.
        let text = std::fs::read_to_string(&stat).unwrap();
        text.split_whitespace().nth(4).unwrap().parse().unwrap()
    };
    let goal = writes() + WRITES;
    wait_until("the device to complete writes", || writes() >= goal);
}

#[test]
fn a_device_of_a_proxy_outlives_its_server() {
    on_host(|| {
        let host = Host::installed();
        host.configure_disk();
        let upstream = format!("TO=nbd://127.0.0.1:{PORT}\n");
        host.configure("far", &format!("{upstream}ADDR=/run/flexnbd/far.nbd\n"));
        ok("modprobe nbd");
        let log = KernelLog::from_now();
        host.systemctl(&format!("start {ATTACH}"));
        ok(&format!("mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt"));
        let words = "--directory=/mnt --ioengine=libaio --iodepth=16 --direct=1 --bsrange=4k-64k \
            --size=32m --fsync=128 --verify_backlog=64";
        let mut fio = Fio::start(words.split_whitespace());
        for _ in 0..KILLS {
            wait_for_writes();
            let before = host.pid(DISK);
            host.systemctl(&format!("kill --signal=KILL {DISK}"));
            wait_until("another process", || ![0, before].contains(&host.pid(DISK)));
            fio.assert_running();
        }
        wait_for_writes();
        host.systemctl(&format!("restart {PROXY} {DISK}"));
        wait_for_writes();
        let before = [DISK, PROXY].map(|unit| host.pid(unit));
        host.install(package::NEXT);
        let after = [DISK, PROXY].map(|unit| host.pid(unit));
        assert!(before[0] != after[0] && before[1] != after[1], "{before:?} {after:?}");
        wait_for_writes();
        report(&fio.stop());
        ok(&format!("umount /mnt && e2fsck -fn {DEVICE}"));
        host.systemctl(&format!("stop {ATTACH}"));
        log.assert_no_error();
    });
}

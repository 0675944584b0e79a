//! A file system on the kernel's client, which is attached to a proxy: its server is killed, moves to
//! another host, or cannot be reached for half a minute.

use crate::machine::{KernelLog, ok};
use crate::nbd_device::{DEVICE, NbdDevice};
use crate::session::with_kernel;
use harness::fio::Fio;
use harness::host::{Host, MIRROR_STARTED};
use harness::nested::report;
use harness::{Builder, Endpoint, MIB, Server, TempDir, sparse_file, temp_dir};
use std::thread;
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
/// The kernel drops a connection that does not answer for 30 s if there are several, and waits for ever if
/// there is one (`nbd_xmit_timeout`).
const CONNECTIONS: u32 = 1;
const BLOCK_SIZE: u32 = 4096;
/// Writes between two events, so that requests are in flight at each.
const WRITES: u64 = 50;
const KILLS: usize = 6;
/// How long the link is cut: about as long as a silent server does not count as lost.
const CUT: Duration = Duration::from_secs(30);

/// An ext4 file system under fio, on the kernel's client, on a proxy of two hosts.
struct MountedProxy {
    hosts: [Host; 2],
    proxy: Server,
    device: NbdDevice,
    fio: Fio,
    log: KernelLog,
    _dir: TempDir,
}

impl MountedProxy {
    /// Serves the disk on the first host, and starts everything.
    fn start() -> (MountedProxy, Server) {
        let dir = temp_dir();
        let hosts = ["a", "b"].map(|name| Host::new(dir.path(), name));
        hosts.iter().for_each(|host| sparse_file(&host.image, SIZE));
        let serving = hosts[0].serve();
        let to = hosts.each_ref().map(|host| Endpoint::Tcp(host.address).uri());
        let proxy = Builder::proxy().unix(&dir.path().join("proxy.sock"));
        let proxy = proxy.args(["--quiet", "--to", &to[0], "--to", &to[1]]).start();
        let log = KernelLog::from_now();
        let device = NbdDevice::attach(proxy.endpoint(), CONNECTIONS, BLOCK_SIZE);
        ok(&format!("mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt"));
        let words = "--directory=/mnt --ioengine=libaio --iodepth=16 --direct=1 --bsrange=4k-64k \
            --size=16m --fsync=128 --verify_backlog=64";
        let fio = Fio::start(words.split_whitespace());
        (MountedProxy { hosts, proxy, device, fio, log, _dir: dir }, serving)
    }

    /// Nothing has failed: fio's data, the file system and the kernel's log are without errors.
    fn finish(self) {
        self.device.wait_for_writes(WRITES);
        report(&self.fio.stop());
        ok(&format!("umount /mnt && e2fsck -fn {DEVICE}"));
        self.device.detach();
        self.log.assert_no_error();
        drop(self.proxy);
    }
}

#[test]
fn a_mounted_file_system_outlives_killed_servers() {
    with_kernel(|| {
        let (mut mounted, mut serving) = MountedProxy::start();
        for _ in 0..KILLS {
            mounted.device.wait_for_writes(WRITES);
            // With SIGKILL.
            drop(serving);
            serving = mounted.hosts[0].serve();
            mounted.fio.assert_running();
        }
        mounted.finish();
    });
}

#[test]
fn a_mounted_file_system_outlives_a_migration_over_a_slow_link() {
    with_kernel(|| {
        let (mounted, mut serving) = MountedProxy::start();
        ok("tc qdisc add dev lo root netem delay 20ms loss 1%");
        mounted.device.wait_for_writes(WRITES);
        let [from, to] = &mounted.hosts;
        let mut listening = to.listen();
        assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        let _serving = to.serve();
        mounted.device.wait_for_writes(WRITES);
        ok("tc qdisc delete dev lo root");
        mounted.finish();
    });
}

#[test]
fn a_mounted_file_system_outlives_half_a_minute_without_a_link() {
    with_kernel(|| {
        let (mounted, _serving) = MountedProxy::start();
        mounted.device.wait_for_writes(WRITES);
        ok("tc qdisc add dev lo root netem loss 100%");
        // The length of the cut is the subject, not a wait for an event.
        thread::sleep(CUT);
        ok("tc qdisc delete dev lo root");
        mounted.finish();
    });
}

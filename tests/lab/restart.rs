//! Restarts and upgrades while clients work: nobody is disconnected, refused, or told a lie.
//! Never accepts a client that came back by itself: connections are those of the beginning.

use crate::host::{DISK, Host};
use crate::knock::Knocker;
use crate::others::{Fio, Libnbd, Qemu};
use crate::package;
use crate::session::{in_lab, tell};
use crate::steady::{Halfway, Steady, wait_for_answers};
use harness::session::{MODES, Mode, Request};
use harness::{Endpoint, MIB, env_number, wait_until};
use std::time::Duration;

/// How often the service is restarted, unless the environment says otherwise.
const RESTARTS: u64 = 20;
/// The unix socket that the instance has besides.
const UNIX: &str = "/run/flexnbd/disk.nbd.sock";
/// What each client has to itself, in bytes. The first 128 MiB are fio's.
const PART: u64 = 4 * MIB;
const SIZE: u64 = 256 * MIB;
const LIBNBD_PART: u64 = 200 * MIB;
const HALFWAY_PART: u64 = 220 * MIB;
/// The length of a write that is sent in two halves.
const HALFWAY_LENGTH: usize = 64 << 10;
/// How many more requests each client gets answered before the next restart.
const BETWEEN: u64 = 30;

/// Everybody at once.
struct Load {
    steady: Vec<Steady>,
    knockers: Vec<(&'static str, Knocker)>,
    fio: Fio,
    libnbd: Libnbd,
    /// Must outlive the client behind it.
    qemu: Qemu,
    doors: [Endpoint; 3],
}

impl Load {
    /// Our own clients in each reply style by TCP and by unix socket and one behind QEMU, fio on
    /// four connections, libnbd, and three that connect in a loop.
    #[track_caller]
    fn start(host: &Host) -> Load {
        let doors = [host.nbd(), host.nbd6(), Endpoint::Unix(host.path(UNIX))];
        let qemu = Qemu::between(&doors[0]);
        let part = |n: u64| 128 * MIB + n * PART..128 * MIB + (n + 1) * PART;
        let ways = [&doors[0], &doors[2]].into_iter().flat_map(|d| MODES.map(|mode| (d, mode)));
        let mut steady: Vec<Steady> =
            ways.zip(0..).map(|((door, mode), n)| Steady::start(door, mode, part(n))).collect();
        steady.push(Steady::start(&qemu.endpoint(), Mode::Structured, part(6)));
        let names = ["IPv4", "IPv6", "a unix socket"];
        let knockers = names.into_iter().zip(doors.each_ref().map(Knocker::start)).collect();
        let (fio, libnbd) = (Fio::start(&doors[0]), Libnbd::start(&doors[0], LIBNBD_PART));
        Load { steady, knockers, fio, libnbd, qemu, doors }
    }

    /// Waits until everybody has been served anew.
    #[track_caller]
    fn assert_in_sync(&self) {
        let before: Vec<_> = self.knockers.iter().map(|(_, knocker)| knocker.served()).collect();
        wait_for_answers(&self.steady, BETWEEN);
        for ((name, knocker), before) in self.knockers.iter().zip(before) {
            wait_until(&format!("a new connection by {name}"), || knocker.served() > before + 1);
        }
    }

    /// Writes of which so much has been sent, in each style and over each kind of socket.
    #[track_caller]
    fn halfway(&self, round: usize) -> Vec<Halfway> {
        let header = |mode| if mode == Mode::Extended { 32 } else { 28 };
        let doors = [&self.doors[0], &self.doors[2]];
        let ways = doors.into_iter().flat_map(|door| MODES.map(|mode| (door, mode)));
        let begin = |(n, (door, mode)): (usize, (&Endpoint, Mode))| {
            let data = harness::noise(HALFWAY_LENGTH, (round * 10 + n) as u64);
            let request = Request::write(HALFWAY_PART + (n * HALFWAY_LENGTH) as u64, &data);
            let whole = header(mode) + HALFWAY_LENGTH;
            let sent = [0, 1, header(mode) - 1, header(mode), whole / 2, whole - 1];
            Halfway::begin(door, mode, request, sent[(round + n) % sent.len()])
        };
        ways.enumerate().map(begin).collect()
    }

    /// Ends everybody; fails when anybody saw anything.
    #[track_caller]
    fn stop(self, what: &str) {
        let ended: Vec<_> = self.steady.into_iter().map(Steady::stop).collect();
        tell(&self.fio.stop());
        tell(&self.libnbd.stop());
        drop(self.qemu);
        let mut slowest = Duration::ZERO;
        for (name, knocker) in self.knockers {
            let knocks = knocker.stop();
            let bad = (knocks.refused, &knocks.failed[..]);
            assert_eq!(bad, (0, &[][..]), "connections by {name}, {} went well", knocks.served);
            slowest = slowest.max(knocks.worst);
        }
        let answers: u64 = ended.iter().map(|e| e.answers).sum();
        let stall = ended.iter().map(|e| e.worst_stall).max().unwrap();
        tell(&format!(
            "{what}: {answers} answers, the worst stall {stall:?}, the slowest new connection {slowest:?}"
        ));
    }
}

/// A host with everything that [`Load`] needs.
fn host() -> Host {
    let host = Host::installed("a");
    host.write(
        "/etc/systemd/system/flexnbd@disk.socket.d/unix.conf",
        &format!("[Socket]\nListenStream={UNIX}\n"),
    );
    host.configure_disk(SIZE);
    host.systemctl(&format!("enable --now {DISK}"));
    host
}

/// Nothing at all may have gone wrong.
#[track_caller]
fn assert_no_warnings(host: &Host) {
    let entries = host.journal(&format!("--unit={DISK} --priority=warning"));
    let texts: Vec<_> = entries.iter().map(|e| crate::host::field(e, "MESSAGE")).collect();
    assert!(texts.is_empty(), "warnings: {texts:#?}");
}

#[test]
fn no_client_notices_a_restart() {
    in_lab(|| {
        let host = host();
        let load = Load::start(&host);
        load.assert_in_sync();
        for round in 0..env_number("FLEXNBD_LAB_RESTARTS").unwrap_or(RESTARTS) {
            let before = host.pid(DISK);
            let halves = load.halfway(round as usize);
            host.systemctl(&format!("restart {DISK}"));
            assert_ne!(host.pid(DISK), before, "another process serves now");
            halves.into_iter().for_each(Halfway::finish);
            load.assert_in_sync();
        }
        load.stop("restarts");
        assert_no_warnings(&host);
    });
}

#[test]
fn no_client_notices_an_upgrade_of_the_package() {
    in_lab(|| {
        let host = host();
        let load = Load::start(&host);
        load.assert_in_sync();
        for (round, deb) in [package::next(), package::current()].iter().enumerate() {
            let before = host.pid(DISK);
            let halves = load.halfway(round);
            host.install(deb);
            let version = host.ok("dpkg-query --show --showformat='${Version}' flexnbd");
            assert!(version.ends_with(if round == 0 { "-2" } else { "-1" }), "{version}");
            assert_ne!(host.pid(DISK), before, "another process serves now");
            halves.into_iter().for_each(Halfway::finish);
            load.assert_in_sync();
        }
        load.stop("upgrades");
        assert_no_warnings(&host);
    });
}

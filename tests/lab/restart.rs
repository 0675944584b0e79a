//! Restarts and upgrades under load: no client is disconnected or refused, or reads wrong data.
//! The clients never reconnect, except QEMU and those that connect in a loop.

use crate::connect::Reconnector;
use crate::host::{DISK, Host};
use crate::package;
use crate::session::{in_lab, report};
use crate::third_party::{Libnbd, Qemu, start_fio};
use crate::verifier::{PartialWrite, Verifier, wait_for_replies};
use harness::fio::Fio;
use harness::session::{MODES, Mode, Request};
use harness::{Endpoint, MIB, env_number, wait_until};
use std::time::Duration;

/// The default number of restarts.
const RESTARTS: u64 = 20;
/// An additional unix socket of the instance.
const UNIX: &str = "/run/flexnbd/disk.nbd.sock";
/// The size of each client's part of the disk, in bytes, after fio's 128 MiB.
const PART: u64 = 4 * MIB;
const SIZE: u64 = 256 * MIB;
const LIBNBD_OFFSET: u64 = 200 * MIB;
const PARTIAL_WRITES_OFFSET: u64 = 220 * MIB;
/// The payload length of a write that is sent in two parts.
const PARTIAL_WRITE_LENGTH: usize = 64 << 10;
/// The number of replies to each client before the next restart.
const REPLIES_BETWEEN_RESTARTS: u64 = 30;

/// All clients.
struct Load {
    steady: Vec<Verifier>,
    reconnectors: Vec<(&'static str, Reconnector)>,
    fio: Fio,
    libnbd: Libnbd,
    /// Outlives the client behind it.
    qemu: Qemu,
    endpoints: [Endpoint; 3],
}

impl Load {
    /// Starts our clients in each reply mode over TCP and over a unix socket, one behind QEMU, fio
    /// with four connections, libnbd, and three clients that connect in a loop.
    #[track_caller]
    fn start(host: &Host) -> Load {
        let endpoints = [host.nbd(), host.nbd6(), Endpoint::Unix(host.path(UNIX))];
        let qemu = Qemu::between(&endpoints[0]);
        let part = |n: u64| 128 * MIB + n * PART..128 * MIB + (n + 1) * PART;
        let ways =
            [&endpoints[0], &endpoints[2]].into_iter().flat_map(|d| MODES.map(|mode| (d, mode)));
        let mut steady: Vec<Verifier> = ways
            .zip(0..)
            .map(|((endpoint, mode), n)| Verifier::start(endpoint, mode, part(n)))
            .collect();
        steady.push(Verifier::start(&qemu.endpoint(), Mode::Structured, part(6)));
        let names = ["IPv4", "IPv6", "a unix socket"];
        let reconnectors =
            names.into_iter().zip(endpoints.each_ref().map(Reconnector::start)).collect();
        let (fio, libnbd) = (start_fio(&endpoints[0]), Libnbd::start(&endpoints[0], LIBNBD_OFFSET));
        Load { steady, reconnectors, fio, libnbd, qemu, endpoints }
    }

    /// Waits until every client has received more replies.
    #[track_caller]
    fn wait_for_progress(&self) {
        let before: Vec<_> =
            self.reconnectors.iter().map(|(_, reconnector)| reconnector.served()).collect();
        wait_for_replies(&self.steady, REPLIES_BETWEEN_RESTARTS);
        for ((name, reconnector), before) in self.reconnectors.iter().zip(before) {
            wait_until(&format!("a new connection by {name}"), || {
                reconnector.served() > before + 1
            });
        }
    }

    /// Sends a part of a write in each reply mode over each kind of socket; `round` selects its
    /// length.
    #[track_caller]
    fn begin_partial_writes(&self, round: usize) -> Vec<PartialWrite> {
        let header = |mode| if mode == Mode::Extended { 32 } else { 28 };
        let endpoints = [&self.endpoints[0], &self.endpoints[2]];
        let ways = endpoints.into_iter().flat_map(|endpoint| MODES.map(|mode| (endpoint, mode)));
        let begin = |(n, (endpoint, mode)): (usize, (&Endpoint, Mode))| {
            let data = harness::noise(PARTIAL_WRITE_LENGTH, (round * 10 + n) as u64);
            let request =
                Request::write(PARTIAL_WRITES_OFFSET + (n * PARTIAL_WRITE_LENGTH) as u64, &data);
            let whole = header(mode) + PARTIAL_WRITE_LENGTH;
            let sent = [0, 1, header(mode) - 1, header(mode), whole / 2, whole - 1];
            PartialWrite::begin(endpoint, mode, request, sent[(round + n) % sent.len()])
        };
        ways.enumerate().map(begin).collect()
    }

    /// Stops all clients; fails if one of them has seen an error.
    #[track_caller]
    fn stop(self, what: &str) {
        let summaries: Vec<_> = self.steady.into_iter().map(Verifier::stop).collect();
        report(&self.fio.stop());
        report(&self.libnbd.stop());
        drop(self.qemu);
        let mut slowest = Duration::ZERO;
        for (name, reconnector) in self.reconnectors {
            let connections = reconnector.stop();
            let bad = (connections.refused, &connections.failed[..]);
            assert_eq!(
                bad,
                (0, &[][..]),
                "failed connections by {name}; {} succeeded",
                connections.served
            );
            slowest = slowest.max(connections.worst);
        }
        let replies: u64 = summaries.iter().map(|e| e.replies).sum();
        let stall = summaries.iter().map(|e| e.worst_stall).max().unwrap();
        report(&format!(
            "{what}: {replies} replies, longest stall {stall:?}, slowest new connection {slowest:?}"
        ));
    }
}

/// A host with the sockets that [`Load`] uses.
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

/// Fails if the service has logged a warning or an error.
#[track_caller]
fn assert_no_warnings(host: &Host) {
    let entries = host.journal(&format!("--unit={DISK} --priority=warning"));
    let texts: Vec<_> = entries.iter().map(|e| crate::host::field(e, "MESSAGE")).collect();
    assert!(texts.is_empty(), "warnings: {texts:#?}");
}

#[test]
fn restarts_are_invisible_to_clients() {
    in_lab(|| {
        let host = host();
        let load = Load::start(&host);
        load.wait_for_progress();
        for round in 0..env_number("FLEXNBD_LAB_RESTARTS").unwrap_or(RESTARTS) {
            let before = host.pid(DISK);
            let partial_writes = load.begin_partial_writes(round as usize);
            host.systemctl(&format!("restart {DISK}"));
            assert_ne!(host.pid(DISK), before, "another process serves now");
            partial_writes.into_iter().for_each(PartialWrite::finish);
            load.wait_for_progress();
        }
        load.stop("restarts");
        assert_no_warnings(&host);
    });
}

#[test]
fn package_upgrades_are_invisible_to_clients() {
    in_lab(|| {
        let host = host();
        let load = Load::start(&host);
        load.wait_for_progress();
        for (round, deb) in [package::next(), package::current()].iter().enumerate() {
            let before = host.pid(DISK);
            let partial_writes = load.begin_partial_writes(round);
            host.install(deb);
            let version = host.ok("dpkg-query --show --showformat='${Version}' flexnbd");
            assert!(version.ends_with(if round == 0 { "-2" } else { "-1" }), "{version}");
            assert_ne!(host.pid(DISK), before, "another process serves now");
            partial_writes.into_iter().for_each(PartialWrite::finish);
            load.wait_for_progress();
        }
        load.stop("upgrades");
        assert_no_warnings(&host);
    });
}

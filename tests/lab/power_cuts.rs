//! Power cuts at the source, the destination or both, in each phase of a migration: afterwards one
//! host owns the disk, which holds every flushed write. Failover clients, which try both hosts,
//! never find the disk at both; the hosts share a configuration without an access control list.
//! `lab.sh cut` defines what a cut does.

use crate::connect::{Probe, probe, serves};
use crate::host::{DISK, Frozen, Host, IMAGE, LISTEN, PORT};
use crate::migration::{half_full, ownership, send, two_hosts, wait_for_arrival};
use crate::session::{in_lab, report};
use crate::verifier::{Crash, Model, Verifier};
use fastrand::Rng;
use harness::clients::{ClientOptions, Clients, Durable, Expected, Role};
use harness::session::Mode;
use harness::{Endpoint, MIB, env_number, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ops::Range;
use std::thread;
use std::time::Duration;

const SIZE: u64 = 64 * MIB;
/// The part of the disk, in bytes, of the client that stays at one host until that host fails.
const PART: u64 = 16 * MIB;
/// The part of the failover clients, in bytes.
const FAILOVER_PART: Range<u64> = PART..PART + 4 * MIB;
/// A speed limit at which a copy outlasts every step of a test.
const SLOW: &str = "--max-speed 2M";
const CONFIGURATION: &str = "/etc/flexnbd/disk.conf";
/// Replies after which failover clients count as connected to the disk.
const CONNECTED_REPLIES: u64 = 100;
/// The time without a reply after which a client gives its connection up.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);
/// Deadline for the arrival of the disk, including all timeouts on the way.
const ARRIVAL_TIMEOUT: Duration = Duration::from_secs(120);
/// The approximate duration of a copy at full speed.
const COPY_DURATION: Duration = Duration::from_millis(400);
/// The first seed of cuts at random moments, and their number for each host.
const SEED: u64 = 1;
const CUTS: u64 = 1;

/// The host that loses power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
}

use Victim::{Destination, Source};

/// Two hosts, a client that sometimes flushes, and failover clients that try both hosts.
struct Setup {
    a: Host,
    b: Host,
    client: Option<Verifier>,
    model: Model,
    failover_clients: Clients,
}

impl Setup {
    /// Starts with `a` serving.
    #[track_caller]
    fn new() -> Setup {
        let expected = Expected::stamped(FAILOVER_PART);
        let (a, b) = two_hosts(SIZE, |image, size| {
            half_full(image, size);
            expected.stamp(image);
        });
        // An empty image without a record could be served; `listen` creates one with a record.
        b.ok(&format!("rm {IMAGE} && chown flexnbd: /srv && echo CREATE={SIZE} >>{CONFIGURATION}"));
        for host in [&a, &b] {
            // A host without power closes no connection; short keepalives shorten the test.
            host.write(
                "/etc/systemd/system/flexnbd@disk.socket.d/keepalive.conf",
                "[Socket]\nKeepAliveTimeSec=2s\nKeepAliveIntervalSec=1s\n",
            );
            for unit in [DISK, LISTEN] {
                host.write(
                    &format!("/etc/systemd/system/{unit}.d/limit.conf"),
                    "[Service]\nEnvironment=FLEXNBD_MS_REQUEST_LIMIT_SECS=4\n",
                );
            }
            host.systemctl("daemon-reload");
        }
        a.systemctl(&format!("stop flexnbd@disk.socket {DISK}"));
        a.systemctl(&format!("start {DISK}"));
        let failover_clients = start_failover_clients(&a, &b, &expected);
        Setup { a, b, client: None, model: Model::of(0..PART), failover_clients }
    }

    /// Starts the client at the source, and a migration from there.
    #[track_caller]
    fn send(&mut self, options: &str) {
        let here = self.a.nbd();
        self.start_client(&here);
        send(&self.a, &self.b, options);
    }

    /// Starts the client at `target`, continuing with its model.
    #[track_caller]
    fn start_client(&mut self, target: &Endpoint) {
        let model = self.model.clone();
        let client = Verifier::start_with_timeout(target, Mode::Structured, model, REPLY_TIMEOUT);
        client.wait_for_replies(500);
        self.client = Some(client);
    }

    /// Waits until the client, if it runs, has lost its connection; keeps its model.
    #[track_caller]
    fn wait_for_client_loss(&mut self) {
        if let Some(client) = self.client.take() {
            self.model = client.wait_for_loss().model;
        }
    }

    /// Cuts the power of `victims`, calls `meanwhile`, and boots them again.
    #[track_caller]
    fn cut(&mut self, victims: &[Victim], meanwhile: impl FnOnce()) {
        let hosts: Vec<&Host> = victims.iter().map(|victim| self.host(*victim)).collect();
        hosts.iter().for_each(|host| host.cut());
        meanwhile();
        hosts.iter().for_each(|host| host.boot());
        if victims.contains(&Source) {
            self.wait_for_client_loss();
        }
    }

    fn host(&self, victim: Victim) -> &Host {
        if victim == Source { &self.a } else { &self.b }
    }

    /// Does what an operator does until the disk has arrived. Fails if both hosts serve it.
    #[track_caller]
    fn drive_to_arrival(&mut self) {
        if ownership(&self.b) != "ours" && self.b.state(LISTEN) != "active" {
            self.b.systemctl(&format!("start {LISTEN}"));
        }
        let mut there = false;
        let arrived = poll_until(ARRIVAL_TIMEOUT, || {
            assert_eq!(self.failover_clients.violation(), None);
            let here = probe(&self.a.nbd()) == Probe::Greeted;
            assert!(!(there && here && serves(&self.a.nbd())), "both hosts serve the disk");
            there |= self.b.state(DISK) == "active" && probe(&self.b.nbd()) == Probe::Greeted;
            if here && !there {
                self.speed_up_or_retry();
            }
            there && !here
        });
        assert!(arrived, "the disk did not arrive in time");
    }

    /// Removes the speed limit of a running migration; starts one if the source only serves.
    #[track_caller]
    fn speed_up_or_retry(&mut self) {
        let status = self.a.disk_status("disk");
        match status.get("is_mirroring").map(String::as_str) {
            Some("true") => drop(self.a.sh("flexnbd mirror-speed --instance disk --max-speed 0")),
            Some("false") => {
                self.restart_lost_client();
                let place = format!("--addr {} --port {PORT}", self.b.ip4());
                // This fails while the destination still waits for the earlier migration; retried.
                let output = self.a.sh(&format!("flexnbd mirror --instance disk {place}"));
                println!("mirror: {output}");
            }
            _ => {}
        }
    }

    /// Starts the client again at the source if it lost its connection, after verifying its data.
    #[track_caller]
    fn restart_lost_client(&mut self) {
        if self.client.is_none() {
            let here = self.a.nbd();
            self.model.verify(&here, Crash::Power);
            self.start_client(&here);
        }
    }

    /// Completes the migration. Only the destination owns the disk then, with every write that had
    /// to survive. Returns the setup for a migration in the other direction.
    #[track_caller]
    fn verify(mut self) -> Setup {
        self.drive_to_arrival();
        self.wait_for_client_loss();
        self.model.verify(&self.b.nbd(), Crash::Power);
        assert_ne!(probe(&self.a.nbd()), Probe::Greeted);
        if ownership(&self.a) == "departing" {
            // The destination was unreachable when the source started.
            self.a.systemctl(&format!("restart {DISK}"));
        }
        assert_eq!(ownership(&self.a), "departed");
        assert_eq!(ownership(&self.b), "ours");
        let found = self.failover_clients.replies(Role::Destination);
        self.b.wait_for("clients to find the disk", || {
            self.failover_clients.replies(Role::Destination) > found + CONNECTED_REPLIES
        });
        assert_eq!(self.failover_clients.violation(), None);
        let expected = self.failover_clients.stop();
        assert_eq!(expected.missing_in(&self.b.path(IMAGE), Durable::Flushed), None);
        let failover_clients = start_failover_clients(&self.b, &self.a, &expected);
        Setup { a: self.b, b: self.a, client: None, model: self.model, failover_clients }
    }

    /// Runs a migration up to the moment when the source has recorded the handover and sent it to
    /// the destination, whose process is stopped.
    #[track_caller]
    fn run_to_handover(&mut self) -> Frozen {
        // Writes would block on the frozen file system as well.
        self.failover_clients.pause_writers();
        send(&self.a, &self.b, "--max-speed 32M");
        self.a.ok("fsfreeze --freeze /srv");
        let (source, destination) = (self.a.process(DISK), self.b.process(LISTEN));
        self.a.wait_for("the source to block on writing its record", || {
            let stage = self.a.disk_status("disk").remove("migration_stage");
            stage.is_some_and(|stage| stage != "copying") && waits_for_disk(source)
        });
        let frozen = Frozen::freeze(destination);
        self.a.ok("fsfreeze --unfreeze /srv");
        self.failover_clients.resume_writers();
        self.b.wait_for("the handover in the socket buffer", || has_unread_bytes(destination));
        assert_eq!(ownership(&self.a), "departing");
        frozen
    }
}

/// Starts clients that follow the disk from one host to the other.
fn start_failover_clients(from: &Host, to: &Host, expected: &Expected) -> Clients {
    let manner = ClientOptions { durable: Durable::Flushed, may_fail: false, seed: SEED };
    Clients::start([from.nbd(), to.nbd()], expected, manner)
}

/// Whether a thread of the process is in uninterruptible sleep (state D), waiting for its disk.
fn waits_for_disk(process: Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let stat = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("stat")).ok();
    threads.filter_map(stat).any(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('D'))
}

/// Whether an established TCP connection in the network namespace of the process has bytes in its
/// receive queue.
fn has_unread_bytes(process: Pid) -> bool {
    let unread = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields[3] == "01" && fields[4].split_once(':').unwrap().1 != "00000000"
    };
    ["tcp", "tcp6"].iter().any(|table| {
        let table = std::fs::read_to_string(format!("/proc/{process}/net/{table}")).unwrap();
        table.lines().skip(1).any(unread)
    })
}

fn cut_before_copy(victim: Victim) {
    let mut setup = Setup::new();
    let here = setup.a.nbd();
    setup.start_client(&here);
    setup.b.systemctl(&format!("start {LISTEN}"));
    setup.cut(&[victim], || ());
    setup.verify();
}

fn cut_during_copy(victims: &[Victim]) {
    let mut setup = Setup::new();
    setup.send(SLOW);
    setup.b.wait_for("the copy to begin", || ownership(&setup.b) == "incoming");
    setup.cut(victims, || ());
    setup.verify();
}

/// The source has sent the handover, which the destination has not received.
fn cut_during_handover(victim: Victim) {
    let mut setup = Setup::new();
    let destination = setup.run_to_handover();
    setup.cut(&[victim], || destination.thaw());
    setup.verify();
}

/// The destination owns the disk, and the source has not received the confirmation.
fn cut_after_takeover(victim: Victim) {
    let mut setup = Setup::new();
    let destination = setup.run_to_handover();
    let source = Frozen::freeze(setup.a.process(DISK));
    destination.thaw();
    setup.b.wait_for("ownership of the disk", || ownership(&setup.b) == "ours");
    setup.cut(&[victim], || source.thaw());
    setup.verify();
}

fn cut_after_arrival(victim: Victim) {
    let mut setup = Setup::new();
    setup.send("");
    wait_for_arrival(&setup.a, &setup.b);
    setup.wait_for_client_loss();
    setup.cut(&[victim], || ());
    setup.verify();
}

/// At random moments, one for each seed.
fn cut_at_random_moments(victim: Victim) {
    let first = env_number("FLEXNBD_LAB_SEED").unwrap_or(SEED);
    let mut setup = Setup::new();
    for seed in first..first + env_number("FLEXNBD_LAB_CUTS").unwrap_or(CUTS) {
        let delay = COPY_DURATION * Rng::with_seed(seed).u64(..1000) as u32 / 1000;
        setup.send("");
        thread::sleep(delay);
        let stage = setup.a.disk_status("disk").remove("migration_stage");
        report(&format!("seed {seed}: cut after {delay:?} in stage {stage:?}"));
        setup.cut(&[victim], || ());
        // The next round migrates in the other direction.
        setup = setup.verify();
    }
}

#[test]
fn a_power_cut_loses_only_unsynced_data() {
    in_lab(|| {
        let host = Host::up("a");
        host.ok("echo kept >/srv/kept && sync /srv/kept && sync -f /srv");
        host.ok("echo lost >/srv/lost; echo lost >>/srv/kept");
        host.cut();
        host.boot();
        assert_eq!(
            host.ok("cat /srv/kept; ls /srv").lines().collect::<Vec<_>>(),
            ["kept", "kept", "lost+found"]
        );
    });
}

#[test]
fn a_killed_receiver_restarts_beside_failover_clients() {
    in_lab(|| {
        let mut setup = Setup::new();
        setup.send(SLOW);
        setup.b.wait_for("the copy to begin", || ownership(&setup.b) == "incoming");
        let before = setup.b.pid(LISTEN);
        kill(setup.b.process(LISTEN), Signal::SIGKILL).unwrap();
        setup.b.wait_for("another receiver", || {
            let now = setup.b.pid(LISTEN);
            now != 0 && now != before
        });
        setup.verify();
    });
}

#[test]
fn the_destination_loses_power_before_the_copy() {
    in_lab(|| cut_before_copy(Destination));
}

#[test]
fn the_source_loses_power_before_the_copy() {
    in_lab(|| cut_before_copy(Source));
}

#[test]
fn the_destination_loses_power_during_the_copy() {
    in_lab(|| cut_during_copy(&[Destination]));
}

#[test]
fn the_source_loses_power_during_the_copy() {
    in_lab(|| cut_during_copy(&[Source]));
}

#[test]
fn both_lose_power_during_the_copy() {
    in_lab(|| cut_during_copy(&[Source, Destination]));
}

#[test]
fn the_destination_loses_power_during_the_handover() {
    in_lab(|| cut_during_handover(Destination));
}

#[test]
fn the_source_loses_power_during_the_handover() {
    in_lab(|| cut_during_handover(Source));
}

#[test]
fn the_destination_loses_power_before_confirming_ownership() {
    in_lab(|| cut_after_takeover(Destination));
}

#[test]
fn the_source_loses_power_before_the_confirmation() {
    in_lab(|| cut_after_takeover(Source));
}

#[test]
fn the_destination_loses_power_after_arrival() {
    in_lab(|| cut_after_arrival(Destination));
}

#[test]
fn the_source_loses_power_after_departure() {
    in_lab(|| cut_after_arrival(Source));
}

#[test]
fn the_destination_loses_power_at_random_moments() {
    in_lab(|| cut_at_random_moments(Destination));
}

#[test]
fn the_source_loses_power_at_random_moments() {
    in_lab(|| cut_at_random_moments(Source));
}

//! The power fails, here or there, in each phase of a migration: afterwards one host has the disk,
//! and in it is every write that was flushed. Clients that look for the disk at both hosts, which
//! have the same configuration and no access control list, never find it at two.
//! Never cuts anything gently: see `lab.sh cut`.

use crate::host::{DISK, Frozen, Host, IMAGE, LISTEN, PORT};
use crate::knock::{Turned, try_door};
use crate::moving::{half_full, ownership, send, two_hosts, wait_for_arrival};
use crate::session::{in_lab, tell};
use crate::steady::{Calamity, Memory, Steady};
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
/// What the client writes that stays at one host until that fails.
const PART: u64 = 16 * MIB;
/// What those write that look for the disk at both.
const SEEKERS_PART: Range<u64> = PART..PART + 4 * MIB;
/// A copy that takes longer than anything the test does meanwhile.
const SLOWLY: &str = "--max-speed 2M";
const CONFIGURATION: &str = "/etc/flexnbd/disk.conf";
/// Answers by which those who look for the disk are seen to have found it.
const SEEKERS_ANSWERS: u64 = 100;
/// When a client counts a silent server as lost.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it may take until the disk is at its destination, with all the waiting for timeouts.
const CONVERGENCE: Duration = Duration::from_secs(120);
/// Within this time from its beginning a copy at full speed has come to its end, or nearly so.
const WHOLE_COPY: Duration = Duration::from_millis(400);
/// The seed of the cuts at a moment left to chance, and how many there are for each host.
const SEED: u64 = 1;
const CUTS: u64 = 1;

/// Whose power fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
}

use Victim::{Destination, Source};

/// Two hosts, a client that flushes now and then, and clients that look for the disk at both.
struct World {
    a: Host,
    b: Host,
    client: Option<Steady>,
    memory: Memory,
    seekers: Clients,
}

impl World {
    /// `a` serves.
    #[track_caller]
    fn new() -> World {
        let expected = Expected::stamped(SEEKERS_PART);
        let (a, b) = two_hosts(SIZE, |image, size| {
            half_full(image, size);
            expected.stamp(image);
        });
        // An empty image without a record could be served: `listen` makes one with a record.
        b.ok(&format!("rm {IMAGE} && chown flexnbd: /srv && echo CREATE={SIZE} >>{CONFIGURATION}"));
        for host in [&a, &b] {
            // Whoever has lost power does not say so. This makes the test shorter.
            host.write(
                "/etc/systemd/system/flexnbd@disk.socket.d/keepalive.conf",
                "[Socket]\nKeepAliveTimeSec=2s\nKeepAliveIntervalSec=1s\n",
            );
            for unit in [DISK, LISTEN] {
                host.write(
                    &format!("/etc/systemd/system/{unit}.d/patience.conf"),
                    "[Service]\nEnvironment=FLEXNBD_MS_REQUEST_LIMIT_SECS=4\n",
                );
            }
            host.systemctl("daemon-reload");
        }
        a.systemctl(&format!("stop flexnbd@disk.socket {DISK}"));
        a.systemctl(&format!("start {DISK}"));
        let seekers = seek(&a, &b, &expected);
        World { a, b, client: None, memory: Memory::of(0..PART), seekers }
    }

    /// The client works at the source, and the disk begins to move from there.
    #[track_caller]
    fn send(&mut self, options: &str) {
        let here = self.a.nbd();
        self.work_at(&here);
        send(&self.a, &self.b, options);
    }

    /// The client goes on there with what it knows.
    #[track_caller]
    fn work_at(&mut self, target: &Endpoint) {
        let memory = self.memory.clone();
        let client = Steady::start_impatient(target, Mode::Structured, memory, PATIENCE);
        client.wait_for_answers(500);
        self.client = Some(client);
    }

    /// The client's connection is lost, sooner or later.
    #[track_caller]
    fn lose_client(&mut self) {
        if let Some(client) = self.client.take() {
            self.memory = client.lost().memory;
        }
    }

    /// Cuts the power of these, and gives it back after something else has happened.
    #[track_caller]
    fn cut(&mut self, victims: &[Victim], meanwhile: impl FnOnce()) {
        let hosts: Vec<&Host> = victims.iter().map(|victim| self.host(*victim)).collect();
        hosts.iter().for_each(|host| host.cut());
        meanwhile();
        hosts.iter().for_each(|host| host.boot());
        if victims.contains(&Source) {
            self.lose_client();
        }
    }

    fn host(&self, victim: Victim) -> &Host {
        if victim == Source { &self.a } else { &self.b }
    }

    /// What operators do until the disk is where it was to go. Fails when both hosts serve it.
    #[track_caller]
    fn bring_to_an_end(&mut self) {
        if ownership(&self.b) != "ours" && self.b.state(LISTEN) != "active" {
            self.b.systemctl(&format!("start {LISTEN}"));
        }
        let mut there = false;
        let arrived = poll_until(CONVERGENCE, || {
            assert_eq!(self.seekers.violation(), None);
            let here = try_door(&self.a.nbd()) == Turned::In;
            assert!(!(there && here), "both hosts serve the disk");
            there |= self.b.state(DISK) == "active" && try_door(&self.b.nbd()) == Turned::In;
            if here && !there {
                self.urge_source();
            }
            there && !here
        });
        assert!(arrived, "the disk does not arrive");
    }

    /// A source that serves and does not move its disk is told to; one that does, to hurry.
    #[track_caller]
    fn urge_source(&mut self) {
        let status = self.a.disk_status("disk");
        match status.get("is_mirroring").map(String::as_str) {
            Some("true") => drop(self.a.sh("flexnbd mirror-speed --instance disk --max-speed 0")),
            Some("false") => {
                self.client_comes_back();
                let place = format!("--addr {} --port {PORT}", self.b.ip4());
                // It may fail, and is then tried again: the destination still expects another.
                let said = self.a.sh(&format!("flexnbd mirror --instance disk {place}"));
                println!("mirror: {said}");
            }
            _ => {}
        }
    }

    /// A client that was lost finds the disk where it left it.
    #[track_caller]
    fn client_comes_back(&mut self) {
        if self.client.is_none() {
            let here = self.a.nbd();
            self.memory.verify(&here, Calamity::PowerCut);
            self.work_at(&here);
        }
    }

    /// The disk comes to the destination, and is nowhere else, with everything that had to survive.
    #[track_caller]
    fn verify(mut self) -> World {
        self.bring_to_an_end();
        self.lose_client();
        self.memory.verify(&self.b.nbd(), Calamity::PowerCut);
        assert_ne!(try_door(&self.a.nbd()), Turned::In);
        if ownership(&self.a) == "departing" {
            // It could not ask the destination when it started.
            self.a.systemctl(&format!("restart {DISK}"));
        }
        assert_eq!(ownership(&self.a), "departed");
        assert_eq!(ownership(&self.b), "ours");
        let found = self.seekers.replies(Role::Destination);
        self.b.wait_for("clients to find the disk", || {
            self.seekers.replies(Role::Destination) > found + SEEKERS_ANSWERS
        });
        assert_eq!(self.seekers.violation(), None);
        let expected = self.seekers.stop();
        assert_eq!(expected.missing_in(&self.b.path(IMAGE), Durable::Flushed), None);
        let seekers = seek(&self.b, &self.a, &expected);
        World { a: self.b, b: self.a, client: None, memory: self.memory, seekers }
    }

    /// A migration up to the moment when the source has recorded the handover and sent it to a
    /// destination that does not move any more.
    #[track_caller]
    fn hand_over(&mut self) -> Frozen {
        // Nobody writes: that would be held up as well.
        self.seekers.pause_writers();
        send(&self.a, &self.b, "--max-speed 32M");
        self.a.ok("fsfreeze --freeze /srv");
        let (source, destination) = (self.a.process(DISK), self.b.process(LISTEN));
        self.a.wait_for("the source to be about to write its record", || {
            let stage = self.a.disk_status("disk").remove("migration_stage");
            stage.is_some_and(|stage| stage != "copying") && waits_for_disk(source)
        });
        let there = Frozen::freeze(destination);
        self.a.ok("fsfreeze --unfreeze /srv");
        self.seekers.resume_writers();
        self.b.wait_for("the handover to be at its door", || has_unread_bytes(destination));
        assert_eq!(ownership(&self.a), "departing");
        there
    }
}

/// Clients of a disk that goes from one to the other, whatever happens to it on the way.
fn seek(from: &Host, to: &Host, expected: &Expected) -> Clients {
    let manner = ClientOptions { durable: Durable::Flushed, may_fail: false, seed: SEED };
    Clients::start([from.nbd(), to.nbd()], expected, manner)
}

/// Whether a thread of the process cannot go on for want of its disk.
fn waits_for_disk(process: Pid) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    let stat = |thread: std::fs::DirEntry| std::fs::read_to_string(thread.path().join("stat")).ok();
    threads.filter_map(stat).any(|stat| stat.rsplit_once(") ").unwrap().1.starts_with('D'))
}

/// Whether one of the host's TCP connections holds something that nobody has read yet.
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

fn before_the_copy(victim: Victim) {
    let mut world = World::new();
    let here = world.a.nbd();
    world.work_at(&here);
    world.b.systemctl(&format!("start {LISTEN}"));
    world.cut(&[victim], || ());
    world.verify();
}

fn in_the_copy(victims: &[Victim]) {
    let mut world = World::new();
    world.send(SLOWLY);
    world.b.wait_for("a copy that has begun", || ownership(&world.b) == "incoming");
    world.cut(victims, || ());
    world.verify();
}

/// The handover is on its way, and the destination has not taken it.
fn in_the_handover(victim: Victim) {
    let mut world = World::new();
    let there = world.hand_over();
    world.cut(&[victim], || there.thaw());
    world.verify();
}

/// The destination has taken the disk, and the source does not know.
fn after_the_handover(victim: Victim) {
    let mut world = World::new();
    let there = world.hand_over();
    let here = Frozen::freeze(world.a.process(DISK));
    there.thaw();
    world.b.wait_for("the disk to be its own", || ownership(&world.b) == "ours");
    world.cut(&[victim], || here.thaw());
    world.verify();
}

fn after_the_arrival(victim: Victim) {
    let mut world = World::new();
    world.send("");
    wait_for_arrival(&world.a, &world.b);
    world.lose_client();
    world.cut(&[victim], || ());
    world.verify();
}

/// At moments that nobody has chosen, one seed after the other.
fn at_any_moment(victim: Victim) {
    let first = env_number("FLEXNBD_LAB_SEED").unwrap_or(SEED);
    let mut world = World::new();
    for seed in first..first + env_number("FLEXNBD_LAB_CUTS").unwrap_or(CUTS) {
        let delay = WHOLE_COPY * Rng::with_seed(seed).u64(..1000) as u32 / 1000;
        world.send("");
        thread::sleep(delay);
        let stage = world.a.disk_status("disk").remove("migration_stage");
        tell(&format!("seed {seed}: after {delay:?}, in the stage {stage:?}"));
        world.cut(&[victim], || ());
        // And from there back in the next round.
        world = world.verify();
    }
}

#[test]
fn a_power_cut_loses_what_was_not_synced_and_nothing_else() {
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
fn a_killed_receiver_receives_again_beside_seeking_clients() {
    in_lab(|| {
        let mut world = World::new();
        world.send(SLOWLY);
        world.b.wait_for("a copy that has begun", || ownership(&world.b) == "incoming");
        let before = world.b.pid(LISTEN);
        kill(world.b.process(LISTEN), Signal::SIGKILL).unwrap();
        world.b.wait_for("another receiver", || {
            let now = world.b.pid(LISTEN);
            now != 0 && now != before
        });
        world.verify();
    });
}

#[test]
fn the_destination_loses_power_before_anything_came() {
    in_lab(|| before_the_copy(Destination));
}

#[test]
fn the_source_loses_power_before_the_copy() {
    in_lab(|| before_the_copy(Source));
}

#[test]
fn the_destination_loses_power_in_the_copy() {
    in_lab(|| in_the_copy(&[Destination]));
}

#[test]
fn the_source_loses_power_in_the_copy() {
    in_lab(|| in_the_copy(&[Source]));
}

#[test]
fn both_lose_power_in_the_copy() {
    in_lab(|| in_the_copy(&[Source, Destination]));
}

#[test]
fn the_destination_loses_power_in_the_handover() {
    in_lab(|| in_the_handover(Destination));
}

#[test]
fn the_source_loses_power_in_the_handover() {
    in_lab(|| in_the_handover(Source));
}

#[test]
fn the_destination_loses_power_when_the_source_does_not_know_that_it_has_the_disk() {
    in_lab(|| after_the_handover(Destination));
}

#[test]
fn the_source_loses_power_before_it_knows_that_the_destination_has_the_disk() {
    in_lab(|| after_the_handover(Source));
}

#[test]
fn the_destination_loses_power_when_it_has_the_disk() {
    in_lab(|| after_the_arrival(Destination));
}

#[test]
fn the_source_loses_power_when_it_has_no_disk_any_more() {
    in_lab(|| after_the_arrival(Source));
}

#[test]
fn the_destination_loses_power_at_any_moment() {
    in_lab(|| at_any_moment(Destination));
}

#[test]
fn the_source_loses_power_at_any_moment() {
    in_lab(|| at_any_moment(Source));
}

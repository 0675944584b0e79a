//! The two hosts, what lies between them, the dice, and the five invariants.

use super::Mutation;
use super::client::{Known, Writer};
use super::destination::{Destination, Process};
use super::medium::{Cell, Dice, Medium, Stamp};
use super::net::Net;
use super::source::{Role, Source};
use super::transitions::Transition;
use flexnbd::disk::ownership::Record;
use flexnbd::migration::job::Stage;
use std::collections::BTreeSet;
use std::time::Duration;

/// Turns in which things may go wrong, and turns to come to rest afterwards, at most.
const FAULTY_TURNS: u64 = 400;
const QUIET_TURNS: u64 = 20_000;

/// Turns without progress after which time passes although something might yet have come.
const IMPATIENT_TURNS: u64 = 15;

/// Turns without progress after which only the passing of time can help.
const IDLE_TURNS: u64 = 80;

/// Turns without progress after which everything is at rest.
const REST_TURNS: u64 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Source,
    Destination,
}

/// How often the schedules came through the rarer places.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) arrived: u64,
    pub(crate) kept: u64,
    pub(crate) handovers: u64,
    pub(crate) in_doubt: u64,
    pub(crate) handed_over_again: u64,
    pub(crate) resumed: u64,
    pub(crate) restarted: u64,
    pub(crate) retired: u64,
    pub(crate) asked_after_restart: u64,
    pub(crate) gate_busy: u64,
    pub(crate) thawed: u64,
    pub(crate) expired: u64,
    pub(crate) asked_beside: u64,
    pub(crate) data_blocks: u64,
    pub(crate) turns: u64,
}

impl Tally {
    fn counts(&mut self) -> [&mut u64; 15] {
        [
            &mut self.arrived,
            &mut self.kept,
            &mut self.handovers,
            &mut self.in_doubt,
            &mut self.handed_over_again,
            &mut self.resumed,
            &mut self.restarted,
            &mut self.retired,
            &mut self.asked_after_restart,
            &mut self.gate_busy,
            &mut self.thawed,
            &mut self.expired,
            &mut self.asked_beside,
            &mut self.data_blocks,
            &mut self.turns,
        ]
    }

    pub(crate) fn add(&mut self, other: &Self) {
        let mut other = Self { ..*other };
        for (sum, count) in self.counts().into_iter().zip(other.counts()) {
            *sum += *count;
        }
    }

    /// Schedules that never come to a place prove nothing about it.
    pub(crate) fn reaches_everything(&self) -> bool {
        let mut all = Self { ..*self };
        all.counts().iter().all(|count| **count > 0)
    }
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) dice: Dice,
    pub(crate) mutation: Mutation,
    pub(crate) verbose: bool,
    pub(crate) now: Duration,
    pub(crate) net: Net,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) writers: [Writer; 2],
    pub(crate) known: Vec<Known>,
    pub(crate) next_stamp: Stamp,
    pub(crate) writes_left: u64,
    pub(crate) migrations: u8,
    /// Things may go wrong.
    pub(crate) faulty: bool,
    /// The destination's disk carries nothing out.
    pub(crate) stalled: bool,
    /// What the source's image holds may lack writes that were not flushed.
    pub(crate) source_lost_power: bool,
    /// The destination has settled a handover.
    pub(crate) settled: bool,
    pub(crate) tally: Tally,
    /// The machine's transitions that its table lacks.
    pub(crate) unlisted: BTreeSet<Transition>,
    /// The destination knows FLUSH; that it must not depend on the source's is a point.
    pub(crate) flush: bool,
    /// One fault in so many turns.
    rough: u64,
}

impl World {
    pub(crate) fn new(seed: u64, mutation: Mutation) -> Self {
        let mut dice = Dice::new(seed);
        let count = 4 + dice.below(5);
        let stamps: Vec<Stamp> =
            (1..=count).map(|stamp| if dice.once_in(3) { 0 } else { stamp as Stamp }).collect();
        let old: Vec<Stamp> = (0..count).map(|_| 900 * dice.below(2) as Stamp).collect();
        let known = |&stamp| Known { acknowledged: stamp, perhaps: Vec::new() };
        let rough = [8, 25, 80, 250][dice.below(4) as usize];
        let writes_left = dice.below(80);
        Self {
            mutation,
            verbose: false,
            now: Duration::from_secs(1),
            net: Net { up: true, all: Vec::new() },
            known: stamps.iter().map(known).collect(),
            source: Source::new(Medium::new(stamps.into_iter())),
            destination: Destination::new(
                Medium::new(old.iter().copied()),
                Medium::new(old.iter().map(|_| 0)),
            ),
            writers: [Writer::Idle; 2],
            next_stamp: 1000,
            writes_left,
            migrations: 0,
            faulty: true,
            stalled: false,
            source_lost_power: false,
            settled: false,
            tally: Tally::default(),
            unlisted: BTreeSet::new(),
            rough,
            flush: !dice.once_in(4),
            dice,
        }
    }

    pub(crate) fn trace(&self, what: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>9.3} s  {}", self.now.as_secs_f64(), what());
        }
    }

    pub(crate) fn medium(&mut self, host: Host) -> &mut Medium {
        match host {
            Host::Source => &mut self.source.medium,
            Host::Destination => &mut self.destination.medium,
        }
    }

    /// The whole schedule.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        self.start_source();
        self.start_destination()?;
        let mut idle = 0;
        for _ in 0..FAULTY_TURNS {
            let rough = if self.is_parting() { self.rough.min(10) } else { self.rough };
            if self.dice.once_in(rough) {
                self.fault()?;
            }
            idle = if self.turn()? { 0 } else { idle + 1 };
            if idle > IMPATIENT_TURNS {
                self.pass_time();
                idle = 0;
            }
        }
        self.calm_down()?;
        for _ in 0..QUIET_TURNS {
            idle = if self.turn()? { 0 } else { idle + 1 };
            if idle > IDLE_TURNS {
                self.put_right_image();
                if !self.pass_time() && idle > REST_TURNS {
                    break;
                }
            }
            if self.destination_may_start() {
                self.start_destination()?;
            }
        }
        self.check_rest()
    }

    /// Where a fault tells most: from the last FLUSH until the source has left.
    fn is_parting(&self) -> bool {
        match &self.source.role {
            Role::Migrating(run) => {
                let stage = run.machine.progress(self.now).stage;
                matches!(stage, Stage::HandingOver | Stage::InDoubt | Stage::Leaving)
            }
            Role::Asking(_) => true,
            Role::Down => matches!(self.source.medium.record.now, Some(Record::Departing { .. })),
            Role::Serving | Role::Moved => false,
        }
    }

    /// One of all that can happen next; false when nothing came of it.
    fn turn(&mut self) -> Result<bool, String> {
        self.now += Duration::from_millis(1);
        self.tally.turns += 1;
        self.expire_gate();
        let progress = match self.dice.below(9) {
            0..=3 => self.source_turn()?,
            4..=6 => self.destination_turn()?,
            which => self.client_turn(which as usize - 7),
        };
        self.check_always()?;
        Ok(progress)
    }

    /// Jumps to when the source wants to be woken; false when it does not.
    fn pass_time(&mut self) -> bool {
        self.source_waits_until().is_some_and(|until| {
            self.now = self.now.max(until);
            true
        })
    }

    fn fault(&mut self) -> Result<(), String> {
        match self.dice.below(18) {
            0 => self.kill(Host::Source, false),
            1 => self.kill(Host::Source, true),
            2 => self.kill(Host::Destination, false),
            3 => self.kill(Host::Destination, true),
            4 | 5 if matches!(self.source.role, Role::Down) => self.start_source(),
            6 | 7 if self.destination_may_start() => self.start_destination()?,
            8 => self.net.up = !self.net.up,
            9 | 10 => self.cut(),
            11 => self.order(),
            12 if self.destination_may_start() && self.dice.once_in(2) => {
                self.swap_images();
                self.start_destination()?;
            }
            13 => self.notice_dead(),
            14 => {
                self.stalled = true;
                self.cut();
            }
            15 => self.stalled = !self.stalled,
            _ => {
                self.pass_time();
            }
        }
        Ok(())
    }

    fn kill(&mut self, host: Host, power: bool) {
        self.trace(|| format!("--- {host:?} killed, power {power}"));
        match host {
            Host::Source => self.kill_source(power),
            Host::Destination => self.kill_destination(power),
        }
    }

    fn cut(&mut self) {
        self.trace(|| "--- link cut".to_owned());
        for connection in self.net.all.iter_mut().filter(|connection| !connection.source_closed) {
            connection.cut(&mut self.dice);
        }
    }

    fn notice_dead(&mut self) {
        let dead = self.net.all.iter_mut().filter(|connection| connection.dead);
        dead.for_each(|connection| connection.noticed = true);
    }

    fn destination_may_start(&self) -> bool {
        matches!(self.destination.process, Process::Down)
    }

    /// From now on nothing goes wrong, and what was down comes up.
    fn calm_down(&mut self) -> Result<(), String> {
        self.trace(|| "--- nothing goes wrong any more".to_owned());
        self.faulty = false;
        self.stalled = false;
        self.net.up = true;
        self.notice_dead();
        self.put_right_image();
        if self.destination_may_start() {
            self.start_destination()?;
        }
        if matches!(self.source.role, Role::Down) {
            self.start_source();
        }
        Ok(())
    }

    // The invariants.

    /// Held after every turn.
    fn check_always(&self) -> Result<(), String> {
        if self.source_serves() && self.destination_serves() {
            return Err("(2) both hosts serve the disk".to_owned());
        }
        if self.source_is_owner() || self.destination_is_owner() {
            return Ok(());
        }
        Err(format!(
            "(3) no host holds a complete copy and says so: source {:?} {:?}, destination {:?}",
            self.source.medium.exists, self.source.medium.record, self.destination.medium.record
        ))
    }

    /// Whatever happens now, the source's copy is there and is not declared departed.
    fn source_is_owner(&self) -> bool {
        let Medium { record, exists, .. } = &self.source.medium;
        let keeps = |record: &Option<Record>| !matches!(record, Some(Record::Departed { .. }));
        exists.now && exists.safe && keeps(&record.now) && keeps(&record.safe)
    }

    fn destination_is_owner(&self) -> bool {
        let Destination { medium, other, .. } = &self.destination;
        let ours = |medium: &Medium| matches!(medium.record.safe, Some(Record::Ours(_)));
        ours(medium) || ours(other)
    }

    /// When the destination has settled the handover, before anybody writes there.
    pub(crate) fn check_arrival(&self) -> Result<(), String> {
        let medium = &self.destination.medium;
        for (block, known) in self.known.iter().enumerate() {
            let Cell { stamp, allocated } = medium.cells[block].now;
            if !known.allows(stamp) {
                return Err(format!(
                    "(1) block {block} arrived as {stamp}, clients know {known:?}"
                ));
            }
            if allocated && stamp == 0 {
                return Err(format!("(5) block {block} was a hole and takes space now"));
            }
        }
        if medium.is_flushed() {
            Ok(())
        } else {
            Err("(3) the disk has arrived and is not durable".to_owned())
        }
    }

    /// Sessions end only when the disk is somebody else's, durably.
    pub(crate) fn check_arrived(&self, what: &str) -> Result<(), String> {
        if self.destination_is_owner() {
            return Ok(());
        }
        Err(format!("(4) {what} before the destination had the disk"))
    }

    /// Nothing has gone wrong for a long time: the disk is with one host, complete, and served.
    fn check_rest(&mut self) -> Result<(), String> {
        let host = match (self.source_serves(), self.destination_serves()) {
            (true, false) => Host::Source,
            (false, true) => Host::Destination,
            _ => {
                return Err(format!(
                    "(4) at rest, and nobody serves the disk: source {:?}, destination {:?}",
                    self.source.role, self.destination.process
                ));
            }
        };
        let migrating = matches!(self.source.role, Role::Migrating(_));
        if migrating && host == Host::Source {
            return Err("the migration neither ends nor goes on".to_owned());
        }
        let known = self.known.clone();
        let medium = self.medium(host);
        for (block, known) in known.iter().enumerate() {
            if !known.allows(medium.stamp(block)) {
                let stamp = medium.stamp(block);
                return Err(format!("(1) block {block} is {stamp}, clients know {known:?}"));
            }
        }
        Ok(())
    }
}

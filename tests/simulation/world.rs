//! The simulated world: two hosts, their clients and network, its faults, and the checks of the five
//! invariants.

use super::Mutation;
use super::client::{ExpectedBlock, Writer};
use super::destination::{Destination, DestinationProcess};
use super::image::{Block, Image, Rng, Stamp};
use super::network::Network;
use super::source::{Source, SourceProcess};
use super::transitions::Unlisted;
use flexnbd::disk::ownership::Record;
use flexnbd::migration::job::Stage;
use std::time::Duration;

/// Turns with faults at the beginning of a schedule.
const FAULTY_TURNS: u64 = 400;
/// The most turns without faults at its end, within which the migration must end.
const QUIET_TURNS: u64 = 20_000;

/// With faults: turns without progress after which time advances, even if a message is in transit.
const IDLE_FAULTY_TURNS: u64 = 15;

/// Without faults: turns without progress after which time advances, as nothing is in transit.
const IDLE_TURNS: u64 = 80;

/// Turns without progress, and without a deadline, after which the schedule ends.
const END_TURNS: u64 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Host {
    Source,
    Destination,
}

/// How often the schedules reached each of the rarer events.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    pub(crate) arrived: u64,
    pub(crate) not_arrived: u64,
    pub(crate) handovers: u64,
    pub(crate) in_doubt: u64,
    pub(crate) handed_over_again: u64,
    pub(crate) resumed: u64,
    pub(crate) restarted: u64,
    pub(crate) retired: u64,
    pub(crate) asked_after_restart: u64,
    pub(crate) drains_refused: u64,
    pub(crate) final_copies_failed: u64,
    pub(crate) gates_expired: u64,
    pub(crate) asked_on_second_connection: u64,
    pub(crate) relayed: u64,
    pub(crate) relays_delayed: u64,
    pub(crate) relays_restarted: u64,
    pub(crate) relayed_writes: u64,
    pub(crate) data_blocks: u64,
    pub(crate) turns: u64,
}

impl Coverage {
    fn counts(&mut self) -> [&mut u64; 19] {
        [
            &mut self.arrived,
            &mut self.not_arrived,
            &mut self.handovers,
            &mut self.in_doubt,
            &mut self.handed_over_again,
            &mut self.resumed,
            &mut self.restarted,
            &mut self.retired,
            &mut self.asked_after_restart,
            &mut self.drains_refused,
            &mut self.final_copies_failed,
            &mut self.gates_expired,
            &mut self.asked_on_second_connection,
            &mut self.relayed,
            &mut self.relays_delayed,
            &mut self.relays_restarted,
            &mut self.relayed_writes,
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

    /// Whether the schedules reached every event. They prove nothing about events they never reach.
    pub(crate) fn is_complete(&self) -> bool {
        let mut all = Self { ..*self };
        all.counts().iter().all(|count| **count > 0)
    }
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) mutation: Mutation,
    pub(crate) verbose: bool,
    pub(crate) now: Duration,
    pub(crate) network: Network,
    pub(crate) source: Source,
    pub(crate) destination: Destination,
    pub(crate) writers: [Writer; 2],
    pub(crate) expected: Vec<ExpectedBlock>,
    pub(crate) next_stamp: Stamp,
    pub(crate) writes_left: u64,
    pub(crate) migrations: u8,
    pub(crate) faults_enabled: bool,
    /// The destination's disk completes no request.
    pub(crate) destination_stalled: bool,
    /// The source's image may have lost writes that were not flushed.
    pub(crate) source_lost_power: bool,
    /// The destination has settled a handover.
    pub(crate) settled: bool,
    pub(crate) coverage: Coverage,
    /// Transitions of either side that its table lacks.
    pub(crate) unlisted: Unlisted,
    /// The destination supports FLUSH. Its data must become durable even if the source sends none.
    pub(crate) destination_has_flush: bool,
    /// The average number of turns between faults.
    fault_interval: u64,
}

impl World {
    pub(crate) fn new(seed: u64, mutation: Mutation) -> Self {
        let mut rng = Rng::new(seed);
        let count = 4 + rng.below(5);
        let stamps: Vec<Stamp> =
            (1..=count).map(|stamp| if rng.one_in(3) { 0 } else { stamp as Stamp }).collect();
        let old: Vec<Stamp> = (0..count).map(|_| 900 * rng.below(2) as Stamp).collect();
        let expected = |&stamp| ExpectedBlock { acknowledged: stamp, unacknowledged: Vec::new() };
        let fault_interval = [8, 25, 80, 250][rng.below(4) as usize];
        let writes_left = rng.below(80);
        Self {
            mutation,
            verbose: false,
            now: Duration::from_secs(1),
            network: Network { is_up: true, connections: Vec::new() },
            expected: stamps.iter().map(expected).collect(),
            source: Source::new(Image::new(stamps.into_iter())),
            destination: Destination::new(
                Image::new(old.iter().copied()),
                Image::new(old.iter().map(|_| 0)),
            ),
            writers: [Writer::Idle; 2],
            next_stamp: 1000,
            writes_left,
            migrations: 0,
            faults_enabled: true,
            destination_stalled: false,
            source_lost_power: false,
            settled: false,
            coverage: Coverage::default(),
            unlisted: Unlisted::default(),
            fault_interval,
            destination_has_flush: !rng.one_in(4),
            rng,
        }
    }

    pub(crate) fn trace(&self, line: impl FnOnce() -> String) {
        if self.verbose {
            println!("{:>9.3} s  {}", self.now.as_secs_f64(), line());
        }
    }

    pub(crate) fn image(&mut self, host: Host) -> &mut Image {
        match host {
            Host::Source => &mut self.source.image,
            Host::Destination => &mut self.destination.image,
        }
    }

    /// Runs the schedule; the error names the invariant that it breaks.
    pub(crate) fn run(&mut self) -> Result<(), String> {
        self.start_source();
        self.start_destination()?;
        let mut idle = 0;
        for _ in 0..FAULTY_TURNS {
            let interval_max = if self.is_handing_over() { 10 } else { u64::MAX };
            if self.rng.one_in(self.fault_interval.min(interval_max)) {
                self.inject_fault()?;
            }
            idle = if self.turn()? { 0 } else { idle + 1 };
            if idle > IDLE_FAULTY_TURNS {
                self.advance_time();
                idle = 0;
            }
        }
        self.stop_faults()?;
        for _ in 0..QUIET_TURNS {
            idle = if self.turn()? { 0 } else { idle + 1 };
            if idle > IDLE_TURNS {
                self.select_migrated_image();
                if !self.advance_time() && idle > END_TURNS {
                    break;
                }
            }
            if self.destination_may_start() {
                self.start_destination()?;
            }
        }
        self.check_final_state()
    }

    /// From the last FLUSH until the source has exited or serves again: faults matter most here, and
    /// are more frequent.
    fn is_handing_over(&self) -> bool {
        match &self.source.process {
            SourceProcess::Migrating(migration) => {
                let stage = migration.machine.progress(self.now).stage;
                matches!(stage, Stage::HandingOver | Stage::InDoubt | Stage::Leaving)
            }
            SourceProcess::Asking(_) => true,
            SourceProcess::Down => {
                matches!(self.source.image.record.current, Some(Record::Departing { .. }))
            }
            SourceProcess::Serving | SourceProcess::Relaying | SourceProcess::Moved => false,
        }
    }

    /// Performs one random step of a host or a client; returns whether it made progress.
    fn turn(&mut self) -> Result<bool, String> {
        self.now += Duration::from_millis(1);
        self.coverage.turns += 1;
        self.expire_gate();
        let progress = match self.rng.below(9) {
            0..=3 => self.source_turn()?,
            4..=6 => self.destination_turn()?,
            client => self.client_turn(client as usize - 7),
        };
        self.check_every_turn()?;
        Ok(progress)
    }

    /// Advances the clock to the source's next deadline; false if it has none.
    fn advance_time(&mut self) -> bool {
        self.source_waits_until().is_some_and(|until| {
            self.now = self.now.max(until);
            true
        })
    }

    fn inject_fault(&mut self) -> Result<(), String> {
        match self.rng.below(19) {
            0 => self.kill(Host::Source, false),
            1 => self.kill(Host::Source, true),
            2 => self.kill(Host::Destination, false),
            3 => self.kill(Host::Destination, true),
            4 | 5 if matches!(self.source.process, SourceProcess::Down) => self.start_source(),
            6 | 7 if self.destination_may_start() => self.start_destination()?,
            8 => self.network.is_up = !self.network.is_up,
            9 | 10 => self.cut(),
            11 => self.send_operator_request(),
            12 if self.destination_may_start() && self.rng.one_in(2) => {
                self.swap_images();
                self.start_destination()?;
            }
            13 => self.detect_broken_connections(),
            14 => {
                self.destination_stalled = true;
                self.cut();
            }
            15 => self.destination_stalled = !self.destination_stalled,
            16 => self.restart_relay(),
            _ => {
                self.advance_time();
            }
        }
        Ok(())
    }

    fn kill(&mut self, host: Host, power_cut: bool) {
        self.trace(|| format!("--- {host:?} killed, power cut: {power_cut}"));
        match host {
            Host::Source => self.kill_source(power_cut),
            Host::Destination => self.kill_destination(power_cut),
        }
    }

    fn cut(&mut self) {
        self.trace(|| "--- link cut".to_owned());
        for connection in
            self.network.connections.iter_mut().filter(|connection| !connection.source_closed)
        {
            connection.cut(&mut self.rng);
        }
    }

    fn detect_broken_connections(&mut self) {
        let broken = self.network.connections.iter_mut().filter(|connection| connection.is_broken);
        broken.for_each(|connection| connection.break_detected = true);
    }

    fn destination_may_start(&self) -> bool {
        matches!(self.destination.process, DestinationProcess::Down)
    }

    /// Ends all faults and starts the processes that are down.
    fn stop_faults(&mut self) -> Result<(), String> {
        self.trace(|| "--- no more faults".to_owned());
        self.faults_enabled = false;
        self.destination_stalled = false;
        self.network.is_up = true;
        self.detect_broken_connections();
        self.select_migrated_image();
        if self.destination_may_start() {
            self.start_destination()?;
        }
        if matches!(self.source.process, SourceProcess::Down) {
            self.start_source();
        }
        Ok(())
    }

    /// Invariants 2 and 3, which must hold after every turn.
    fn check_every_turn(&self) -> Result<(), String> {
        if self.source_serves() && self.destination_serves() {
            return Err("(2) both hosts serve the disk".to_owned());
        }
        if self.source_is_owner() || self.destination_is_owner() {
            return Ok(());
        }
        Err(format!(
            "(3) no host owns a complete copy: source {:?} {:?}, destination {:?}",
            self.source.image.exists, self.source.image.record, self.destination.image.record
        ))
    }

    /// Whether the source's copy exists and is not recorded as departed, even after a power cut.
    fn source_is_owner(&self) -> bool {
        let Image { record, exists, .. } = &self.source.image;
        let not_departed =
            |record: &Option<Record>| !matches!(record, Some(Record::Departed { .. }));
        exists.current
            && exists.durable
            && not_departed(&record.current)
            && not_departed(&record.durable)
    }

    fn destination_is_owner(&self) -> bool {
        let Destination { image, other_image, .. } = &self.destination;
        let ours = |image: &Image| matches!(image.record.durable, Some(Record::Ours(_)));
        ours(image) || ours(other_image)
    }

    /// Checks the copy when the destination has settled the handover, before a client writes to it.
    pub(crate) fn check_arrival(&self) -> Result<(), String> {
        let image = &self.destination.image;
        for (block, expected) in self.expected.iter().enumerate() {
            let Block { stamp, allocated } = image.blocks[block].current;
            if !expected.allows(stamp) {
                return Err(format!(
                    "(1) block {block} arrived as {stamp}, clients expect {expected:?}"
                ));
            }
            if allocated && stamp == 0 {
                return Err(format!(
                    "(5) block {block} is a hole at the source and allocated here"
                ));
            }
        }
        if image.is_flushed() {
            Ok(())
        } else {
            Err("(3) the disk has arrived and is not durable".to_owned())
        }
    }

    /// Invariant 4: the source's sessions end only when the destination durably owns the disk.
    pub(crate) fn check_destination_owns(&self, event: &str) -> Result<(), String> {
        if self.destination_is_owner() {
            return Ok(());
        }
        Err(format!("(4) {event} before the destination had the disk"))
    }

    /// Checks that after a long time without faults one host serves the complete disk.
    fn check_final_state(&mut self) -> Result<(), String> {
        let host = match (self.source_serves(), self.destination_serves()) {
            (true, false) => Host::Source,
            (false, true) => Host::Destination,
            _ => {
                return Err(format!(
                    "(4) at the end no host serves the disk: source {:?}, destination {:?}",
                    self.source.process, self.destination.process
                ));
            }
        };
        let migrating = matches!(self.source.process, SourceProcess::Migrating(_));
        if migrating && host == Host::Source {
            return Err("the migration neither ends nor goes on".to_owned());
        }
        let expected = self.expected.clone();
        let image = self.image(host);
        for (block, expected) in expected.iter().enumerate() {
            if !expected.allows(image.stamp(block)) {
                let stamp = image.stamp(block);
                return Err(format!("(1) block {block} is {stamp}, clients expect {expected:?}"));
            }
        }
        Ok(())
    }
}

//! One migration in which processes are killed, as its seed says. Afterwards the test acts as the
//! service manager and restarts processes until the destination serves and the source has departed.
//! Never looks inside flexnbd: it sees exit statuses, records, status keys and replies to clients.

use fastrand::Rng;
use harness::host::{Host, MIRROR_STARTED};
use harness::image::stamped_image;
use harness::writers::Writers;
use harness::{Endpoint, FILE_SYSTEMS, MIB, Server, TempDir, poll_until, sparse_file, temp_dir_in};
use std::time::{Duration, Instant};

const SIZE: u64 = 16 * MIB;
/// The part of the disk that writers use: so small that each of its blocks is dirty all the time.
const WRITTEN_SIZE: u64 = 2 * MIB;
/// Rate limit of the copy, in bytes per second. The copy takes about half a second.
const BYTES_PER_SEC_MAX: &str = "8000000";
/// Approximate duration of a migration without kills.
const DURATION: Duration = Duration::from_millis(1200);
/// Pause between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a trigger waits for a record. It may never see the record: two writes of records can
/// follow each other faster than the test polls.
const RECORD_TIMEOUT: Duration = Duration::from_secs(20);
/// How long source and destination may take to settle after the kill.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Exit status of a process that refuses its image (`EX_CONFIG`).
const EXIT_REFUSED: i32 = 78;

/// When processes are killed.
#[derive(Clone, Copy, Debug)]
enum Trigger {
    /// A delay after the reply to `mirror`.
    Started(Duration),
    /// A delay after the record of the source has this word.
    SourceRecord(&'static str, Duration),
    /// A delay after the record of the destination has this word.
    DestinationRecord(&'static str, Duration),
}

/// The processes that are killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
    Both,
}

/// All random choices of one migration.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    seed: u64,
    trigger: Trigger,
    victim: Victim,
    /// Time from the kill to the first restart.
    downtime: Duration,
    /// Whether `mirror` deletes the source's image after the handover.
    unlink: bool,
}

/// One migration with kills.
pub(crate) struct KilledMigration {
    schedule: Schedule,
    source: Host,
    destination: Host,
    /// The process of the source, if one runs.
    source_server: Option<Server>,
    /// The process of the destination, if one runs: `listen` until the disk has arrived, then
    /// `serve`.
    destination_server: Option<Server>,
    /// `listen` has exited successfully.
    arrived: bool,
    /// The source must not be started again.
    departed: bool,
    killed: bool,
    writers: Option<Writers>,
    began: Instant,
    /// A line for each event, for the message of a failure.
    events: Vec<String>,
    _directory: TempDir,
}

impl Schedule {
    fn new(seed: u64) -> Schedule {
        let mut random = Rng::with_seed(seed);
        let soon = Duration::from_micros(random.u64(..4000));
        let trigger = match random.u64(..8) {
            0..3 => {
                Trigger::Started(Duration::from_micros(random.u64(..DURATION.as_micros() as u64)))
            }
            3 => Trigger::DestinationRecord("incoming", soon),
            4..6 => Trigger::SourceRecord("departing", soon),
            6 => Trigger::DestinationRecord("ours", soon),
            _ => Trigger::SourceRecord("departed", soon),
        };
        let victim = match random.u64(..3) {
            0 => Victim::Source,
            1 => Victim::Destination,
            _ => Victim::Both,
        };
        let downtime = Duration::from_millis(random.u64(..50));
        Schedule { seed, trigger, victim, downtime, unlink: random.u64(..4) == 0 }
    }
}

impl KilledMigration {
    /// Starts `serve` and `listen`.
    pub(crate) fn new(seed: u64) -> KilledMigration {
        let directory = temp_dir_in(FILE_SYSTEMS[seed as usize % 2]);
        let source = Host::new(directory.path(), "source");
        let destination = Host::new(directory.path(), "dest");
        stamped_image(&source.image, SIZE);
        sparse_file(&destination.image, SIZE);
        KilledMigration {
            schedule: Schedule::new(seed),
            source_server: Some(source.serve()),
            destination_server: Some(destination.listen()),
            arrived: false,
            departed: false,
            killed: false,
            writers: None,
            began: Instant::now(),
            events: Vec::new(),
            source,
            destination,
            _directory: directory,
        }
    }

    /// Migrates, kills, restarts, and verifies the result.
    #[track_caller]
    pub(crate) fn run(mut self) {
        let endpoint = Endpoint::Tcp(self.source.address);
        let writers = Writers::start(endpoint, WRITTEN_SIZE, (3, self.schedule.seed, PAUSE));
        writers.wait_for_writes(50);
        self.writers = Some(writers);
        self.send_mirror();
        self.wait_for_trigger();
        self.kill_victims();
        let settled = poll_until(SETTLE_TIMEOUT, || self.supervise());
        assert!(settled, "not settled after {SETTLE_TIMEOUT:?}: {}", self.describe());
        self.verify();
    }

    fn send_mirror(&mut self) {
        let action = if self.schedule.unlink { "unlink" } else { "exit" };
        let reply = self.source.try_command(&[
            "mirror",
            &self.destination.address.ip().to_string(),
            &self.destination.address.port().to_string(),
            action,
            "0.0.0.0",
            BYTES_PER_SEC_MAX,
        ]);
        self.log_event(format!("mirror: {reply:?}"));
        let expected = reply.as_deref().is_none_or(|reply| {
            reply == MIRROR_STARTED || reply == "1: mirror already running" || self.killed
        });
        assert!(expected, "unexpected reply to mirror: {}", self.describe());
    }

    /// Waits for the trigger. Spins, since sleeping would miss delays of microseconds. If the
    /// record is never seen, returns once a process has exited or [`RECORD_TIMEOUT`] has passed.
    fn wait_for_trigger(&mut self) {
        let (host, word, delay) = match self.schedule.trigger {
            Trigger::Started(delay) => return std::thread::sleep(delay),
            Trigger::SourceRecord(word, delay) => (self.source.clone(), word, delay),
            Trigger::DestinationRecord(word, delay) => (self.destination.clone(), word, delay),
        };
        let deadline = Instant::now() + RECORD_TIMEOUT;
        while host.record() != word && Instant::now() < deadline && self.both_run() {
            std::thread::yield_now();
        }
        self.log_event(format!("the record of {} is {:?}", host.image.display(), host.record()));
        let start = Instant::now();
        while start.elapsed() < delay {
            std::hint::spin_loop();
        }
    }

    fn both_run(&mut self) -> bool {
        let runs = |server: &mut Option<Server>| server.as_mut().is_some_and(Server::is_running);
        runs(&mut self.source_server) && runs(&mut self.destination_server)
    }

    /// Kills the victims with SIGKILL, which is how a [`Server`] is dropped.
    fn kill_victims(&mut self) {
        self.killed = true;
        let victim = self.schedule.victim;
        if victim != Victim::Destination {
            self.source_server = None;
        }
        if victim != Victim::Source {
            self.destination_server = None;
        }
        self.log_event(format!("killed: {victim:?}; records {:?}", self.records()));
        std::thread::sleep(self.schedule.downtime);
    }

    /// One round of the service manager: restarts processes that have exited. True once the source
    /// has departed and the destination serves.
    fn supervise(&mut self) -> bool {
        // The seed decides which host restarts first.
        if self.schedule.seed.is_multiple_of(2) {
            self.supervise_source();
            self.supervise_destination();
        } else {
            self.supervise_destination();
            self.supervise_source();
        }
        self.departed && self.arrived && self.destination_server.is_some()
    }

    fn supervise_source(&mut self) {
        if self.departed {
            return;
        }
        let Some(server) = &mut self.source_server else { return self.start_source() };
        if let Some(status) = server.exit_status() {
            server.wait_for_end();
            let stderr = server.stderr();
            self.log_event(format!("the source exited: {status}, stderr: {stderr}"));
            self.source_server = None;
            let image_gone = !self.source.image.exists();
            self.departed = status.success() || self.source.record() == "departed" || image_gone;
            let may_refuse = ["departing", "departed"].contains(&self.source.record().as_str());
            let expected = status.success() || may_refuse || image_gone;
            assert!(expected, "the source fails without a reason: {}", self.describe());
        } else if !self.arrived
            && self.source.status_of("is_mirroring") == "false"
            && self.destination_server.is_some()
        {
            // A restarted source does not migrate by itself: as an operator, start it again.
            self.send_mirror();
        }
    }

    fn start_source(&mut self) {
        let mut server = self.source.mode("serve").spawn();
        let listens = server.starts_listening();
        let records = self.records();
        self.log_event(format!("serve at the source: listens: {listens}, records {records:?}"));
        self.source_server = Some(server);
    }

    fn supervise_destination(&mut self) {
        let Some(server) = &mut self.destination_server else { return self.start_destination() };
        let Some(status) = server.exit_status() else { return };
        server.wait_for_end();
        let stderr = server.stderr();
        self.log_event(format!("the destination exited: {status}, stderr: {stderr}"));
        self.destination_server = None;
        if status.success() {
            assert_eq!(self.destination.record(), "ours", "{}", self.describe());
            self.arrived = true;
        }
        let refused = status.code() == Some(EXIT_REFUSED);
        assert!(!refused, "the destination refuses its image: {}", self.describe());
    }

    fn start_destination(&mut self) {
        let mode = if self.arrived { "serve" } else { "listen" };
        let mut server = self.destination.mode(mode).spawn();
        let listens = server.starts_listening();
        let records = self.records();
        self.log_event(format!("{mode} at the destination: listens: {listens}, {records:?}"));
        if self.arrived {
            assert!(listens, "the arrived disk is not served: {}", self.describe());
            let endpoint = Endpoint::Tcp(self.destination.address);
            self.writers.as_ref().unwrap().add_destination(endpoint);
        }
        self.destination_server = Some(server);
    }

    /// Asserts that the destination serves every acknowledged write, and that the source refuses to
    /// serve.
    fn verify(mut self) {
        let writers = self.writers.take().unwrap();
        writers.wait_for_destination();
        writers.wait_for_writes(50);
        let written = writers.stop();
        let mut server = self.destination_server.take().unwrap();
        assert!(server.stop().success(), "{}", self.describe());
        assert_eq!(self.destination.record(), "ours", "{}", self.describe());
        let Schedule { unlink, victim, .. } = self.schedule;
        let exists = self.source.image.exists();
        // A source that was killed before it deleted the image does not delete it after a restart.
        let may_exist = !unlink || victim != Victim::Destination;
        let expected = if exists { may_exist } else { unlink };
        assert!(expected, "the source's image exists: {exists}: {}", self.describe());
        let mut restarted = self.source.mode("serve").spawn();
        assert!(!restarted.starts_listening(), "the source serves again: {}", self.describe());
        assert_eq!(restarted.wait_for_end().code(), Some(EXIT_REFUSED), "{}", restarted.stderr());
        written.assert_all_present(&self.destination.image, &self.describe());
    }

    fn records(&self) -> (String, String) {
        (self.source.record(), self.destination.record())
    }

    fn log_event(&mut self, event: String) {
        self.events.push(format!("{:6} ms: {event}", self.began.elapsed().as_millis()));
    }

    /// The schedule and all events.
    fn describe(&self) -> String {
        format!("{:?}\n{}", self.schedule, self.events.join("\n"))
    }
}

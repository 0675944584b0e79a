//! One migration in which somebody is killed at some moment, and what follows: whatever a service
//! manager would start again is started again, until one side serves the disk and the other is gone.
//! Never knows what flexnbd does inside; it sees exit statuses, records and what clients see.

use fastrand::Rng;
use harness::host::{Host, MIRROR_STARTED};
use harness::image::stamped_image;
use harness::writers::Writers;
use harness::{Endpoint, FILE_SYSTEMS, MIB, Server, TempDir, poll_until, sparse_file, temp_dir_in};
use std::time::{Duration, Instant};

const SIZE: u64 = 16 * MIB;
/// The part of the disk that is written to. Every block of it is dirty all the time.
const BUSY: u64 = 2 * MIB;
/// Bytes per second of the copy: it takes a good half second.
const SPEED: &str = "8000000";
/// As long as an undisturbed migration takes, roughly.
const LIFE: Duration = Duration::from_millis(1200);
/// Between two batches of a writer.
const PAUSE: Duration = Duration::from_millis(5);
/// How long it may take after the kill until all is settled.
const SETTLED: Duration = Duration::from_secs(60);
/// Exit status of a process that refuses its image.
const REFUSED: i32 = 78;

/// When somebody is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// So long after the order to migrate.
    After(Duration),
    /// So long after the source's record has this word.
    Source(&'static str, Duration),
    /// So long after the destination's record has this word.
    Destination(&'static str, Duration),
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Source,
    Destination,
    Both,
}

/// What was decided before it began.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    seed: u64,
    moment: Moment,
    victim: Victim,
    /// How long the dead stay dead.
    rest: Duration,
    unlink: bool,
}

/// One migration.
pub(crate) struct Life {
    schedule: Schedule,
    source: Host,
    destination: Host,
    /// None while nothing of the source runs.
    serving: Option<Server>,
    /// None while nothing of the destination runs.
    receiving: Option<Server>,
    /// The destination's process is one that serves.
    arrived: bool,
    /// The source has ended for good.
    departed: bool,
    story: Vec<String>,
    began: Instant,
    killed: bool,
    writers: Option<Writers>,
    _directory: TempDir,
}

impl Schedule {
    fn new(seed: u64) -> Schedule {
        let mut random = Rng::with_seed(seed);
        let soon = Duration::from_micros(random.u64(..4000));
        let moment = match random.u64(..8) {
            0..3 => Moment::After(Duration::from_micros(random.u64(..LIFE.as_micros() as u64))),
            3 => Moment::Destination("incoming", soon),
            4..6 => Moment::Source("departing", soon),
            6 => Moment::Destination("ours", soon),
            _ => Moment::Source("departed", soon),
        };
        let victim = match random.u64(..3) {
            0 => Victim::Source,
            1 => Victim::Destination,
            _ => Victim::Both,
        };
        let rest = Duration::from_millis(random.u64(..50));
        Schedule { seed, moment, victim, rest, unlink: random.u64(..4) == 0 }
    }
}

impl Life {
    pub(crate) fn new(seed: u64) -> Life {
        let directory = temp_dir_in(FILE_SYSTEMS[seed as usize % 2]);
        let source = Host::new(directory.path(), "source");
        let destination = Host::new(directory.path(), "dest");
        stamped_image(&source.image, SIZE);
        sparse_file(&destination.image, SIZE);
        Life {
            schedule: Schedule::new(seed),
            serving: Some(source.serve()),
            receiving: Some(destination.listen()),
            arrived: false,
            departed: false,
            story: Vec::new(),
            began: Instant::now(),
            killed: false,
            writers: None,
            source,
            destination,
            _directory: directory,
        }
    }

    /// Lives it, and fails unless it ends well.
    #[track_caller]
    pub(crate) fn run(mut self) {
        let door = Endpoint::Tcp(self.source.address);
        let writers = Writers::start(door, BUSY, (3, self.schedule.seed, PAUSE));
        writers.wait_for_writes(50);
        self.writers = Some(writers);
        self.migrate();
        self.wait_for_the_moment();
        self.kill();
        let settled = poll_until(SETTLED, || self.look_after());
        assert!(settled, "it does not end by itself: {}", self.tell());
        self.judge();
    }

    fn migrate(&mut self) {
        let action = if self.schedule.unlink { "unlink" } else { "exit" };
        let reply = self.source.try_command(&[
            "mirror",
            &self.destination.address.ip().to_string(),
            &self.destination.address.port().to_string(),
            action,
            "0.0.0.0",
            SPEED,
        ]);
        self.note(format!("mirror: {reply:?}"));
        let expected = reply.as_deref().is_none_or(|reply| {
            reply == MIRROR_STARTED || reply == "1: mirror already running" || self.killed
        });
        assert!(expected, "{}", self.tell());
    }

    /// It may never come, where a record is gone faster than one can look; then the kill comes
    /// when all is over.
    fn wait_for_the_moment(&mut self) {
        let (host, word, then) = match self.schedule.moment {
            Moment::After(time) => return std::thread::sleep(time),
            Moment::Source(word, then) => (self.source.clone(), word, then),
            Moment::Destination(word, then) => (self.destination.clone(), word, then),
        };
        let end = Instant::now() + Duration::from_secs(20);
        while host.record() != word && Instant::now() < end && self.both_run() {
            std::thread::yield_now();
        }
        self.note(format!("the record of {} is {:?}", host.image.display(), host.record()));
        let start = Instant::now();
        while start.elapsed() < then {
            std::hint::spin_loop();
        }
    }

    fn both_run(&mut self) -> bool {
        let runs = |server: &mut Option<Server>| server.as_mut().is_some_and(Server::is_running);
        runs(&mut self.serving) && runs(&mut self.receiving)
    }

    fn kill(&mut self) {
        self.killed = true;
        let victim = self.schedule.victim;
        if victim != Victim::Destination {
            end(&mut self.serving);
        }
        if victim != Victim::Source {
            end(&mut self.receiving);
        }
        self.note(format!("killed: {victim:?}; records {:?}", self.records()));
        std::thread::sleep(self.schedule.rest);
    }

    /// What a service manager does, once; true when there is nothing left to do.
    fn look_after(&mut self) -> bool {
        // In either order: which host comes back first is chance.
        if self.schedule.seed.is_multiple_of(2) {
            self.look_after_source();
            self.look_after_destination();
        } else {
            self.look_after_destination();
            self.look_after_source();
        }
        self.departed && self.arrived && self.receiving.is_some()
    }

    fn look_after_source(&mut self) {
        if self.departed {
            return;
        }
        let Some(server) = &mut self.serving else { return self.start_source() };
        if let Some(status) = server.exit_status() {
            server.wait_for_end();
            let said = server.stderr();
            self.note(format!("source: {status}, saying {said}"));
            self.serving = None;
            let image_gone = !self.source.image.exists();
            self.departed = status.success() || self.source.record() == "departed" || image_gone;
            let may_refuse = ["departing", "departed"].contains(&self.source.record().as_str());
            let expected = status.success() || may_refuse || image_gone;
            assert!(expected, "{}", self.tell());
        } else if !self.arrived
            && self.source.status_of("is_mirroring") == "false"
            && self.receiving.is_some()
        {
            // What an operator does who finds the migration gone with the process.
            self.migrate();
        }
    }

    fn start_source(&mut self) {
        let mut server = self.source.mode("serve").spawn();
        let up = server.starts_listening();
        self.note(format!("source started again, serving: {up}, records {:?}", self.records()));
        self.serving = Some(server);
    }

    fn look_after_destination(&mut self) {
        let Some(server) = &mut self.receiving else { return self.start_destination() };
        let Some(status) = server.exit_status() else { return };
        server.wait_for_end();
        let said = server.stderr();
        self.note(format!("destination: {status}, saying {said}"));
        self.receiving = None;
        if status.success() {
            assert_eq!(self.destination.record(), "ours", "{}", self.tell());
            self.arrived = true;
        }
        let refused = status.code() == Some(REFUSED);
        assert!(!refused, "a destination refuses: {}", self.tell());
    }

    fn start_destination(&mut self) {
        let mode = if self.arrived { "serve" } else { "listen" };
        let mut server = self.destination.mode(mode).spawn();
        let up = server.starts_listening();
        self.note(format!("destination: {mode} again: {up}, records {:?}", self.records()));
        if self.arrived {
            assert!(up, "what has arrived is served: {}", self.tell());
            let door = Endpoint::Tcp(self.destination.address);
            self.writers.as_ref().unwrap().add_destination(door);
        }
        self.receiving = Some(server);
    }

    fn judge(mut self) {
        let writers = self.writers.take().unwrap();
        writers.wait_for_destination();
        writers.wait_for_writes(50);
        let written = writers.stop();
        let mut server = self.receiving.take().unwrap();
        assert!(server.stop().success(), "{}", self.tell());
        assert_eq!(self.destination.record(), "ours", "{}", self.tell());
        // A source that was killed before it could delete its image only knows that it is gone.
        let left = self.source.image.exists();
        let Schedule { unlink, victim, .. } = self.schedule;
        let as_ordered = left != unlink || (left && victim != Victim::Destination);
        assert!(as_ordered, "the source's image: {}", self.tell());
        let mut revenant = self.source.mode("serve").spawn();
        assert!(!revenant.starts_listening(), "the source serves again: {}", self.tell());
        assert_eq!(revenant.wait_for_end().code(), Some(REFUSED), "{}", revenant.stderr());
        written.assert_all_present(&self.destination.image, &self.tell());
    }

    fn records(&self) -> (String, String) {
        (self.source.record(), self.destination.record())
    }

    fn note(&mut self, what: String) {
        self.story.push(format!("{:6} ms: {what}", self.began.elapsed().as_millis()));
    }

    fn tell(&self) -> String {
        format!("{:?}\n{}", self.schedule, self.story.join("\n"))
    }
}

/// `kill -9`, as dropping a server does it.
fn end(server: &mut Option<Server>) {
    if let Some(server) = server.take() {
        drop(server);
    }
}

//! Executes one plan on two hosts, with a link, an operator and clients. Then ends all faults,
//! waits until the disk has arrived, and checks that every acknowledged write is in it.
//! Uses no internals of flexnbd: only exit statuses, records and the replies to clients.

use crate::operator::Operator;
use crate::plan::{Action, Event, MigrationPlan, Plan, StorageKind, Trigger};
use crate::supervised_host::{Mode, SupervisedHost};
use harness::clients::{ClientOptions, Clients, Durable, Expected, Role};
use harness::image::stamped_image;
use harness::proxy::{CutAt, Proxy};
use harness::{Endpoint, MIB, sparse_file};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// The size of the disk, all of which is written to, in bytes.
const SIZE: u64 = 4 * MIB;
/// The interval between two looks at processes and records.
const POLL_INTERVAL: Duration = Duration::from_millis(4);
/// Events whose trigger has not come by then fire nevertheless.
const TRIGGER_TIMEOUT: Duration = Duration::from_secs(5);
/// The deadline for all events: in the worst case they happen one after the other.
const EVENTS_TIMEOUT: Duration = Duration::from_secs(30);
/// The deadline for clients to get replies, and for the migration once all faults have ended.
const MOVE_TIMEOUT: Duration = Duration::from_secs(60);
/// Replies after which clients count as served.
const REPLIES_MIN: u64 = 50;

/// No host loses power, so every acknowledged write must survive, flushed or not.
const DURABLE: Durable = Durable::Acknowledged;

/// The end of an action that lasts for some time.
enum Undo {
    Unfreeze(Role),
    RepairLink,
    ResumeLink,
    ClearFaults(Role),
}

/// The execution of one migration.
struct Execution<'a> {
    migration: &'a MigrationPlan,
    began: Instant,
    source: &'a mut SupervisedHost,
    destination: &'a mut SupervisedHost,
    proxy: Proxy,
    operator: Operator,
    clients: Clients,
    /// The events that have not fired yet.
    pending: Vec<Event>,
    undo: Vec<(Instant, Undo)>,
    log: &'a mut Vec<String>,
    /// Whether a process was terminated: its exit status 0 then means no completed migration.
    terminated: bool,
}

/// Executes a plan. The error has the plan and the log of the execution.
pub(crate) fn execute(plan: &Plan) -> Result<(), String> {
    let mut log = Vec::new();
    migrate(plan, &mut log).map_err(|why| {
        let mut text = format!("seed {}: {why}\n{plan:#?}\n", plan.seed);
        for line in log {
            let _ = writeln!(text, "{line}");
        }
        text
    })
}

fn migrate(plan: &Plan, log: &mut Vec<String>) -> Result<(), String> {
    let mut here = SupervisedHost::new(plan, Role::Source, SIZE);
    let mut there = SupervisedHost::new(plan, Role::Destination, SIZE);
    stamped_image(&here.host.image, SIZE);
    let mut expected = Expected::stamped(0..SIZE);
    for (number, migration) in plan.migrations.iter().enumerate() {
        if !there.host.image.exists() {
            sparse_file(&there.host.image, SIZE);
        }
        if number == 0 {
            here.fill();
            there.fill();
        }
        log.push(format!("-- from {:?}", here.host.image));
        let hosts = (&mut here, &mut there);
        expected = Execution::begin(plan, migration, hosts, &expected, log).run()?;
        std::mem::swap(&mut here, &mut there);
    }
    Ok(())
}

impl<'a> Execution<'a> {
    fn begin(
        plan: &Plan,
        migration: &'a MigrationPlan,
        (source, destination): (&'a mut SupervisedHost, &'a mut SupervisedHost),
        expected: &Expected,
        log: &'a mut Vec<String>,
    ) -> Execution<'a> {
        let proxy = Proxy::to(destination.host.address, CutAt::Never);
        let endpoints = [source.host.address, destination.host.address].map(Endpoint::Tcp);
        let (may_fail, seed) = (may_fail(plan), plan.seed);
        let options = ClientOptions { durable: DURABLE, may_fail, seed };
        let clients = Clients::start(endpoints, expected, options);
        let operator = Operator::start(&source.host, proxy.address, migration.unlink);
        source.mode = Mode::Serve;
        destination.mode = Mode::Listen;
        Execution {
            migration,
            began: Instant::now(),
            source,
            destination,
            proxy,
            operator,
            clients,
            pending: migration.events.clone(),
            undo: Vec::new(),
            log,
            terminated: false,
        }
    }

    fn run(mut self) -> Result<Expected, String> {
        self.fire_events(|trigger, _| trigger == Trigger::BeforeStart);
        self.until("the source serves clients", MOVE_TIMEOUT, |run| {
            run.clients.replies(Role::Source) > REPLIES_MIN || run.starts_without_clients()
        })?;
        self.operator.set_paused(false);
        self.began = Instant::now();
        self.until("all events have fired and ended", EVENTS_TIMEOUT, |run| {
            run.pending.is_empty() && run.undo.is_empty()
        })?;
        self.append_log("all faults end");
        self.source.repair();
        self.destination.repair();
        self.until("the disk has moved", MOVE_TIMEOUT, |run| run.has_moved())?;
        let before = self.clients.replies(Role::Destination);
        self.until("the destination serves clients", MOVE_TIMEOUT, |run| {
            run.clients.replies(Role::Destination) > before + REPLIES_MIN
        })?;
        self.check_result()
    }

    /// Whether to go on without a served client: a source that cannot read its record serves none
    /// until the faults end.
    fn starts_without_clients(&self) -> bool {
        self.began.elapsed() > Duration::from_secs(2)
    }

    /// Fires events and supervises the hosts until `done`; fails after `timeout`.
    fn until(
        &mut self,
        what: &str,
        timeout: Duration,
        mut done: impl FnMut(&mut Execution<'_>) -> bool,
    ) -> Result<(), String> {
        let start = Instant::now();
        while !done(self) {
            let late = self.began.elapsed() > TRIGGER_TIMEOUT;
            self.fire_events(|trigger, run| run.is_due(trigger) || late);
            self.undo_due();
            self.supervise_source()?;
            self.supervise_destination()?;
            self.adopt_after_failed_flush();
            let commands = self.operator.take_log();
            commands.into_iter().for_each(|command| self.append_log(&command));
            if let Some(violation) = self.clients.violation() {
                return Err(self.with_output(&violation));
            }
            if start.elapsed() > timeout {
                return Err(self.with_output(&format!("timed out waiting until {what}")));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn host(&mut self, role: Role) -> &mut SupervisedHost {
        match role {
            Role::Source => self.source,
            Role::Destination => self.destination,
        }
    }

    /// Whether the trigger has come. After the state of a record it sleeps for the trigger's delay,
    /// at most 60 ms.
    fn is_due(&self, trigger: Trigger) -> bool {
        match trigger {
            Trigger::BeforeStart => true,
            Trigger::After(time) => !self.operator.is_paused() && self.began.elapsed() >= time,
            Trigger::Record(role, state, delay) => {
                let supervised =
                    if role == Role::Source { &self.source } else { &self.destination };
                let is_reached = supervised.host.record() == state;
                if is_reached {
                    std::thread::sleep(delay);
                }
                is_reached
            }
        }
    }

    /// Starts the actions of all events that are due.
    fn fire_events(&mut self, is_due: impl Fn(Trigger, &Execution<'_>) -> bool) {
        let mut later = Vec::new();
        for event in std::mem::take(&mut self.pending) {
            if is_due(event.trigger, self) {
                self.append_log(&format!("{:?} {:?}", event.trigger, event.action));
                self.start_action(&event.action);
            } else {
                later.push(event);
            }
        }
        self.pending = later;
    }

    fn start_action(&mut self, action: &Action) {
        match action {
            Action::Kill(role) => self.host(*role).kill(),
            Action::KillBoth => {
                self.source.kill();
                self.destination.kill();
            }
            Action::Terminate(role) => {
                self.terminated = true;
                self.host(*role).terminate();
            }
            Action::Freeze(role, time) => {
                self.host(*role).freeze(true);
                self.undo_after(*time, Undo::Unfreeze(*role));
            }
            Action::CutLink(time) => {
                self.proxy.cut();
                self.undo_after(*time, Undo::RepairLink);
            }
            Action::StallLink(time) => {
                self.proxy.set_paused(true);
                self.undo_after(*time, Undo::ResumeLink);
            }
            Action::ResetConnections => self.proxy.reset(),
            Action::AbortMigration => self.operator.abort_migration(),
            Action::InjectFaults(role, faults, time) => {
                self.host(*role).faults.set(faults);
                self.undo_after(*time, Undo::ClearFaults(*role));
            }
        }
    }

    fn undo_after(&mut self, time: Duration, undo: Undo) {
        self.undo.push((Instant::now() + time, undo));
    }

    /// Ends all actions whose time is over.
    fn undo_due(&mut self) {
        let now = Instant::now();
        let due = self.undo.extract_if(.., |(when, _)| *when <= now);
        for (_, undo) in due.collect::<Vec<_>>() {
            match undo {
                Undo::Unfreeze(role) => self.host(role).freeze(false),
                Undo::RepairLink => self.proxy.repair(),
                Undo::ResumeLink => self.proxy.set_paused(false),
                Undo::ClearFaults(role) => self.host(role).faults.set(&[]),
            }
        }
    }

    fn supervise_source(&mut self) -> Result<(), String> {
        let Some((status, output)) = self.source.supervise() else { return Ok(()) };
        let record = self.source.host.record();
        let is_gone = !self.source.host.image.exists() || record == "departed";
        self.append_log(&format!("source: {status}, record {record:?}, stderr {output}"));
        if is_gone {
            self.source.mode = Mode::Off;
        } else if status.success() && record != "departing" && !self.terminated {
            // With the record *departing* the next process queries the destination.
            return Err("the source exits as after a migration, without a record of it".to_owned());
        }
        Ok(())
    }

    fn supervise_destination(&mut self) -> Result<(), String> {
        let Some((status, output)) = self.destination.supervise() else { return Ok(()) };
        let record = self.destination.host.record();
        self.append_log(&format!("destination: {status}, record {record:?}, stderr {output}"));
        if self.destination.mode == Mode::Listen && status.success() {
            if record != "ours" {
                return Err(
                    "the destination exits as after an arrival, without a record of it".to_owned()
                );
            }
            self.destination.mode = Mode::Serve;
        }
        Ok(())
    }

    /// Does for the operator what the refusal of a migration says: a disk whose flush has failed moves only
    /// once the operator has found it right.
    fn adopt_after_failed_flush(&mut self) {
        let has_faults = !self.pending.is_empty() || !self.undo.is_empty();
        if !has_faults && self.source.has_failed_flush() {
            let outcome = self.source.adopt();
            self.append_log(&format!("the operator adopts the disk at the source: {outcome}"));
        }
    }

    fn has_moved(&mut self) -> bool {
        self.source.mode == Mode::Off && self.destination.mode == Mode::Serve
    }

    /// Stops clients and destination; checks that the destination alone owns the disk, and that the
    /// disk has every acknowledged write.
    fn check_result(self) -> Result<Expected, String> {
        let violation = self.clients.violation();
        let expected = self.clients.stop();
        drop(self.operator);
        let image = &self.destination.host.image.clone();
        let lost = violation.or_else(|| expected.missing_in(image, DURABLE));
        let ended = self.destination.stop();
        self.log.push(format!("destination, stopped: {ended:?}"));
        if let Some(lost) = lost.or_else(|| expected.missing_in(image, DURABLE)) {
            return Err(lost);
        }
        if !ended.is_some_and(|(status, _)| status.success()) {
            return Err("the destination does not exit with 0".to_owned());
        }
        let record = self.destination.host.record();
        if record != "ours" {
            return Err(format!("the destination's record is {record:?}"));
        }
        if self.source.host.image.exists() {
            self.source.refuses_to_serve().map_err(|why| format!("the source: {why}"))?;
        } else if !self.migration.unlink {
            return Err("the source's image is gone".to_owned());
        }
        Ok(expected)
    }

    fn append_log(&mut self, what: &str) {
        self.log.push(format!("{:6} ms: {}", self.began.elapsed().as_millis(), shortened(what)));
    }

    fn with_output(&mut self, why: &str) -> String {
        let (here, there) = (self.source.output(), self.destination.output());
        let records = [self.source.host.record(), self.destination.host.record()];
        self.append_log(&format!("records {records:?}\nsource: {here}\ndestination: {there}"));
        why.to_owned()
    }
}

/// The log without the lines about clients that connected and disconnected normally.
fn shortened(text: &str) -> String {
    let ends = [
        " connected",
        ": the client closed the connection",
        "Connection reset by peer (os error 104)",
    ];
    let lines = text.lines().filter(|line| !ends.iter().any(|end| line.ends_with(end)));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether requests of clients may fail under this plan.
fn may_fail(plan: &Plan) -> bool {
    let events = plan.migrations.iter().flat_map(|migration| &migration.events);
    let full = [plan.source, plan.destination]
        .iter()
        .any(|config| matches!(config.storage, StorageKind::FullExt4 { .. }));
    full || events.into_iter().any(|event| matches!(event.action, Action::InjectFaults(..)))
}

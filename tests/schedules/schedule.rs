//! Carries out one plan: two hosts, a link, an operator, clients, and what happens to them. Then
//! puts everything right, waits until the disk is where it was to go, and looks for what is lost.
//! Never knows what flexnbd does inside: it sees exit statuses, records, and what clients see.

use crate::operator::Operator;
use crate::plan::{Deed, Event, Leg, Medium, Moment, Plan};
use crate::side::{Mode, Side};
use harness::clients::{ClientOptions, Clients, Durable, Expected, Role};
use harness::image::stamped_image;
use harness::proxy::{CutAt, Proxy};
use harness::{Endpoint, MIB, sparse_file};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// All of it is written to.
const SIZE: u64 = 4 * MIB;
/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(4);
/// When what is to follow a record that does not come happens all the same.
const NEVER: Duration = Duration::from_secs(5);
/// How long it may take until everything has happened: one after the other at worst.
const HAPPENED: Duration = Duration::from_secs(30);
/// How long it may take from the end of all faults until the disk has moved.
const SETTLED: Duration = Duration::from_secs(60);
/// Answers by which clients are seen to be at work.
const AT_WORK: u64 = 50;

/// Hosts stay up, so that no acknowledged write may be lost, flushed or not.
const DURABLE: Durable = Durable::Acknowledged;

/// Something to be taken back at its time.
enum Undo {
    Thaw(Role),
    Mend,
    Speak,
    Heal(Role),
}

/// One migration under way.
struct Running<'a> {
    leg: &'a Leg,
    began: Instant,
    source: &'a mut Side,
    destination: &'a mut Side,
    proxy: Proxy,
    operator: Operator,
    clients: Clients,
    /// Those that have not happened yet.
    pending: Vec<Event>,
    undo: Vec<(Instant, Undo)>,
    story: &'a mut Vec<String>,
    /// Processes that were asked to end; what they say then is no success.
    asked_to_end: bool,
}

/// Carries it out; what went wrong is the error.
pub(crate) fn carry_out(plan: &Plan) -> Result<(), String> {
    let mut story = Vec::new();
    let lived = migrate(plan, &mut story);
    lived.map_err(|why| {
        let mut text = format!("seed {}: {why}\n{plan:#?}\n", plan.seed);
        for line in story {
            let _ = writeln!(text, "{line}");
        }
        text
    })
}

fn migrate(plan: &Plan, story: &mut Vec<String>) -> Result<(), String> {
    let mut here = Side::new(plan, Role::Source, SIZE);
    let mut there = Side::new(plan, Role::Destination, SIZE);
    stamped_image(&here.host.image, SIZE);
    let mut expected = Expected::stamped(0..SIZE);
    for (number, leg) in plan.legs.iter().enumerate() {
        if !there.host.image.exists() {
            sparse_file(&there.host.image, SIZE);
        }
        if number == 0 {
            here.fill();
            there.fill();
        }
        story.push(format!("-- from {:?}", here.host.image));
        let running = Running::begin(plan, leg, (&mut here, &mut there), &expected, story);
        expected = running.live()?;
        std::mem::swap(&mut here, &mut there);
    }
    Ok(())
}

impl<'a> Running<'a> {
    fn begin(
        plan: &Plan,
        leg: &'a Leg,
        (source, destination): (&'a mut Side, &'a mut Side),
        expected: &Expected,
        story: &'a mut Vec<String>,
    ) -> Running<'a> {
        let proxy = Proxy::to(destination.host.address, CutAt::Never);
        let doors = [source.host.address, destination.host.address].map(Endpoint::Tcp);
        let (may_fail, seed) = (may_fail(plan), plan.seed);
        let manner = ClientOptions { durable: DURABLE, may_fail, seed };
        let clients = Clients::start(doors, expected, manner);
        let mut operator = Operator::of(&source.host, proxy.address, leg.unlink);
        operator.pause(true);
        source.mode = Mode::Serve;
        destination.mode = Mode::Listen;
        Running {
            leg,
            began: Instant::now(),
            source,
            destination,
            proxy,
            operator,
            clients,
            pending: leg.events.clone(),
            undo: Vec::new(),
            story,
            asked_to_end: false,
        }
    }

    fn live(mut self) -> Result<Expected, String> {
        self.happen(|moment, _| moment == Moment::Before);
        self.until("clients are at work", SETTLED, |leg| {
            leg.clients.replies(Role::Source) > AT_WORK || leg.needs_healing()
        })?;
        self.operator.pause(false);
        self.began = Instant::now();
        self.until("everything has happened", HAPPENED, |leg| {
            leg.pending.is_empty() && leg.undo.is_empty()
        })?;
        self.note("everything is put right");
        self.source.heal();
        self.destination.heal();
        self.until("the disk has moved", SETTLED, |leg| leg.has_moved())?;
        let before = self.clients.replies(Role::Destination);
        self.until("clients are at work at the destination", SETTLED, |leg| {
            leg.clients.replies(Role::Destination) > before + AT_WORK
        })?;
        self.judge()
    }

    /// A source that cannot even read its record does not serve before that is put right.
    fn needs_healing(&self) -> bool {
        self.began.elapsed() > Duration::from_secs(2)
    }

    /// Goes on until it is done.
    fn until(
        &mut self,
        what: &str,
        patience: Duration,
        mut done: impl FnMut(&mut Running<'_>) -> bool,
    ) -> Result<(), String> {
        let start = Instant::now();
        while !done(self) {
            let late = self.began.elapsed() > NEVER;
            self.happen(|moment, leg| leg.has_come(moment) || late);
            self.take_back();
            self.look_after_source()?;
            self.look_after_destination()?;
            let news = self.operator.news();
            news.into_iter().for_each(|news| self.note(&news));
            if let Some(trouble) = self.clients.violation() {
                return Err(self.with_output(&trouble));
            }
            if start.elapsed() > patience {
                return Err(self.with_output(&format!("waited in vain until {what}")));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    fn side(&mut self, role: Role) -> &mut Side {
        match role {
            Role::Source => self.source,
            Role::Destination => self.destination,
        }
    }

    /// Whether it is time. Records are looked at again later, by [`Running::happen`], if the
    /// moment is some time after that.
    fn has_come(&self, moment: Moment) -> bool {
        match moment {
            Moment::Before => true,
            Moment::After(time) => !self.operator.is_paused() && self.began.elapsed() >= time,
            Moment::Record(role, word, then) => {
                let side = if role == Role::Source { &self.source } else { &self.destination };
                let there = side.host.record() == word;
                if there {
                    std::thread::sleep(then);
                }
                there
            }
        }
    }

    /// Lets everything happen whose moment has come.
    fn happen(&mut self, has_come: impl Fn(Moment, &Running<'_>) -> bool) {
        let mut later = Vec::new();
        for event in std::mem::take(&mut self.pending) {
            if has_come(event.moment, self) {
                self.note(&format!("{:?} {:?}", event.moment, event.deed));
                self.carry_out(&event.deed);
            } else {
                later.push(event);
            }
        }
        self.pending = later;
    }

    fn carry_out(&mut self, deed: &Deed) {
        match deed {
            Deed::Kill(role) => self.side(*role).kill(),
            Deed::KillBoth => {
                self.source.kill();
                self.destination.kill();
            }
            Deed::Terminate(role) => {
                self.asked_to_end = true;
                self.side(*role).terminate();
            }
            Deed::Freeze(role, time) => {
                self.side(*role).freeze(true);
                self.later(*time, Undo::Thaw(*role));
            }
            Deed::Cut(time) => {
                self.proxy.cut();
                self.later(*time, Undo::Mend);
            }
            Deed::Silence(time) => {
                self.proxy.set_paused(true);
                self.later(*time, Undo::Speak);
            }
            Deed::Reset => self.proxy.reset(),
            Deed::CallOff => self.operator.call_off(),
            Deed::Break(role, faults, time) => {
                self.side(*role).faults.set(faults);
                self.later(*time, Undo::Heal(*role));
            }
        }
    }

    fn later(&mut self, time: Duration, undo: Undo) {
        self.undo.push((Instant::now() + time, undo));
    }

    /// Takes back everything whose time is over.
    fn take_back(&mut self) {
        let now = Instant::now();
        let due = self.undo.extract_if(.., |(when, _)| *when <= now);
        for (_, undo) in due.collect::<Vec<_>>() {
            match undo {
                Undo::Thaw(role) => self.side(role).freeze(false),
                Undo::Mend => self.proxy.repair(),
                Undo::Speak => self.proxy.set_paused(false),
                Undo::Heal(role) => self.side(role).faults.set(&[]),
            }
        }
    }

    fn look_after_source(&mut self) -> Result<(), String> {
        let Some((status, said)) = self.source.look_after() else { return Ok(()) };
        let record = self.source.host.record();
        let is_gone = !self.source.host.image.exists() || record == "departed";
        self.note(&format!("source: {status}, record {record:?}, saying {said}"));
        if is_gone {
            self.source.mode = Mode::Nothing;
        } else if status.success() && record != "departing" && !self.asked_to_end {
            // With *departing*, the next one asks the destination.
            return Err("the source ends as after a migration, and has no record of it".to_owned());
        }
        Ok(())
    }

    fn look_after_destination(&mut self) -> Result<(), String> {
        let Some((status, said)) = self.destination.look_after() else { return Ok(()) };
        let record = self.destination.host.record();
        self.note(&format!("destination: {status}, record {record:?}, saying {said}"));
        if self.destination.mode == Mode::Listen && status.success() {
            if record != "ours" {
                return Err("the destination took the disk, and has no record of it".to_owned());
            }
            self.destination.mode = Mode::Serve;
        }
        Ok(())
    }

    fn has_moved(&mut self) -> bool {
        self.source.mode == Mode::Nothing && self.destination.mode == Mode::Serve
    }

    /// Everything is at rest: is the disk at one place, with everything in it?
    fn judge(self) -> Result<Expected, String> {
        let trouble = self.clients.violation();
        let expected = self.clients.stop();
        drop(self.operator);
        let image = &self.destination.host.image.clone();
        let lost = trouble.or_else(|| expected.missing_in(image, DURABLE));
        let ended = self.destination.stop();
        self.story.push(format!("destination, at last: {ended:?}"));
        if let Some(lost) = lost.or_else(|| expected.missing_in(image, DURABLE)) {
            return Err(lost);
        }
        if !ended.is_some_and(|(status, _)| status.success()) {
            return Err("the destination does not end well".to_owned());
        }
        let record = self.destination.host.record();
        if record != "ours" {
            return Err(format!("the destination's record is {record:?}"));
        }
        if self.source.host.image.exists() {
            self.source.refuses_to_serve().map_err(|why| format!("the source: {why}"))?;
        } else if !self.leg.unlink {
            return Err("the source's image is gone".to_owned());
        }
        Ok(expected)
    }

    fn note(&mut self, what: &str) {
        self.story.push(format!("{:6} ms: {}", self.began.elapsed().as_millis(), shortened(what)));
    }

    fn with_output(&mut self, why: &str) -> String {
        let (here, there) = (self.source.said(), self.destination.said());
        let records = [self.source.host.record(), self.destination.host.record()];
        self.note(&format!("records {records:?}\nsource: {here}\ndestination: {there}"));
        why.to_owned()
    }
}

/// Without the lines of a log that tell of clients that came and went as they should.
fn shortened(text: &str) -> String {
    let ends = [
        " connected",
        ": the client closed the connection",
        "Connection reset by peer (os error 104)",
    ];
    let lines = text.lines().filter(|line| !ends.iter().any(|end| line.ends_with(end)));
    lines.collect::<Vec<_>>().join("\n")
}

/// Whether clients may be told that something failed.
fn may_fail(plan: &Plan) -> bool {
    let events = plan.legs.iter().flat_map(|leg| &leg.events);
    let full = [plan.source, plan.destination]
        .iter()
        .any(|setting| matches!(setting.medium, Medium::FullExt4 { .. }));
    full || events.into_iter().any(|event| matches!(event.deed, Deed::Break(..)))
}

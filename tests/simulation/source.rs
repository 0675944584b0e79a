//! The source host: what `source.rs` and `serve` do around the machine, one action a turn.

use super::Mutation;
use super::medium::{Medium, Stamp, blocks};
use super::net::{Down, Up};
use super::transitions;
use super::world::{Host, World};
use flexnbd::disk::dirty::{BLOCK, DirtyBitmap};
use flexnbd::disk::ownership::{ForServe, Id, Provenance, Record, RemoteAddress, for_serve};
use flexnbd::migration::job::{
    Action, DestinationInfo, DestinationRequest, Event, HandoverVerdict, Job, News, Obstacle,
    OperatorRequest, Outcome, RecordKind, RequestKind, Trouble, handover_verdict,
};
use flexnbd::migration::machine::Machine;
use flexnbd::migration::plan::{Caps, Content, Limits};
use flexnbd::migration::wire::{Answer, Has, Question, Token};
use flexnbd::range::Range;
use std::num::NonZeroU64;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) medium: Medium,
    pub(crate) role: Role,
    pub(crate) gate_closed: bool,
    /// When the closed gate opens by itself.
    gate_end: Option<Duration>,
    /// It has.
    gate_expired: bool,
    /// Writes inside the gate.
    pub(crate) visits: usize,
    pub(crate) dirty: Option<DirtyBitmap>,
}

/// What its process does.
#[derive(Debug)]
pub(crate) enum Role {
    Down,
    Serving,
    Migrating(Box<Run>),
    /// Restarted with the record *departing*: serves nothing, asks the destination.
    Asking(Ask),
    /// Restarted with the record *departed*, or exited with success.
    Moved,
}

impl Source {
    pub(crate) fn new(medium: Medium) -> Self {
        Self {
            medium,
            role: Role::Down,
            gate_closed: false,
            gate_end: None,
            gate_expired: false,
            visits: 0,
            dirty: None,
        }
    }

    fn open_gate(&mut self) {
        (self.gate_closed, self.gate_end, self.gate_expired) = (false, None, false);
    }
}

#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) machine: Machine,
    pub(crate) action: Action,
    connection: Option<usize>,
    /// A second one, on which it is asked what has become of the handover.
    asking: Option<usize>,
    /// The action is half done.
    half: bool,
    deadline: Duration,
    first_token: Option<Token>,
    /// For [`Mutation::ReadBeforeMark`]: what was read before the mark was taken.
    early: Option<Vec<Stamp>>,
    /// For [`Mutation::ForgetAfterRead`]: what was found before marks were forgotten.
    early_look: Option<Event>,
}

#[derive(Debug)]
pub(crate) struct Ask {
    id: Id,
    before: Provenance,
    connection: Option<usize>,
    pub(crate) at: Duration,
    verdict: Option<HandoverVerdict>,
}

const SECOND: Duration = Duration::from_secs(1);

impl World {
    /// Whether clients can write here.
    pub(crate) fn source_serves(&self) -> bool {
        matches!(self.source.role, Role::Serving | Role::Migrating(_)) && !self.source.gate_closed
    }

    fn size(&self) -> u64 {
        self.known.len() as u64 * BLOCK
    }

    /// The process starts, as `serve`.
    pub(crate) fn start_source(&mut self) {
        if !self.source.medium.exists.now {
            self.source.role = Role::Moved;
            return;
        }
        if self.mutation != Mutation::TrustUnsyncedRecord {
            self.source.medium.record.sync();
        }
        match for_serve(self.source.medium.record.now.as_ref()) {
            ForServe::Serve(_) => self.serve_at_source(),
            ForServe::Refuse(_) => self.source.role = Role::Moved,
            ForServe::Ask { id, before, .. } => {
                self.tally.asked_after_restart += 1;
                let ask = Ask { id, before, connection: None, at: self.now, verdict: None };
                self.source.role = Role::Asking(ask);
            }
        }
    }

    /// Serves what is there; a power cut may have taken writes that were not flushed.
    fn serve_at_source(&mut self) {
        self.source.role = Role::Serving;
        self.source.open_gate();
        if std::mem::take(&mut self.source_lost_power) {
            for (block, known) in self.known.iter_mut().enumerate() {
                known.acknowledged = self.source.medium.stamp(block);
                known.perhaps.clear();
            }
        }
    }

    /// An operator orders a migration.
    pub(crate) fn start_migration(&mut self) {
        self.migrations += 1;
        let mut id = [0; 16];
        id[0] = self.migrations;
        let to = RemoteAddress::new("destination 4779").expect("a place");
        let before = match self.source.medium.record.now {
            Some(Record::Ours(title)) => title,
            _ => Provenance::Native,
        };
        let data_max = BLOCK << self.dice.below(2);
        let job = Job {
            unlink: self.dice.once_in(3),
            speed: NonZeroU64::new(self.dice.below(3) * 40 * BLOCK),
            limits: Limits {
                data_max,
                zero_max: 4 * BLOCK,
                window: 3 * BLOCK,
                requests: 4,
                zeroes: 3,
            },
            pause: Duration::from_millis(self.dice.below(2) * 20),
            timeout: 3 * SECOND,
            ..Job::new(Id(id), self.size(), to, before)
        };
        let mut machine = Machine::new(job, self.now).expect("large enough");
        let action = machine.step(self.now, Event::Begin);
        self.source.dirty = Some(DirtyBitmap::new(self.size()).expect("memory"));
        self.source.role = Role::Migrating(Box::new(Run {
            machine,
            action,
            connection: None,
            asking: None,
            half: false,
            deadline: Duration::ZERO,
            first_token: None,
            early: None,
            early_look: None,
        }));
    }

    /// When the source would do something if nothing came.
    pub(crate) fn source_waits_until(&self) -> Option<Duration> {
        match &self.source.role {
            Role::Migrating(run) => match run.action {
                Action::Wait { until } => Some(until),
                Action::Connect(_) | Action::Ask(_) if run.half => Some(run.deadline),
                _ => None,
            },
            Role::Asking(ask) => Some(ask.at),
            _ => None,
        }
    }

    pub(crate) fn order(&mut self) {
        let speed = NonZeroU64::new(self.dice.below(2) * 100 * BLOCK);
        let order = if self.dice.once_in(3) {
            OperatorRequest::Break
        } else {
            OperatorRequest::Speed(speed)
        };
        if let Role::Migrating(run) = &mut self.source.role {
            let _ = run.machine.request(order);
        }
    }

    /// Sessions that have waited long enough open the gate, whatever the copier does.
    pub(crate) fn expire_gate(&mut self) {
        let end = self.source.gate_end.filter(|end| self.now >= *end);
        if end.is_some() && self.source.gate_closed {
            self.trace(|| "source: the gate opens by itself".to_owned());
            self.tally.expired += 1;
            (self.source.gate_closed, self.source.gate_end) = (false, None);
            self.source.gate_expired = true;
        }
    }

    pub(crate) fn source_turn(&mut self) -> Result<bool, String> {
        match std::mem::replace(&mut self.source.role, Role::Down) {
            Role::Migrating(run) => self.migrate(run),
            Role::Asking(ask) => self.ask(ask),
            Role::Serving if self.migrations < 3 && self.dice.once_in(4) => {
                self.start_migration();
                Ok(true)
            }
            role => {
                self.source.role = role;
                Ok(false)
            }
        }
    }

    fn migrate(&mut self, mut run: Box<Run>) -> Result<bool, String> {
        let event = self.perform(&mut run)?;
        let Some(event) = event else {
            self.source.role = Role::Migrating(run);
            return Ok(false);
        };
        run.half = false;
        self.trace(|| format!("source: {event:?}"));
        let (action, unlisted) = transitions::step(&mut run.machine, self.now, event);
        run.action = action;
        self.unlisted.extend(unlisted);
        self.trace(|| format!("source: -> {} {:?}", run.machine.phase_name(), run.action));
        if self.source.gate_closed && !matches!(run.action, Action::CloseGate { .. }) {
            self.source.gate_end = run.machine.freeze_end();
        }
        while let Some(news) = run.machine.news() {
            self.hear(&news);
        }
        match &run.action {
            Action::End(outcome) => self.migration_ended(outcome.clone())?,
            _ => self.source.role = Role::Migrating(run),
        }
        Ok(true)
    }

    fn hear(&mut self, news: &News) {
        match news {
            News::Obstructed(Obstacle::Acknowledgement(_)) => {
                self.tally.in_doubt += 1;
                if self.mutation == Mutation::ServeInDoubt {
                    self.source.open_gate();
                }
            }
            News::Resumed => self.tally.resumed += 1,
            News::Restarted => self.tally.restarted += 1,
            News::HandingOverAgain => self.tally.handed_over_again += 1,
            News::Obstructed(Obstacle::Requests(_)) => self.tally.gate_busy += 1,
            News::Obstructed(Obstacle::LastCopy(_)) => self.tally.thawed += 1,
            _ => {}
        }
    }

    fn migration_ended(&mut self, outcome: Outcome) -> Result<(), String> {
        self.source.dirty = None;
        if outcome != (Outcome::Arrived { acknowledged: true }) {
            self.tally.kept += 1;
            self.source.role = Role::Serving;
            return if self.source.gate_closed {
                Err("(4) the migration ended, and clients are still waiting".to_owned())
            } else {
                Ok(())
            };
        }
        self.tally.arrived += 1;
        self.source.role = Role::Moved;
        let Medium { record, exists, .. } = &self.source.medium;
        let departed = matches!(record.safe, Some(Record::Departed { .. }));
        if exists.safe && !departed {
            return Err("(3) the source exited, and nothing durable says why".to_owned());
        }
        Ok(())
    }

    /// Does the action, or a part of it; none when it is not over yet.
    fn perform(&mut self, run: &mut Run) -> Result<Option<Event>, String> {
        Ok(match run.action.clone() {
            Action::Connect(question) => self.connect(run, question),
            Action::Ask(question) => self.ask_beside(run, question),
            Action::Look(range) => self.look(run, range),
            Action::TakeDirty { from, longest } => self.take_dirty(run, from, longest),
            Action::Send(request) => Some(self.send(run, request)),
            Action::Wait { until } => self.wait(run, until),
            Action::Probe => {
                let turned = self.dice.once_in(2);
                Some(Event::Visits { turned })
            }
            Action::CloseGate { .. } => self.close_gate(),
            Action::Seal => self.seal(run),
            Action::OpenGate => {
                self.source.open_gate();
                Some(Event::Done)
            }
            Action::Throttle(_) => Some(Event::Done),
            Action::Record(note) => self.write_record(run, note),
            Action::Unlink => {
                self.source.medium.exists.now = false;
                self.in_two_turns(run, |medium| medium.exists.sync())
            }
            Action::Retire => {
                self.check_arrived("sessions ended")?;
                Some(Event::Done)
            }
            Action::HangUp | Action::Disconnect => {
                self.hang_up(run.connection.take());
                Some(Event::Done)
            }
            Action::End(_) => None,
        })
    }

    /// The first turn does it, the second makes it durable: a power cut can come between.
    fn in_two_turns(&mut self, run: &mut Run, finish: fn(&mut Medium)) -> Option<Event> {
        if !std::mem::replace(&mut run.half, true) {
            return None;
        }
        finish(&mut self.source.medium);
        Some(Event::Done)
    }

    fn write_record(&mut self, run: &mut Run, note: RecordKind) -> Option<Event> {
        let skipped = match note {
            RecordKind::Departing => self.mutation == Mutation::HandoverBeforeDeparting,
            RecordKind::Departed => self.mutation == Mutation::ExitBeforeRecord,
            RecordKind::Before => false,
        };
        if skipped {
            return Some(Event::Done);
        }
        if note == RecordKind::Departing && self.faulty && self.dice.once_in(30) {
            return Some(Event::Failed("no space for the record".to_owned()));
        }
        if note == RecordKind::Before && self.faulty && self.dice.once_in(4) {
            return Some(Event::Failed("the record's medium fails".to_owned()));
        }
        if note == RecordKind::Departing && self.faulty && run.half && self.dice.once_in(20) {
            // The medium is slow.
            self.now += 5 * SECOND;
        }
        self.source.medium.record.now = run.machine.job().record(note, 1);
        if note == RecordKind::Departing && self.mutation == Mutation::DepartingNotDurable {
            return Some(Event::Done);
        }
        self.in_two_turns(run, |medium| medium.record.sync())
    }

    fn close_gate(&mut self) -> Option<Event> {
        self.source.gate_closed = true;
        if self.source.visits == 0 {
            return Some(Event::Done);
        }
        if self.dice.once_in(20) {
            self.source.open_gate();
            return Some(Event::Failed("a visit does not end".to_owned()));
        }
        None
    }

    /// Clients may come between the record and this.
    fn seal(&mut self, run: &mut Run) -> Option<Event> {
        if !std::mem::replace(&mut run.half, true) {
            if self.faulty && self.dice.once_in(10) {
                self.now += 5 * SECOND;
            }
            return None;
        }
        if self.source.gate_expired && self.mutation != Mutation::HandoverAfterExpiry {
            return Some(Event::Failed("the gate has opened by itself".to_owned()));
        }
        self.source.gate_end = None;
        Some(Event::Done)
    }

    fn look(&mut self, run: &mut Run, range: Range) -> Option<Event> {
        if self.faulty && self.dice.once_in(3000) {
            self.hang_up(run.connection.take());
            return Some(Event::Unreadable("bad sector".to_owned()));
        }
        if self.mutation == Mutation::ForgetAfterRead && run.early_look.is_none() {
            run.early_look = Some(self.found(range));
            return None;
        }
        if let Some(dirty) = &self.source.dirty {
            dirty.forget(range);
        }
        Some(run.early_look.take().unwrap_or_else(|| self.found(range)))
    }

    fn found(&mut self, range: Range) -> Event {
        let all = blocks(range);
        let medium = &self.source.medium;
        let zero = medium.stamp(all.start) == 0;
        let same =
            all.clone().take_while(|block| (medium.stamp(*block) == 0) == zero).count() as u64;
        let said = 1 + self.dice.below(same);
        let content = if zero { Content::Zeros } else { Content::Data };
        Event::Looked { range: range.split(said * BLOCK).0, content }
    }

    fn take_dirty(&mut self, run: &mut Run, from: u64, longest: u64) -> Option<Event> {
        if self.mutation == Mutation::ReadBeforeMark && run.early.is_none() {
            let cells = &self.source.medium.cells;
            run.early = Some(cells.iter().map(|cell| cell.now.stamp).collect());
            return None;
        }
        let dirty = self.source.dirty.as_ref()?;
        let taken = dirty.take_next(from, longest);
        if taken.is_none() {
            run.early = None;
        }
        Some(Event::Taken { run: taken, left: dirty.bytes() })
    }

    fn send(&mut self, run: &mut Run, request: DestinationRequest) -> Event {
        let Some(at) = run.connection else { return Event::Lost("hung up".to_owned()) };
        let cookie = request.cookie;
        let message = match request.kind {
            RequestKind::Write(range) => {
                let early = run.early.take();
                let read = |block: usize| match &early {
                    Some(stamps) => stamps[block],
                    None => self.source.medium.stamp(block),
                };
                self.tally.data_blocks += blocks(range).len() as u64;
                Up::Write { cookie, range, stamps: blocks(range).map(read).collect() }
            }
            RequestKind::Zero(range) => Up::Zero { cookie, range },
            RequestKind::Flush => Up::Flush { cookie },
            RequestKind::Handover(handover) => {
                self.tally.handovers += 1;
                if self.mutation == Mutation::UnlinkBeforeAcknowledgement {
                    self.source.medium.exists = super::medium::Kept::new(false);
                }
                Up::Handover { cookie, handover }
            }
            RequestKind::Disconnect => Up::Goodbye,
        };
        let connection = &mut self.net.all[at];
        if connection.destination_closed && self.dice.once_in(2) {
            return Event::Unsent("broken pipe".to_owned());
        }
        connection.send_up(message);
        Event::Done
    }

    fn wait(&mut self, run: &mut Run, until: Duration) -> Option<Event> {
        if let Some(at) = run.connection {
            if self.net.up
                && let Some(Down::Reply { cookie, error }) = self.net.all[at].down.pop_front()
            {
                return Some(Event::Reply { cookie, error });
            }
            let connection = &self.net.all[at];
            if connection.ended_for_source() || connection.dead && self.dice.once_in(8) {
                return Some(Event::Lost("connection reset".to_owned()));
            }
        }
        (self.now >= until).then_some(Event::Tick)
    }

    fn connect(&mut self, run: &mut Run, question: Question) -> Option<Event> {
        if !run.half {
            if !self.net.up || !self.destination_accepts() {
                return Some(Event::Unreachable(Trouble::Connect("refused".to_owned())));
            }
            run.connection = Some(self.say_hello(question));
            (run.half, run.deadline) = (true, self.now + SECOND);
            return None;
        }
        let at = run.connection?;
        let event = match self.hear_answer(at, run.deadline)? {
            Ok(answer) => Event::Greeted(self.peer(run, answer)),
            Err(trouble) => {
                self.hang_up(run.connection.take());
                Event::Unreachable(trouble)
            }
        };
        Some(event)
    }

    /// The first connection stays until the second is there.
    fn ask_beside(&mut self, run: &mut Run, question: Question) -> Option<Event> {
        if !run.half {
            if !self.net.up || !self.destination_accepts() {
                return Some(Event::Unreachable(Trouble::Connect("refused".to_owned())));
            }
            self.tally.asked_beside += 1;
            run.asking = Some(self.say_hello(question));
            (run.half, run.deadline) = (true, self.now + SECOND);
            return None;
        }
        let at = run.asking?;
        let answer = self.hear_answer(at, run.deadline)?;
        run.asking = None;
        Some(match answer {
            Ok(answer) => {
                self.hang_up(run.connection.replace(at));
                Event::Greeted(self.peer(run, answer))
            }
            Err(trouble) => {
                self.hang_up(Some(at));
                Event::Unreachable(trouble)
            }
        })
    }

    fn peer(&self, run: &mut Run, mut answer: Answer) -> DestinationInfo {
        if let (Mutation::ResumeAcrossTokens, Some(token)) = (self.mutation, answer.listening) {
            let first = *run.first_token.get_or_insert(token);
            if first != token {
                answer = Answer { listening: Some(first), has: Has::Incomplete };
            }
        }
        DestinationInfo {
            size: self.size(),
            read_only: false,
            flush: self.flush,
            caps: Caps { zeroes: true, block_min: BLOCK, data_max: 32 << 20 },
            answer: Some(answer),
        }
    }

    fn say_hello(&mut self, question: Question) -> usize {
        let at = self.net.open();
        self.net.all[at].send_up(Up::Hello(question));
        at
    }

    /// The answer to a hello, or why there is none; none when it may yet come.
    fn hear_answer(&mut self, at: usize, deadline: Duration) -> Option<Result<Answer, Trouble>> {
        let connection = &mut self.net.all[at];
        let message = if self.net.up { connection.down.pop_front() } else { None };
        match message {
            Some(Down::Welcome(answer)) => Some(Ok(answer)),
            Some(_) => Some(Err(Trouble::Rejected("busy".to_owned()))),
            None if connection.ended_for_source() || self.now >= deadline => {
                Some(Err(Trouble::Silent("no greeting".to_owned())))
            }
            None => None,
        }
    }

    pub(crate) fn hang_up(&mut self, at: Option<usize>) {
        if let Some(at) = at {
            self.net.all[at].source_closed = true;
        }
    }

    /// A restarted source with the record *departing*.
    fn ask(&mut self, mut ask: Ask) -> Result<bool, String> {
        if let Some(verdict) = ask.verdict {
            self.source.medium.record.sync();
            match verdict {
                HandoverVerdict::Arrived => self.source.role = Role::Moved,
                HandoverVerdict::NotArrived | HandoverVerdict::Unknown => self.serve_at_source(),
            }
            return Ok(true);
        }
        let progress = self.ask_on(&mut ask);
        self.source.role = Role::Asking(ask);
        Ok(progress)
    }

    fn ask_on(&mut self, ask: &mut Ask) -> bool {
        let Some(at) = ask.connection else {
            if self.now < ask.at {
                return false;
            }
            ask.at = self.now + SECOND;
            if self.net.up && self.destination_accepts() {
                let question = Question { size: self.size(), id: ask.id };
                ask.connection = Some(self.say_hello(question));
            } else if self.mutation == Mutation::ServeOnUnreachable {
                self.judge(ask, HandoverVerdict::NotArrived);
            }
            return true;
        };
        let Some(answer) = self.hear_answer(at, ask.at) else { return false };
        self.hang_up(ask.connection.take());
        let mut verdict = handover_verdict(answer.as_ref().ok(), None);
        let ignorant = matches!(answer, Ok(Answer { has: Has::Nothing, .. }));
        if self.mutation == Mutation::NothingMeansNo && ignorant {
            verdict = HandoverVerdict::NotArrived;
        }
        self.trace(|| format!("source asks: {verdict:?}"));
        self.judge(ask, verdict);
        true
    }

    fn judge(&mut self, ask: &mut Ask, verdict: HandoverVerdict) {
        let to = RemoteAddress::new("destination 4779").expect("a place");
        self.source.medium.record.now = match verdict {
            HandoverVerdict::Arrived => Some(Record::Departed { id: ask.id, when: 1, to }),
            HandoverVerdict::NotArrived => ask.before.record(),
            HandoverVerdict::Unknown => return,
        };
        ask.verdict = Some(verdict);
    }

    /// The process is gone; with `power`, so is what was not durable.
    pub(crate) fn kill_source(&mut self, power: bool) {
        let connections = match std::mem::replace(&mut self.source.role, Role::Down) {
            Role::Migrating(run) => [run.connection, run.asking],
            Role::Asking(ask) => [ask.connection, None],
            Role::Down | Role::Serving | Role::Moved => [None, None],
        };
        for at in connections.into_iter().flatten() {
            if power {
                self.net.all[at].cut(&mut self.dice);
            }
            self.net.all[at].source_closed = true;
        }
        self.source.dirty = None;
        self.source.open_gate();
        self.abandon_writes(Host::Source);
        if power {
            self.source.medium.power_cut(&mut self.dice);
            self.source_lost_power = true;
        }
    }
}

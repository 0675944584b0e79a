//! The source host: models `serve` and `migration/source.rs`, which drive the real machine. Performs
//! at most one action of the machine per turn.

use super::Mutation;
use super::image::{Image, Stamp, block_indices};
use super::network::{ToDestination, ToSource};
use super::transitions;
use super::world::{Host, World};
use flexnbd::disk::dirty::{BLOCK, DirtyBitmap};
use flexnbd::disk::ownership::{ForServe, Id, Provenance, Record, RemoteAddress, for_serve};
use flexnbd::migration::job::{
    Action, DestinationInfo, DestinationRequest, Event, HandoverVerdict, Job, News, Obstacle,
    OfferedTerms, OperatorRequest, Outcome, RecordKind, RequestKind, Trouble, handover_verdict,
};
use flexnbd::migration::machine::Machine;
use flexnbd::migration::plan::{Caps, Content, Limits};
use flexnbd::migration::wire::{Answer, Has, Question, Token};
use flexnbd::nbd::wire::TransmissionFlags;
use flexnbd::range::Range;
use std::num::NonZeroU64;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) image: Image,
    pub(crate) process: SourceProcess,
    pub(crate) gate_closed: bool,
    /// When the freeze expires and the gate opens by itself.
    gate_end: Option<Duration>,
    /// The freeze has expired.
    gate_expired: bool,
    /// The destination's disk has taken the place of the image: clients of this host write to it.
    pub(crate) relays: bool,
    /// Number of writes inside the gate.
    pub(crate) visits: usize,
    pub(crate) dirty: Option<DirtyBitmap>,
}

/// The state of the source's process.
#[derive(Debug)]
pub(crate) enum SourceProcess {
    Down,
    Serving,
    Migrating(Box<Migration>),
    /// Restarted with the record *departing*: asks the destination whether the disk has arrived, and
    /// does not serve.
    Asking(HandoverQuery),
    /// The disk has left, and the process passes the requests of its clients on.
    Relaying,
    /// Restarted with the record *departed*, or exited with success.
    Moved,
}

impl Source {
    pub(crate) fn new(image: Image) -> Self {
        Self {
            image,
            process: SourceProcess::Down,
            gate_closed: false,
            gate_end: None,
            gate_expired: false,
            relays: false,
            visits: 0,
            dirty: None,
        }
    }

    fn open_gate(&mut self) {
        (self.gate_closed, self.gate_end, self.gate_expired) = (false, None, false);
    }
}

#[derive(Debug)]
pub(crate) struct Migration {
    pub(crate) machine: Machine,
    pub(crate) action: Action,
    connection: Option<usize>,
    /// The connection on which the source asks about the outcome of the handover.
    second_connection: Option<usize>,
    /// The action needs a second turn.
    is_half_done: bool,
    deadline: Duration,
    first_token: Option<Token>,
    /// For [`Mutation::ReadBeforeMark`]: the bytes read before the mark was taken.
    stale_stamps: Option<Vec<Stamp>>,
    /// For [`Mutation::ClearMarkAfterRead`]: the content looked up before marks were cleared.
    premature_lookup: Option<Event>,
}

#[derive(Debug)]
pub(crate) struct HandoverQuery {
    id: Id,
    before: Provenance,
    connection: Option<usize>,
    /// When the next attempt begins, or this one times out.
    pub(crate) deadline: Duration,
    verdict: Option<HandoverVerdict>,
}

const SECOND: Duration = Duration::from_secs(1);

impl World {
    /// Whether clients of the source get answers.
    fn source_answers(&self) -> bool {
        let answers = matches!(
            self.source.process,
            SourceProcess::Serving | SourceProcess::Migrating(_) | SourceProcess::Relaying
        );
        answers && !self.source.gate_closed
    }

    /// Whether clients can write to the source's image.
    pub(crate) fn source_serves(&self) -> bool {
        self.source_answers() && !self.source.relays
    }

    /// Whether clients of the source can write to the destination's image.
    pub(crate) fn source_relays(&self) -> bool {
        self.source_answers() && self.source.relays && self.network.is_up
    }

    fn size(&self) -> u64 {
        self.expected.len() as u64 * BLOCK
    }

    /// Starts the process, as `flexnbd serve`.
    pub(crate) fn start_source(&mut self) {
        self.source.relays = false;
        if !self.source.image.exists.current {
            self.source.process = SourceProcess::Moved;
            return;
        }
        if self.mutation != Mutation::TrustUnsyncedRecord {
            self.source.image.record.sync();
        }
        match for_serve(self.source.image.record.current.as_ref()) {
            ForServe::Serve(_) => self.serve_at_source(),
            ForServe::Refuse(_) => self.source.process = SourceProcess::Moved,
            ForServe::Ask { id, before, .. } => {
                self.coverage.asked_after_restart += 1;
                let query = HandoverQuery {
                    id,
                    before,
                    connection: None,
                    deadline: self.now,
                    verdict: None,
                };
                self.source.process = SourceProcess::Asking(query);
            }
        }
    }

    /// Serves the image. After a power cut, clients expect its content, without writes that were not
    /// flushed.
    fn serve_at_source(&mut self) {
        self.source.process = SourceProcess::Serving;
        self.source.open_gate();
        if std::mem::take(&mut self.source_lost_power) {
            for (block, expected) in self.expected.iter_mut().enumerate() {
                expected.acknowledged = self.source.image.stamp(block);
                expected.unacknowledged.clear();
            }
        }
    }

    /// Starts a migration, as the operator's `mirror` does.
    pub(crate) fn start_migration(&mut self) {
        self.migrations += 1;
        let mut id = [0; 16];
        id[0] = self.migrations;
        let to = RemoteAddress::new("destination 4779").expect("a valid address");
        let before = match self.source.image.record.current {
            Some(Record::Ours(provenance)) => provenance,
            _ => Provenance::Native,
        };
        let data_max = BLOCK << self.rng.below(2);
        let job = Job {
            unlink: self.rng.one_in(3),
            relay: self.rng.one_in(2).then(OfferedTerms::default),
            speed: NonZeroU64::new(self.rng.below(3) * 40 * BLOCK),
            limits: Limits {
                data_max,
                zero_max: 4 * BLOCK,
                window: 3 * BLOCK,
                requests: 4,
                zeroes: 3,
            },
            pause: Duration::from_millis(self.rng.below(2) * 20),
            timeout: 3 * SECOND,
            ..Job::new(Id(id), self.size(), to, before)
        };
        let mut machine = Machine::new(job, self.now).expect("large enough");
        let action = machine.step(self.now, Event::Begin);
        self.source.dirty = Some(DirtyBitmap::new(self.size()).expect("memory"));
        self.source.process = SourceProcess::Migrating(Box::new(Migration {
            machine,
            action,
            connection: None,
            second_connection: None,
            is_half_done: false,
            deadline: Duration::ZERO,
            first_token: None,
            stale_stamps: None,
            premature_lookup: None,
        }));
    }

    /// The next deadline of the source; `None` if it waits for none.
    pub(crate) fn source_waits_until(&self) -> Option<Duration> {
        match &self.source.process {
            SourceProcess::Migrating(migration) => match migration.action {
                Action::Wait { until } => Some(until),
                Action::Connect(_) | Action::Ask(_) if migration.is_half_done => {
                    Some(migration.deadline)
                }
                _ => None,
            },
            SourceProcess::Asking(query) => Some(query.deadline),
            _ => None,
        }
    }

    /// Changes the speed of the migration or breaks it off, if one runs.
    pub(crate) fn send_operator_request(&mut self) {
        let speed = NonZeroU64::new(self.rng.below(2) * 100 * BLOCK);
        let request =
            if self.rng.one_in(3) { OperatorRequest::Break } else { OperatorRequest::Speed(speed) };
        if let SourceProcess::Migrating(migration) = &mut self.source.process {
            let _ = migration.machine.request(request);
        }
    }

    /// Opens the gate once the freeze has lasted too long, as the waiting sessions do.
    pub(crate) fn expire_gate(&mut self) {
        let end = self.source.gate_end.filter(|end| self.now >= *end);
        if end.is_some() && self.source.gate_closed {
            self.trace(|| "source: the gate opens by itself".to_owned());
            self.coverage.gates_expired += 1;
            (self.source.gate_closed, self.source.gate_end) = (false, None);
            self.source.gate_expired = true;
        }
    }

    pub(crate) fn source_turn(&mut self) -> Result<bool, String> {
        match std::mem::replace(&mut self.source.process, SourceProcess::Down) {
            SourceProcess::Migrating(migration) => self.migrate(migration),
            SourceProcess::Asking(query) => self.query_destination(query),
            SourceProcess::Serving if self.migrations < 3 && self.rng.one_in(4) => {
                self.start_migration();
                Ok(true)
            }
            process => {
                self.source.process = process;
                Ok(false)
            }
        }
    }

    fn migrate(&mut self, mut migration: Box<Migration>) -> Result<bool, String> {
        let event = self.perform(&mut migration)?;
        let Some(event) = event else {
            self.source.process = SourceProcess::Migrating(migration);
            return Ok(false);
        };
        migration.is_half_done = false;
        self.trace(|| format!("source: {event:?}"));
        migration.action =
            transitions::step(&mut migration.machine, self.now, event, &self.unlisted);
        self.trace(|| {
            format!("source: -> {} {:?}", migration.machine.phase_name(), migration.action)
        });
        if self.source.gate_closed && !matches!(migration.action, Action::CloseGate { .. }) {
            self.source.gate_end = migration.machine.freeze_end();
        }
        while let Some(news) = migration.machine.news() {
            self.on_news(&news);
        }
        match &migration.action {
            Action::End(outcome) => self.migration_ended(outcome.clone())?,
            _ => self.source.process = SourceProcess::Migrating(migration),
        }
        Ok(true)
    }

    fn on_news(&mut self, news: &News) {
        match news {
            News::Obstructed(Obstacle::Acknowledgement(_)) => {
                self.coverage.in_doubt += 1;
                if self.mutation == Mutation::ServeInDoubt {
                    self.source.open_gate();
                }
            }
            News::Resumed => self.coverage.resumed += 1,
            News::Restarted => self.coverage.restarted += 1,
            News::HandingOverAgain => self.coverage.handed_over_again += 1,
            News::Obstructed(Obstacle::Requests(_)) => self.coverage.drains_refused += 1,
            News::Obstructed(Obstacle::LastCopy(_)) => self.coverage.final_copies_failed += 1,
            _ => {}
        }
    }

    fn migration_ended(&mut self, outcome: Outcome) -> Result<(), String> {
        self.source.dirty = None;
        if outcome != (Outcome::Arrived { acknowledged: true }) {
            self.coverage.not_arrived += 1;
            self.source.process = SourceProcess::Serving;
            return if self.source.gate_closed {
                Err("(4) the migration ended with the gate closed".to_owned())
            } else {
                Ok(())
            };
        }
        self.coverage.arrived += 1;
        self.source.process =
            if self.source.gate_closed { SourceProcess::Moved } else { SourceProcess::Relaying };
        let Image { record, exists, .. } = &self.source.image;
        let departed = matches!(record.durable, Some(Record::Departed { .. }));
        if exists.durable && !departed {
            return Err("(3) the source exited without a durable record".to_owned());
        }
        Ok(())
    }

    /// Performs the action or the first part of it. Returns the event, or `None` if the action is not
    /// complete.
    fn perform(&mut self, migration: &mut Migration) -> Result<Option<Event>, String> {
        Ok(match migration.action.clone() {
            Action::Connect(question) => self.connect(migration, question),
            Action::Ask(question) => self.ask_on_second_connection(migration, question),
            Action::Look(range) => self.look(migration, range),
            Action::TakeDirty { from, longest } => self.take_dirty(migration, from, longest),
            Action::Send(request) => Some(self.send(migration, request)),
            Action::Wait { until } => self.wait(migration, until),
            Action::Probe => {
                let turned = self.rng.one_in(2);
                Some(Event::Visits { turned })
            }
            Action::CloseGate { .. } => self.close_gate(),
            Action::Seal => self.seal(migration),
            Action::OpenGate => {
                self.source.open_gate();
                Some(Event::Done)
            }
            Action::Throttle(_) => Some(Event::Done),
            Action::Record(kind) => self.write_record(migration, kind),
            Action::Unlink => {
                self.source.image.exists.current = false;
                self.in_two_turns(migration, |image| image.exists.sync())
            }
            Action::Retire => {
                self.check_destination_owns("sessions ended")?;
                Some(Event::Done)
            }
            Action::Relay { proof } => Some(self.relay(proof.is_some())?),
            Action::HangUp | Action::Disconnect => {
                self.close_connection(migration.connection.take());
                Some(Event::Done)
            }
            Action::End(_) => None,
        })
    }

    /// Connects to the destination for the clients that wait, and opens the gate.
    fn relay(&mut self, has_proof: bool) -> Result<Event, String> {
        let Image { record, exists, .. } = &self.source.image;
        if exists.durable && !matches!(record.durable, Some(Record::Departed { .. })) {
            return Err(
                "(3) the source relays before its record says that the disk has left".into()
            );
        }
        if !has_proof {
            return Err("(4) the source relays to a destination that may not have the disk".into());
        }
        if self.faults_enabled && self.rng.one_in(20) {
            return Ok(Event::Failed("it does not offer enough".to_owned()));
        }
        let is_ready = self.network.is_up && self.destination_serves();
        if !is_ready {
            self.coverage.relays_delayed += 1;
            return Ok(Event::Unreachable(Trouble::Connect("refused".to_owned())));
        }
        self.coverage.relayed += 1;
        self.source.relays = self.mutation != Mutation::RelayFromOwnImage;
        self.source.open_gate();
        Ok(Event::Done)
    }

    /// Restarts the process while it relays: the next one finds the record *departed*, and the note of the
    /// last one.
    pub(crate) fn restart_relay(&mut self) {
        if !matches!(self.source.process, SourceProcess::Relaying) {
            return;
        }
        self.start_source();
        if matches!(self.source.process, SourceProcess::Moved) {
            self.coverage.relays_restarted += 1;
            (self.source.process, self.source.relays) = (SourceProcess::Relaying, true);
        }
    }

    /// The first turn changes the image, the second makes the change durable: a power cut can occur
    /// between them.
    fn in_two_turns(&mut self, migration: &mut Migration, finish: fn(&mut Image)) -> Option<Event> {
        if !std::mem::replace(&mut migration.is_half_done, true) {
            return None;
        }
        finish(&mut self.source.image);
        Some(Event::Done)
    }

    fn write_record(&mut self, migration: &mut Migration, kind: RecordKind) -> Option<Event> {
        let skipped = match kind {
            RecordKind::Departing => self.mutation == Mutation::HandoverBeforeDeparting,
            RecordKind::Departed => self.mutation == Mutation::ExitBeforeRecord,
            RecordKind::Before => false,
        };
        if skipped {
            return Some(Event::Done);
        }
        if kind == RecordKind::Departing && self.faults_enabled && self.rng.one_in(30) {
            return Some(Event::Failed("no space for the record".to_owned()));
        }
        if kind == RecordKind::Before && self.faults_enabled && self.rng.one_in(4) {
            return Some(Event::Failed("cannot write the record".to_owned()));
        }
        if kind == RecordKind::Departing
            && self.faults_enabled
            && migration.is_half_done
            && self.rng.one_in(20)
        {
            // The disk is slow.
            self.now += 5 * SECOND;
        }
        self.source.image.record.current = migration.machine.job().record(kind, 1);
        if kind == RecordKind::Departing && self.mutation == Mutation::DepartingNotDurable {
            return Some(Event::Done);
        }
        self.in_two_turns(migration, |image| image.record.sync())
    }

    fn close_gate(&mut self) -> Option<Event> {
        self.source.gate_closed = true;
        if self.source.visits == 0 {
            return Some(Event::Done);
        }
        if self.rng.one_in(20) {
            self.source.open_gate();
            return Some(Event::Failed("a visit does not end".to_owned()));
        }
        None
    }

    /// Takes two turns, so that clients act between the record and the seal.
    fn seal(&mut self, migration: &mut Migration) -> Option<Event> {
        if !std::mem::replace(&mut migration.is_half_done, true) {
            if self.faults_enabled && self.rng.one_in(10) {
                self.now += 5 * SECOND;
            }
            return None;
        }
        if self.source.gate_expired && self.mutation != Mutation::HandoverAfterFreeze {
            return Some(Event::Failed("the gate has opened by itself".to_owned()));
        }
        self.source.gate_end = None;
        Some(Event::Done)
    }

    fn look(&mut self, migration: &mut Migration, range: Range) -> Option<Event> {
        if self.faults_enabled && self.rng.one_in(3000) {
            self.close_connection(migration.connection.take());
            return Some(Event::Unreadable("bad sector".to_owned()));
        }
        if self.mutation == Mutation::ClearMarkAfterRead && migration.premature_lookup.is_none() {
            migration.premature_lookup = Some(self.look_up(range));
            return None;
        }
        if let Some(dirty) = &self.source.dirty {
            dirty.forget(range);
        }
        Some(migration.premature_lookup.take().unwrap_or_else(|| self.look_up(range)))
    }

    /// The content at the start of the range, for an arbitrary length.
    fn look_up(&mut self, range: Range) -> Event {
        let all = block_indices(range);
        let image = &self.source.image;
        let zero = image.stamp(all.start) == 0;
        let same =
            all.clone().take_while(|block| (image.stamp(*block) == 0) == zero).count() as u64;
        let length = 1 + self.rng.below(same);
        let content = if zero { Content::Zeros } else { Content::Data };
        Event::Looked { range: range.split(length * BLOCK).0, content }
    }

    fn take_dirty(&mut self, migration: &mut Migration, from: u64, longest: u64) -> Option<Event> {
        if self.mutation == Mutation::ReadBeforeMark && migration.stale_stamps.is_none() {
            let blocks = &self.source.image.blocks;
            migration.stale_stamps = Some(blocks.iter().map(|block| block.current.stamp).collect());
            return None;
        }
        let dirty = self.source.dirty.as_ref()?;
        let taken = dirty.take_next(from, longest);
        if taken.is_none() {
            migration.stale_stamps = None;
        }
        Some(Event::Taken { run: taken, left: dirty.bytes() })
    }

    fn send(&mut self, migration: &mut Migration, request: DestinationRequest) -> Event {
        let Some(at) = migration.connection else { return Event::Lost("closed".to_owned()) };
        let cookie = request.cookie;
        let message = match request.kind {
            RequestKind::Write(range) => {
                let stale_stamps = migration.stale_stamps.take();
                let read = |block: usize| match &stale_stamps {
                    Some(stamps) => stamps[block],
                    None => self.source.image.stamp(block),
                };
                self.coverage.data_blocks += block_indices(range).len() as u64;
                ToDestination::Write {
                    cookie,
                    range,
                    stamps: block_indices(range).map(read).collect(),
                }
            }
            RequestKind::Zero(range) => ToDestination::Zero { cookie, range },
            RequestKind::Flush => ToDestination::Flush { cookie },
            RequestKind::Handover(handover) => {
                self.coverage.handovers += 1;
                if self.mutation == Mutation::UnlinkBeforeAcknowledgement {
                    self.source.image.exists = super::image::Cached::new(false);
                }
                ToDestination::Handover { cookie, handover }
            }
            RequestKind::Disconnect => ToDestination::Disconnect,
        };
        let connection = &mut self.network.connections[at];
        if connection.destination_closed && self.rng.one_in(2) {
            return Event::Unsent("broken pipe".to_owned());
        }
        connection.send_to_destination(message);
        Event::Done
    }

    fn wait(&mut self, migration: &mut Migration, until: Duration) -> Option<Event> {
        if let Some(at) = migration.connection {
            if self.network.is_up
                && let Some(ToSource::Reply { cookie, error }) =
                    self.network.connections[at].to_source.pop_front()
            {
                return Some(Event::Reply { cookie, error });
            }
            let connection = &self.network.connections[at];
            if connection.ended_for_source() || connection.is_broken && self.rng.one_in(8) {
                return Some(Event::Lost("connection reset".to_owned()));
            }
        }
        (self.now >= until).then_some(Event::Tick)
    }

    fn connect(&mut self, migration: &mut Migration, question: Question) -> Option<Event> {
        if !migration.is_half_done {
            if !self.network.is_up || !self.destination_accepts() {
                return Some(Event::Unreachable(Trouble::Connect("refused".to_owned())));
            }
            migration.connection = Some(self.send_question(question));
            (migration.is_half_done, migration.deadline) = (true, self.now + SECOND);
            return None;
        }
        let at = migration.connection?;
        let event = match self.receive_answer(at, migration.deadline)? {
            Ok(answer) => Event::Greeted(self.destination_info(migration, answer)),
            Err(trouble) => {
                self.close_connection(migration.connection.take());
                Event::Unreachable(trouble)
            }
        };
        Some(event)
    }

    /// The first connection stays open until the second has an answer.
    fn ask_on_second_connection(
        &mut self,
        migration: &mut Migration,
        question: Question,
    ) -> Option<Event> {
        if !migration.is_half_done {
            if !self.network.is_up || !self.destination_accepts() {
                return Some(Event::Unreachable(Trouble::Connect("refused".to_owned())));
            }
            self.coverage.asked_on_second_connection += 1;
            migration.second_connection = Some(self.send_question(question));
            (migration.is_half_done, migration.deadline) = (true, self.now + SECOND);
            return None;
        }
        let at = migration.second_connection?;
        let answer = self.receive_answer(at, migration.deadline)?;
        migration.second_connection = None;
        Some(match answer {
            Ok(answer) => {
                self.close_connection(migration.connection.replace(at));
                Event::Greeted(self.destination_info(migration, answer))
            }
            Err(trouble) => {
                self.close_connection(Some(at));
                Event::Unreachable(trouble)
            }
        })
    }

    fn destination_info(&self, migration: &mut Migration, mut answer: Answer) -> DestinationInfo {
        if let (Mutation::ResumeAcrossTokens, Some(token)) = (self.mutation, answer.listening) {
            let first = *migration.first_token.get_or_insert(token);
            if first != token {
                answer = Answer { listening: Some(first), has: Has::Incomplete };
            }
        }
        DestinationInfo {
            size: self.size(),
            read_only: false,
            flush: self.destination_has_flush,
            flags: TransmissionFlags::empty(),
            caps: Caps { zeroes: true, block_min: BLOCK, data_max: 32 << 20 },
            answer: Some(answer),
        }
    }

    /// Opens a connection and sends the question; returns the connection's index.
    fn send_question(&mut self, question: Question) -> usize {
        let at = self.network.open();
        self.network.connections[at].send_to_destination(ToDestination::Question(question));
        at
    }

    /// The answer to the question, or the error; `None` while it is outstanding.
    fn receive_answer(&mut self, at: usize, deadline: Duration) -> Option<Result<Answer, Trouble>> {
        let connection = &mut self.network.connections[at];
        let message = if self.network.is_up { connection.to_source.pop_front() } else { None };
        match message {
            Some(ToSource::Answer(answer)) => Some(Ok(answer)),
            Some(_) => Some(Err(Trouble::Rejected("busy".to_owned()))),
            None if connection.ended_for_source() || self.now >= deadline => {
                Some(Err(Trouble::NoGreeting("no greeting".to_owned())))
            }
            None => None,
        }
    }

    pub(crate) fn close_connection(&mut self, at: Option<usize>) {
        if let Some(at) = at {
            self.network.connections[at].source_closed = true;
        }
    }

    /// One turn of a restarted source with the record *departing*.
    fn query_destination(&mut self, mut query: HandoverQuery) -> Result<bool, String> {
        if let Some(verdict) = query.verdict {
            self.source.image.record.sync();
            match verdict {
                HandoverVerdict::Arrived => self.source.process = SourceProcess::Moved,
                HandoverVerdict::NotArrived | HandoverVerdict::Unknown => self.serve_at_source(),
            }
            return Ok(true);
        }
        let progress = self.query_on_connection(&mut query);
        self.source.process = SourceProcess::Asking(query);
        Ok(progress)
    }

    fn query_on_connection(&mut self, query: &mut HandoverQuery) -> bool {
        let Some(at) = query.connection else {
            if self.now < query.deadline {
                return false;
            }
            query.deadline = self.now + SECOND;
            if self.network.is_up && self.destination_accepts() {
                let question = Question { size: self.size(), id: query.id };
                query.connection = Some(self.send_question(question));
            } else if self.mutation == Mutation::ServeOnUnreachable {
                self.apply_verdict(query, HandoverVerdict::NotArrived);
            }
            return true;
        };
        let Some(answer) = self.receive_answer(at, query.deadline) else { return false };
        self.close_connection(query.connection.take());
        let mut verdict = handover_verdict(answer.as_ref().ok(), None);
        let has_no_copy = matches!(answer, Ok(Answer { has: Has::Nothing, .. }));
        if self.mutation == Mutation::NoCopyMeansNotArrived && has_no_copy {
            verdict = HandoverVerdict::NotArrived;
        }
        self.trace(|| format!("source asks: {verdict:?}"));
        self.apply_verdict(query, verdict);
        true
    }

    fn apply_verdict(&mut self, query: &mut HandoverQuery, verdict: HandoverVerdict) {
        let to = RemoteAddress::new("destination 4779").expect("a valid address");
        self.source.image.record.current = match verdict {
            HandoverVerdict::Arrived => Some(Record::Departed { id: query.id, when: 1, to }),
            HandoverVerdict::NotArrived => query.before.record(),
            HandoverVerdict::Unknown => return,
        };
        query.verdict = Some(verdict);
    }

    /// Kills the process, or with `power_cut` the host, which loses writes that are not durable.
    pub(crate) fn kill_source(&mut self, power_cut: bool) {
        let connections = match std::mem::replace(&mut self.source.process, SourceProcess::Down) {
            SourceProcess::Migrating(migration) => {
                [migration.connection, migration.second_connection]
            }
            SourceProcess::Asking(query) => [query.connection, None],
            SourceProcess::Down
            | SourceProcess::Serving
            | SourceProcess::Relaying
            | SourceProcess::Moved => [None, None],
        };
        for at in connections.into_iter().flatten() {
            if power_cut {
                self.network.connections[at].cut(&mut self.rng);
            }
            self.network.connections[at].source_closed = true;
        }
        self.source.dirty = None;
        self.source.open_gate();
        self.abandon_writes(Host::Source);
        if power_cut {
            self.source.image.power_cut(&mut self.rng);
            self.source_lost_power = true;
        }
    }
}

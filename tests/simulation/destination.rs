//! The destination host: what `listen`, and `serve` after it, do around their decisions.

use super::Mutation;
use super::medium::{Medium, Stamp, blocks};
use super::net::{Down, Up};
use super::world::{Host, World};
use flexnbd::disk::ownership::{
    ForListen, ForServe, Id, Provenance, Record, for_listen, for_serve,
};
use flexnbd::migration::arrival::{
    Admits, Arrival, ArrivalEnd, ProbeDecision, SOURCE_SILENCE, WritePermission,
    answer_when_serving,
};
use flexnbd::migration::wire::{Answer, Handover, Has, Question, Token};
use std::collections::BTreeMap;
use std::time::Duration;

/// NBD's EPERM and EINVAL.
const EPERM: u32 = 1;
const EINVAL: u32 = 22;

#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) medium: Medium,
    /// Another image, which an operator may start `listen` with instead.
    pub(crate) other: Medium,
    pub(crate) process: Process,
    processes: u8,
}

#[derive(Debug)]
pub(crate) enum Process {
    Down,
    Listen(Box<Listen>),
    Serve(Provenance),
}

#[derive(Debug)]
pub(crate) struct Listen {
    arrival: Arrival,
    token: Token,
    /// The migration that each connection was introduced with.
    guests: BTreeMap<usize, Id>,
    /// Requests under way, which may be carried out in any order.
    work: Vec<(usize, Up)>,
    busy: Busy,
}

/// Something with several steps that nothing else comes between, save a kill.
#[derive(Clone, Debug)]
enum Busy {
    No,
    /// The record *incoming* is written, and not yet durable.
    Recording(Id),
    Settling {
        connection: usize,
        cookie: u64,
        record: Record,
        steps: Vec<Settle>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settle {
    Flush,
    Record,
    Sync,
    Acknowledge,
}

impl Destination {
    pub(crate) fn new(medium: Medium, other: Medium) -> Self {
        Self { medium, other, process: Process::Down, processes: 0 }
    }
}

impl World {
    pub(crate) fn destination_serves(&self) -> bool {
        matches!(self.destination.process, Process::Serve(_))
    }

    pub(crate) fn destination_accepts(&self) -> bool {
        !matches!(self.destination.process, Process::Down)
    }

    /// systemd, or an operator, starts `listen`, and `serve` when the disk has arrived.
    pub(crate) fn start_destination(&mut self) -> Result<(), String> {
        if self.mutation != Mutation::TrustUnsyncedRecord {
            self.destination.medium.record.sync();
        }
        let record = self.destination.medium.record.now.clone();
        self.destination.process = match for_listen(record.as_ref(), false) {
            ForListen::Accept { .. } if self.serves_incomplete() => {
                Process::Serve(Provenance::Native)
            }
            ForListen::Accept { incomplete_copy } => self.listen(incomplete_copy),
            ForListen::AlreadyArrived(_) => match for_serve(record.as_ref()) {
                ForServe::Serve(title) => Process::Serve(title),
                _ => Process::Down,
            },
            ForListen::Refuse(_) => Process::Down,
        };
        let arrived = matches!(self.destination.process, Process::Serve(Provenance::Arrived(_)));
        if arrived { self.arrived() } else { Ok(()) }
    }

    /// The disk is here: the last moment before clients come is the moment to look at it.
    fn arrived(&mut self) -> Result<(), String> {
        let first = !std::mem::replace(&mut self.settled, true);
        if first { self.check_arrival() } else { Ok(()) }
    }

    fn serves_incomplete(&self) -> bool {
        let record = &self.destination.medium.record.now;
        self.mutation == Mutation::ServeIncomplete
            && matches!(record, Some(Record::Incoming { .. }))
    }

    fn listen(&mut self, incomplete_copy: Option<Option<Id>>) -> Process {
        self.destination.processes += 1;
        let token = Token([self.destination.processes; 16]);
        Process::Listen(Box::new(Listen {
            arrival: Arrival::new(token, incomplete_copy, Admits::Sources),
            token,
            guests: BTreeMap::new(),
            work: Vec::new(),
            busy: Busy::No,
        }))
    }

    pub(crate) fn swap_images(&mut self) {
        std::mem::swap(&mut self.destination.medium, &mut self.destination.other);
    }

    /// Puts the image in place that the disk went to, if it went to one.
    pub(crate) fn put_right_image(&mut self) {
        let leaving = match &self.source.medium.record.now {
            Some(Record::Departing { id, .. } | Record::Departed { id, .. }) => Some(*id),
            _ => None,
        };
        let rank = |medium: &Medium| match &medium.record.now {
            Some(Record::Ours(_)) => 2,
            Some(Record::Incoming { id }) if leaving.is_some() && *id == leaving => 1,
            _ => 0,
        };
        if rank(&self.destination.other) > rank(&self.destination.medium) {
            self.kill_destination(false);
            self.swap_images();
        }
    }

    pub(crate) fn kill_destination(&mut self, power: bool) {
        self.destination.process = Process::Down;
        for connection in &mut self.net.all {
            if !connection.destination_closed {
                if power {
                    connection.cut(&mut self.dice);
                }
                connection.destination_closed = true;
                connection.up.clear();
            }
        }
        self.abandon_writes(Host::Destination);
        if power {
            self.destination.medium.power_cut(&mut self.dice);
            self.destination.other.power_cut(&mut self.dice);
            self.forget_unflushed_at_destination();
        }
    }

    /// After the arrival a power cut takes what clients have not flushed.
    fn forget_unflushed_at_destination(&mut self) {
        let Destination { medium, other, .. } = &self.destination;
        let ours = |medium: &&Medium| matches!(medium.record.now, Some(Record::Ours(_)));
        let Some(medium) = [medium, other].into_iter().find(ours) else { return };
        if self.settled {
            for (block, known) in self.known.iter_mut().enumerate() {
                known.acknowledged = medium.stamp(block);
                known.perhaps.clear();
            }
        }
    }

    pub(crate) fn destination_turn(&mut self) -> Result<bool, String> {
        match std::mem::replace(&mut self.destination.process, Process::Down) {
            Process::Down => Ok(false),
            Process::Serve(title) => {
                self.destination.process = Process::Serve(title);
                Ok(self.serve_questions(title))
            }
            Process::Listen(mut listen) => {
                self.destination.process = Process::Down;
                let (progress, next) = self.listen_turn(&mut listen)?;
                self.destination.process = next.unwrap_or(Process::Listen(listen));
                Ok(progress)
            }
        }
    }

    /// What a `serve` process says to a source.
    fn serve_questions(&mut self, title: Provenance) -> bool {
        let up = self.net.up;
        let hello = self.net.all.iter_mut().find_map(|connection| {
            if !up || connection.destination_closed {
                return None;
            }
            let Up::Hello(question) = connection.up.pop_front()? else { return None };
            Some((connection, question))
        });
        let Some((connection, question)) = hello else { return false };
        connection.send_down(Down::Welcome(answer_when_serving(title, &question)));
        true
    }

    fn listen_turn(&mut self, listen: &mut Listen) -> Result<(bool, Option<Process>), String> {
        match listen.busy.clone() {
            Busy::Recording(id) => {
                self.destination.medium.record.sync();
                listen.arrival.on_recorded(Some(id), true);
                listen.busy = Busy::No;
                Ok((true, None))
            }
            Busy::Settling { connection, cookie, record, steps } => {
                self.settle(listen, connection, cookie, &record, steps)
            }
            Busy::No if !self.stalled && !listen.work.is_empty() && self.dice.once_in(2) => {
                self.work(listen)?;
                Ok((true, None))
            }
            Busy::No => Ok((self.receive(listen)?, None)),
        }
    }

    /// Takes one message, or the end, of some connection.
    fn receive(&mut self, listen: &mut Listen) -> Result<bool, String> {
        let count = self.net.all.len();
        let first = self.dice.below(count.max(1) as u64) as usize;
        for at in (0..count).map(|step| (first + step) % count) {
            if self.net.all[at].destination_closed {
                continue;
            }
            let pending = listen.work.iter().any(|(connection, _)| *connection == at);
            if self.net.all[at].ended_for_destination() && !pending {
                self.net.all[at].destination_closed = true;
                listen.arrival.on_close(at as u64);
                return Ok(true);
            }
            let message = if self.net.up { self.net.all[at].up.pop_front() } else { None };
            if let Some(message) = message {
                self.take(listen, at, message)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn take(&mut self, listen: &mut Listen, at: usize, message: Up) -> Result<(), String> {
        match message {
            Up::Hello(question) => self.introduce(listen, at, question),
            Up::Handover { cookie, handover } => {
                self.handed_over(listen, at, cookie, handover);
                Ok(())
            }
            Up::Goodbye => match listen.arrival.on_disconnect(at as u64) {
                ArrivalEnd::Nothing => Ok(()),
                ending => Err(format!("(2) a goodbye made the destination say {ending:?}")),
            },
            request => self.admit(listen, at, request),
        }
    }

    fn admit(&mut self, listen: &mut Listen, at: usize, request: Up) -> Result<(), String> {
        let Some(&id) = listen.guests.get(&at) else {
            return Err("a request came before its connection was introduced".to_owned());
        };
        if let Up::Write { range, .. } | Up::Zero { range, .. } = &request {
            let clash = listen.work.iter().any(|(connection, other)| match other {
                Up::Write { range: other, .. } | Up::Zero { range: other, .. } => {
                    *connection == at
                        && other.offset() < range.end()
                        && range.offset() < other.end()
                }
                _ => false,
            });
            if clash {
                return Err(format!("two requests in flight cover {range:?}"));
            }
        }
        match listen.arrival.on_write_request(at as u64) {
            WritePermission::Go => listen.work.push((at, request)),
            WritePermission::Refuse(_) => self.reply(at, &request, Some(EPERM)),
            WritePermission::RecordFirst(record) => {
                self.destination.medium.record.now = Some(record);
                listen.busy = Busy::Recording(id);
                self.net.all[at].up.push_front(request);
            }
        }
        Ok(())
    }

    fn reply(&mut self, at: usize, request: &Up, error: Option<u32>) {
        let (Up::Write { cookie, .. } | Up::Zero { cookie, .. } | Up::Flush { cookie }) = *request
        else {
            return;
        };
        self.net.all[at].send_down(Down::Reply { cookie, error });
    }

    /// Carries out any one of the requests under way.
    fn work(&mut self, listen: &mut Listen) -> Result<(), String> {
        let which = self.dice.below(listen.work.len() as u64) as usize;
        let (at, request) = listen.work.swap_remove(which);
        if self.faulty && self.dice.once_in(200) {
            self.reply(at, &request, Some(5));
            return Ok(());
        }
        self.carry_out(&request);
        self.reply(at, &request, None);
        Ok(())
    }

    fn carry_out(&mut self, request: &Up) {
        let medium = &mut self.destination.medium;
        match request {
            Up::Write { range, stamps, .. } => {
                let put = |(block, stamp): (usize, &Stamp)| medium.write(block, *stamp, true);
                blocks(*range).zip(stamps).for_each(put);
            }
            Up::Zero { range, .. } => {
                blocks(*range).for_each(|block| medium.write(block, 0, false));
            }
            Up::Flush { .. } => medium.flush(),
            _ => {}
        }
    }

    fn introduce(&mut self, listen: &mut Listen, at: usize, ask: Question) -> Result<(), String> {
        if self.mutation == Mutation::EarlierConnectionLeft
            && listen.guests.values().any(|id| *id == ask.id)
        {
            let answer = Answer { listening: Some(listen.token), has: Has::Incomplete };
            listen.guests.insert(at, ask.id);
            self.net.all[at].send_down(Down::Welcome(answer));
            return Ok(());
        }
        // A holder may have been silent for long, whatever it still has on its way.
        let silent = if self.dice.once_in(2) { SOURCE_SILENCE } else { Duration::ZERO };
        let connection = at as u64;
        let answer = match listen.arrival.on_introduction(connection, &ask, silent) {
            ProbeDecision::Refuse(_) => None,
            ProbeDecision::Answer { answer, retire } => {
                self.retire_all(listen, &retire);
                Some(answer)
            }
        };
        // Who only asks does not go on; it makes no difference here.
        let entered = answer.and_then(|answer| {
            let retire = listen.arrival.enter(connection, silent).ok()?;
            Some((answer, retire))
        });
        match (answer, entered) {
            (_, Some((answer, retire))) => {
                self.retire_all(listen, &retire);
                listen.guests.insert(at, ask.id);
                self.net.all[at].send_down(Down::Welcome(answer));
            }
            (Some(answer), None) if answer.is_final() => {
                self.net.all[at].send_down(Down::Welcome(answer));
            }
            _ => {
                self.net.all[at].send_down(Down::Refused);
                self.net.all[at].destination_closed = true;
                listen.arrival.on_close(connection);
            }
        }
        Ok(())
    }

    fn retire_all(&mut self, listen: &mut Listen, retire: &[u64]) {
        for old in retire {
            self.retire(listen, *old as usize);
        }
    }

    /// Closes an earlier connection for good, once its requests under way are done.
    fn retire(&mut self, listen: &mut Listen, old: usize) {
        self.tally.retired += 1;
        if self.mutation != Mutation::EarlierWritesLeft {
            let (done, others) =
                std::mem::take(&mut listen.work).into_iter().partition(|(at, _)| *at == old);
            listen.work = others;
            let done: Vec<(usize, Up)> = done;
            done.iter().for_each(|(_, request)| self.carry_out(request));
        }
        self.net.all[old].up.clear();
        self.net.all[old].destination_closed = true;
        listen.arrival.on_close(old as u64);
    }

    fn handed_over(&mut self, listen: &mut Listen, at: usize, cookie: u64, mut asked: Handover) {
        if self.mutation == Mutation::ResumeAcrossTokens {
            asked.token = listen.token;
        }
        let ArrivalEnd::Settle(record) = listen.arrival.on_handover(at as u64, &asked) else {
            self.net.all[at].send_down(Down::Reply { cookie, error: Some(EINVAL) });
            return;
        };
        let steps = match self.mutation {
            Mutation::AcknowledgeBeforeDurable => {
                vec![Settle::Acknowledge, Settle::Flush, Settle::Record, Settle::Sync]
            }
            Mutation::AcknowledgeBeforeRecord => {
                vec![Settle::Flush, Settle::Acknowledge, Settle::Record, Settle::Sync]
            }
            Mutation::RecordBeforeDurable => {
                vec![Settle::Record, Settle::Sync, Settle::Flush, Settle::Acknowledge]
            }
            _ => vec![Settle::Flush, Settle::Record, Settle::Sync, Settle::Acknowledge],
        };
        listen.busy = Busy::Settling { connection: at, cookie, record, steps };
    }

    fn settle(
        &mut self,
        listen: &mut Listen,
        at: usize,
        cookie: u64,
        record: &Record,
        mut steps: Vec<Settle>,
    ) -> Result<(bool, Option<Process>), String> {
        let step = steps.remove(0);
        let failing = self.faulty && matches!(step, Settle::Flush | Settle::Sync);
        if failing && self.dice.once_in(20) {
            return Ok((true, Some(self.settling_failed(listen))));
        }
        match step {
            Settle::Flush => self.destination.medium.flush(),
            Settle::Record => self.destination.medium.record.now = Some(record.clone()),
            Settle::Sync => self.destination.medium.record.sync(),
            Settle::Acknowledge => {
                self.net.all[at].send_down(Down::Reply { cookie, error: None });
            }
        }
        if !steps.is_empty() {
            let (connection, record) = (at, record.clone());
            listen.busy = Busy::Settling { connection, cookie, record, steps };
            return Ok((true, None));
        }
        listen.arrival.on_settled(true);
        self.arrived()?;
        Ok((true, Some(self.exit_and_serve(record))))
    }

    /// Without a word to the source: it asks whoever is here next.
    fn settling_failed(&mut self, listen: &mut Listen) -> Process {
        listen.arrival.on_settled(false);
        for connection in &mut self.net.all {
            connection.destination_closed = true;
        }
        Process::Down
    }

    /// `listen` exits with success, which closes its connections; `serve` follows.
    fn exit_and_serve(&mut self, record: &Record) -> Process {
        for connection in &mut self.net.all {
            connection.destination_closed = true;
        }
        match for_serve(Some(record)) {
            ForServe::Serve(title) => Process::Serve(title),
            _ => Process::Down,
        }
    }
}

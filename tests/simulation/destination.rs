//! The destination host: models `listen`, and the `serve` that follows it, around the real decisions.

use super::Mutation;
use super::image::{Image, Stamp, block_indices};
use super::network::{ToDestination, ToSource};
use super::transitions::CheckedArrival;
use super::world::{Host, World};
use flexnbd::disk::ownership::{
    ForListen, ForServe, Id, Provenance, Record, for_listen, for_serve,
};
use flexnbd::migration::arrival::{
    ArrivalEnd, ProbeDecision, SOURCE_SILENCE, WritePermission, answer_when_serving,
};
use flexnbd::migration::wire::{Answer, Handover, Has, Question, Token};
use std::collections::BTreeMap;
use std::time::Duration;

/// Error numbers of NBD.
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

#[derive(Debug)]
pub(crate) struct Destination {
    pub(crate) image: Image,
    /// Another image, with which the operator may start `listen` instead.
    pub(crate) other_image: Image,
    pub(crate) process: DestinationProcess,
    /// Number of `listen` processes started; the token of the last one.
    process_count: u8,
}

#[derive(Debug)]
pub(crate) enum DestinationProcess {
    Down,
    Listen(Box<Listen>),
    Serve(Provenance),
}

#[derive(Debug)]
pub(crate) struct Listen {
    arrival: CheckedArrival,
    token: Token,
    /// The migration ID that each connection has introduced itself with.
    introduced: BTreeMap<usize, Id>,
    /// Requests in flight, by connection. They complete in any order.
    in_flight: Vec<(usize, ToDestination)>,
    busy: Busy,
}

/// An operation of several steps. Only a kill can interrupt it.
#[derive(Clone, Debug)]
enum Busy {
    No,
    /// The record *incoming* is written but not durable.
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
    pub(crate) fn new(image: Image, other_image: Image) -> Self {
        Self { image, other_image, process: DestinationProcess::Down, process_count: 0 }
    }
}

impl World {
    pub(crate) fn destination_serves(&self) -> bool {
        matches!(self.destination.process, DestinationProcess::Serve(_))
    }

    pub(crate) fn destination_accepts(&self) -> bool {
        !matches!(self.destination.process, DestinationProcess::Down)
    }

    /// Starts `listen`, or `serve` if the disk has arrived, as systemd or the operator does.
    pub(crate) fn start_destination(&mut self) -> Result<(), String> {
        if self.mutation != Mutation::TrustUnsyncedRecord {
            self.destination.image.record.sync();
        }
        let record = self.destination.image.record.current.clone();
        self.destination.process = match for_listen(record.as_ref(), false) {
            ForListen::Accept { .. } if self.serves_incomplete() => {
                DestinationProcess::Serve(Provenance::Native)
            }
            ForListen::Accept { incomplete_copy } => self.listen(incomplete_copy),
            ForListen::AlreadyArrived(_) => match for_serve(record.as_ref()) {
                ForServe::Serve(provenance) => DestinationProcess::Serve(provenance),
                _ => DestinationProcess::Down,
            },
            ForListen::Refuse(_) => DestinationProcess::Down,
        };
        let arrived =
            matches!(self.destination.process, DestinationProcess::Serve(Provenance::Arrived(_)));
        if arrived { self.on_arrival() } else { Ok(()) }
    }

    /// Checks the copy when it arrives for the first time, before clients can change it.
    fn on_arrival(&mut self) -> Result<(), String> {
        let first = !std::mem::replace(&mut self.settled, true);
        if first { self.check_arrival() } else { Ok(()) }
    }

    /// For [`Mutation::ServeIncomplete`].
    fn serves_incomplete(&self) -> bool {
        let record = &self.destination.image.record.current;
        self.mutation == Mutation::ServeIncomplete
            && matches!(record, Some(Record::Incoming { .. }))
    }

    fn listen(&mut self, incomplete_copy: Option<Option<Id>>) -> DestinationProcess {
        self.destination.process_count += 1;
        let token = Token([self.destination.process_count; 16]);
        DestinationProcess::Listen(Box::new(Listen {
            arrival: CheckedArrival::new(token, incomplete_copy, &self.unlisted),
            token,
            introduced: BTreeMap::new(),
            in_flight: Vec::new(),
            busy: Busy::No,
        }))
    }

    pub(crate) fn swap_images(&mut self) {
        std::mem::swap(&mut self.destination.image, &mut self.destination.other_image);
    }

    /// Selects the image that received the disk, if one did, as an operator would.
    pub(crate) fn select_migrated_image(&mut self) {
        let departing_id = match &self.source.image.record.current {
            Some(Record::Departing { id, .. } | Record::Departed { id, .. }) => Some(*id),
            _ => None,
        };
        let rank = |image: &Image| match &image.record.current {
            Some(Record::Ours(_)) => 2,
            Some(Record::Incoming { id }) if departing_id.is_some() && *id == departing_id => 1,
            _ => 0,
        };
        if rank(&self.destination.other_image) > rank(&self.destination.image) {
            self.kill_destination(false);
            self.swap_images();
        }
    }

    /// Kills the process, or with `power_cut` the host, which loses writes that are not durable.
    pub(crate) fn kill_destination(&mut self, power_cut: bool) {
        self.destination.process = DestinationProcess::Down;
        for connection in &mut self.network.connections {
            if !connection.destination_closed {
                if power_cut {
                    connection.cut(&mut self.rng);
                }
                connection.destination_closed = true;
                connection.to_destination.clear();
            }
        }
        self.abandon_writes(Host::Destination);
        if power_cut {
            self.destination.image.power_cut(&mut self.rng);
            self.destination.other_image.power_cut(&mut self.rng);
            self.expect_content_of_destination();
        }
    }

    /// After a power cut of the disk's new owner clients expect the content of its image, without writes
    /// that were not flushed.
    fn expect_content_of_destination(&mut self) {
        let Destination { image, other_image, .. } = &self.destination;
        let ours = |image: &&Image| matches!(image.record.current, Some(Record::Ours(_)));
        let Some(image) = [image, other_image].into_iter().find(ours) else { return };
        if self.settled {
            for (block, expected) in self.expected.iter_mut().enumerate() {
                expected.acknowledged = image.stamp(block);
                expected.unacknowledged.clear();
            }
        }
    }

    pub(crate) fn destination_turn(&mut self) -> Result<bool, String> {
        match std::mem::replace(&mut self.destination.process, DestinationProcess::Down) {
            DestinationProcess::Down => Ok(false),
            DestinationProcess::Serve(provenance) => {
                self.destination.process = DestinationProcess::Serve(provenance);
                Ok(self.answer_while_serving(provenance))
            }
            DestinationProcess::Listen(mut listen) => {
                self.destination.process = DestinationProcess::Down;
                let (progress, next) = self.listen_turn(&mut listen)?;
                self.destination.process = next.unwrap_or(DestinationProcess::Listen(listen));
                Ok(progress)
            }
        }
    }

    /// Answers the question of a source, as `serve` does.
    fn answer_while_serving(&mut self, provenance: Provenance) -> bool {
        let is_up = self.network.is_up;
        let received = self.network.connections.iter_mut().find_map(|connection| {
            if !is_up || connection.destination_closed {
                return None;
            }
            let ToDestination::Question(question) = connection.to_destination.pop_front()? else {
                return None;
            };
            Some((connection, question))
        });
        let Some((connection, question)) = received else { return false };
        connection.send_to_source(ToSource::Answer(answer_when_serving(provenance, &question)));
        true
    }

    fn listen_turn(
        &mut self,
        listen: &mut Listen,
    ) -> Result<(bool, Option<DestinationProcess>), String> {
        match listen.busy.clone() {
            Busy::Recording(id) => {
                self.destination.image.record.sync();
                listen.arrival.on_recorded(Some(id), true);
                listen.busy = Busy::No;
                Ok((true, None))
            }
            Busy::Settling { connection, cookie, record, steps } => {
                self.settle(listen, connection, cookie, &record, steps)
            }
            Busy::No
                if !self.destination_stalled
                    && !listen.in_flight.is_empty()
                    && self.rng.one_in(2) =>
            {
                self.complete_one_request(listen)?;
                Ok((true, None))
            }
            Busy::No => Ok((self.receive(listen)?, None)),
        }
    }

    /// Receives one message or EOF from one connection.
    fn receive(&mut self, listen: &mut Listen) -> Result<bool, String> {
        let count = self.network.connections.len();
        let first = self.rng.below(count.max(1) as u64) as usize;
        for at in (0..count).map(|step| (first + step) % count) {
            if self.network.connections[at].destination_closed {
                continue;
            }
            let has_requests = listen.in_flight.iter().any(|(connection, _)| *connection == at);
            if self.network.connections[at].ended_for_destination() && !has_requests {
                self.network.connections[at].destination_closed = true;
                listen.arrival.on_close(at as u64);
                return Ok(true);
            }
            let message = if self.network.is_up {
                self.network.connections[at].to_destination.pop_front()
            } else {
                None
            };
            if let Some(message) = message {
                self.on_message(listen, at, message)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn on_message(
        &mut self,
        listen: &mut Listen,
        at: usize,
        message: ToDestination,
    ) -> Result<(), String> {
        match message {
            ToDestination::Question(question) => self.on_question(listen, at, question),
            ToDestination::Handover { cookie, handover } => {
                self.on_handover(listen, at, cookie, handover);
                Ok(())
            }
            ToDestination::Disconnect => match listen.arrival.on_disconnect(at as u64) {
                ArrivalEnd::Nothing => Ok(()),
                ending => Err(format!("(2) DISC made the destination reply {ending:?}")),
            },
            request => self.on_request(listen, at, request),
        }
    }

    fn on_request(
        &mut self,
        listen: &mut Listen,
        at: usize,
        request: ToDestination,
    ) -> Result<(), String> {
        let Some(&id) = listen.introduced.get(&at) else {
            return Err("a request precedes the introduction of its connection".to_owned());
        };
        if let ToDestination::Write { range, .. } | ToDestination::Zero { range, .. } = &request {
            let overlaps = listen.in_flight.iter().any(|(connection, other)| match other {
                ToDestination::Write { range: other, .. }
                | ToDestination::Zero { range: other, .. } => {
                    *connection == at
                        && other.offset() < range.end()
                        && range.offset() < other.end()
                }
                _ => false,
            });
            if overlaps {
                return Err(format!("two requests in flight overlap at {range:?}"));
            }
        }
        match listen.arrival.on_write_request(at as u64) {
            WritePermission::Go => listen.in_flight.push((at, request)),
            WritePermission::Refuse(_) => self.reply(at, &request, Some(EPERM)),
            WritePermission::RecordFirst(record) => {
                self.destination.image.record.current = Some(record);
                listen.busy = Busy::Recording(id);
                self.network.connections[at].to_destination.push_front(request);
            }
        }
        Ok(())
    }

    fn reply(&mut self, at: usize, request: &ToDestination, error: Option<u32>) {
        let (ToDestination::Write { cookie, .. }
        | ToDestination::Zero { cookie, .. }
        | ToDestination::Flush { cookie }) = *request
        else {
            return;
        };
        self.network.connections[at].send_to_source(ToSource::Reply { cookie, error });
    }

    /// Executes one of the requests in flight, or fails it.
    fn complete_one_request(&mut self, listen: &mut Listen) -> Result<(), String> {
        let index = self.rng.below(listen.in_flight.len() as u64) as usize;
        let (at, request) = listen.in_flight.swap_remove(index);
        if self.faults_enabled && self.rng.one_in(200) {
            self.reply(at, &request, Some(EIO));
            return Ok(());
        }
        self.execute(&request);
        self.reply(at, &request, None);
        Ok(())
    }

    fn execute(&mut self, request: &ToDestination) {
        let image = &mut self.destination.image;
        match request {
            ToDestination::Write { range, stamps, .. } => {
                let put = |(block, stamp): (usize, &Stamp)| image.write(block, *stamp, true);
                block_indices(*range).zip(stamps).for_each(put);
            }
            ToDestination::Zero { range, .. } => {
                block_indices(*range).for_each(|block| image.write(block, 0, false));
            }
            ToDestination::Flush { .. } => image.flush(),
            _ => {}
        }
    }

    fn on_question(
        &mut self,
        listen: &mut Listen,
        at: usize,
        question: Question,
    ) -> Result<(), String> {
        if self.mutation == Mutation::KeepEarlierConnection
            && listen.introduced.values().any(|id| *id == question.id)
        {
            let answer = Answer { listening: Some(listen.token), has: Has::Incomplete };
            listen.introduced.insert(at, question.id);
            self.network.connections[at].send_to_source(ToSource::Answer(answer));
            return Ok(());
        }
        // The earlier connection may have been silent for long, even with messages in transit.
        let silent = if self.rng.one_in(2) { SOURCE_SILENCE } else { Duration::ZERO };
        let connection = at as u64;
        let answer = match listen.arrival.on_introduction(connection, &question, silent) {
            ProbeDecision::Refuse(_) => None,
            ProbeDecision::Answer { answer, retire } => {
                self.retire_all(listen, &retire);
                Some(answer)
            }
        };
        // A source that only asks would close the connection now; the model lets it enter.
        let entered = answer.and_then(|answer| {
            let retire = listen.arrival.enter(connection, silent).ok()?;
            Some((answer, retire))
        });
        match (answer, entered) {
            (_, Some((answer, retire))) => {
                self.retire_all(listen, &retire);
                listen.introduced.insert(at, question.id);
                self.network.connections[at].send_to_source(ToSource::Answer(answer));
            }
            (Some(answer), None) if answer.is_final() => {
                self.network.connections[at].send_to_source(ToSource::Answer(answer));
            }
            _ => {
                self.network.connections[at].send_to_source(ToSource::Refused);
                self.network.connections[at].destination_closed = true;
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

    /// Closes an earlier connection after its requests in flight are done.
    fn retire(&mut self, listen: &mut Listen, old: usize) {
        self.coverage.retired += 1;
        if self.mutation != Mutation::KeepEarlierWrites {
            let (done, others) =
                std::mem::take(&mut listen.in_flight).into_iter().partition(|(at, _)| *at == old);
            listen.in_flight = others;
            let done: Vec<(usize, ToDestination)> = done;
            done.iter().for_each(|(_, request)| self.execute(request));
        }
        self.network.connections[old].to_destination.clear();
        self.network.connections[old].destination_closed = true;
        listen.arrival.on_close(old as u64);
    }

    fn on_handover(&mut self, listen: &mut Listen, at: usize, cookie: u64, mut handover: Handover) {
        if self.mutation == Mutation::ResumeAcrossTokens {
            handover.token = listen.token;
        }
        let ArrivalEnd::Settle(record) = listen.arrival.on_handover(at as u64, &handover) else {
            self.network.connections[at]
                .send_to_source(ToSource::Reply { cookie, error: Some(EINVAL) });
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
    ) -> Result<(bool, Option<DestinationProcess>), String> {
        let step = steps.remove(0);
        let may_fail = self.faults_enabled && matches!(step, Settle::Flush | Settle::Sync);
        if may_fail && self.rng.one_in(20) {
            return Ok((true, Some(self.settling_failed(listen))));
        }
        match step {
            Settle::Flush => self.destination.image.flush(),
            Settle::Record => self.destination.image.record.current = Some(record.clone()),
            Settle::Sync => self.destination.image.record.sync(),
            Settle::Acknowledge => {
                self.network.connections[at]
                    .send_to_source(ToSource::Reply { cookie, error: None });
            }
        }
        if !steps.is_empty() {
            let (connection, record) = (at, record.clone());
            listen.busy = Busy::Settling { connection, cookie, record, steps };
            return Ok((true, None));
        }
        listen.arrival.on_settled(true);
        self.on_arrival()?;
        Ok((true, Some(self.exit_and_serve(record))))
    }

    /// Exits without a reply: the source will ask the next process.
    fn settling_failed(&mut self, listen: &mut Listen) -> DestinationProcess {
        listen.arrival.on_settled(false);
        for connection in &mut self.network.connections {
            connection.destination_closed = true;
        }
        DestinationProcess::Down
    }

    /// `listen` exits with success, which closes its connections; `serve` follows.
    fn exit_and_serve(&mut self, record: &Record) -> DestinationProcess {
        for connection in &mut self.network.connections {
            connection.destination_closed = true;
        }
        match for_serve(Some(record)) {
            ForServe::Serve(provenance) => DestinationProcess::Serve(provenance),
            _ => DestinationProcess::Down,
        }
    }
}

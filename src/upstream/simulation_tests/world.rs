//! The world of one schedule: sessions, the machine, the connections, the disk and its servers.

use super::cells::{CellModel, CellValue};
use super::clients::{SimClients, SimKind, SimMix};
use super::coverage::{UpstreamCoverage, UpstreamReached};
use super::image::ScriptedImage;
use super::scene::Scene;
use super::server::{ReceivedRequest, ScriptedUpstream, ServerFaults};
use super::theme::{UpstreamTheme, first_terms, other_terms, replacement_terms};
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;
use crate::schedules::ByteQueue;
use crate::upstream::machine::UpstreamMachine;
use crate::upstream::rotation::{DELAY_MAX, NextAttempt, Rotation};
use crate::upstream::rx::UpstreamRx;
use crate::upstream::terms::ServerTerms;
use crate::upstream::tx::UpstreamTx;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// What a server needs, borrowed from the fields of a world.
macro_rules! scene {
    ($world:ident) => {
        Scene {
            rng: &mut $world.rng,
            image: &mut $world.image,
            model: &mut $world.model,
            coverage: &mut $world.coverage,
        }
    };
}

mod traffic;

/// Rounds within which a schedule settles.
const ROUNDS_MAX: u32 = 20_000;

/// Our end of a connection.
#[derive(Debug)]
struct SimConnection {
    tx: UpstreamTx,
    rx: UpstreamRx,
    /// Sent, and not received by the server.
    to_server: ByteQueue,
    is_blocked: bool,
}

/// The current connections, and the server process at their other end.
#[derive(Debug)]
struct SimLink {
    server: ScriptedUpstream,
    connections: Vec<SimConnection>,
    /// Replies before it.
    replies: u64,
}

/// How a server is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    Connection,
    Process,
    Power,
}

#[derive(Debug)]
pub(super) struct UpstreamWorld {
    theme: UpstreamTheme,
    rng: fastrand::Rng,
    machine: UpstreamMachine,
    /// The terms of the first server, and the id of the disk, once a server has told it.
    first: ServerTerms,
    link: Option<SimLink>,
    /// Requests of lost connections that the server goes on to execute.
    late: Vec<ReceivedRequest>,
    rotation: Rotation,
    /// Every address is due at each attempt.
    time: Duration,
    /// The address of the last connection.
    address: usize,
    addresses: usize,
    /// The address of the disk.
    home: usize,
    image: ScriptedImage,
    model: CellModel,
    clients: SimClients,
    mix: SimMix,
    depth_max: usize,
    /// How frequent faults are.
    faults: u8,
    operations_left: u32,
    unflushed_max: u64,
    /// Size of the buffers of the writes that the server has to reply to, by value.
    sent_writes: BTreeMap<CellValue, u64>,
    /// Values of the writes that were sent at any time.
    begun: BTreeSet<CellValue>,
    /// Cookies of the requests that were sent as a single message, by their number in the machine.
    cookies: BTreeMap<u64, u64>,
    /// Bytes that a socket takes.
    socket: usize,
    /// ServerFaults are over.
    is_settling: bool,
    coverage: UpstreamCoverage,
}

/// Runs one schedule.
pub(super) fn run(seed: u64) -> Result<UpstreamCoverage, String> {
    let (theme, mut rng) = (UpstreamTheme::of(seed), fastrand::Rng::with_seed(seed));
    let cells = theme.cells(&mut rng);
    let first = first_terms(cells, &mut rng);
    let initial: Vec<CellValue> =
        (1..=cells as u32).map(|cell| if rng.u8(..3) == 0 { 0 } else { cell }).collect();
    let addresses = rng.usize(1..4);
    let unflushed_max = theme.unflushed_max(&mut rng);
    let mut world = UpstreamWorld {
        theme,
        machine: UpstreamMachine::new(first, unflushed_max),
        first,
        link: None,
        late: Vec::new(),
        rotation: Rotation::starting_at(addresses, 0),
        time: Duration::ZERO,
        address: 0,
        addresses,
        home: 0,
        image: ScriptedImage::new(&initial),
        model: CellModel::new(&initial),
        clients: SimClients::new(cells, cells as u32 + 1, first.has(TransmissionFlags::SEND_TRIM)),
        mix: theme.mix(&first, &mut rng),
        depth_max: rng.usize(1..8),
        faults: theme.faults(&mut rng),
        operations_left: rng.u32(1..90),
        unflushed_max,
        sent_writes: BTreeMap::new(),
        begun: BTreeSet::new(),
        cookies: BTreeMap::new(),
        socket: [100, 2000, 1 << 20][rng.usize(..3)],
        is_settling: false,
        coverage: UpstreamCoverage::default(),
        rng,
    };
    world.run()?;
    Ok(world.coverage)
}

impl UpstreamWorld {
    fn run(&mut self) -> Result<(), String> {
        for _ in 0..self.rng.usize(1..4) {
            self.clients.add_queue(&mut self.rng);
        }
        self.begin_link(self.first)?;
        while self.operations_left > 0 {
            self.step()?;
        }
        self.is_settling = true;
        self.settle()?;
        self.check_end()
    }

    /// A random event.
    fn step(&mut self) -> Result<(), String> {
        match self.rng.u8(..96) {
            0..10 => self.submit(),
            10..26 => self.server_receives(),
            26..46 => self.serve(ScriptedUpstream::execute),
            46..62 => self.serve(ScriptedUpstream::reply),
            62..80 => self.receive(),
            80..84 => self.unblock(),
            84 => {
                let cell = self.rng.usize(..self.image.len());
                self.image.write_back(cell);
                Ok(())
            }
            85 => self.probe(),
            86 | 87 if self.link.is_none() => self.connect(),
            88 => self.end_queue(),
            89 if self.theme == UpstreamTheme::Endings => self.end_queue(),
            90.. if self.rng.u8(..6) < self.faults => self.fault(),
            _ if self.link.is_none() => self.connect(),
            _ => self.receive(),
        }
    }

    fn fault(&mut self) -> Result<(), String> {
        if self.link.is_none() {
            return Ok(());
        }
        let may_lose_power = self.first.has(TransmissionFlags::SEND_FLUSH);
        match self.rng.u8(..8) {
            0 | 1 if may_lose_power => self.lose(Loss::Power),
            0..3 => self.lose(Loss::Process),
            3 | 4 => self.lose(Loss::Connection),
            5 => self.migrate(),
            _ => Ok(()),
        }
    }

    /// A session submits operations.
    fn submit(&mut self) -> Result<(), String> {
        let queue = self.rng.usize(..self.clients.queues.len());
        for _ in 0..self.rng.usize(1..4) {
            self.operations_left = self.operations_left.saturating_sub(1);
            let state = &self.clients.queues[queue];
            if state.has_ended || state.depth() >= self.depth_max {
                break;
            }
            if let Some(draft) = self.clients.draft(self.mix, &mut self.rng) {
                self.begin(queue, draft)?;
            }
        }
        self.pump()
    }

    fn begin(
        &mut self,
        queue: usize,
        draft: (SimKind, std::ops::Range<usize>),
    ) -> Result<(), String> {
        let disk = Range::whole(self.first.size);
        let takes_two = draft.0 == SimKind::Write { durable: true }
            && self.first.has(TransmissionFlags::SEND_FLUSH)
            && !self.first.has(TransmissionFlags::SEND_FUA);
        let (id, op) = self.clients.begin(queue, draft, &mut self.model, disk);
        let declined = self.machine.submit(self.clients.queues[queue].owner, id, op).is_err();
        if declined {
            self.coverage.count(UpstreamReached::Declined);
            self.clients.decline(queue, id.key, &mut self.model);
        }
        if declined == takes_two { Ok(()) } else { Err(format!("declined: {declined}")) }
    }

    /// A session ends, and another one begins.
    fn end_queue(&mut self) -> Result<(), String> {
        if self.rng.u8(..4) > 0 && self.theme != UpstreamTheme::Endings {
            return Ok(());
        }
        let queue = self.rng.usize(..self.clients.queues.len());
        if self.clients.queues[queue].has_ended {
            return Ok(());
        }
        self.coverage.count(UpstreamReached::Ended);
        self.clients.queues[queue].has_ended = true;
        self.clients.add_queue(&mut self.rng);
        self.distribute()
    }

    /// Nothing that was promised to be durable has been lost.
    fn check_durable(&self) -> Result<(), String> {
        if !self.first.has(TransmissionFlags::SEND_FLUSH) {
            return Ok(());
        }
        let durable = |cell: &usize| self.model.allows_durable(*cell, self.image.durable(*cell));
        match (0..self.image.len()).find(|cell| !durable(cell)) {
            Some(cell) => Err(format!("cell {cell} is not durable: {}", self.image.durable(cell))),
            None => Ok(()),
        }
    }

    fn serve(
        &mut self,
        act: fn(&mut ScriptedUpstream, &mut Scene<'_>) -> bool,
    ) -> Result<(), String> {
        if let Some(link) = &mut self.link {
            act(&mut link.server, &mut scene!(self));
        }
        Ok(())
    }

    fn probe(&mut self) -> Result<(), String> {
        let Some(link) = &self.link else { return Ok(()) };
        let number = self.rng.usize(..link.connections.len());
        if self.machine.awaits_reply(number) {
            self.machine.probe(number);
            self.coverage.count(UpstreamReached::Probed);
        }
        self.pump()
    }

    /// The connections, the process or the host of the server are lost.
    fn lose(&mut self, loss: Loss) -> Result<(), String> {
        self.coverage.count(match loss {
            Loss::Connection => UpstreamReached::Cut,
            Loss::Process => UpstreamReached::Killed,
            Loss::Power => UpstreamReached::PowerCut,
        });
        self.receive_last()?;
        let Some(mut link) = self.link.take() else { return Ok(()) };
        let mut scene = scene!(self);
        self.late = link.server.end(loss == Loss::Connection, &mut scene);
        for connection in &mut link.connections {
            let is_direct = !connection.rx.needs_machine();
            self.coverage.count_if(is_direct, UpstreamReached::Abandoned);
            connection.rx.abandon(&mut self.machine);
        }
        self.machine.lost();
        self.sent_writes.clear();
        if self.machine.replies() > link.replies {
            self.rotation.on_success();
        } else {
            self.rotation.on_failure(self.address, self.time);
        }
        if loss == Loss::Power {
            self.lose_power()?;
        }
        self.distribute()
    }

    fn lose_power(&mut self) -> Result<(), String> {
        self.check_durable()?;
        let lost = self.image.lose_power(&mut self.rng);
        self.coverage.count_if(!lost.is_empty(), UpstreamReached::Undone);
        if self.image.has_failed_flush {
            lost.iter().for_each(|cell| self.model.loosen(*cell));
        }
        Ok(())
    }

    /// The disk moves to another address; the server at the old one executes nothing any more.
    fn migrate(&mut self) -> Result<(), String> {
        self.coverage.count(UpstreamReached::Migrated);
        if let Some(link) = &mut self.link {
            link.server.faults.is_leaving = true;
        }
        self.image.migrate(&mut self.rng);
        self.home = self.rng.usize(..self.addresses);
        self.check_durable()
    }

    /// Tries the next address.
    fn connect(&mut self) -> Result<(), String> {
        let may_fail = !self.is_settling && self.rng.u8(..4) == 0;
        self.time += DELAY_MAX;
        let next = self.rotation.next(self.time);
        let NextAttempt::Start(address) = next else { return Err(format!("no address: {next:?}")) };
        self.rotation.on_start(address, self.time);
        if address == self.home && !may_fail {
            self.rotation.on_connected(address);
            self.address = address;
            let terms = replacement_terms(&self.first, &mut self.rng);
            return self.begin_link(terms);
        }
        self.rotation.on_failure(address, self.time);
        if self.rng.bool() {
            self.coverage.count(UpstreamReached::Unreachable);
            return Ok(());
        }
        self.coverage.count(UpstreamReached::OtherDisk);
        let other = other_terms(&self.first, &mut self.rng);
        let has_other_id = other.disk_id.is_some_and(|id| self.first.disk_id != Some(id));
        self.coverage.count_if(has_other_id, UpstreamReached::OtherDiskId);
        match self.promised().check_replacement(&other) {
            Ok(()) => Err(format!("another disk is taken: {other:?}")),
            Err(_) => Ok(()),
        }
    }

    /// What a server has to keep.
    fn promised(&self) -> ServerTerms {
        ServerTerms { disk_id: self.machine.disk_id(), ..self.first }
    }

    fn begin_link(&mut self, terms: ServerTerms) -> Result<(), String> {
        self.promised().check_replacement(&terms).map_err(|why| format!("not taken: {why}"))?;
        self.first.disk_id = self.first.disk_id.or(terms.disk_id);
        let may_be_several = terms.has(TransmissionFlags::CAN_MULTI_CONN);
        let count = if may_be_several { self.rng.usize(1..=4) } else { 1 };
        self.coverage.count_if(count > 1, UpstreamReached::Several);
        self.coverage.count_if(terms.dialect != self.first.dialect, UpstreamReached::OtherDialect);
        self.coverage.count(UpstreamReached::Connected);
        let faults = ServerFaults {
            fails: self.theme == UpstreamTheme::Errors,
            fails_flushes: self.theme == UpstreamTheme::Flushes,
            is_leaving: false,
            misbehaves: self.theme == UpstreamTheme::Misbehaving,
        };
        let faults = if self.is_settling { ServerFaults::default() } else { faults };
        let mut server = ScriptedUpstream::new(terms, self.first.flags, count, faults);
        server.go_on(std::mem::take(&mut self.late));
        let connection = |number| SimConnection {
            tx: UpstreamTx::new(terms.dialect),
            rx: UpstreamRx::new(number, terms.dialect),
            to_server: ByteQueue::default(),
            is_blocked: false,
        };
        let connections = (0..count).map(connection).collect();
        self.machine.connected(terms, count);
        self.link = Some(SimLink { server, connections, replies: self.machine.replies() });
        self.pump()
    }

    /// Without further faults every operation completes.
    fn settle(&mut self) -> Result<(), String> {
        if let Some(link) = &mut self.link {
            let is_leaving = link.server.faults.is_leaving;
            link.server.faults = ServerFaults { is_leaving, ..ServerFaults::default() };
        }
        let mut idle = 0;
        for _ in 0..ROUNDS_MAX {
            if self.link.is_none() {
                self.connect()?;
                continue;
            }
            idle = if self.advance()? { 0 } else { idle + 1 };
            if idle == 2 {
                break;
            }
        }
        if self.clients.depth() == 0 {
            return Ok(());
        }
        let server = self.link.as_ref().map(|link| link.server.describe());
        Err(format!("not completed: {:?}; {server:?}", self.clients.queues))
    }

    /// Everything goes on; false if there is nothing left to do.
    fn advance(&mut self) -> Result<bool, String> {
        let mut has_moved = false;
        let count = self.link.as_ref().map_or(0, |link| link.connections.len());
        for number in 0..count {
            let Some(link) = &mut self.link else { return Ok(true) };
            let available = link.connections[number].to_server.len();
            has_moved |= available > 0 || link.connections[number].is_blocked;
            self.pass_to_server(number, available)?;
            let Some(link) = &mut self.link else { return Ok(true) };
            if std::mem::take(&mut link.connections[number].is_blocked) {
                self.pump()?;
            }
        }
        for act in [ScriptedUpstream::execute, ScriptedUpstream::reply] {
            while let Some(link) = &mut self.link
                && act(&mut link.server, &mut scene!(self))
            {
                has_moved = true;
            }
        }
        for number in 0..count {
            let Some(link) = &self.link else { return Ok(true) };
            let available = link.server.outboxes[number].len();
            has_moved |= available > 0;
            self.receive_from(number, available)?;
        }
        Ok(has_moved)
    }

    /// A last flush makes everything durable, and the disk reads as it has to after a power cut.
    fn check_end(&mut self) -> Result<(), String> {
        self.clients.add_queue(&mut self.rng);
        let queue = self.clients.queues.len() - 1;
        self.begin(queue, (SimKind::Flush, 0..0))?;
        self.pump()?;
        self.settle()?;
        if self.first.has(TransmissionFlags::SEND_FLUSH) {
            self.lose(Loss::Power)?;
        }
        let queue = self.clients.queues.len() - 1;
        self.begin(queue, (SimKind::Read, 0..self.image.len()))?;
        self.pump()?;
        self.settle()
    }
}

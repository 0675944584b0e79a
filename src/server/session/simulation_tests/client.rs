//! A scripted client: sends requests of every kind, and checks that each is answered once and correctly.

use super::disk::{fill, stamp_of};
use super::model::{CELL, Model, Stamp};
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind};
use std::collections::BTreeMap;
use std::ops::Range;

/// A request without a complete reply.
#[derive(Debug)]
struct Unanswered {
    kind: CommandKind,
    cells: Range<usize>,
    durable: bool,
    sent: u64,
    /// Its number in the model, if it changes bytes.
    change: Option<usize>,
    /// Cells that a reply has described.
    received: Vec<bool>,
    failed: bool,
}

/// One client's connection.
#[derive(Debug)]
pub(super) struct ScriptedClient {
    session: u64,
    dialect: Dialect,
    /// Sent, and not received by the server.
    pub(super) outgoing: Vec<u8>,
    incoming: Vec<u8>,
    unanswered: BTreeMap<u64, Unanswered>,
    next_cookie: u64,
    /// It has sent the last request, or will close its side.
    pub(super) is_closing: bool,
    /// Errors are expected.
    may_fail: bool,
    pub(super) answered: u64,
}

impl ScriptedClient {
    pub(super) fn new(session: u64, dialect: Dialect, may_fail: bool) -> Self {
        let (outgoing, incoming, unanswered) = (Vec::new(), Vec::new(), BTreeMap::new());
        let (next_cookie, is_closing, answered) = (1, false, 0);
        Self {
            session,
            dialect,
            outgoing,
            incoming,
            unanswered,
            next_cookie,
            is_closing,
            may_fail,
            answered,
        }
    }

    pub(super) fn dialect(&self) -> Dialect {
        self.dialect
    }

    /// How many requests are not answered.
    pub(super) fn depth(&self) -> usize {
        self.unanswered.len()
    }

    /// The requests that are not answered, for a message.
    pub(super) fn describe(&self) -> String {
        let first: Vec<_> = self.unanswered.iter().take(3).collect();
        format!("session {}: {} requests: {first:?}", self.session, self.unanswered.len())
    }

    /// Sends a request.
    pub(super) fn request(&mut self, rng: &mut fastrand::Rng, model: &mut Model, stamp: Stamp) {
        let kind = match rng.u8(..40) {
            0..12 => CommandKind::Read,
            12..26 => CommandKind::Write,
            26..30 => CommandKind::Flush,
            30..33 => CommandKind::Trim,
            33..36 => CommandKind::WriteZeroes,
            36 => CommandKind::Cache,
            _ if self.dialect == Dialect::Simple => CommandKind::Read,
            _ => CommandKind::BlockStatus,
        };
        let cells = if kind == CommandKind::Flush { 0..0 } else { self.cells(rng, model) };
        let stamp = match kind {
            CommandKind::Write if rng.u8(..6) > 0 => stamp,
            _ => 0,
        };
        let changes = [CommandKind::Write, CommandKind::Trim, CommandKind::WriteZeroes];
        let change = changes.contains(&kind);
        let change = change.then(|| model.on_sent(self.session, cells.clone(), stamp));
        let durable = change.is_some() && rng.u8(..3) == 0;
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::FUA, durable);
        let payload = kind == CommandKind::Write && self.dialect == Dialect::Extended;
        flags.set(CommandFlags::PAYLOAD_LEN, payload);
        flags.set(CommandFlags::NO_HOLE, kind == CommandKind::WriteZeroes && rng.bool());
        let is_whole = kind == CommandKind::Read && self.dialect != Dialect::Simple;
        let is_whole = is_whole && cells.len() <= 2048 && rng.u8(..6) == 0;
        flags.set(CommandFlags::DF, is_whole);
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let (offset, length) = (cells.start as u64 * CELL, cells.len() as u64 * CELL);
        let header =
            RequestHeader { flags: flags.bits(), kind: kind.number(), cookie, offset, length };
        header.encode(self.dialect, &mut self.outgoing);
        if kind == CommandKind::Write {
            let start = self.outgoing.len();
            self.outgoing.resize(start + cells.len() * CELL as usize, 0);
            fill(&mut self.outgoing[start..], stamp);
        }
        let (sent, received) = (model.tick(), vec![false; cells.len()]);
        let failed = false;
        let request = Unanswered { kind, cells, durable, sent, change, received, failed };
        self.unanswered.insert(cookie, request);
    }

    /// The range of a request: mostly short, sometimes longer than one piece or load.
    fn cells(&self, rng: &mut fastrand::Rng, model: &Model) -> Range<usize> {
        let count = model.cell_count();
        let longest = match rng.u8(..8) {
            0 => count,
            1 => 128,
            _ => 20,
        };
        let start = rng.usize(..count);
        start..start + rng.usize(1..=longest.min(count - start))
    }

    /// Sends `NBD_CMD_DISC`.
    pub(super) fn disconnect(&mut self) {
        let kind = CommandKind::Disconnect.number();
        let header = RequestHeader { flags: 0, kind, cookie: 0, offset: 0, length: 0 };
        header.encode(self.dialect, &mut self.outgoing);
        self.is_closing = true;
    }

    /// The connection is lost.
    pub(super) fn abandon(&mut self, model: &mut Model) {
        for (_, request) in std::mem::take(&mut self.unanswered) {
            if let Some(change) = request.change {
                model.on_ended(change, false, false);
            }
        }
    }

    /// Receives bytes, and checks the replies in them.
    pub(super) fn receive(&mut self, bytes: &[u8], model: &mut Model) -> Result<(), String> {
        self.incoming.extend_from_slice(bytes);
        let mut used = 0;
        loop {
            let incoming = std::mem::take(&mut self.incoming);
            let outcome = self.reply(&incoming[used..], model);
            self.incoming = incoming;
            match outcome? {
                Some(count) => used += count,
                None => break,
            }
        }
        self.incoming.drain(..used);
        Ok(())
    }

    /// Handles the first reply or chunk, and returns its length; `None` if it is incomplete.
    fn reply(&mut self, bytes: &[u8], model: &mut Model) -> Result<Option<usize>, String> {
        let header = ReplyHeader::decode(bytes).map_err(|error| format!("a reply: {error:?}"))?;
        let Some((header, used)) = header else { return Ok(None) };
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let rest = &bytes[used..];
        let request = self.unanswered.get_mut(&cookie);
        let request = request.ok_or_else(|| format!("no request has the cookie {cookie}"))?;
        let (length, done) = match header {
            ReplyHeader::Simple { error, .. } => {
                let has_data = request.kind == CommandKind::Read && error == 0;
                let length = if has_data { request.cells.len() * CELL as usize } else { 0 };
                if rest.len() < length {
                    return Ok(None);
                }
                request.failed = error != 0;
                if has_data {
                    let offset = request.cells.start as u64 * CELL;
                    request.on_data(offset, &rest[..length], model)?;
                }
                (length, true)
            }
            ReplyHeader::Chunk { kind, length, done, .. } => {
                let length = usize::try_from(length).unwrap();
                if rest.len() < length {
                    return Ok(None);
                }
                let needed = Chunk::needed(kind, length as u64) as usize;
                let chunk = Chunk::decode(kind, length as u64, &rest[..needed]);
                let chunk = chunk.map_err(|error| format!("a chunk: {error:?}"))?;
                request.on_chunk(chunk, &rest[needed..length], model)?;
                (length, done)
            }
        };
        if done && let Some(request) = self.unanswered.remove(&cookie) {
            self.answered += 1;
            self.on_answered(&request, model)?;
        }
        Ok(Some(used + length))
    }

    fn on_answered(&self, request: &Unanswered, model: &mut Model) -> Result<(), String> {
        if let Some(change) = request.change {
            let overwrites = !request.failed && request.kind != CommandKind::Trim;
            model.on_ended(change, overwrites, request.durable && overwrites);
        }
        if !request.failed
            && (request.durable || request.kind == CommandKind::Flush)
            && !model.allows_flush(request.sent)
        {
            return Err(format!("{request:?} succeeds after a failed flush"));
        }
        if request.failed {
            if request.kind == CommandKind::Flush {
                model.on_flush_failed();
            }
            let answer = if self.may_fail { Ok(()) } else { Err(()) };
            return answer.map_err(|()| format!("{request:?} fails"));
        }
        match request.kind {
            CommandKind::Flush => model.on_flushed(request.sent),
            CommandKind::Read | CommandKind::BlockStatus
                if !request.received.iter().all(|received| *received) =>
            {
                return Err(format!("the reply to {request:?} is incomplete"));
            }
            _ => {}
        }
        Ok(())
    }
}

impl Unanswered {
    fn on_chunk(&mut self, chunk: Chunk, data: &[u8], model: &Model) -> Result<(), String> {
        match chunk {
            Chunk::None => Ok(()),
            Chunk::Data { offset } => self.on_data(offset, data, model),
            Chunk::Hole { offset, length } => {
                self.on_data(offset, &vec![0; length as usize], model)
            }
            Chunk::Status { extents, .. } => self.on_status(&extents, model),
            Chunk::Error { .. } => {
                self.failed = true;
                Ok(())
            }
        }
    }

    fn on_status(&mut self, extents: &[(u64, u32)], model: &Model) -> Result<(), String> {
        let mut offset = self.cells.start as u64 * CELL;
        for (length, flags) in extents {
            let cells = (offset / CELL) as usize..((offset + length) / CELL) as usize;
            for cell in cells {
                if *flags != 0 && !model.allows_read(cell, 0, self.sent) {
                    return Err(format!("cell {cell} is no hole for {self:?}"));
                }
            }
            offset += length;
        }
        self.received.fill(true);
        Ok(())
    }

    fn on_data(&mut self, offset: u64, data: &[u8], model: &Model) -> Result<(), String> {
        for (cell, bytes) in ((offset / CELL) as usize..).zip(data.chunks_exact(CELL as usize)) {
            let at = cell.checked_sub(self.cells.start);
            let received = at.and_then(|at| self.received.get_mut(at));
            match received {
                Some(received) if !*received => *received = true,
                _ => return Err(format!("cell {cell} is received twice or unasked: {self:?}")),
            }
            let stamp = stamp_of(bytes);
            if !model.allows_read(cell, stamp, self.sent) {
                return Err(format!("cell {cell} reads as {stamp} for {self:?}"));
            }
        }
        Ok(())
    }
}

//! The replies of a scripted server: every form that the specification permits.

use super::cells::{CELL, CellValue, append};
use super::coverage::UpstreamReached;
use super::scene::Scene;
use crate::nbd::reply::{Dialect, ReplyHeader, ReplyTo};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{Allocation, ChunkKind, CommandKind, ErrorCode};
use crate::upstream::terms::ServerTerms;
use std::collections::VecDeque;
use std::ops::Range;

/// The outcome of a request.
#[derive(Debug)]
pub(super) enum ServerAnswer {
    Success,
    Error(ErrorCode),
    /// The values of a read, and an error that follows a part of them.
    Data(Vec<CellValue>, Option<ErrorCode>),
    /// For each cell whether it is a hole.
    Extents(Vec<bool>),
}

/// A reply that is not sent.
#[derive(Debug)]
pub(super) struct ScriptedReply {
    terms: ServerTerms,
    pub(super) connection: usize,
    pub(super) cookie: u64,
    offset: u64,
    length: u64,
    to: ReplyTo,
    /// Other replies may be sent between two pieces.
    pub(super) pieces: VecDeque<Vec<u8>>,
    /// The cells that it acknowledges to have changed.
    pub(super) acknowledges: Range<usize>,
    /// A part of its content is missing.
    pub(super) is_incomplete: bool,
}

impl ScriptedReply {
    pub(super) fn new(terms: ServerTerms, connection: usize, request: RequestHeader) -> Self {
        let RequestHeader { kind, cookie, offset, length, .. } = request;
        let chunked = [CommandKind::Read, CommandKind::BlockStatus];
        let chunked = chunked.iter().any(|command| command.number() == kind);
        Self {
            terms,
            connection,
            cookie,
            offset,
            length,
            to: ReplyTo { cookie, offset, chunked },
            pieces: VecDeque::new(),
            acknowledges: 0..0,
            is_incomplete: false,
        }
    }

    /// Encodes its pieces.
    pub(super) fn answer(&mut self, answer: ServerAnswer, scene: &mut Scene<'_>) {
        let dialect = self.terms.dialect;
        let mut piece = Vec::new();
        match answer {
            ServerAnswer::Success => dialect.success(self.to, &mut piece),
            ServerAnswer::Error(code) => {
                let at = (self.to.chunked && scene.rng.bool()).then_some(self.offset);
                dialect.failure(self.to, code, at, "why", &mut piece);
            }
            ServerAnswer::Data(values, error) if dialect == Dialect::Simple => match error {
                Some(code) => dialect.failure(self.to, code, None, "", &mut piece),
                None => {
                    dialect.data_header(self.to, self.offset, 0, true, &mut piece);
                    self.append_values(&values, &mut piece);
                }
            },
            ServerAnswer::Data(values, error) => return self.chunks(&values, error, scene),
            ServerAnswer::Extents(holes) => {
                let extents = extents(&holes, scene.rng);
                let context = self.terms.allocation_context.unwrap_or_default();
                dialect.status(self.to, context, &extents, &mut piece);
            }
        }
        self.pieces.push_back(piece);
    }

    /// A probe may read less than a cell.
    fn append_values(&self, values: &[CellValue], piece: &mut Vec<u8>) {
        let end = piece.len() + self.length.min((values.len() * CELL) as u64) as usize;
        values.iter().for_each(|value| append(piece, *value));
        piece.truncate(end);
    }

    /// Divides the data of a read into chunks.
    fn chunks(&mut self, values: &[CellValue], error: Option<ErrorCode>, scene: &mut Scene<'_>) {
        let mut parts: Vec<Range<usize>> = Vec::new();
        let mut start = 0;
        while start < values.len() {
            let left = values.len() - start;
            let count = if scene.rng.bool() { left } else { scene.rng.usize(1..=left) };
            parts.push(start..start + count);
            start += count;
        }
        if self.is_incomplete || error.is_some() {
            scene.coverage.count_if(error.is_none(), UpstreamReached::Misbehaved);
            parts.remove(scene.rng.usize(..parts.len()));
        }
        if scene.rng.u8(..4) == 0 {
            scene.rng.shuffle(&mut parts);
            scene.coverage.count_if(parts.len() > 1, UpstreamReached::Shuffled);
        }
        let (count, ends_with_data) = (parts.len(), scene.rng.bool());
        let error_at = scene.rng.usize(..=count);
        for (nth, part) in parts.into_iter().enumerate() {
            if let Some(code) = error
                && nth == error_at
            {
                self.error_chunk(code, false);
                scene.coverage.count(UpstreamReached::ErrorChunk);
            }
            let done = error.is_none() && nth + 1 == count && ends_with_data;
            self.data_chunk(part, values, done, scene);
        }
        match error {
            None if ends_with_data && count > 0 => {}
            Some(code) if self.pieces.len() <= error_at => self.error_chunk(code, true),
            _ => self.end_chunk(),
        }
    }

    fn data_chunk(
        &mut self,
        part: Range<usize>,
        values: &[CellValue],
        done: bool,
        scene: &mut Scene<'_>,
    ) {
        let dialect = self.terms.dialect;
        let at = self.offset + (part.start * CELL) as u64;
        let length = self.length.min((part.len() * CELL) as u64) as u32;
        let mut piece = Vec::new();
        let values = &values[part];
        if values.iter().all(|value| *value == 0) && scene.rng.bool() {
            scene.coverage.count(UpstreamReached::Hole);
            dialect.hole(self.to, at, length, done, &mut piece);
        } else {
            dialect.data_header(self.to, at, length, done, &mut piece);
            self.append_values(values, &mut piece);
        }
        self.pieces.push_back(piece);
    }

    /// An error, possibly before other chunks.
    fn error_chunk(&mut self, code: ErrorCode, done: bool) {
        let mut piece = Vec::new();
        self.header(done, ChunkKind::Error, 6, &mut piece);
        piece.extend_from_slice(&code.number().to_be_bytes());
        piece.extend_from_slice(&[0, 0]);
        self.pieces.push_back(piece);
    }

    fn end_chunk(&mut self) {
        let mut piece = Vec::new();
        self.header(true, ChunkKind::None, 0, &mut piece);
        self.pieces.push_back(piece);
    }

    fn header(&self, done: bool, kind: ChunkKind, length: u64, out: &mut Vec<u8>) {
        let offset = (self.terms.dialect == Dialect::Extended).then_some(self.offset);
        let (cookie, kind) = (self.cookie, kind.number());
        ReplyHeader::Chunk { cookie, done, kind, length, offset }.encode(out);
    }
}

/// The extents of a range; the last one may reach beyond the range, and the list may end before it does.
fn extents(holes: &[bool], rng: &mut fastrand::Rng) -> Vec<(u64, u32)> {
    let mut extents: Vec<(u64, u32)> = Vec::new();
    for hole in holes {
        let flags = if *hole { (Allocation::HOLE | Allocation::ZERO).bits() } else { 0 };
        let is_cut = extents.len() > 2 && rng.u8(..8) == 0;
        match extents.last_mut() {
            Some((length, last)) if *last == flags => *length += CELL as u64,
            _ if is_cut => return extents,
            _ => extents.push((CELL as u64, flags)),
        }
    }
    if let Some((length, _)) = extents.last_mut()
        && rng.bool()
    {
        *length += CELL as u64;
    }
    extents
}

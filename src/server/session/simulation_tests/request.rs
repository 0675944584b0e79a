//! The requests of a script, valid and invalid, and the replies that the specification demands.

use super::model::{Model, cell_size};
use crate::nbd::reply::Dialect;
use crate::nbd::request::{RequestHeader, Terms};
use crate::nbd::wire::{
    CommandFlags, CommandKind, ErrorCode, PRIVATE_COMMAND, PRIVATE_PAYLOAD_MAX, TransmissionFlags,
};
use crate::server::session::reads::WHOLE_READ_MAX;
use std::ops::Range;

/// Number of a command that does not exist.
const UNKNOWN_COMMAND: u16 = 99;

/// A request before it is sent.
#[derive(Debug)]
pub(super) struct Draft {
    pub(super) kind: u16,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// A payload of that length follows.
    pub(super) has_payload: bool,
    /// The error of the reply; `None` if the request is valid.
    pub(super) refusal: Option<ErrorCode>,
}

/// The kinds of requests in a schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    Usual,
    /// Mostly flushes and durable changes.
    Durable,
    /// Mostly zeroing and trimming of long ranges.
    Zeroing,
}

/// Whether a command changes bytes.
pub(super) fn changes(kind: u16) -> bool {
    [CommandKind::Write, CommandKind::Trim, CommandKind::WriteZeroes]
        .iter()
        .any(|change| change.number() == kind)
}

/// The range of a request: mostly short, sometimes longer than one piece or load.
fn range(rng: &mut fastrand::Rng, count: usize, mix: Mix, kind: u16) -> Range<usize> {
    let has_data = kind == CommandKind::Read.number() || kind == CommandKind::Write.number();
    let longest = match rng.u8(..8) {
        0 if mix != Mix::Zeroing || !has_data => count,
        1..4 if mix == Mix::Zeroing && !has_data => count,
        1 if mix != Mix::Zeroing => 128,
        _ => 20,
    };
    let start = rng.usize(..count);
    start..start + rng.usize(1..=longest.min(count - start))
}

impl Draft {
    /// A request of this kind.
    fn of(kind: CommandKind, terms: &Terms, rng: &mut fastrand::Rng) -> Self {
        let mut flags = CommandFlags::empty();
        let is_write = kind == CommandKind::Write;
        // QEMU sends the payload without the flag.
        let announces = is_write && terms.dialect == Dialect::Extended && rng.u8(..4) > 0;
        flags.set(CommandFlags::PAYLOAD_LEN, announces);
        flags.set(CommandFlags::FUA, rng.u8(..3) == 0);
        Self {
            kind: kind.number(),
            flags,
            offset: 0,
            length: 0,
            has_payload: is_write,
            refusal: None,
        }
    }

    /// A valid request, unless the export is read-only.
    pub(super) fn valid(rng: &mut fastrand::Rng, terms: &Terms, model: &Model, mix: Mix) -> Self {
        let kind = match rng.u8(..42) {
            0..20 if mix == Mix::Zeroing => {
                if rng.bool() {
                    CommandKind::Trim
                } else {
                    CommandKind::WriteZeroes
                }
            }
            0..20 if mix == Mix::Durable => CommandKind::Flush,
            0..12 => CommandKind::Read,
            12..26 => CommandKind::Write,
            26..30 => CommandKind::Flush,
            30..33 => CommandKind::Trim,
            33..36 => CommandKind::WriteZeroes,
            36 => CommandKind::Cache,
            37.. if terms.private && rng.bool() => return Self::private(rng, terms),
            _ if terms.allocation_selected => CommandKind::BlockStatus,
            _ => CommandKind::Read,
        };
        let mut draft = Self::of(kind, terms, rng);
        if kind == CommandKind::Flush {
            return draft.checked(terms);
        }
        let mut cells = range(rng, model.cell_count(), mix, draft.kind);
        if matches!(kind, CommandKind::Read | CommandKind::Write) {
            let longest = (u64::from(terms.payload_length_max) / cell_size()) as usize;
            cells.end = cells.end.min(cells.start + longest);
        }
        if rng.u8(..32) == 0 {
            cells.end = cells.start;
        }
        (draft.offset, draft.length) = (cells.start as u64, cells.len() as u64);
        (draft.offset, draft.length) = (draft.offset * cell_size(), draft.length * cell_size());
        if kind == CommandKind::WriteZeroes {
            draft.flags.set(CommandFlags::NO_HOLE, rng.bool());
            draft.flags.set(CommandFlags::FAST_ZERO, rng.u8(..4) == 0);
        }
        draft.flags.set(CommandFlags::REQ_ONE, kind == CommandKind::BlockStatus && rng.bool());
        let is_whole = kind == CommandKind::Read && terms.dialect != Dialect::Simple;
        let is_whole = is_whole && draft.length <= WHOLE_READ_MAX && rng.u8(..6) == 0;
        draft.flags.set(CommandFlags::DF, is_whole);
        draft.checked(terms)
    }

    /// With the error that a command or flag has which the export does not offer.
    fn checked(self, terms: &Terms) -> Self {
        let needed = match CommandKind::try_from(self.kind) {
            Ok(CommandKind::Flush) => TransmissionFlags::SEND_FLUSH,
            Ok(CommandKind::Trim) => TransmissionFlags::SEND_TRIM,
            Ok(CommandKind::WriteZeroes) => TransmissionFlags::SEND_WRITE_ZEROES,
            Ok(CommandKind::Cache) => TransmissionFlags::SEND_CACHE,
            _ => TransmissionFlags::empty(),
        };
        let modifiers = [
            (CommandFlags::FUA, TransmissionFlags::SEND_FUA),
            (CommandFlags::FAST_ZERO, TransmissionFlags::SEND_FAST_ZERO),
        ];
        let is_offered = terms.flags.contains(needed)
            && modifiers.iter().all(|(modifier, needed)| {
                !self.flags.contains(*modifier) || terms.flags.contains(*needed)
            });
        let is_forbidden = terms.flags.contains(TransmissionFlags::READ_ONLY) && changes(self.kind);
        let refusal = match self.refusal {
            _ if is_forbidden => Some(ErrorCode::NotPermitted),
            _ if !is_offered => Some(ErrorCode::Invalid),
            refusal => refusal,
        };
        Self { refusal, ..self }
    }

    fn private(rng: &mut fastrand::Rng, terms: &Terms) -> Self {
        let mut flags = CommandFlags::empty();
        flags.set(CommandFlags::PAYLOAD_LEN, terms.dialect == Dialect::Extended && rng.bool());
        let length = if rng.bool() { rng.u64(..=PRIVATE_PAYLOAD_MAX) } else { 36 };
        let (kind, offset, has_payload) = (PRIVATE_COMMAND, 0, true);
        Self { kind, flags, offset, length, has_payload, refusal: None }
    }

    /// A request that the server has to refuse.
    pub(super) fn invalid(rng: &mut fastrand::Rng, terms: &Terms, model: &Model) -> Self {
        match rng.u8(..6) {
            0 => Self::with_wrong_flag(rng, terms, model),
            1 => Self::unknown(rng, terms),
            2 if terms.payload_length_max < 1 << 20 => Self::too_long(rng, terms),
            3 if !terms.allocation_selected => {
                let draft = Self::of(CommandKind::BlockStatus, terms, rng);
                Self { length: cell_size(), refusal: Some(ErrorCode::Invalid), ..draft }
            }
            4 if terms.dialect != Dialect::Simple && terms.size > WHOLE_READ_MAX => {
                let draft = Self::of(CommandKind::Read, terms, rng);
                let length = WHOLE_READ_MAX + cell_size();
                if length > u64::from(terms.payload_length_max) {
                    return Self::beyond_end(rng, terms);
                }
                let flags = draft.flags | CommandFlags::DF;
                Self { flags, length, refusal: Some(ErrorCode::Overflow), ..draft }.checked(terms)
            }
            5 if terms.private => {
                let length = PRIVATE_PAYLOAD_MAX + u64::from(rng.u8(1..9));
                Self { length, refusal: Some(ErrorCode::Invalid), ..Self::private(rng, terms) }
            }
            _ => Self::beyond_end(rng, terms),
        }
    }

    fn beyond_end(rng: &mut fastrand::Rng, terms: &Terms) -> Self {
        use CommandKind::{BlockStatus, Cache, Read, Trim, Write, WriteZeroes};
        let kind = [Read, Write, Trim, WriteZeroes, Cache, BlockStatus][rng.usize(..6)];
        let inside = rng.u64(..4) * cell_size();
        let offset = if rng.u8(..8) == 0 { u64::MAX - 100 } else { terms.size - inside };
        let length = inside + rng.u64(1..3) * cell_size();
        let refusal = match kind {
            Write | WriteZeroes => ErrorCode::NoSpace,
            Read if terms.reads_beyond_end_are_no_space => ErrorCode::NoSpace,
            _ => ErrorCode::Invalid,
        };
        Self { offset, length, refusal: Some(refusal), ..Self::of(kind, terms, rng) }.checked(terms)
    }

    fn with_wrong_flag(rng: &mut fastrand::Rng, terms: &Terms, model: &Model) -> Self {
        let mut draft = loop {
            let draft = Self::valid(rng, terms, model, Mix::Usual);
            if draft.kind != PRIVATE_COMMAND {
                break draft;
            }
        };
        let is_flush = draft.kind == CommandKind::Flush.number();
        draft.flags |= if is_flush || draft.kind == CommandKind::Read.number() {
            CommandFlags::FAST_ZERO
        } else {
            CommandFlags::DF
        };
        // The flag announces a payload even where it is wrong, but only with extended headers.
        if draft.length <= 4096 && rng.bool() {
            draft.flags |= CommandFlags::PAYLOAD_LEN;
            draft.has_payload |= terms.dialect == Dialect::Extended;
        }
        Self { refusal: Some(ErrorCode::Invalid), ..draft }
    }

    fn unknown(rng: &mut fastrand::Rng, terms: &Terms) -> Self {
        let draft = Self::of(CommandKind::Write, terms, rng);
        let has_payload = draft.flags.contains(CommandFlags::PAYLOAD_LEN);
        let kind = if terms.private || rng.bool() { UNKNOWN_COMMAND } else { PRIVATE_COMMAND };
        let (length, refusal) = (rng.u64(..2000), Some(ErrorCode::Invalid));
        Self { kind, length, has_payload, refusal, ..draft }
    }

    fn too_long(rng: &mut fastrand::Rng, terms: &Terms) -> Self {
        let kind = if rng.bool() { CommandKind::Read } else { CommandKind::Write };
        let length = u64::from(terms.payload_length_max) + rng.u64(1..2000);
        let refusal = Some(ErrorCode::Invalid);
        Self { length, refusal, ..Self::of(kind, terms, rng) }.checked(terms)
    }

    /// The cells that a valid request is for.
    pub(super) fn cells(&self) -> Range<usize> {
        if self.refusal.is_some() || self.kind == PRIVATE_COMMAND {
            return 0..0;
        }
        (self.offset / cell_size()) as usize..((self.offset + self.length) / cell_size()) as usize
    }

    pub(super) fn encode(&self, cookie: u64, dialect: Dialect, out: &mut Vec<u8>) {
        let Self { kind, flags, offset, length, .. } = *self;
        RequestHeader { flags: flags.bits(), kind, cookie, offset, length }.encode(dialect, out);
    }
}

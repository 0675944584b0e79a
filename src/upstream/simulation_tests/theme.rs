//! The themes of schedules, and the terms of their servers.

use super::clients::SimMix;
use crate::ids::DiskId;
use crate::nbd::reply::Dialect;
use crate::nbd::wire::TransmissionFlags as Flags;
use crate::upstream::terms::ServerTerms;

/// A kind of schedule, in which some events are more frequent than in others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpstreamTheme {
    Any,
    /// A large disk, and long operations.
    Large,
    /// Little memory for unflushed changes.
    Scarce,
    /// The server fails some of the requests.
    Errors,
    /// The server fails many flushes, and clients flush often.
    Flushes,
    /// The server breaks the protocol.
    Misbehaving,
    /// Sessions end while there is no connection.
    Endings,
}

impl UpstreamTheme {
    /// The seeds of its schedules: one of so many, with this remainder.
    pub(super) fn seeds(self) -> (u64, u64) {
        match self {
            Self::Any => (1, 0),
            Self::Large => (16, 1),
            Self::Scarce => (8, 3),
            Self::Errors => (8, 6),
            Self::Flushes => (16, 8),
            Self::Misbehaving => (16, 10),
            Self::Endings => (16, 12),
        }
    }

    /// The theme of a schedule.
    pub(super) fn of(seed: u64) -> Self {
        use UpstreamTheme::{Endings, Errors, Flushes, Large, Misbehaving, Scarce};
        let special = [Large, Scarce, Errors, Flushes, Misbehaving, Endings];
        let of_seed = |theme: &Self| seed % theme.seeds().0 == theme.seeds().1;
        special.into_iter().find(of_seed).unwrap_or(Self::Any)
    }

    /// The number of the disk's cells.
    pub(super) fn cells(self, rng: &mut fastrand::Rng) -> usize {
        if self == Self::Large { 512 } else { rng.usize(8..48) }
    }

    /// The bound of the memory for unflushed changes, in bytes.
    pub(super) fn unflushed_max(self, rng: &mut fastrand::Rng) -> u64 {
        match self {
            Self::Scarce => [0, 4000, 8000, 16_000][rng.usize(..4)],
            Self::Flushes => [1500, 3000, 8000][rng.usize(..3)],
            Self::Large => [100_000, 64 << 20][rng.usize(..2)],
            _ => [8000, 20_000, 64 << 20][rng.usize(..3)],
        }
    }

    /// How frequent faults are: at most 6.
    pub(super) fn faults(self, rng: &mut fastrand::Rng) -> u8 {
        match self {
            Self::Flushes => rng.u8(..2),
            Self::Scarce => rng.u8(2..5),
            Self::Large => rng.u8(3..6),
            _ => rng.u8(..6),
        }
    }

    /// Whether the server fails requests.
    pub(super) fn has_errors(self) -> bool {
        matches!(self, Self::Errors | Self::Flushes)
    }

    /// What clients submit.
    pub(super) fn mix(self, terms: &ServerTerms, rng: &mut fastrand::Rng) -> SimMix {
        SimMix {
            flags: terms.flags,
            length_max: if self == Self::Large { 400 } else { 16 },
            is_durable: rng.u8(..if self == Self::Flushes { 2 } else { 4 }) == 0,
        }
    }
}

/// Commands and flags that a server may lack.
const OPTIONAL: [Flags; 5] = [
    Flags::SEND_FUA,
    Flags::SEND_TRIM,
    Flags::SEND_WRITE_ZEROES,
    Flags::SEND_CACHE,
    Flags::CAN_MULTI_CONN,
];

/// The id of the disk, which some of its servers tell.
const DISK_ID: DiskId = DiskId([1; 16]);
/// The id of another disk.
const OTHER_DISK_ID: DiskId = DiskId([2; 16]);

/// The terms of the first server.
pub(super) fn first_terms(cells: usize, rng: &mut fastrand::Rng) -> ServerTerms {
    let mut flags = Flags::HAS_FLAGS | Flags::SEND_FLUSH;
    if rng.u8(..16) == 0 {
        flags -= Flags::SEND_FLUSH;
    }
    flags.set(Flags::READ_ONLY, rng.u8(..32) == 0);
    server_terms(cells, flags, 4, rng)
}

/// The terms of a server that may take the place of one with these terms.
pub(super) fn replacement_terms(first: &ServerTerms, rng: &mut fastrand::Rng) -> ServerTerms {
    let cells = first.size as usize / super::cells::CELL;
    let mut flags = first.flags;
    if rng.bool() {
        flags |= Flags::SEND_FLUSH;
    }
    let terms = server_terms(cells, flags, 2, rng);
    ServerTerms { block_min: terms.block_min.min(first.block_min), ..terms }
}

fn server_terms(cells: usize, given: Flags, of: u8, rng: &mut fastrand::Rng) -> ServerTerms {
    let mut flags = given;
    for flag in OPTIONAL {
        if rng.u8(..of) > 0 {
            flags |= flag;
        }
    }
    if flags.contains(Flags::SEND_WRITE_ZEROES) && rng.bool() {
        flags |= Flags::SEND_FAST_ZERO;
    }
    let dialect = [Dialect::Simple, Dialect::Structured, Dialect::Extended][rng.usize(..3)];
    let has_context = dialect != Dialect::Simple && rng.u8(..4) > 0;
    ServerTerms {
        size: (cells * super::cells::CELL) as u64,
        flags,
        dialect,
        block_min: [1, 512][rng.usize(..2)],
        block_preferred: 4096,
        payload_max: [1024, 4096, 1 << 25, 1 << 25][rng.usize(..4)],
        allocation_context: has_context.then(|| rng.u32(..3)),
        disk_id: rng.bool().then_some(DISK_ID),
    }
}

/// The terms of another disk. It may differ in nothing but its id if `first` has one.
pub(super) fn other_terms(first: &ServerTerms, rng: &mut fastrand::Rng) -> ServerTerms {
    let terms = replacement_terms(first, rng);
    match rng.u8(..4) {
        3 if first.disk_id.is_some() => ServerTerms { disk_id: Some(OTHER_DISK_ID), ..terms },
        0 => ServerTerms { size: first.size + 512, ..terms },
        1 => ServerTerms { block_min: first.block_min * 2, ..terms },
        _ if first.flags.contains(Flags::SEND_FLUSH) => {
            ServerTerms { flags: terms.flags - Flags::SEND_FLUSH, ..terms }
        }
        _ => ServerTerms { size: 0, ..terms },
    }
}

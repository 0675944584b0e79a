//! Random requests of one session for the sectors that all sessions share, determined by a seed.
//! Every request that writes has a value of its own.

use crate::register::Value;
use crate::stamp::{SECTOR, ZEROS, encode};
use fastrand::Rng;
use harness::raw::{FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE_ZEROES};
use harness::session::Request;
use std::ops::Range;

/// The sectors that all sessions read and write. Many, so that some are not written again before they
/// are read by another session, after a restart or by a migration.
pub(crate) const SECTORS: u64 = 1024;
/// Half of the requests begin in this many sectors: few, so that requests overlap.
const HOT_SECTORS: u64 = 32;
/// The first of these sectors on the disk. Odd, so that requests are rarely aligned to 4096 bytes.
pub(crate) const FIRST_SECTOR: u64 = 4001;
/// The longest request, 64 KiB: the shortest read whose pages the server sends without a copy.
const LENGTH_MAX: u64 = 128;
/// Limit of the length of a range that is zeroed or trimmed, in sectors.
const ZEROED_MAX: u64 = 8;
/// One request in so many zeroes or trims the next range of the session.
const ZEROING_PERIOD: u64 = 50;

/// The value of all sectors at first.
pub(crate) const INITIAL: Value = Value(1);

/// The effect of a request on the sectors of its range, if it succeeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Returns their values.
    Read,
    /// Gives them this value.
    Write(Value),
    /// Gives some of them this value.
    MayWrite(Value),
    /// None.
    Flush,
}

/// A request and its effect.
pub(crate) struct Planned {
    pub(crate) request: Request,
    pub(crate) effect: Effect,
    /// The sectors of its range.
    pub(crate) sectors: Range<u64>,
}

/// The requests of one session.
pub(crate) struct Requests {
    seed: u64,
    session: usize,
    random: Rng,
    /// Count of writes.
    writes: u32,
    /// Ranges still to be zeroed by this session. Each sector is in one range of one session, so that
    /// zero is a value that only one request writes, as every other value is.
    to_zero: Vec<Range<u64>>,
}

impl Requests {
    /// The requests of one of `sessions` sessions.
    pub(crate) fn new(seed: u64, session: usize, sessions: usize) -> Requests {
        let to_zero = ranges(seed).into_iter().skip(session).step_by(sessions).collect();
        let random = Rng::with_seed(seed.wrapping_mul(sessions as u64) + session as u64);
        Requests { seed, session, random, writes: 0, to_zero }
    }

    /// The next request.
    pub(crate) fn next(&mut self) -> Planned {
        if self.random.u64(..ZEROING_PERIOD) == 0
            && let Some(sectors) = self.to_zero.pop()
        {
            return self.zeroing(sectors);
        }
        let sectors = self.range();
        let (offset, length) = bytes(&sectors);
        let (request, effect) = match self.random.u8(..32) {
            0 => {
                let (request, effect) = (Request::new(FLUSH, 0, 0), Effect::Flush);
                return Planned { request, effect, sectors: 0..0 };
            }
            1..16 => (Request::new(READ, offset, length), Effect::Read),
            _ => {
                let value = self.next_value();
                let data = encode(self.seed, value, sectors.start, sectors.end - sectors.start);
                (Request::write(offset, &data).flags(self.fua()), Effect::Write(value))
            }
        };
        Planned { request, effect, sectors }
    }

    /// A WRITE_ZEROES; or a TRIM, which may leave any sector unchanged.
    fn zeroing(&mut self, sectors: Range<u64>) -> Planned {
        let (offset, length) = bytes(&sectors);
        let (command, hole, effect) = match self.random.u8(..4) {
            0 => (TRIM, 0, Effect::MayWrite(ZEROS)),
            1 => (WRITE_ZEROES, NO_HOLE, Effect::Write(ZEROS)),
            _ => (WRITE_ZEROES, 0, Effect::Write(ZEROS)),
        };
        let request = Request::new(command, offset, length).flags(hole | self.fua());
        Planned { request, effect, sectors }
    }

    fn range(&mut self) -> Range<u64> {
        let starts = if self.random.bool() { HOT_SECTORS } else { SECTORS };
        let start = self.random.u64(..starts);
        let length = match self.random.u8(..32) {
            0 => LENGTH_MAX,
            1..3 => self.random.u64(1..=LENGTH_MAX),
            3..12 => self.random.u64(1..=16),
            _ => self.random.u64(1..=4),
        };
        let length = length.min(SECTORS - start);
        FIRST_SECTOR + start..FIRST_SECTOR + start + length
    }

    fn next_value(&mut self) -> Value {
        self.writes += 1;
        Value((self.session as u32 + 1) << 24 | self.writes)
    }

    fn fua(&mut self) -> u16 {
        if self.random.u8(..4) == 0 { FUA } else { 0 }
    }
}

/// The session that wrote this value; `None` for the initial value, and for zeros.
pub(crate) fn writer(value: Value) -> Option<usize> {
    ((value.0 >> 24) as usize).checked_sub(1)
}

/// All sectors in random order, in ranges of random length.
fn ranges(seed: u64) -> Vec<Range<u64>> {
    let mut random = Rng::with_seed(!seed);
    let mut ranges = Vec::new();
    let (mut start, end) = (FIRST_SECTOR, FIRST_SECTOR + SECTORS);
    while start < end {
        let next = (start + random.u64(1..=ZEROED_MAX)).min(end);
        ranges.push(start..next);
        start = next;
    }
    random.shuffle(&mut ranges);
    ranges
}

/// Offset and length in bytes.
fn bytes(sectors: &Range<u64>) -> (u64, u64) {
    (sectors.start * SECTOR, (sectors.end - sectors.start) * SECTOR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_value_of_a_sector_has_one_request() {
        let mut seen = HashSet::new();
        for session in 0..3 {
            let mut requests = Requests::new(5, session, 3);
            for planned in std::iter::repeat_with(|| requests.next()).take(5000) {
                if let Effect::Write(value) | Effect::MayWrite(value) = planned.effect {
                    for sector in planned.sectors {
                        assert!(seen.insert((value, sector)), "{value:?} twice in {sector}");
                    }
                }
            }
            assert!(requests.to_zero.is_empty());
        }
        let zeroed = seen.iter().filter(|(value, _)| *value == ZEROS).count();
        assert_eq!(zeroed as u64, SECTORS, "every sector is zeroed once");
    }
}

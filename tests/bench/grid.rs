//! Which loads there are: one cell is one load, a set is a choice of cells.
//! Pure: measures nothing.

use std::fmt;

/// The lengths of a request, in bytes.
const BLOCKS: [u32; 4] = [4 << 10, 64 << 10, 256 << 10, 1 << 20];
/// From this length on requests follow each other on the disk; shorter ones are spread at random.
const SEQUENTIAL_FROM: u32 = 256 << 10;
/// How many requests each session has under way.
const DEPTHS: [usize; 3] = [1, 8, 32];
/// How many sessions there are at once.
const SESSIONS: [usize; 3] = [1, 4, 16];

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cell {
    /// Length of a request, in bytes.
    pub(super) block: u32,
    pub(super) work: Work,
    /// Requests under way in each session.
    pub(super) depth: usize,
    pub(super) sessions: usize,
    pub(super) transport: Transport,
    pub(super) temperature: Temperature,
    pub(super) source: Source,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    /// Half of each, drawn at random.
    Mixed,
}

/// How the client is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    /// Loopback.
    Tcp,
    Unix,
}

/// Where the bytes are when they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Temperature {
    /// In memory.
    Cached,
    /// On the disk, the page cache having been emptied.
    Cold,
}

/// Who makes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Our own pipelining generator.
    Raw,
    /// fio's nbd engine, which is libnbd.
    Fio,
}

/// A choice of cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Set {
    /// Two cells, to see that all is well.
    Small,
    /// What most people want to know, in a few minutes.
    Default,
    /// The whole grid, with both generators: hours.
    Full,
}

impl Cell {
    /// Whether requests follow each other on the disk.
    pub(super) fn is_sequential(&self) -> bool {
        self.block >= SEQUENTIAL_FROM
    }

    const fn raw(block: u32, work: Work, depth: usize) -> Self {
        let (transport, temperature) = (Transport::Tcp, Temperature::Cached);
        Self { block, work, depth, sessions: 1, transport, temperature, source: Source::Raw }
    }

    const fn fio(self) -> Self {
        Self { source: Source::Fio, ..self }
    }
}

impl Set {
    /// Its cells, in the order of measuring.
    pub(super) fn cells(self) -> Vec<Cell> {
        match self {
            Self::Small => vec![RANDOM_READS, LARGE_READS],
            Self::Default => vec![
                Cell { depth: 1, ..RANDOM_READS },
                RANDOM_READS,
                RANDOM_WRITES,
                LARGE_READS,
                LARGE_WRITES,
                RANDOM_READS.fio(),
                LARGE_READS.fio(),
            ],
            Self::Full => full(),
        }
    }
}

const RANDOM_READS: Cell = Cell::raw(4 << 10, Work::Read, 32);
const RANDOM_WRITES: Cell = Cell::raw(4 << 10, Work::Write, 32);
const LARGE_READS: Cell = Cell::raw(1 << 20, Work::Read, 4);
const LARGE_WRITES: Cell = Cell::raw(1 << 20, Work::Write, 4);

fn full() -> Vec<Cell> {
    let mut cells = Vec::new();
    for source in [Source::Raw, Source::Fio] {
        for temperature in [Temperature::Cached, Temperature::Cold] {
            for transport in [Transport::Tcp, Transport::Unix] {
                for work in [Work::Read, Work::Write, Work::Mixed] {
                    for block in BLOCKS {
                        for (depth, sessions) in depths_and_sessions() {
                            let cell = Cell::raw(block, work, depth);
                            cells.push(Cell { sessions, transport, temperature, source, ..cell });
                        }
                    }
                }
            }
        }
    }
    cells
}

fn depths_and_sessions() -> impl Iterator<Item = (usize, usize)> {
    DEPTHS.into_iter().flat_map(|depth| SESSIONS.map(|sessions| (depth, sessions)))
}

impl fmt::Display for Cell {
    /// As in `4k-randread-d32-s1-tcp-cached-raw`; what `--only` looks at.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (block, rest) = if self.block.is_multiple_of(1 << 20) {
            (self.block >> 20, "m")
        } else {
            (self.block >> 10, "k")
        };
        let order = if self.is_sequential() { "" } else { "rand" };
        let Self { depth, sessions, transport, temperature, source, .. } = self;
        let work = self.work.word();
        write!(f, "{block}{rest}-{order}{work}-d{depth}-s{sessions}")?;
        write!(f, "-{}-{}-{}", transport.word(), temperature.word(), source.word())
    }
}

impl Work {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Mixed => "rw",
        }
    }
}

impl Transport {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
}

impl Temperature {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Cached => "cached",
            Self::Cold => "cold",
        }
    }
}

impl Source {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Fio => "fio",
        }
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_cell_has_a_name_of_its_own() {
        for set in [Set::Small, Set::Default, Set::Full] {
            let cells = set.cells();
            let names: BTreeSet<String> = cells.iter().map(Cell::to_string).collect();
            assert_eq!(names.len(), cells.len());
        }
    }

    #[test]
    fn the_full_set_is_the_whole_grid_with_both_generators() {
        let per_source = BLOCKS.len() * 3 * DEPTHS.len() * SESSIONS.len() * 2 * 2;
        assert_eq!(Set::Full.cells().len(), 2 * per_source);
    }

    #[test]
    fn a_name_says_what_is_measured() {
        assert_eq!(RANDOM_READS.to_string(), "4k-randread-d32-s1-tcp-cached-raw");
        assert_eq!(LARGE_WRITES.fio().to_string(), "1m-write-d4-s1-tcp-cached-fio");
    }

    #[test]
    fn requests_are_in_order_from_the_limit_on_and_not_before() {
        assert!(Cell::raw(SEQUENTIAL_FROM, Work::Read, 1).is_sequential());
        assert!(!Cell::raw(SEQUENTIAL_FROM - 1, Work::Read, 1).is_sequential());
    }
}

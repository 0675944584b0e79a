//! Which loads there are: one cell is one load, a set is a choice of cells.
//! Pure: measures nothing.

use Temperature::{Cached, Cold};
use Transport::{Tcp, Unix};
use Work::{Mixed, Read, Write};
use serde::{Deserialize, Serialize};
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cell {
    /// Length of a request, in bytes.
    pub(super) block: u32,
    pub(super) work: Work,
    /// Requests under way in each session.
    pub(super) depth: usize,
    pub(super) sessions: usize,
    pub(super) transport: Transport,
    pub(super) temperature: Temperature,
    #[serde(rename = "generator")]
    pub(super) source: Source,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Work {
    Read,
    Write,
    /// Half of each, drawn at random.
    #[serde(rename = "rw")]
    Mixed,
}

/// How the client is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Transport {
    /// Loopback.
    Tcp,
    Unix,
}

/// Where the bytes are when they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Temperature {
    /// In memory.
    Cached,
    /// On the disk, the page cache having been emptied.
    Cold,
}

/// Who makes the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
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
    /// Every axis, and every two values of two axes together, in less than ten minutes.
    Default,
    /// The whole grid, with both generators: hours.
    Full,
}

impl Cell {
    /// Whether requests follow each other on the disk.
    pub(super) fn is_sequential(&self) -> bool {
        self.block >= SEQUENTIAL_FROM
    }

    /// The length of a request, as people say it.
    pub(super) fn block_words(&self) -> String {
        match self.block {
            block if block.is_multiple_of(1 << 20) => format!("{} MiB", block >> 20),
            block => format!("{} KiB", block >> 10),
        }
    }
}

impl Set {
    /// Its cells, in the order of measuring.
    pub(super) fn cells(self) -> Vec<Cell> {
        let of = |source, choice: &[Choice]| -> Vec<Cell> {
            choice.iter().map(|choice| cell(source, *choice)).collect()
        };
        match self {
            Self::Small => of(Source::Raw, SMALL),
            Self::Default => [of(Source::Raw, RAW), of(Source::Fio, FIO)].concat(),
            Self::Full => full(),
        }
    }
}

/// A cell in one line: block in KiB, work, depth, sessions, transport, temperature.
type Choice = (u32, Work, usize, usize, Transport, Temperature);

const SMALL: &[Choice] = &[(4, Read, 32, 1, Tcp, Cached), (1024, Read, 8, 1, Tcp, Cached)];

/// What is measured by default with our own generator.
const RAW: &[Choice] = &[
    (4, Read, 1, 1, Tcp, Cached),
    (4, Read, 32, 1, Tcp, Cached),
    (4, Write, 32, 1, Tcp, Cached),
    (4, Mixed, 8, 4, Tcp, Cached),
    (4, Read, 1, 16, Tcp, Cached),
    (64, Read, 8, 1, Tcp, Cached),
    (64, Mixed, 32, 16, Tcp, Cached),
    (256, Read, 8, 4, Tcp, Cached),
    (256, Write, 32, 1, Tcp, Cached),
    (1024, Read, 8, 1, Tcp, Cached),
    (1024, Write, 8, 1, Tcp, Cached),
    (1024, Mixed, 1, 16, Tcp, Cached),
    (4, Read, 32, 4, Unix, Cached),
    (4, Write, 1, 1, Unix, Cached),
    (64, Read, 1, 4, Unix, Cached),
    (64, Write, 8, 1, Unix, Cached),
    (256, Read, 1, 16, Unix, Cached),
    (256, Mixed, 1, 1, Unix, Cached),
    (1024, Read, 32, 4, Unix, Cached),
    (4, Read, 1, 1, Tcp, Cold),
    (4, Read, 32, 1, Tcp, Cold),
    (64, Read, 32, 4, Tcp, Cold),
    (64, Write, 1, 4, Tcp, Cold),
    (256, Mixed, 32, 16, Tcp, Cold),
    (1024, Mixed, 32, 4, Tcp, Cold),
    (4, Mixed, 8, 16, Unix, Cold),
    (256, Read, 8, 1, Unix, Cold),
    (1024, Write, 8, 16, Unix, Cold),
];

/// What is measured by default with fio.
const FIO: &[Choice] = &[
    (4, Read, 1, 1, Tcp, Cached),
    (4, Read, 32, 1, Tcp, Cached),
    (256, Read, 8, 1, Tcp, Cached),
    (1024, Read, 8, 1, Tcp, Cached),
    (1024, Write, 8, 1, Tcp, Cached),
    (4, Write, 32, 4, Unix, Cached),
    (64, Mixed, 8, 1, Unix, Cached),
    (4, Read, 32, 1, Tcp, Cold),
    (64, Write, 1, 16, Tcp, Cold),
    (256, Write, 1, 4, Unix, Cold),
    (1024, Mixed, 32, 16, Unix, Cold),
];

fn cell(source: Source, choice: Choice) -> Cell {
    let (kib, work, depth, sessions, transport, temperature) = choice;
    Cell { block: kib << 10, work, depth, sessions, transport, temperature, source }
}

/// Everything, kinds of cell together that belong together in a picture.
fn full() -> Vec<Cell> {
    let mut cells = Vec::new();
    for source in [Source::Raw, Source::Fio] {
        for temperature in [Cached, Cold] {
            for transport in [Tcp, Unix] {
                for work in [Read, Write, Mixed] {
                    for block in BLOCKS {
                        for (depth, sessions) in depths_and_sessions() {
                            let choice =
                                (block >> 10, work, depth, sessions, transport, temperature);
                            cells.push(cell(source, choice));
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

    /// The words of a cell's name: one for each axis.
    fn values(cell: &Cell) -> Vec<String> {
        let kind = format!("{:?}", cell.work);
        let name = cell.to_string();
        let words = name.split('-').map(str::to_owned);
        words.enumerate().map(|(at, word)| if at == 1 { kind.clone() } else { word }).collect()
    }

    fn pairs(cells: &[Cell]) -> BTreeSet<(usize, String, usize, String)> {
        let mut pairs = BTreeSet::new();
        for values in cells.iter().map(values) {
            for (one, first) in values.iter().enumerate() {
                for (other, second) in values.iter().enumerate().skip(one + 1) {
                    pairs.insert((one, first.clone(), other, second.clone()));
                }
            }
        }
        pairs
    }

    #[test]
    fn by_default_every_two_values_of_two_axes_meet_as_they_do_in_the_full_set() {
        let (default, full) = (pairs(&Set::Default.cells()), pairs(&Set::Full.cells()));
        let missing: Vec<_> = full.difference(&default).collect();
        assert!(missing.is_empty(), "{missing:?}");
        assert!(full.is_superset(&default), "the default set leaves the grid");
    }

    #[test]
    fn a_name_says_what_is_measured() {
        let names: Vec<String> = Set::Small.cells().iter().map(Cell::to_string).collect();
        assert_eq!(names, ["4k-randread-d32-s1-tcp-cached-raw", "1m-read-d8-s1-tcp-cached-raw"]);
        let cell = cell(Source::Fio, (64, Mixed, 8, 16, Unix, Cold));
        assert_eq!(cell.to_string(), "64k-randrw-d8-s16-unix-cold-fio");
        assert_eq!(cell.block_words(), "64 KiB");
    }

    #[test]
    fn requests_are_in_order_from_the_limit_on_and_not_before() {
        let small = Set::Small.cells()[0];
        assert!(Cell { block: SEQUENTIAL_FROM, ..small }.is_sequential());
        assert!(!Cell { block: SEQUENTIAL_FROM - 1, ..small }.is_sequential());
    }
}

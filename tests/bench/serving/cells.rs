//! The loads: a cell is one load, a set is a choice of cells. Pure.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Requests of at least this length are sequential, shorter ones random. In bytes.
const SEQUENTIAL_FROM: u32 = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Length of a request, in bytes.
    pub(crate) block: u32,
    pub(crate) work: Work,
    /// Requests in flight in each session.
    pub(crate) depth: usize,
    pub(crate) sessions: usize,
    pub(crate) transport: Transport,
    pub(crate) temperature: Temperature,
    pub(crate) generator: Generator,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Work {
    Read,
    Write,
    #[serde(rename = "rw")]
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// Whether the page cache holds the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Temperature {
    Cached,
    Cold,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Generator {
    /// `raw.rs`.
    Raw,
    /// fio's nbd engine, which is libnbd.
    Fio,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Set {
    /// Two cells, for a quick check
    Small,
    /// Every value of every axis, and every pair of values of two axes; less than ten minutes
    Default,
    /// The whole grid, with both generators: hours
    Full,
}

impl Cell {
    pub(crate) fn is_sequential(&self) -> bool {
        self.block >= SEQUENTIAL_FROM
    }

    /// Length of a request in MiB or KiB, and the unit.
    pub(crate) fn block_in_units(&self) -> (u32, &'static str) {
        if self.block >= 1 << 20 { (self.block >> 20, "MiB") } else { (self.block >> 10, "KiB") }
    }
}

/// The value's name in cell names and in JSON.
pub(crate) fn word(value: impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// As in `4k-randread-d32-s1-tcp-cached-raw`.
impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { depth, sessions, transport, temperature, generator, .. } = *self;
        let (block, unit) = self.block_in_units();
        let unit = unit[..1].to_lowercase();
        let order = if self.is_sequential() { "" } else { "rand" };
        write!(f, "{block}{unit}-{order}{}-d{depth}-s{sessions}", word(self.work))?;
        write!(f, "-{}-{}-{}", word(transport), word(temperature), word(generator))
    }
}

/// The default set: for each generator, transport and temperature, the most used paths and enough
/// others for every pair of values.
const DEFAULT: &str = "
    4k-randread-d1-s1-tcp-cached-raw 4k-randread-d32-s1-tcp-cached-raw
    4k-randwrite-d32-s1-tcp-cached-raw 4k-randrw-d8-s4-tcp-cached-raw
    4k-randread-d1-s16-tcp-cached-raw 4k-randread-d4-s64-tcp-cached-raw
    4k-randread-d1-s256-tcp-cached-raw 64k-randread-d8-s1-tcp-cached-raw
    64k-randrw-d32-s16-tcp-cached-raw 256k-read-d8-s4-tcp-cached-raw
    256k-write-d32-s1-tcp-cached-raw 1m-read-d8-s1-tcp-cached-raw
    1m-write-d8-s1-tcp-cached-raw 1m-rw-d1-s16-tcp-cached-raw
    4k-randread-d32-s4-unix-cached-raw 4k-randwrite-d1-s1-unix-cached-raw
    64k-randread-d1-s4-unix-cached-raw 64k-randwrite-d8-s1-unix-cached-raw
    256k-read-d1-s16-unix-cached-raw 256k-rw-d1-s1-unix-cached-raw
    1m-read-d32-s4-unix-cached-raw 4k-randread-d1-s1-tcp-cold-raw
    4k-randread-d32-s1-tcp-cold-raw 64k-randread-d32-s4-tcp-cold-raw
    64k-randwrite-d1-s4-tcp-cold-raw 256k-rw-d32-s16-tcp-cold-raw
    1m-rw-d32-s4-tcp-cold-raw 4k-randrw-d8-s16-unix-cold-raw
    256k-read-d8-s1-unix-cold-raw 1m-write-d8-s16-unix-cold-raw
    4k-randread-d1-s1-tcp-cached-fio 4k-randread-d32-s1-tcp-cached-fio
    256k-read-d8-s1-tcp-cached-fio 1m-read-d8-s1-tcp-cached-fio
    1m-write-d8-s1-tcp-cached-fio 4k-randwrite-d32-s4-unix-cached-fio
    64k-randrw-d8-s1-unix-cached-fio 4k-randread-d32-s1-tcp-cold-fio
    64k-randwrite-d1-s16-tcp-cold-fio 256k-write-d1-s4-unix-cold-fio
    1m-rw-d32-s16-unix-cold-fio
";
/// Depth and number of sessions of the cells outside the grid.
const MANY_SESSIONS: [(usize, usize); 2] = [(4, 64), (1, 256)];
const SMALL: &str = "4k-randread-d32-s1-tcp-cached-raw 1m-read-d8-s1-tcp-cached-raw";

impl Set {
    pub(crate) fn cells(self) -> Vec<Cell> {
        let all = full();
        let named = |names: &str| {
            let cell = |name: &str| all.iter().find(|cell| cell.to_string() == name).copied();
            names.split_whitespace().filter_map(cell).collect()
        };
        match self {
            Self::Small => named(SMALL),
            Self::Default => named(DEFAULT),
            Self::Full => all,
        }
    }
}

fn full() -> Vec<Cell> {
    let mut cells = Vec::new();
    for generator in [Generator::Raw, Generator::Fio] {
        for temperature in [Temperature::Cached, Temperature::Cold] {
            for transport in [Transport::Tcp, Transport::Unix] {
                for work in [Work::Read, Work::Write, Work::Mixed] {
                    for block in [4, 64, 256, 1024].map(|kib: u32| kib << 10) {
                        for depth in [1, 8, 32] {
                            cells.extend([1, 4, 16].map(|sessions| Cell {
                                block,
                                work,
                                depth,
                                sessions,
                                transport,
                                temperature,
                                generator,
                            }));
                        }
                    }
                }
            }
        }
    }
    cells.extend(MANY_SESSIONS.map(|(depth, sessions)| Cell {
        block: 4 << 10,
        work: Work::Read,
        depth,
        sessions,
        transport: Transport::Tcp,
        temperature: Temperature::Cached,
        generator: Generator::Raw,
    }));
    cells
}

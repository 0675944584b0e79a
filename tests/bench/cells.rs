//! The loads: a cell is one load, a set is a choice of cells. Pure.

use Temperature::{Cached, Cold};
use Transport::{Tcp, Unix};
use Work::{Mixed, Read, Write};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Requests of at least this length are sequential, shorter ones random. In bytes.
const SEQUENTIAL_FROM: u32 = 256 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Cell {
    /// Length of a request, in bytes.
    pub(super) block: u32,
    pub(super) work: Work,
    /// Requests in flight in each session.
    pub(super) depth: usize,
    pub(super) sessions: usize,
    pub(super) transport: Transport,
    pub(super) temperature: Temperature,
    pub(super) generator: Generator,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Work {
    Read,
    Write,
    /// Half reads, half writes, at random.
    #[serde(rename = "rw")]
    Mixed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Transport {
    /// Loopback.
    Tcp,
    Unix,
}

/// Whether the page cache holds the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Temperature {
    Cached,
    Cold,
}

/// The client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Generator {
    /// `raw.rs`.
    Raw,
    /// fio's nbd engine, which is libnbd.
    Fio,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Set {
    /// Two cells, for a quick check
    Small,
    /// Every value of every axis, and every pair of values of two axes; less than ten minutes
    Default,
    /// The whole grid, with both generators: hours
    Full,
}

impl Cell {
    pub(super) fn is_sequential(&self) -> bool {
        self.block >= SEQUENTIAL_FROM
    }

    /// Length of a request in MiB or KiB, and the unit.
    pub(super) fn block_in_units(&self) -> (u32, &'static str) {
        if self.block >= 1 << 20 { (self.block >> 20, "MiB") } else { (self.block >> 10, "KiB") }
    }
}

/// The value's name in cell names and in JSON.
pub(super) fn word(value: impl Serialize) -> String {
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

impl Set {
    /// Its cells, in the order of measuring.
    pub(super) fn cells(self) -> Vec<Cell> {
        let of = |generator, rows: &[CellRow]| -> Vec<Cell> {
            rows.iter().map(|row| cell(generator, *row)).collect()
        };
        let small = [(4, Read, 32, 1, Tcp, Cached), (1024, Read, 8, 1, Tcp, Cached)];
        match self {
            Self::Small => of(Generator::Raw, &small),
            Self::Default => [of(Generator::Raw, RAW), of(Generator::Fio, FIO)].concat(),
            Self::Full => full(),
        }
    }
}

/// Block in KiB, work, depth, sessions, transport, temperature.
type CellRow = (u32, Work, usize, usize, Transport, Temperature);

/// The default cells of the raw generator.
const RAW: &[CellRow] = &[
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

/// The default cells of fio.
const FIO: &[CellRow] = &[
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

fn cell(generator: Generator, row: CellRow) -> Cell {
    let (kib, work, depth, sessions, transport, temperature) = row;
    Cell { block: kib << 10, work, depth, sessions, transport, temperature, generator }
}

fn full() -> Vec<Cell> {
    let mut cells = Vec::new();
    for generator in [Generator::Raw, Generator::Fio] {
        for temperature in [Cached, Cold] {
            for transport in [Tcp, Unix] {
                for work in [Read, Write, Mixed] {
                    for kib in [4, 64, 256, 1024] {
                        for depth in [1, 8, 32] {
                            cells.extend([1, 4, 16].map(|sessions| {
                                let row = (kib, work, depth, sessions, transport, temperature);
                                cell(generator, row)
                            }));
                        }
                    }
                }
            }
        }
    }
    cells
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every pair of words, with their positions, in the names of these cells.
    fn pairs(set: Set) -> BTreeSet<String> {
        let mut pairs = BTreeSet::new();
        for cell in set.cells() {
            let name = cell.to_string().replace("rand", "");
            for (one, word) in name.split('-').enumerate() {
                let others = name.split('-').enumerate().skip(one + 1);
                pairs
                    .extend(others.map(|(other, word_2)| format!("{one} {word} {other} {word_2}")));
            }
        }
        pairs
    }

    #[test]
    fn the_default_set_has_every_pair_of_the_full_set() {
        assert_eq!(Set::Full.cells().len(), 864);
        assert_eq!(pairs(Set::Default), pairs(Set::Full));
    }
}

//! All that was measured, with its circumstances: printed for people, written and read as JSON.
//! Judges nothing; that is `summary.rs`.

use super::Trouble;
use super::activation::{self, ActivationRow};
use super::cells::CellReport;
use super::grid::{Cell, Source};
use super::machine::Machine;
use super::memory::{self, MemoryRow};
use super::options::Options;
use super::plan;
use super::servers::{Server, version};
use super::summary;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

/// All of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) about: About,
    pub(super) cells: Vec<CellReport>,
    pub(super) memory: Vec<MemoryRow>,
    pub(super) activation: Vec<ActivationRow>,
}

/// The circumstances.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct About {
    pub(super) machine: Machine,
    pub(super) servers: Vec<AboutServer>,
    /// What fio says of its version, if it makes any of the loads.
    pub(super) fio: Option<String>,
    pub(super) rounds: u32,
    pub(super) seconds: f64,
    pub(super) image_mib: u64,
}

/// A server, for whoever wants to repeat the run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct AboutServer {
    pub(super) name: String,
    pub(super) ours: bool,
    pub(super) version: String,
    /// How it was started.
    pub(super) usage: String,
}

impl Report {
    /// Nothing measured yet.
    pub(super) fn begin(options: &Options, servers: &[Server], cells: &[Cell]) -> Self {
        let about_server = |server: &Server| AboutServer {
            name: server.name.clone(),
            ours: server.is_ours(),
            version: server.version(),
            usage: server.usage(),
        };
        let with_fio = cells.iter().any(|cell| cell.source == Source::Fio);
        let about = About {
            machine: Machine::of_this_run("peers"),
            servers: servers.iter().map(about_server).collect(),
            fio: with_fio.then(|| version(Path::new("fio"))),
            rounds: options.rounds,
            seconds: options.seconds.as_secs_f64(),
            image_mib: options.size,
        };
        Self { about, cells: Vec::new(), memory: Vec::new(), activation: Vec::new() }
    }

    /// What an earlier run wrote.
    ///
    /// # Errors
    /// When the file cannot be read, or says something else.
    pub(super) fn read(file: &Path) -> Result<Self, Trouble> {
        let wrong = |error: &dyn std::fmt::Display| format!("{}: {error}", file.display());
        let text = fs::read_to_string(file).map_err(|error| wrong(&error))?;
        Ok(serde_json::from_str(&text).map_err(|error| wrong(&error))?)
    }

    /// Writes everything, with what can be computed from it.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn write(&self, file: &Path) -> Result<(), Trouble> {
        let text = serde_json::to_string_pretty(&self.json()?)?;
        fs::write(file, text + "\n").map_err(|error| format!("{}: {error}", file.display()).into())
    }

    fn json(&self) -> serde_json::Result<Value> {
        let mut json = serde_json::to_value(self)?;
        let cells = self.cells.iter().map(CellReport::json);
        json["cells"] = cells.collect::<serde_json::Result<Vec<_>>>()?.into();
        json["summary"] = json!(summary::means(&self.cells));
        json["targets"] = json!(summary::targets(self));
        Ok(json)
    }

    /// Prints what is known beforehand.
    pub(super) fn print_beginning(&self) {
        let About { machine, servers, fio, rounds, seconds, image_mib } = &self.about;
        machine.print();
        for AboutServer { name, version, usage, .. } in servers {
            println!("# {name}: {version}: {usage}");
        }
        if let Some(version) = fio {
            println!("# fio: {version}");
        }
        println!("# {rounds} rounds of {seconds} s, image of {image_mib} MiB");
    }

    /// Prints how long it will take.
    pub(super) fn print_plan(&self, options: &Options, cells: &[Cell]) {
        let servers = self.about.servers.len();
        let seconds = plan::duration(cells, servers, options).as_secs_f64();
        let took = match seconds {
            0.0..100.0 => format!("{seconds:.0} seconds"),
            100.0..6000.0 => format!("{:.0} minutes", seconds / 60.0),
            _ => format!("{:.1} hours", seconds / 3600.0),
        };
        println!("# {} cells, {servers} servers, about {took}", cells.len());
    }

    /// Prints all cells, as they were printed while they were measured.
    pub(super) fn print_cells(&self) {
        self.cells.iter().for_each(CellReport::print);
    }

    /// Prints everything but the cells.
    pub(super) fn print_end(&self) {
        memory::print(&self.memory);
        activation::print(&self.activation);
        summary::print(self);
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::cells::tests::against_one_peer;
    use super::super::grid::Set;
    use super::*;

    #[test]
    fn a_report_is_read_back_as_it_was_written() {
        let options: Options = clap::Parser::parse_from(["peers"]);
        let cells = Set::Default.cells();
        let mut report = Report::begin(&options, &[], &cells);
        report.cells.push(against_one_peer(cells[0], &[2.0]));
        report.memory.push(MemoryRow::default());
        let file = tempfile::NamedTempFile::new().unwrap();
        report.write(file.path()).unwrap();
        let again = Report::read(file.path()).unwrap();
        assert_eq!(again.json().unwrap(), report.json().unwrap());
        assert_eq!(report.json().unwrap()["summary"][0]["rate"], 2.0);
    }

    #[test]
    fn a_file_that_says_something_else_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "{}").unwrap();
        let trouble = Report::read(file.path()).unwrap_err().to_string();
        assert!(trouble.contains(file.path().to_str().unwrap()), "{trouble}");
    }
}

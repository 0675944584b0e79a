//! Memory of idle servers: alone, per idle session, and for a disk of 1 TiB. Each session has read
//! once, so that the server's buffers count.

use super::Setup;
use super::cells::{Temperature, Transport};
use super::servers::{Running, Server, is_minimal};
use super::usage::{PSS, RSS, memory_kib};
use crate::report::{Error, figure, print_row};
use flexnbd::client::Connection;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;

pub(crate) const SESSIONS: [usize; 2] = [100, 1000];
/// Size of the large disk in bytes. It is one hole.
const LARGE: u64 = 1 << 40;
/// How long a server is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(2);
/// How much each session reads, in bytes.
const READ_LENGTH: u32 = 4096;
const WIDTHS: [usize; 6] = [9, 13, 9, 13, 9, 13];

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct MemoryRow {
    #[serde(rename = "server")]
    name: String,
    pub(crate) ours: bool,
    /// For the image of the cells.
    pub(crate) usual: Occupied,
    /// For the large disk.
    pub(crate) large: Occupied,
}

#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Occupied {
    /// Without any session.
    pub(crate) rss_idle_kib: Option<u64>,
    pub(crate) with_sessions: Vec<WithSessions>,
    /// Why figures are missing.
    trouble: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WithSessions {
    sessions: usize,
    rss_kib: u64,
    /// Growth of the proportional set size, which is fair to servers that fork.
    pub(crate) pss_per_session_kib: f64,
}

/// Measures each server once, because memory hardly varies.
pub(crate) fn measure(setup: &Setup) -> Result<Vec<MemoryRow>, Error> {
    // The default limit of open files is too low for a thousand sessions. Servers inherit it.
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        println!("# cannot raise the limit of open files: {error}");
    }
    let image = setup.images.path(Temperature::Cached)?;
    let large = NamedTempFile::new_in(&setup.options.cached_dir)?;
    large.as_file().set_len(LARGE)?;
    let row = |server: &Server| MemoryRow {
        name: server.name.clone(),
        ours: server.ours,
        usual: occupied(setup, server, image, &SESSIONS),
        large: occupied(setup, server, large.path(), &SESSIONS[..1]),
    };
    Ok(setup.servers.iter().filter(|server| !is_minimal(&server.name)).map(row).collect())
}

/// Opens more and more sessions; keeps the figures of those that succeeded.
fn occupied(setup: &Setup, server: &Server, image: &Path, sessions: &[usize]) -> Occupied {
    let mut occupied = Occupied::default();
    let mut observe = || -> Result<(), Error> {
        let running = setup.start(server, image, Transport::Tcp)?;
        thread::sleep(SETTLE);
        occupied.rss_idle_kib = Some(memory_kib(running.pid, RSS));
        let pss_idle_kib = memory_kib(running.pid, PSS) as f64;
        let mut open: Vec<Connection> = Vec::new();
        for count in sessions {
            while open.len() < *count {
                let session = read_once(&running);
                open.push(session.map_err(|error| format!("session {}: {error}", open.len() + 1))?);
            }
            thread::sleep(SETTLE);
            let growth_kib = memory_kib(running.pid, PSS) as f64 - pss_idle_kib;
            occupied.with_sessions.push(WithSessions {
                sessions: *count,
                rss_kib: memory_kib(running.pid, RSS),
                pss_per_session_kib: growth_kib / *count as f64,
            });
        }
        Ok(())
    };
    if let Err(error) = observe() {
        println!("# memory: {}: {error}", server.name);
        occupied.trouble = Some(error.to_string());
    }
    occupied
}

fn read_once(server: &Running) -> Result<Connection, Error> {
    let mut connection = server.export.open()?;
    connection.read(0, READ_LENGTH, &mut |_| Ok(()))?;
    Ok(connection)
}

pub(crate) fn print(rows: &[MemoryRow]) {
    if rows.is_empty() {
        return;
    }
    let [few, many] = SESSIONS;
    println!("\nmemory in KiB, after {} s without requests", SETTLE.as_secs());
    println!("  {:16} {:>23} {:>23} {:>23}", "", "usual disk", "PSS a session", "disk of 1 TiB");
    let rss = |count| format!("RSS {count}");
    let of = |count| format!("of {count}");
    let idle = || "RSS idle".to_owned();
    print_row("", WIDTHS, [idle(), rss(many), of(few), of(many), idle(), rss(few)]);
    for MemoryRow { name, usual, large, .. } in rows {
        let with = |disk: &Occupied, count, of: fn(&WithSessions) -> f64, places| {
            let with = disk.with_sessions.iter().find(|with| with.sessions == count);
            figure(with.map(of), places)
        };
        let idle = |disk: &Occupied| figure(disk.rss_idle_kib.map(|kib| kib as f64), 0);
        let rss = |disk: &Occupied, count| with(disk, count, |with| with.rss_kib as f64, 0);
        let pss = |count| with(usual, count, |with| with.pss_per_session_kib, 1);
        let cells =
            [idle(usual), rss(usual, many), pss(few), pss(many), idle(large), rss(large, few)];
        print_row(name, WIDTHS, cells);
    }
}

//! How much memory a server takes while nothing happens: alone, per idle session, and for a disk
//! that is a thousand times as large. Each session has read once, so that what a server keeps for
//! its clients is counted.

use super::Trouble;
use super::grid::{Temperature, Transport};
use super::image::Images;
use super::options::Options;
use super::pin;
use super::running::Running;
use super::servers::Server;
use super::session::{self, PATIENCE};
use super::usage::{self, Memory};
use flexnbd::nbd::wire::CommandKind;
use flexnbd::net::Stream;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::thread;
use std::time::Duration;
use tempfile::NamedTempFile;

/// How many sessions are idle at once.
pub(super) const SESSIONS: [usize; 2] = [100, 1000];
/// Size of the large disk in bytes, all of it one hole.
const LARGE: u64 = 1 << 40;
/// How long a server is left alone before it counts as idle.
pub(super) const SETTLE: Duration = Duration::from_secs(2);
/// How much each session reads, in bytes.
const READ_LENGTH: usize = 4096;
/// Length of a simple reply without data, in bytes.
const REPLY_LENGTH: usize = 16;

/// What one server takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct MemoryRow {
    #[serde(rename = "server")]
    pub(super) name: String,
    pub(super) ours: bool,
    /// For the image that the cells use.
    pub(super) usual: Occupied,
    /// For a disk of 1 TiB.
    pub(super) large: Occupied,
}

/// What one server takes for one disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Occupied {
    /// Resident without any session, in KiB.
    pub(super) rss_idle_kib: Option<u64>,
    pub(super) with_sessions: Vec<WithSessions>,
    /// Why not all of this could be seen.
    pub(super) trouble: Option<String>,
}

/// What it takes while so many sessions are idle.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct WithSessions {
    pub(super) sessions: usize,
    pub(super) rss_kib: u64,
    /// Growth of the proportional set size by one session: fair to servers that fork.
    pub(super) pss_per_session_kib: f64,
}

impl Occupied {
    /// What is known of so many sessions.
    pub(super) fn with(&self, sessions: usize) -> Option<WithSessions> {
        self.with_sessions.iter().find(|with| with.sessions == sessions).copied()
    }
}

/// Looks at every server once: memory hardly varies.
///
/// # Errors
/// When the disks cannot be made.
pub(super) fn measure(
    options: &Options,
    servers: &[Server],
    images: &Images,
) -> Result<Vec<MemoryRow>, Trouble> {
    allow_many_descriptors();
    let image = images.image(Temperature::Cached)?;
    let large = NamedTempFile::new_in(&options.cached_dir)?;
    large.as_file().set_len(LARGE)?;
    let row = |server: &Server| MemoryRow {
        name: server.name.clone(),
        ours: server.is_ours(),
        usual: occupied(options, server, &image, &SESSIONS),
        large: occupied(options, server, large.path(), &SESSIONS[..1]),
    };
    Ok(servers.iter().map(row).collect())
}

/// A thousand sockets are more than a process may usually have, here and in servers that we start.
fn allow_many_descriptors() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        println!("# the limit of open files stays as it is: {error}");
    }
}

fn occupied(options: &Options, server: &Server, image: &Path, sessions: &[usize]) -> Occupied {
    let mut seen = Occupied::default();
    if let Err(trouble) = look(options, server, image, sessions, &mut seen) {
        println!("# memory: {}: {trouble}", server.name);
        seen.trouble = Some(trouble.to_string());
    }
    seen
}

/// Adds sessions until there are as many as wanted, and keeps what was seen if that fails.
fn look(
    options: &Options,
    server: &Server,
    image: &Path,
    sessions: &[usize],
    seen: &mut Occupied,
) -> Result<(), Trouble> {
    pin::to(options.server_cpu);
    let running = Running::start(server, image, Transport::Tcp);
    pin::to(options.client_cpu);
    let running = running?;
    thread::sleep(SETTLE);
    let idle = usage::memory(running.pid);
    seen.rss_idle_kib = Some(idle.rss_kib);
    let mut open: Vec<Stream> = Vec::new();
    for count in sessions {
        while open.len() < *count {
            open.push(read_once(&running, open.len())?);
        }
        thread::sleep(SETTLE);
        seen.with_sessions.push(with_sessions(*count, idle, usage::memory(running.pid)));
    }
    Ok(())
}

/// A session that has done one request and then does nothing.
fn read_once(running: &Running, number: usize) -> Result<Stream, Trouble> {
    let (stream, _size) = session::open(&running.place)
        .map_err(|trouble| format!("session {}: {trouble}", number + 1))?;
    let request = session::encode(CommandKind::Read, number, 0, READ_LENGTH);
    stream.send_all(&request, PATIENCE)?;
    stream.recv_exact(&mut [0; REPLY_LENGTH + READ_LENGTH], PATIENCE)?;
    Ok(stream)
}

/// Pure.
fn with_sessions(sessions: usize, idle: Memory, full: Memory) -> WithSessions {
    let grown_kib = full.pss_kib as f64 - idle.pss_kib as f64;
    let pss_per_session_kib = grown_kib / sessions as f64;
    WithSessions { sessions, rss_kib: full.rss_kib, pss_per_session_kib }
}

/// Prints the table; nothing when there is nothing.
pub(super) fn print(rows: &[MemoryRow]) {
    if rows.is_empty() {
        return;
    }
    let [few, many] = SESSIONS;
    println!("\nmemory in KiB, after {} s without requests", SETTLE.as_secs());
    println!("  {:16} {:>23} {:>23} {:>23}", "", "usual disk", "PSS a session", "disk of 1 TiB");
    println!(
        "  {:16} {:>9} {:>13} {:>9} {:>13} {:>9} {:>13}",
        "",
        "RSS idle",
        format!("RSS {many}"),
        format!("of {few}"),
        format!("of {many}"),
        "RSS idle",
        format!("RSS {few}")
    );
    rows.iter().for_each(|row| println!("{}", line(row)));
}

fn line(row: &MemoryRow) -> String {
    let told = |kib: Option<u64>| kib.map_or("-".to_owned(), |kib| kib.to_string());
    let rss = |disk: &Occupied, count| told(disk.with(count).map(|with| with.rss_kib));
    let each = |count| {
        let with = row.usual.with(count).map(|with| with.pss_per_session_kib);
        with.map_or("-".to_owned(), |kib| format!("{kib:.1}"))
    };
    let MemoryRow { name, usual, large, .. } = row;
    let [few, many] = SESSIONS;
    format!(
        "  {name:16} {:>9} {:>13} {:>9} {:>13} {:>9} {:>13}",
        told(usual.rss_idle_kib),
        rss(usual, many),
        each(few),
        each(many),
        told(large.rss_idle_kib),
        rss(large, few)
    )
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::servers;
    use super::*;

    #[test]
    fn a_session_costs_what_the_server_grew_by_divided_by_their_number() {
        let idle = Memory { rss_kib: 1000, pss_kib: 900 };
        let full = Memory { rss_kib: 9000, pss_kib: 5900 };
        let with = with_sessions(100, idle, full);
        assert_eq!((with.rss_kib, with.pss_per_session_kib), (9000, 50.0));
    }

    #[test]
    fn what_could_not_be_seen_is_a_dash() {
        let with = WithSessions { sessions: 100, rss_kib: 9000, pss_per_session_kib: 5.25 };
        let usual = Occupied { with_sessions: vec![with], ..Occupied::default() };
        let line = line(&MemoryRow { usual, ..MemoryRow::default() });
        assert_eq!(line.split_whitespace().collect::<Vec<_>>(), ["-", "-", "5.2", "-", "-", "-"]);
    }

    #[test]
    fn a_real_server_is_seen_with_its_sessions() {
        let image = NamedTempFile::new().unwrap();
        image.as_file().set_len(LARGE).unwrap();
        let ours = servers::installed(&["flexnbd".to_owned()], &[]).unwrap();
        let options = clap::Parser::parse_from(["peers"]);
        let seen = occupied(&options, &ours[0], image.path(), &[2]);
        assert_eq!(seen.trouble, None);
        assert!(seen.rss_idle_kib > Some(0) && seen.with(2).is_some(), "{seen:?}");
    }
}

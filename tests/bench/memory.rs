//! How much memory a server takes while nothing happens: alone, and per idle session.
//! Each session has read once, so that what a server keeps for its clients is counted.

use super::Trouble;
use super::grid::{Temperature, Transport};
use super::image::Images;
use super::options::Options;
use super::pin;
use super::running::Running;
use super::servers::Server;
use super::session::{self, PATIENCE};
use super::stats::median;
use super::usage::{self, Memory};
use flexnbd::nbd::wire::CommandKind;
use flexnbd::net::Stream;
use std::thread;
use std::time::Duration;

/// How many sessions are idle at once.
const SESSIONS: usize = 100;
/// How long a server is left alone before it counts as idle.
const SETTLE: Duration = Duration::from_secs(2);
/// How much each session reads, in bytes.
const READ_LENGTH: usize = 4096;
/// Length of a simple reply without data, in bytes.
const REPLY_LENGTH: usize = 16;

/// What one server takes.
#[derive(Clone, Debug)]
pub(super) struct MemoryRow {
    pub(super) name: String,
    pub(super) rss_idle_kib: f64,
    /// With 100 idle sessions.
    pub(super) rss_full_kib: f64,
    /// Growth of the proportional set size by one session: fair to servers that fork.
    pub(super) per_session_kib: f64,
}

/// Looks at every server; says which ones failed.
///
/// # Errors
/// When the image cannot be made.
pub(super) fn measure(
    options: &Options,
    servers: &[Server],
    images: &Images,
) -> Result<Vec<MemoryRow>, Trouble> {
    images.image(Temperature::Cached)?;
    let mut rows = Vec::new();
    for server in servers {
        let seen: Result<Vec<_>, _> =
            (0..options.rounds).map(|_| measure_once(options, server, images)).collect();
        match seen {
            Ok(seen) => rows.extend(row(&server.name, &seen)),
            Err(trouble) => println!("# memory: {}: {trouble}", server.name),
        }
    }
    Ok(rows)
}

/// Prints the table.
pub(super) fn print(rows: &[MemoryRow]) {
    println!("\nmemory in KiB, after {} s without requests", SETTLE.as_secs());
    println!("  {:16} {:>10} {:>14} {:>14}", "", "RSS idle", "RSS, 100 idle", "PSS a session");
    for row in rows {
        let MemoryRow { name, rss_idle_kib, rss_full_kib, per_session_kib } = row;
        println!("  {name:16} {rss_idle_kib:>10.0} {rss_full_kib:>14.0} {per_session_kib:>14.1}");
    }
}

fn measure_once(
    options: &Options,
    server: &Server,
    images: &Images,
) -> Result<(Memory, Memory), Trouble> {
    let image = images.image(Temperature::Cached)?;
    pin::to(options.server_cpu);
    let running = Running::start(server, &image, Transport::Tcp);
    pin::to(options.client_cpu);
    let running = running?;
    thread::sleep(SETTLE);
    let idle = usage::memory(running.pid);
    let sessions: Result<Vec<_>, _> =
        (0..SESSIONS).map(|number| read_once(&running, number)).collect();
    let sessions = sessions?;
    thread::sleep(SETTLE);
    let full = usage::memory(running.pid);
    drop(sessions);
    Ok((idle, full))
}

/// A session that has done one request and then does nothing.
fn read_once(running: &Running, number: usize) -> Result<Stream, Trouble> {
    let (stream, _size) = session::open(&running.place)?;
    let request = session::encode(CommandKind::Read, number, 0, READ_LENGTH);
    stream.send_all(&request, PATIENCE)?;
    stream.recv_exact(&mut [0; REPLY_LENGTH + READ_LENGTH], PATIENCE)?;
    Ok(stream)
}

/// Pure: the medians of several looks at one server.
fn row(name: &str, seen: &[(Memory, Memory)]) -> Option<MemoryRow> {
    let of = |figure: fn(&(Memory, Memory)) -> f64| median(seen.iter().map(figure).collect());
    Some(MemoryRow {
        name: name.to_owned(),
        rss_idle_kib: of(|(idle, _)| idle.rss_kib as f64)?,
        rss_full_kib: of(|(_, full)| full.rss_kib as f64)?,
        per_session_kib: of(|(idle, full)| {
            (full.pss_kib as f64 - idle.pss_kib as f64) / SESSIONS as f64
        })?,
    })
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn a_session_costs_what_the_server_grew_by_divided_by_their_number() {
        let idle = Memory { rss_kib: 1000, pss_kib: 900 };
        let full = Memory { rss_kib: 9000, pss_kib: 5900 };
        let row = row("x", &[(idle, full)]).unwrap();
        assert_eq!((row.rss_idle_kib, row.rss_full_kib), (1000.0, 9000.0));
        assert_eq!(row.per_session_kib, 50.0);
    }
}

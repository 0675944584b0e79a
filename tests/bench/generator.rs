//! Our own generator: raw sockets, simple replies, one thread for all its sessions.
//! Keeps the server busy and counts; it does not look at the data that it reads.

use super::Trouble;
use super::grid::{Cell, Temperature};
use super::image::Images;
use super::options::Options;
use super::running::Running;
use super::session::{PATIENCE, Session};
use super::stats::Sample;
use super::usage;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// How much is received at once, in bytes.
const BUFFER_LENGTH: usize = 256 << 10;
/// How long a cached load runs before it is measured.
pub(super) const WARM_UP: Duration = Duration::from_millis(200);

/// Sessions under one load.
#[derive(Debug)]
pub(super) struct Generator {
    sessions: Vec<Session>,
    payload: Vec<u8>,
    buffer: Vec<u8>,
}

/// When to stop measuring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    pub(super) time: Duration,
    pub(super) requests: u64,
}

/// What was done until then.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    /// Processor time of this thread.
    pub(super) computing: Duration,
}

/// Measures one load on one running server.
///
/// # Errors
/// When the server fails, or the page cache could not be emptied for a cold load.
pub(super) fn sample(
    cell: &Cell,
    options: &Options,
    server: &Running,
    images: &Images,
) -> Result<Sample, Trouble> {
    let mut generator = Generator::connect(cell, server)?;
    let is_cold = cell.temperature == Temperature::Cold;
    let mut limit = Limit { time: options.seconds, requests: u64::MAX };
    if is_cold {
        images.cool()?;
        // What has been read once is cold no more.
        limit.requests = images.size() / u64::from(cell.block);
    } else {
        generator.drive(Limit { time: WARM_UP, ..limit })?;
    }
    let before = usage::cpu_seconds(server.pid);
    let mut done = generator.drive(limit)?;
    if is_cold {
        // As many requests are under way now as when a warm load begins, but here none were.
        done = done.and(generator.finish()?);
    }
    let cpu = usage::cpu_seconds(server.pid) - before;
    let (requests, elapsed) = (done.requests as f64, done.elapsed.as_secs_f64());
    Ok(Sample {
        requests_per_sec: requests / elapsed,
        mb_per_sec: requests * f64::from(cell.block) / elapsed / 1e6,
        server_cpu_us_per_request: cpu * 1e6 / requests.max(1.0),
        client_busy: done.computing.as_secs_f64() / elapsed,
        rss_peak_mib: usage::rss_peak_kib(server.pid) as f64 / 1024.0,
    })
}

impl Done {
    fn and(self, later: Self) -> Self {
        Self {
            requests: self.requests + later.requests,
            elapsed: self.elapsed + later.elapsed,
            computing: self.computing + later.computing,
        }
    }
}

impl Generator {
    /// Connects all sessions.
    ///
    /// # Errors
    /// As [`Session::connect`].
    pub(super) fn connect(cell: &Cell, server: &Running) -> Result<Self, Trouble> {
        let connect = |number| Session::connect(&server.place, cell, number);
        Ok(Self {
            sessions: (0..cell.sessions).map(connect).collect::<Result<_, Trouble>>()?,
            // Not zeros, which a server might turn into holes.
            payload: (0..cell.block).map(|i| (i % 251) as u8 + 1).collect(),
            buffer: vec![0; BUFFER_LENGTH],
        })
    }

    /// Runs the load until one of the limits is reached; requests stay under way, so that it can
    /// be called again.
    ///
    /// # Errors
    /// When the connection breaks, a request fails, or nothing happens for [`PATIENCE`].
    pub(super) fn drive(&mut self, limit: Limit) -> Result<Done, Trouble> {
        let (start, computing) = (Instant::now(), thread_time()?);
        let mut requests = 0;
        for session in &mut self.sessions {
            session.ask(&self.payload)?;
        }
        while start.elapsed() < limit.time && requests < limit.requests {
            requests += self.turn(Session::ask)?;
        }
        Ok(Done { requests, elapsed: start.elapsed(), computing: thread_time()? - computing })
    }

    /// Waits for the answers to all requests that are under way.
    ///
    /// # Errors
    /// As [`Self::drive`].
    fn finish(&mut self) -> Result<Done, Trouble> {
        let (start, computing) = (Instant::now(), thread_time()?);
        let mut requests = 0;
        while !self.sessions.iter().all(Session::is_idle) {
            requests += self.turn(Session::send)?;
        }
        Ok(Done { requests, elapsed: start.elapsed(), computing: thread_time()? - computing })
    }

    /// Takes what has arrived, and lets those sessions `go_on`; how many requests were answered.
    fn turn(&mut self, go_on: fn(&mut Session, &[u8]) -> io::Result<()>) -> Result<u64, Trouble> {
        let mut requests = 0;
        for ready in self.wait()? {
            let session = &mut self.sessions[ready];
            requests += session.listen(&mut self.buffer)? as u64;
            go_on(session, &self.payload)?;
        }
        Ok(requests)
    }

    /// Waits until something can be done, and says in which sessions.
    fn wait(&self) -> Result<Vec<usize>, Trouble> {
        let mut descriptors: Vec<PollFd<'_>> = Vec::with_capacity(self.sessions.len());
        for session in &self.sessions {
            let mut events = PollFlags::POLLIN;
            events.set(PollFlags::POLLOUT, session.has_unsent());
            descriptors.push(PollFd::new(session.stream().as_fd(), events));
        }
        let patience = PollTimeout::try_from(PATIENCE.as_millis()).unwrap_or(PollTimeout::MAX);
        if poll(&mut descriptors, patience)? == 0 {
            return Err(format!("the server did nothing for {} s", PATIENCE.as_secs()).into());
        }
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(true);
        Ok((0..descriptors.len()).filter(|at| ready(&descriptors[*at])).collect())
    }
}

fn thread_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from)
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::grid::{Set, Transport, Work};
    use super::super::{options::Options, servers};
    use super::*;
    use std::fs;

    /// Enough requests to come around several times at every depth.
    const REQUESTS: u64 = 300;

    fn run(transport: Transport, work: Work, block: u32) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        fs::write(&image, vec![0; 8 << 20]).unwrap();
        let ours = servers::installed(&["flexnbd".to_owned()], &[]).unwrap();
        let server = Running::start(&ours[0], &image, transport).unwrap();
        let cell =
            Cell { work, block, transport, depth: 8, sessions: 3, ..Set::Default.cells()[0] };
        let mut generator = Generator::connect(&cell, &server).unwrap();
        let limit = Limit { time: Duration::from_secs(600), requests: REQUESTS };
        let done = generator.drive(limit).unwrap();
        assert!(done.requests >= REQUESTS && done.computing <= done.elapsed);
        let rest = generator.finish().unwrap();
        assert_eq!(rest.requests, (cell.depth * cell.sessions) as u64);
        drop(generator);
        drop(server);
        fs::read(&image).unwrap()
    }

    #[test]
    fn reads_are_answered_and_change_nothing() {
        for block in [4 << 10, 1 << 20] {
            let image = run(Transport::Tcp, Work::Read, block);
            assert!(image.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn writes_reach_the_image() {
        let image = run(Transport::Unix, Work::Write, 1 << 20);
        let written: Vec<u8> = (0..1 << 20).map(|i| (i % 251) as u8 + 1).collect();
        assert!(image.chunks(1 << 20).all(|block| block == written), "the data differs");
    }

    #[test]
    fn large_reads_and_writes_at_once_do_not_block_each_other() {
        run(Transport::Tcp, Work::Mixed, 1 << 20);
    }

    #[test]
    fn a_sample_has_all_its_figures() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let line = ["peers", "--size=8", "--seconds=0.1", "--cached-dir", path, "--dir", path];
        let options: Options = clap::Parser::parse_from(line);
        let images = Images::new(&options).unwrap();
        let ours = servers::installed(&["flexnbd".to_owned()], &[]).unwrap();
        let image = images.image(Temperature::Cached).unwrap();
        let server = Running::start(&ours[0], &image, Transport::Tcp).unwrap();
        let seen = sample(&Set::Small.cells()[0], &options, &server, &images).unwrap();
        assert!(seen.requests_per_sec > 0.0 && seen.mb_per_sec > 0.0, "{seen:?}");
        assert!(seen.rss_peak_mib > 0.0 && seen.client_busy > 0.0, "{seen:?}");
    }
}

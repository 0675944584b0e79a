//! Asks the destination of an interrupted handover whether the disk has arrived there. That can
//! take long, so a thread asks, while the process handles signals, feeds the watchdog and refuses
//! clients.
//! Never decides the reaction to the answer.

use super::signals::Signals;
use super::tls::ProcessTls;
use crate::disk::ownership::{Id, RemoteAddress};
use crate::memory_reserve::check_thread_headroom;
use crate::migration::job::{HandoverVerdict, Trouble, handover_verdict};
use crate::migration::link::Route;
use crate::migration::source;
use crate::migration::wire::{Answer, Question};
use crate::net::{Address, Wake, wait_readable};
use crate::systemd::{ServiceManager, log_unsent};
use nix::sys::signal::Signal;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Attempts before the process gives up and refuses clients.
const STARTUP_ATTEMPTS: u32 = 4;
/// Pause between these attempts.
const STARTUP_PAUSE: Duration = Duration::from_secs(1);
/// Upper bound of one attempt and the pause after it, for the service manager: a connection and a
/// few messages.
const STARTUP_ATTEMPT_MAX: Duration = Duration::from_secs(60);
/// Pause before the first attempt while clients are refused. It doubles with each attempt.
const REFUSING_PAUSE_FIRST: Duration = Duration::from_secs(5);
/// Longest pause between two attempts while clients are refused.
const REFUSING_PAUSE_MAX: Duration = Duration::from_secs(60);

/// The question to a destination whether a disk has arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HandoverQuery {
    /// The destination, as the record names it.
    pub(super) to: RemoteAddress,
    route: Route,
    question: Question,
}

impl HandoverQuery {
    /// A question to `to`, asked from the local address `from` if there is one. `None` if `to` has
    /// no address to connect to.
    pub(super) fn new(
        question: Question,
        to: &RemoteAddress,
        from: Option<IpAddr>,
        tls: &ProcessTls,
    ) -> Option<Box<Self>> {
        let address = to.as_str().parse().ok().map(Address::Tcp)?;
        let tls = tls.for_question(&address);
        let route = Route { to: address, bind: from, tls };
        Some(Box::new(Self { to: to.clone(), route, question }))
    }
}

/// The answer that a destination has given, and the migration that it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueryResult {
    id: Id,
    verdict: HandoverVerdict,
}

/// Why a query at start-up ended without a verdict.
#[derive(Debug)]
pub(super) enum QueryError {
    /// A signal stops the process.
    Interrupted(Signal),
    /// A system call failed.
    System(io::Error),
}

impl From<io::Error> for QueryError {
    fn from(error: io::Error) -> Self {
        Self::System(error)
    }
}

/// A query that a thread carries out. Its descriptor becomes readable when the answer is there.
/// Dropping this does not stop the thread, which its own time limits end.
#[derive(Debug)]
struct RunningQuery(Arc<PendingAnswer>);

#[derive(Debug)]
struct PendingAnswer {
    wake: Wake,
    answer: OnceLock<Result<Option<Answer>, Trouble>>,
}

impl RunningQuery {
    fn start(query: &HandoverQuery) -> io::Result<Self> {
        let pending = Arc::new(PendingAnswer { wake: Wake::new()?, answer: OnceLock::new() });
        let for_thread = Arc::clone(&pending);
        let HandoverQuery { route, question, .. } = query.clone();
        let ask = move || {
            let answer = route.with_bind_fallback(|route| source::ask(route, &question));
            // Only this thread sets the cell, and once.
            let _ = for_thread.answer.set(answer);
            for_thread.wake.wake();
        };
        check_thread_headroom()?;
        thread::Builder::new().name("asking".into()).spawn(ask)?;
        Ok(Self(pending))
    }

    fn answer(&self) -> Option<&Result<Option<Answer>, Trouble>> {
        self.0.answer.get()
    }
}

impl AsFd for RunningQuery {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.wake.as_fd()
    }
}

/// Queries at start-up, before the process knows whether it may serve the disk.
#[derive(Debug)]
pub(super) struct StartupQuery<'a> {
    pub(super) notifier: &'a ServiceManager,
    pub(super) signals: &'a Signals,
    pub(super) tls: &'a ProcessTls,
    /// The result of an earlier query, if there is one.
    pub(super) answer: Option<QueryResult>,
}

impl StartupQuery<'_> {
    /// Whether the disk has arrived, according to the destination; asks a few times.
    pub(super) fn run(&self, query: &HandoverQuery) -> Result<HandoverVerdict, QueryError> {
        let HandoverQuery { to, question: Question { id, .. }, .. } = query;
        if let Some(answer) = self.answer.filter(|answer| answer.id == *id) {
            return Ok(answer.verdict);
        }
        info!(
            "flexnbd.migration" = %id, "flexnbd.destination" = %to,
            "asking {to} whether the disk has arrived there"
        );
        let status = format!("asking {to} whether the disk has arrived there");
        log_unsent(self.notifier.status(&status));
        for attempts_left in (0..STARTUP_ATTEMPTS).rev() {
            log_unsent(self.notifier.extend_timeout(STARTUP_ATTEMPT_MAX));
            let running = RunningQuery::start(query)?;
            while running.answer().is_none() {
                self.wait(Some(&running), None)?;
            }
            match running.answer() {
                Some(Ok(answer)) => return Ok(handover_verdict(answer.as_ref(), None)),
                Some(Err(trouble)) if attempts_left == 0 => warn!(
                    "flexnbd.migration" = %id, "flexnbd.destination" = %to,
                    "{to} does not say whether the disk has arrived there: {trouble}"
                ),
                // At the destination one process receives the disk and another one serves it.
                // Between the two, for an unknown time, no process listens.
                _ => self.pause()?,
            }
        }
        Ok(HandoverVerdict::Unknown)
    }

    fn pause(&self) -> Result<(), QueryError> {
        let deadline = Instant::now() + STARTUP_PAUSE;
        while Instant::now() < deadline {
            self.wait(None, Some(deadline))?;
        }
        Ok(())
    }

    /// Waits for the answer, the deadline, a signal or the watchdog's interval, and feeds the
    /// watchdog. Returns early for any of them.
    fn wait(
        &self,
        running: Option<&RunningQuery>,
        deadline: Option<Instant>,
    ) -> Result<(), QueryError> {
        let signal = self.signals.descriptor()?;
        let mut descriptors = vec![signal.as_fd()];
        descriptors.extend(running.map(AsFd::as_fd));
        let feed_at = self.notifier.watchdog_interval().map(|interval| Instant::now() + interval);
        wait_readable(&descriptors, [deadline, feed_at].into_iter().flatten().min())?;
        if feed_at.is_some() {
            log_unsent(self.notifier.watchdog());
        }
        match self.signals.read_stop(&signal)? {
            Some(signal) => Err(QueryError::Interrupted(signal)),
            None => Ok(()),
        }
    }
}

/// Repeats a query while clients are refused, with growing pauses.
#[derive(Debug)]
pub(super) struct RepeatedQuery {
    query: Box<HandoverQuery>,
    running: Option<RunningQuery>,
    /// When to start the next attempt, unless one is running.
    next_at: Instant,
    backoff: QueryBackoff,
    /// The last failure that was logged.
    logged: String,
}

impl RepeatedQuery {
    pub(super) fn new(query: Box<HandoverQuery>, now: Instant) -> Self {
        let mut backoff = QueryBackoff::default();
        let next_at = now + backoff.next();
        Self { query, running: None, next_at, backoff, logged: String::new() }
    }

    /// When to call [`RepeatedQuery::poll`] next, if no attempt is running.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.running.is_none().then_some(self.next_at)
    }

    /// The descriptor of the running attempt: readable when to call [`RepeatedQuery::poll`].
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(AsFd::as_fd)
    }

    /// Starts an attempt that is due, and takes the answer of a running one. Returns the result
    /// once the destination has given a verdict.
    pub(super) fn poll(&mut self, now: Instant) -> Option<QueryResult> {
        let Some(running) = &self.running else {
            if self.next_at <= now {
                self.start(now);
            }
            return None;
        };
        let verdict = match running.answer()? {
            Ok(answer) => handover_verdict(answer.as_ref(), None),
            Err(trouble) => {
                let trouble = trouble.to_string();
                self.log_failure(trouble);
                HandoverVerdict::Unknown
            }
        };
        self.running = None;
        self.next_at = now + self.backoff.next();
        let id = self.query.question.id;
        (verdict != HandoverVerdict::Unknown).then_some(QueryResult { id, verdict })
    }

    fn start(&mut self, now: Instant) {
        match RunningQuery::start(&self.query) {
            Ok(running) => self.running = Some(running),
            Err(error) => {
                self.next_at = now + self.backoff.next();
                self.log_failure(error.to_string());
            }
        }
    }

    /// Logs why an attempt failed, unless the one before failed for the same reason.
    fn log_failure(&mut self, trouble: String) {
        if self.logged != trouble {
            let HandoverQuery { to, question, .. } = &*self.query;
            info!(
                "flexnbd.migration" = %question.id, "flexnbd.destination" = %to,
                "{to} still does not say whether the disk has arrived there: {trouble}"
            );
            self.logged = trouble;
        }
    }
}

/// The pauses between attempts: exponential backoff with an upper limit.
#[derive(Debug)]
struct QueryBackoff(Duration);

impl Default for QueryBackoff {
    fn default() -> Self {
        Self(REFUSING_PAUSE_FIRST)
    }
}

impl QueryBackoff {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(REFUSING_PAUSE_MAX);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    const QUESTION: Question = Question { size: 512, id: Id([7; 16]) };

    #[test]
    fn pauses_double_up_to_a_minute() {
        let mut backoff = QueryBackoff::default();
        let seconds: Vec<u64> = (0..6).map(|_| backoff.next().as_secs()).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 60, 60]);
    }

    #[test]
    fn query_falls_back_to_any_local_address() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = RemoteAddress::new(&listener.local_addr().unwrap().to_string()).unwrap();
        // No host has it (RFC 5737).
        let from = "192.0.2.1".parse().unwrap();
        let query = HandoverQuery::new(QUESTION, &to, Some(from), &ProcessTls::none()).unwrap();
        let ask = || {
            let running = RunningQuery::start(&query).unwrap();
            wait_readable(&[running.as_fd()], None).unwrap();
            running.answer().unwrap().clone()
        };
        let hang_up = thread::spawn(move || listener.accept().map(drop));
        let answer = ask();
        assert!(!matches!(answer, Err(Trouble::Connect(_))), "{answer:?}");
        hang_up.join().unwrap().unwrap();
        let Err(Trouble::Connect(why)) = ask() else { panic!("nothing listens") };
        assert!(why.contains("192.0.2.1") && why.contains("from any local address"), "{why}");
    }

    #[test]
    fn only_tcp_addresses_can_be_asked() {
        let tls = ProcessTls::none();
        let query =
            |to: &str| HandoverQuery::new(QUESTION, &RemoteAddress::new(to).unwrap(), None, &tls);
        assert!(query("192.0.2.7:10809").is_some());
        assert!(query("/run/x").is_none());
    }
}

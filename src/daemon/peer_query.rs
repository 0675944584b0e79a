//! Asking another host whether a disk has arrived there, which can take long, while this process
//! goes on hearing signals, feeding the watchdog and refusing clients.
//! Never decides what follows from the answer.

use super::config::StartError;
use super::signals::{SignalAction, Signals};
use super::tell;
use crate::disk::ownership::{Id, RemoteAddress};
use crate::memory_reserve::check_thread_headroom;
use crate::migration::job::{HandoverVerdict, Trouble, handover_verdict};
use crate::migration::link::Route;
use crate::migration::source;
use crate::migration::wire::{Answer, Question};
use crate::net::{Address, Wake, wait_readable};
use crate::systemd::ServiceManager;
use nix::sys::signal::Signal;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How often another host is asked before clients are refused, if it does not answer.
const ASK_TRIES: u32 = 4;
/// Time between one of these questions and the next.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a question and the pause after it may take, with time to spare: a connection, a few
/// messages.
const ASK_LONGEST: Duration = Duration::from_secs(60);
/// Time to the first question while clients are refused. It doubles with each question.
const REFUSING_ASK_FIRST: Duration = Duration::from_secs(5);
/// The longest time between two questions while clients are refused.
const REFUSING_ASK_EVERY_MAX: Duration = Duration::from_secs(60);

/// What only another host knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerQuery {
    /// Who knows.
    pub to: RemoteAddress,
    /// Where to ask.
    pub route: Route,
    /// What to ask.
    pub question: Question,
}

impl PeerQuery {
    /// What `to` knows of the disk of that id and size, to be asked from the local address `from` if
    /// there is one. None if `to` has no address to connect to.
    pub(super) fn new(
        (id, size): (Id, u64),
        (to, from): (&RemoteAddress, Option<IpAddr>),
    ) -> Option<Box<Self>> {
        let address = to.as_str().parse().ok().map(Address::Tcp)?;
        let route = Route { to: address, bind: from };
        Some(Box::new(Self { to: to.clone(), route, question: Question { size, id } }))
    }
}

/// An answer that decides, and the migration it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueryResult {
    id: Id,
    fate: HandoverVerdict,
}

/// A question under way, on a thread of its own. Readable when the answer is there. Dropping it
/// leaves the thread to its own end, which its time limits bring about.
#[derive(Debug)]
struct RunningQuery(Arc<PendingAnswer>);

#[derive(Debug)]
struct PendingAnswer {
    wake: Wake,
    answer: OnceLock<Result<Option<Answer>, Trouble>>,
}

impl RunningQuery {
    fn begin(inquiry: &PeerQuery) -> io::Result<Self> {
        let reply = Arc::new(PendingAnswer { wake: Wake::new()?, answer: OnceLock::new() });
        let (for_thread, PeerQuery { route, question, .. }) = (Arc::clone(&reply), inquiry.clone());
        let ask = move || {
            let answer = route.or_from_anywhere(|route| source::ask(route, &question));
            // This thread alone sets it, and once.
            let _ = for_thread.answer.set(answer);
            for_thread.wake.wake();
        };
        check_thread_headroom()?;
        thread::Builder::new().name("asking".into()).spawn(ask)?;
        Ok(Self(reply))
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

/// Asks before it is known whether the disk is to be served.
#[derive(Debug)]
pub(super) struct StartupQuery<'a> {
    pub(super) notifier: &'a ServiceManager,
    /// Stopping signals end the question.
    pub(super) signals: &'a Signals,
    /// The answer, if it has come already.
    pub(super) answered: Option<QueryResult>,
}

impl StartupQuery<'_> {
    /// What has become of the disk, as far as the other host says within a few tries.
    ///
    /// # Errors
    /// A signal that ends the process came first, or the system failed us.
    pub(super) fn what_became_of(
        &self,
        inquiry: &PeerQuery,
    ) -> Result<HandoverVerdict, StartError> {
        let PeerQuery { to, question: Question { id, .. }, .. } = inquiry;
        if let Some(answered) = self.answered.filter(|answered| answered.id == *id) {
            return Ok(answered.fate);
        }
        info!(
            "flexnbd.migration" = %id, "flexnbd.destination" = %to,
            "asking {to} whether the disk has arrived there"
        );
        tell(self.notifier.status(&format!("asking {to} whether the disk has arrived there")));
        for tries_left in (0..ASK_TRIES).rev() {
            tell(self.notifier.extend_timeout(ASK_LONGEST));
            let asking = RunningQuery::begin(inquiry).map_err(system)?;
            while asking.answer().is_none() {
                self.wait(Some(&asking), None)?;
            }
            match asking.answer() {
                Some(Ok(answer)) => return Ok(handover_verdict(answer.as_ref(), None)),
                Some(Err(trouble)) if tries_left == 0 => warn!(
                    "flexnbd.migration" = %id, "flexnbd.destination" = %to,
                    "{to} does not say whether the disk has arrived there: {trouble}"
                ),
                // No process may listen for a moment, between the one that received the disk and
                // the one that serves it; nothing tells us when that is over.
                _ => self.pause()?,
            }
        }
        Ok(HandoverVerdict::Unknown)
    }

    fn pause(&self) -> Result<(), StartError> {
        let until = Instant::now() + ASK_EVERY;
        while Instant::now() < until {
            self.wait(None, Some(until))?;
        }
        Ok(())
    }

    /// Waits for the answer, the deadline or the watchdog's next sign of life.
    fn wait(
        &self,
        asking: Option<&RunningQuery>,
        deadline: Option<Instant>,
    ) -> Result<(), StartError> {
        let signal = readable(self.signals).map_err(system)?;
        let mut descriptors = vec![signal.as_fd()];
        descriptors.extend(asking.map(AsFd::as_fd));
        let beat = self.notifier.watchdog_interval().map(|interval| Instant::now() + interval);
        let deadline = [deadline, beat].into_iter().flatten().min();
        wait_readable(&descriptors, deadline).map_err(system)?;
        if beat.is_some() {
            tell(self.notifier.watchdog());
        }
        match received(&signal, self.signals).map_err(system)? {
            Some(signal) => Err(StartError::Interrupted(signal)),
            None => Ok(()),
        }
    }
}

fn system(error: io::Error) -> StartError {
    StartError::System("ask another host", error)
}

/// Where the signals that are waited for can be read.
pub(super) fn readable(signals: &Signals) -> io::Result<SignalFd> {
    Ok(SignalFd::with_flags(&signals.set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// The signal that has come, if it ends a process that does not serve yet.
pub(super) fn received(from: &SignalFd, signals: &Signals) -> io::Result<Option<Signal>> {
    let Some(told) = from.read_signal()? else { return Ok(None) };
    // The kernel has no signals that we do not know the names of.
    let number = i32::try_from(told.ssi_signo).unwrap_or_default();
    let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
    // A process that has nothing to reload ends at SIGHUP: the next client starts one that reads
    // the configuration as it is then.
    match signals.meaning(signal, false) {
        SignalAction::Stop => Ok(Some(signal)),
        _ => {
            warn!("received {signal}, which has no meaning here; going on");
            Ok(None)
        }
    }
}

/// Asks again and again while clients are refused, ever less often.
#[derive(Debug)]
pub(super) struct RepeatedQuery {
    inquiry: Box<PeerQuery>,
    asking: Option<RunningQuery>,
    /// When to ask next, unless that is under way.
    due: Instant,
    pauses: QueryBackoff,
    /// Why there was no answer, as it was logged.
    told: String,
}

impl RepeatedQuery {
    pub(super) fn new(inquiry: Box<PeerQuery>, now: Instant) -> Self {
        let mut pauses = QueryBackoff::default();
        let due = now + pauses.next();
        Self { inquiry, asking: None, due, pauses, told: String::new() }
    }

    /// When to look again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.asking.is_none().then_some(self.due)
    }

    /// What becomes readable when to look again.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.asking.as_ref().map(AsFd::as_fd)
    }

    /// Goes on with it; the answer, once there is one that decides.
    pub(super) fn look(&mut self, now: Instant) -> Option<QueryResult> {
        let Some(asking) = &self.asking else {
            if self.due <= now {
                self.begin(now);
            }
            return None;
        };
        let fate = match asking.answer()? {
            Ok(answer) => handover_verdict(answer.as_ref(), None),
            Err(trouble) => {
                let trouble = trouble.to_string();
                self.tell(trouble);
                HandoverVerdict::Unknown
            }
        };
        self.asking = None;
        self.due = now + self.pauses.next();
        let id = self.inquiry.question.id;
        (fate != HandoverVerdict::Unknown).then_some(QueryResult { id, fate })
    }

    fn begin(&mut self, now: Instant) {
        match RunningQuery::begin(&self.inquiry) {
            Ok(asking) => self.asking = Some(asking),
            Err(error) => {
                self.due = now + self.pauses.next();
                self.tell(error.to_string());
            }
        }
    }

    /// Logs why there is no answer, when that changes.
    fn tell(&mut self, trouble: String) {
        if self.told != trouble {
            let PeerQuery { to, question, .. } = &*self.inquiry;
            info!(
                "flexnbd.migration" = %question.id, "flexnbd.destination" = %to,
                "{to} still does not say whether the disk has arrived there: {trouble}"
            );
            self.told = trouble;
        }
    }
}

/// The times from one question to the next.
#[derive(Debug)]
struct QueryBackoff(Duration);

impl Default for QueryBackoff {
    fn default() -> Self {
        Self(REFUSING_ASK_FIRST)
    }
}

impl QueryBackoff {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (pause * 2).min(REFUSING_ASK_EVERY_MAX);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn questions_come_ever_less_often_up_to_a_minute() {
        let mut pauses = QueryBackoff::default();
        let seconds: Vec<u64> = (0..6).map(|_| pauses.next().as_secs()).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 60, 60]);
    }

    #[test]
    fn a_lost_local_address_does_not_prevent_the_question() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = RemoteAddress::new(&listener.local_addr().unwrap().to_string()).unwrap();
        // No host has it (RFC 5737).
        let from = "192.0.2.1".parse().unwrap();
        let inquiry = PeerQuery::new((Id([7; 16]), 512), (&to, Some(from))).unwrap();
        let answer = || {
            let asking = RunningQuery::begin(&inquiry).unwrap();
            wait_readable(&[asking.as_fd()], None).unwrap();
            asking.answer().unwrap().clone()
        };
        let hang_up = thread::spawn(move || listener.accept().map(drop));
        let heard = answer();
        assert!(!matches!(heard, Err(Trouble::Connect(_))), "{heard:?}");
        hang_up.join().unwrap().unwrap();
        let Err(Trouble::Connect(why)) = answer() else { panic!("nothing listens") };
        assert!(why.contains("192.0.2.1") && why.contains("from any local address"), "{why}");
    }

    #[test]
    fn places_without_an_address_are_not_asked() {
        let inquiry =
            |to: &str| PeerQuery::new((Id([7; 16]), 512), (&RemoteAddress::new(to).unwrap(), None));
        assert!(inquiry("192.0.2.7:10809").is_some());
        assert!(inquiry("/run/x").is_none());
    }
}

//! What each signal means to a process that serves or receives a disk (signal(7)).
//! Never ends the process by a signal's default action, which would drop requests in flight.
//!
//! | signal | meaning |
//! |---|---|
//! | `SIGTERM` `SIGINT` `SIGQUIT` | stop |
//! | `SIGXCPU` `SIGPWR` `SIGALRM` `SIGVTALRM` `SIGPROF` | stop: a limit, a timer set before `exec`, or the power ends the process soon |
//! | `SIGHUP` | reload the configuration; without one, stop, unless `nohup` has the process ignore it |
//! | `SIGUSR1` `SIGUSR2` `SIGIO` `SIGSTKFLT` | nothing, with a line in the log |
//! | `SIGXFSZ` `SIGPIPE` `SIGTTOU` and real-time signals | ignored: the system call returns the error |

use nix::libc;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use tracing::warn;

/// Signals that stop the process in an orderly way.
const STOPPING: [Signal; 8] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGXCPU,
    Signal::SIGPWR,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
];
/// Signals that are only logged.
const MEANINGLESS: [Signal; 4] =
    [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGIO, Signal::SIGSTKFLT];
/// Signals that repeat the error that a system call returns.
const REDUNDANT: [libc::c_int; 3] = [libc::SIGXFSZ, libc::SIGPIPE, libc::SIGTTOU];

/// What a signal makes the process do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalAction {
    /// Stop in an orderly way.
    Stop,
    /// Read the configuration again.
    Reload,
    /// Nothing but a line in the log.
    Ignore,
}

/// The signals that the process handles, blocked in every thread so that one thread can wait for
/// them.
#[derive(Clone, Debug)]
pub(super) struct Signals {
    pub(super) set: SigSet,
    /// `SIGHUP` was ignored when the process started, as `nohup` does.
    hangup_ignored: bool,
}

impl Signals {
    /// Blocks every signal that the process handles, and ignores the redundant ones. Call this
    /// before any thread starts: threads inherit the mask.
    pub(super) fn block() -> io::Result<Self> {
        let hangup_ignored = is_ignored(libc::SIGHUP);
        let mut set = SigSet::empty();
        STOPPING.into_iter().chain(MEANINGLESS).chain([Signal::SIGHUP]).for_each(|s| set.add(s));
        set.thread_block()?;
        REDUNDANT.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()).for_each(ignore);
        Ok(Self { set, hangup_ignored })
    }

    /// Handles no signal, and leaves the process's signals as they are.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self { set: SigSet::empty(), hangup_ignored: false }
    }

    /// What `signal` makes a process do that can reload its configuration, or has none.
    pub(super) fn action(&self, signal: Signal, has_configuration: bool) -> SignalAction {
        match signal {
            Signal::SIGHUP if has_configuration => SignalAction::Reload,
            Signal::SIGHUP if self.hangup_ignored => SignalAction::Ignore,
            signal if MEANINGLESS.contains(&signal) => SignalAction::Ignore,
            _ => SignalAction::Stop,
        }
    }

    /// A descriptor to read the signals from, for a start-up that has no signal thread yet.
    pub(super) fn descriptor(&self) -> io::Result<SignalFd> {
        Ok(SignalFd::with_flags(&self.set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
    }

    /// Reads the next signal from `descriptor`, and returns it if it stops a process that does not
    /// serve yet.
    pub(super) fn read_stop(&self, descriptor: &SignalFd) -> io::Result<Option<Signal>> {
        let Some(info) = descriptor.read_signal()? else { return Ok(None) };
        // The set holds only signals that `Signal` knows.
        let number = i32::try_from(info.ssi_signo).unwrap_or_default();
        let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
        // SIGHUP ends a process that serves nothing to reload for: the next client starts a process
        // that reads the configuration as it is then.
        match self.action(signal, false) {
            SignalAction::Stop => Ok(Some(signal)),
            SignalAction::Reload | SignalAction::Ignore => {
                warn!("received {signal}, which has no meaning here; going on");
                Ok(None)
            }
        }
    }
}

/// Ignores `SIGXFSZ`, so that a write beyond `RLIMIT_FSIZE` fails with `EFBIG`.
pub fn ignore_file_size_signal() {
    ignore(libc::SIGXFSZ);
}

fn ignore(number: libc::c_int) {
    // SAFETY: `SIG_IGN` runs no code of ours. The call fails only for numbers that are no signals.
    unsafe { libc::signal(number, libc::SIG_IGN) };
}

/// Whether this signal is ignored. A new process inherits that, from `nohup` for `SIGHUP` and from
/// a shell for the `SIGINT` of background jobs.
#[must_use]
pub fn is_ignored(number: libc::c_int) -> bool {
    // SAFETY: zeroes are a valid `sigaction`.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: without a new action the call only writes to `current`, which outlives it.
    let result = unsafe { libc::sigaction(number, std::ptr::null(), &raw mut current) };
    result == 0 && current.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sighup_reloads_if_there_is_a_configuration() {
        for (ignored, configured, expected) in [
            (false, false, SignalAction::Stop),
            (true, false, SignalAction::Ignore),
            (false, true, SignalAction::Reload),
            (true, true, SignalAction::Reload),
        ] {
            let signals = Signals { hangup_ignored: ignored, ..Signals::none() };
            assert_eq!(signals.action(Signal::SIGHUP, configured), expected);
        }
    }

    #[test]
    fn every_fatal_signal_has_a_meaning() {
        use Signal::*;
        // Faults of the program, signals that cannot be blocked, job control, and signals whose
        // default action is to do nothing.
        let others = [
            SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, SIGSYS, SIGTRAP, SIGKILL, SIGSTOP, SIGTSTP,
            SIGTTIN, SIGCHLD, SIGCONT, SIGURG, SIGWINCH,
        ];
        for signal in Signal::iterator().filter(|signal| !others.contains(signal)) {
            let is_redundant = REDUNDANT.contains(&(signal as libc::c_int));
            let is_known = STOPPING.contains(&signal)
                || MEANINGLESS.contains(&signal)
                || signal == SIGHUP
                || is_redundant;
            assert!(is_known, "{signal}");
        }
    }
}

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

use super::config::StartError;
use nix::libc;
use nix::sys::signal::{SigSet, Signal};

/// Signals that end the process in order.
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
/// Signals that have no meaning here.
const MEANINGLESS: [Signal; 4] =
    [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGIO, Signal::SIGSTKFLT];
/// Signals that report what a system call returns as an error as well.
const REDUNDANT: [libc::c_int; 3] = [libc::SIGXFSZ, libc::SIGPIPE, libc::SIGTTOU];

/// What to do about a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalAction {
    /// End the process in order.
    Stop,
    /// Read the configuration again.
    Reload,
    /// Go on.
    Nothing,
}

/// The signals that the process waits for; blocked in every thread.
#[derive(Clone, Debug)]
pub(super) struct Signals {
    pub(super) set: SigSet,
    /// `nohup` or a shell has set `SIGHUP` to be ignored.
    hangup_ignored: bool,
}

impl Signals {
    /// Blocks every signal that has a meaning, so that it can be waited for, and ignores those that
    /// repeat an error. Call it before any thread starts: threads inherit the mask.
    pub(super) fn block() -> Result<Self, StartError> {
        let refused = |errno: nix::Error| StartError::System("set up signals", errno.into());
        let hangup_ignored = is_ignored(libc::SIGHUP);
        let mut set = SigSet::empty();
        STOPPING.into_iter().chain(MEANINGLESS).chain([Signal::SIGHUP]).for_each(|s| set.add(s));
        set.thread_block().map_err(refused)?;
        REDUNDANT.into_iter().chain(libc::SIGRTMIN()..=libc::SIGRTMAX()).for_each(ignore);
        Ok(Self { set, hangup_ignored })
    }

    /// What `signal` means to a process that has a configuration to read again, or has none.
    pub(super) fn meaning(&self, signal: Signal, has_configuration: bool) -> SignalAction {
        match signal {
            Signal::SIGHUP if has_configuration => SignalAction::Reload,
            Signal::SIGHUP if self.hangup_ignored => SignalAction::Nothing,
            signal if MEANINGLESS.contains(&signal) => SignalAction::Nothing,
            _ => SignalAction::Stop,
        }
    }
}

/// Lets a write beyond `RLIMIT_FSIZE` fail with `EFBIG`, rather than end the process.
pub fn ignore_file_size_signal() {
    ignore(libc::SIGXFSZ);
}

fn ignore(number: libc::c_int) {
    // SAFETY: `SIG_IGN` runs no code of ours. It fails for numbers that are no signals only.
    unsafe { libc::signal(number, libc::SIG_IGN) };
}

/// Whether the process has been started with this signal ignored, as `nohup` does with `SIGHUP`, and a
/// shell with the `SIGINT` of background jobs.
#[must_use]
pub fn is_ignored(number: libc::c_int) -> bool {
    // SAFETY: zeroes are a valid `sigaction`.
    let mut current: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: with no new action it only fills in the current one, which lives here.
    let asked = unsafe { libc::sigaction(number, std::ptr::null(), &raw mut current) };
    asked == 0 && current.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signals(hangup_ignored: bool) -> Signals {
        Signals { set: SigSet::empty(), hangup_ignored }
    }

    #[test]
    fn hangup_reloads_if_there_is_a_configuration() {
        for (ignored, configured, expected) in [
            (false, false, SignalAction::Stop),
            (true, false, SignalAction::Nothing),
            (false, true, SignalAction::Reload),
            (true, true, SignalAction::Reload),
        ] {
            assert_eq!(signals(ignored).meaning(Signal::SIGHUP, configured), expected);
        }
    }

    #[test]
    fn every_signal_that_would_end_the_process_has_a_meaning() {
        use Signal::*;
        // Faults of the program, what cannot be blocked, job control, and what does nothing anyway.
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

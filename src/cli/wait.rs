//! `flexnbd mirror --wait`: starts a migration and shows its progress until it ends.
//! Never stops the migration: SIGINT ends only this process, which prints how to stop the
//! migration.

use super::output;
use super::progress::{ProgressDisplay, StatusSample, describe_summary};
use crate::control::reply::UNKNOWN_COMMAND;
use crate::control::{AskError, Command, Reply, Status, Summary, ask_and_wait, ask_within};
use crate::daemon::signals::is_ignored;
use nix::libc;
use nix::sys::signal::{SigSet, Signal, raise};
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// The message of `mirror` when the migration has started (flexnbd(1), MIRROR MODE).
pub(super) const STARTED: &str = "Migration started";

/// Interval between two status requests.
const POLL_INTERVAL: Duration = Duration::from_millis(200);
/// Timeout of one status request; the next one follows anyway.
const POLL_TIMEOUT: Duration = Duration::from_secs(2);

/// Sends `command`, a [`Command::MirrorWait`], and shows the migration's progress and end. The exit
/// status is the reply's code, or 1 without a reply.
pub(super) fn run(socket: &Path, command: &Command) -> ExitCode {
    explain_interrupt(socket);
    let display = ProgressDisplay::new(io::stderr().is_terminal());
    let mut print = |line: &str| {
        // A reader that has closed the pipe does not end the wait.
        let _ = output::print(line);
    };
    match follow(socket, command, display, &mut print) {
        Ok(reply) if reply.is_success() => output::print(&describe_end(&reply)),
        Ok(reply) if reply.code() == UNKNOWN_COMMAND => {
            let why = "this server does not support --wait; leave it out";
            output::print_error(&format!("flexnbd mirror: {why}"), reply.exit_status())
        }
        Ok(reply) => output::print_error(reply.text(), reply.exit_status()),
        Err(why) => output::print_error(&format!("flexnbd mirror: {why}"), output::EXIT_FAILURE),
    }
}

/// Prints on SIGINT, before it ends the process, that the migration continues. Must be called
/// before any thread is started that does not block all signals, because threads inherit the mask.
fn explain_interrupt(socket: &Path) {
    let mut interrupt = SigSet::empty();
    interrupt.add(Signal::SIGINT);
    if is_ignored(libc::SIGINT) || interrupt.thread_block().is_err() {
        return;
    }
    let line = interrupt_message(socket);
    let wait = move || {
        if interrupt.wait().is_ok() {
            // The newline leaves the progress bar on the line above.
            let _ = output::print_error(&format!("\n{line}"), output::EXIT_FAILURE);
            let _ = interrupt.thread_unblock();
            let _ = raise(Signal::SIGINT);
        }
    };
    if thread::Builder::new().name("interrupt".into()).spawn(wait).is_err() {
        let _ = interrupt.thread_unblock();
    }
}

fn interrupt_message(socket: &Path) -> String {
    let socket = socket.display();
    format!(
        "flexnbd mirror: no longer waiting; a migration that has started goes on. To see it: `flexnbd \
         status --sock {socket}`; to end it: `flexnbd break --sock {socket}`"
    )
}

/// Describes the end of a successful migration; falls back to the server's own text if that is not
/// a summary.
fn describe_end(reply: &Reply) -> String {
    Summary::from_line(reply.text())
        .map_or_else(|_| reply.text().to_owned(), |summary| describe_summary(&summary))
}

/// Sends the command and shows the progress until the server replies, which is at the end.
fn follow(
    socket: &Path,
    command: &Command,
    mut display: ProgressDisplay,
    print: &mut dyn FnMut(&str),
) -> Result<Reply, String> {
    let (sender, receiver) = mpsc::channel();
    thread::scope(|scope| {
        let request = move || {
            // Cannot fail: the receiver outlives this thread.
            let _ = sender.send(ask_and_wait(socket, command));
        };
        let thread = thread::Builder::new().spawn_scoped(scope, request);
        thread.map_err(|error| format!("cannot start a thread: {error}"))?;
        let start = Instant::now();
        let mut has_started = false;
        let reply = wait_for_reply(&receiver, || {
            let Some(sample) = request_status(socket) else { return };
            if !std::mem::replace(&mut has_started, true) {
                print(STARTED);
            }
            if let Some(line) = display.show(start.elapsed(), &sample) {
                print(&line);
            }
        });
        display.end();
        // A short migration can end before the first status request.
        if !has_started && reply.as_ref().is_ok_and(Reply::is_success) {
            print(STARTED);
        }
        reply
    })
}

/// Waits for the reply, and calls `poll` at each [`POLL_INTERVAL`] until then.
fn wait_for_reply(
    receiver: &Receiver<Result<Reply, AskError>>,
    mut poll: impl FnMut(),
) -> Result<Reply, String> {
    loop {
        match receiver.recv_timeout(POLL_INTERVAL) {
            Ok(reply) => return reply.map_err(|error| error.to_string()),
            Err(RecvTimeoutError::Timeout) => poll(),
            Err(RecvTimeoutError::Disconnected) => {
                return Err("the request ended without a reply".to_owned());
            }
        }
    }
}

/// Requests the migration's progress; `None` if the server sends no status, for example because it
/// has ended. The outcome is in the reply to the command.
fn request_status(socket: &Path) -> Option<StatusSample> {
    let reply = ask_within(socket, &Command::Status, POLL_TIMEOUT).ok()?;
    let status = reply.is_success().then(|| Status::from_line(reply.text()))?;
    StatusSample::of(&status.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::Mirror;
    use crate::control::status::Migration;
    use crate::control::{ControlSocket, Credentials, Operator};
    use std::sync::{Arc, Condvar, Mutex};

    /// A server with a migration at 50 %, which ends with `reply` after `polls_wanted` status
    /// requests.
    struct FakeServer {
        reply: Reply,
        polls: Mutex<u32>,
        polled: Condvar,
        polls_wanted: u32,
    }

    impl Operator for FakeServer {
        fn execute(&self, command: Command, _from: Credentials) -> Reply {
            match command {
                Command::Status => {
                    *self.polls.lock().unwrap() += 1;
                    self.polled.notify_all();
                    let migration = Migration { bytes_left: 50, ..Migration::default() };
                    let status =
                        Status { size: 100, migration: Some(migration), ..Status::default() };
                    Reply::success(status.to_string())
                }
                Command::MirrorWait(_) => {
                    let polls = self.polls.lock().unwrap();
                    let wanted = |polls: &mut u32| *polls < self.polls_wanted;
                    drop(self.polled.wait_while(polls, wanted).unwrap());
                    self.reply.clone()
                }
                other => panic!("{other}"),
            }
        }
    }

    /// Follows a migration; returns the printed lines and the reply.
    fn follow_fake(reply: &Reply, polls_wanted: u32) -> (Vec<String>, Result<Reply, String>) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let (polls, polled) = Default::default();
        let fake = FakeServer { reply: reply.clone(), polls, polled, polls_wanted };
        let _handle = ControlSocket::bind(&socket).unwrap().start(Arc::new(fake)).unwrap();
        let mut printed = Vec::new();
        let mut print = |line: &str| printed.push(line.to_owned());
        let reply = follow(&socket, &command(), ProgressDisplay::new(false), &mut print);
        (printed, reply)
    }

    fn command() -> Command {
        Command::MirrorWait(Mirror::plain("[::1]:7"))
    }

    #[test]
    fn progress_is_printed_between_start_and_end() {
        let done = Reply::success(Summary::default().to_string());
        let (printed, reply) = follow_fake(&done, 2);
        assert_eq!(reply, Ok(done));
        assert_eq!(printed, ["Migration started", "50 %, 0 bytes/s, 50 bytes left, pass 1"]);
    }

    #[test]
    fn short_migration_reports_its_start() {
        let done = Reply::success(Summary::default().to_string());
        assert_eq!(follow_fake(&done, 0), (vec!["Migration started".to_owned()], Ok(done)));
    }

    #[test]
    fn a_refused_migration_reports_no_start() {
        let refused = Reply::refused("mirror already running");
        assert_eq!(follow_fake(&refused, 0), (Vec::new(), Ok(refused)));
    }

    #[test]
    fn a_missing_server_is_an_error() {
        let nowhere = Path::new("/nowhere/control.sock");
        let reply =
            follow(nowhere, &command(), ProgressDisplay::new(false), &mut |line| panic!("{line}"));
        assert!(reply.unwrap_err().contains("no such socket"));
    }

    #[test]
    fn an_unknown_summary_is_printed_unchanged() {
        assert_eq!(describe_end(&Reply::success("well done")), "well done");
        let summary = Summary { acknowledged: true, ..Summary::default() };
        assert!(
            describe_end(&Reply::success(summary.to_string()))
                .starts_with("Migration finished: 0 bytes")
        );
    }
}

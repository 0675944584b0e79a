//! `flexnbd mirror --wait`: gives the order and follows the migration until it ends.
//! Decides nothing about it: to stop this does not stop the migration, and SIGINT says so.

use super::output;
use super::progress::{Display, StatusSample, ended};
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

/// What `mirror` says when the migration has begun (flexnbd(1), MIRROR MODE).
pub(super) const STARTED: &str = "Migration started";

/// How often the server is asked how it is doing.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// How long it may take to say so; there will be another time.
const LOOK_TIME_MAX: Duration = Duration::from_secs(2);

/// Gives `command`, a [`Command::MirrorWait`], and shows what comes of it. The exit status is the
/// answer's number, or 1 when there is none.
pub(super) fn run(socket: &Path, command: &Command) -> ExitCode {
    explain_interrupt(socket);
    let display = Display::new(io::stderr().is_terminal());
    let mut print = |line: &str| {
        // Whoever read it had enough; the migration goes on, and so does the waiting.
        let _ = output::say(line);
    };
    match follow(socket, command, display, &mut print) {
        Ok(reply) if reply.is_success() => output::say(&told(&reply)),
        Ok(reply) if reply.code() == UNKNOWN_COMMAND => {
            let why = "this server's flexnbd cannot be waited for; leave out --wait";
            output::complain(&format!("flexnbd mirror: {why}"), reply.exit_status())
        }
        Ok(reply) => output::complain(reply.text(), reply.exit_status()),
        Err(why) => output::complain(&format!("flexnbd mirror: {why}"), output::EXIT_FAILURE),
    }
}

/// Says at SIGINT, which ends the process, that the migration goes on. Call it before any thread is
/// started that does not block all signals: threads inherit the mask.
fn explain_interrupt(socket: &Path) {
    let mut interrupt = SigSet::empty();
    interrupt.add(Signal::SIGINT);
    if is_ignored(libc::SIGINT) || interrupt.thread_block().is_err() {
        return;
    }
    let line = farewell(socket);
    let wait = move || {
        if interrupt.wait().is_ok() {
            // Below the bar, which is left as it was.
            let _ = output::complain(&format!("\n{line}"), output::EXIT_FAILURE);
            let _ = interrupt.thread_unblock();
            let _ = raise(Signal::SIGINT);
        }
    };
    if thread::Builder::new().name("interrupt".into()).spawn(wait).is_err() {
        let _ = interrupt.thread_unblock();
    }
}

/// The message at SIGINT: the migration goes on, and how to see and end it.
fn farewell(socket: &Path) -> String {
    let socket = socket.display();
    format!(
        "flexnbd mirror: no longer waiting; a migration that has started goes on. To see it: `flexnbd \
         status --sock {socket}`; to end it: `flexnbd break --sock {socket}`"
    )
}

/// What a migration that succeeded came to; as the server says it, if that is not understood.
fn told(reply: &Reply) -> String {
    Summary::from_line(reply.text()).map_or_else(|_| reply.text().to_owned(), |it| ended(&it))
}

/// Returns the answer, which comes at the end.
fn follow(
    socket: &Path,
    command: &Command,
    mut display: Display,
    print: &mut dyn FnMut(&str),
) -> Result<Reply, String> {
    let (sender, answer) = mpsc::channel();
    thread::scope(|scope| {
        let order = move || {
            // The receiver lives until this has come.
            let _ = sender.send(ask_and_wait(socket, command));
        };
        let thread = thread::Builder::new().spawn_scoped(scope, order);
        thread.map_err(|error| format!("cannot start a thread: {error}"))?;
        let began = Instant::now();
        let mut has_started = false;
        let answer = watch(&answer, || {
            let Some(sight) = look(socket) else { return };
            if !std::mem::replace(&mut has_started, true) {
                print(STARTED);
            }
            if let Some(line) = display.show(began.elapsed(), &sight) {
                print(&line);
            }
        });
        display.end();
        // It may be over before anybody could look.
        if !has_started && answer.as_ref().is_ok_and(Reply::is_success) {
            print(STARTED);
        }
        answer
    })
}

/// Looks every now and then until the answer is there.
fn watch(
    answer: &Receiver<Result<Reply, AskError>>,
    mut look: impl FnMut(),
) -> Result<Reply, String> {
    loop {
        match answer.recv_timeout(LOOK_EVERY) {
            Ok(answer) => return answer.map_err(|error| error.to_string()),
            Err(RecvTimeoutError::Timeout) => look(),
            Err(RecvTimeoutError::Disconnected) => return Err("gave up waiting".to_owned()),
        }
    }
}

/// How the migration is doing; none when the server does not say, perhaps because it has ended:
/// then the answer tells how.
fn look(socket: &Path) -> Option<StatusSample> {
    let reply = ask_within(socket, &Command::Status, LOOK_TIME_MAX).ok()?;
    let status = reply.is_success().then(|| Status::from_line(reply.text()))?;
    StatusSample::of(&status.ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::{ArrivalAction, Mirror};
    use crate::control::status::Migration;
    use crate::control::{ControlSocket, Credentials, Operator};
    use std::sync::{Arc, Condvar, Mutex};

    /// A server that shows a migration at 50 % until it was asked for it twice, and then answers.
    struct Fake {
        reply: Reply,
        looks: Mutex<u32>,
        looked: Condvar,
        looks_wanted: u32,
    }

    impl Operator for Fake {
        fn execute(&self, command: Command, _from: Credentials) -> Reply {
            match command {
                Command::Status => {
                    *self.looks.lock().unwrap() += 1;
                    self.looked.notify_all();
                    let migration = Migration { bytes_left: 50, ..Migration::default() };
                    let status =
                        Status { size: 100, migration: Some(migration), ..Status::default() };
                    Reply::success(status.to_string())
                }
                Command::MirrorWait(_) => {
                    let looks = self.looks.lock().unwrap();
                    let wanted = |looks: &mut u32| *looks < self.looks_wanted;
                    drop(self.looked.wait_while(looks, wanted).unwrap());
                    self.reply.clone()
                }
                other => panic!("{other}"),
            }
        }
    }

    /// What is printed, and the answer.
    fn following(reply: &Reply, looks_wanted: u32) -> (Vec<String>, Result<Reply, String>) {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let (looks, looked) = Default::default();
        let fake = Fake { reply: reply.clone(), looks, looked, looks_wanted };
        let _handle = ControlSocket::bind(&socket).unwrap().start(Arc::new(fake)).unwrap();
        let mut printed = Vec::new();
        let mut print = |line: &str| printed.push(line.to_owned());
        let answer = follow(&socket, &order(), Display::new(false), &mut print);
        (printed, answer)
    }

    fn order() -> Command {
        let to = "[::1]:7".parse().unwrap();
        Command::MirrorWait(Mirror {
            to,
            action: ArrivalAction::Exit,
            bind: None,
            max_bps: None,
            no_record: false,
        })
    }

    #[test]
    fn progress_is_printed_between_start_and_end() {
        let done = Reply::success(Summary::default().to_string());
        let (printed, answer) = following(&done, 2);
        assert_eq!(answer, Ok(done));
        assert_eq!(printed, ["Migration started", "50 %, 0 bytes/s, 50 bytes left, pass 1"]);
    }

    #[test]
    fn a_migration_that_is_over_at_once_has_started_all_the_same() {
        let done = Reply::success(Summary::default().to_string());
        assert_eq!(following(&done, 0), (vec!["Migration started".to_owned()], Ok(done)));
    }

    #[test]
    fn a_migration_that_never_began_has_not_started() {
        let refused = Reply::refused("mirror already running");
        assert_eq!(following(&refused, 0), (Vec::new(), Ok(refused)));
    }

    #[test]
    fn a_server_that_is_not_there_is_an_error() {
        let nowhere = Path::new("/nowhere/control.sock");
        let answer = follow(nowhere, &order(), Display::new(false), &mut |line| panic!("{line}"));
        assert!(answer.unwrap_err().contains("no such socket"));
    }

    #[test]
    fn what_the_end_says_is_told_even_if_it_is_not_understood() {
        assert_eq!(told(&Reply::success("well done")), "well done");
        let summary = Summary { acknowledged: true, ..Summary::default() };
        assert!(told(&Reply::success(summary.to_string())).starts_with("Migration finished: 0 B"));
    }
}

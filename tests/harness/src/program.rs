//! Other programs, and flexnbd as a command: run until they exit, or in the background.
//! Never waits without a timeout, and never kills a process that it has not started itself.

use crate::{Endpoint, TIMEOUT, poll_until, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};

/// The command line and stdin of a program, before it is started.
pub struct Program {
    words: Vec<OsString>,
    input: Vec<u8>,
}

/// Exit status and output of a program that has exited.
pub struct Outcome {
    /// The command line, for messages.
    pub command_line: String,
    /// The exit status.
    pub status: ExitStatus,
    /// The complete stdout.
    pub stdout: Vec<u8>,
    /// The complete stderr.
    pub stderr: String,
}

impl Program {
    /// A program without arguments, found in `PATH` unless `name` is a path.
    pub fn new(name: impl AsRef<OsStr>) -> Program {
        Program { words: vec![name.as_ref().to_owned()], input: Vec::new() }
    }

    /// `flexnbd`, with its arguments in one string, separated by spaces.
    pub fn flexnbd(arguments: &str) -> Program {
        Program::new(crate::flexnbd()).words(arguments)
    }

    /// Adds arguments, separated by spaces.
    pub fn words(self, arguments: &str) -> Program {
        self.args(arguments.split_whitespace())
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets the bytes of stdin, which is empty otherwise.
    pub fn input(mut self, bytes: &[u8]) -> Program {
        self.input = bytes.to_vec();
        self
    }

    /// Runs the program until it exits, successfully or not.
    #[track_caller]
    pub fn run(self) -> Outcome {
        let command_line = join(&self.words);
        let mut child = self.start(Stdio::piped(), Stdio::piped());
        let (mut stdin, input) = (child.stdin.take().unwrap(), self.input);
        // Ignores errors: the program may exit before it has read all of stdin.
        let feed = thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        let status = wait_for_exit(&mut child, &command_line);
        feed.join().unwrap();
        let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
        Outcome { command_line, status, stdout: stdout.join().unwrap(), stderr }
    }

    /// Runs the program until it exits, fails unless it succeeded, and returns its stdout.
    #[track_caller]
    pub fn ok(self) -> String {
        let outcome = self.run();
        outcome.succeeded();
        outcome.text()
    }

    /// Starts the program with a pipe for stderr. The caller must wait for the child.
    #[track_caller]
    pub fn start(&self, stdin: Stdio, output: Stdio) -> Child {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).stdin(stdin).stdout(output).stderr(Stdio::piped());
        command.spawn().unwrap_or_else(|e| panic!("cannot start {}: {e}", join(&self.words)))
    }

    /// Starts the program as a server, and returns once it accepts a connection at `endpoint`.
    #[track_caller]
    pub fn serve_at(self, endpoint: Endpoint) -> Peer {
        let process = self.start_until(|| endpoint.accepts());
        Peer { process, endpoint }
    }

    /// Starts the program, and returns once `ready` is true. Fails if it exits before.
    #[track_caller]
    pub fn start_until(self, ready: impl Fn() -> bool) -> Running {
        let mut child = self.start(Stdio::null(), Stdio::null());
        let command_line = join(&self.words);
        let stderr = drain(child.stderr.take().unwrap());
        let mut ended = None;
        let is_ready = poll_until(TIMEOUT, || {
            ended = child.try_wait().unwrap();
            ended.is_some() || ready()
        });
        let process = Running { child };
        if let Some(status) = ended {
            let printed = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
            panic!("{command_line} exited with {status}, stderr: {printed}");
        }
        assert!(is_ready, "{command_line} is not ready");
        process
    }
}

impl Outcome {
    /// The stdout as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails unless the exit status is 0.
    #[track_caller]
    pub fn succeeded(&self) -> &Outcome {
        self.ended_with(0)
    }

    /// Fails unless this is the exit status.
    #[track_caller]
    pub fn ended_with(&self, code: i32) -> &Outcome {
        let Outcome { command_line, status, stderr, .. } = self;
        let printed = self.text();
        assert_eq!(status.code(), Some(code), "{command_line}: {status}; {stderr}{printed}");
        self
    }

    /// Fails unless this is the exit status, and stderr contains each of `parts`.
    #[track_caller]
    pub fn refused(&self, code: i32, parts: &[&str]) -> &Outcome {
        self.ended_with(code);
        for part in parts {
            assert!(
                self.stderr.contains(part),
                "{}: no {part:?} in: {}",
                self.command_line,
                self.stderr
            );
        }
        self
    }

    /// Fails unless stdout and stderr are empty.
    #[track_caller]
    pub fn prints_nothing(&self) -> &Outcome {
        assert_eq!((self.text().as_str(), self.stderr.as_str()), ("", ""), "{}", self.command_line);
        self
    }
}

fn join(words: &[OsString]) -> String {
    let words: Vec<_> = words.iter().map(|w| w.to_string_lossy()).collect();
    words.join(" ")
}

fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// Waits until a child exits. After twice [`TIMEOUT`], kills it and fails.
#[track_caller]
pub fn wait_for_exit(child: &mut Child, command_line: &str) -> ExitStatus {
    let mut status = None;
    let ended = poll_until(2 * TIMEOUT, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{command_line} does not exit");
    }
    status.unwrap()
}

/// Another program in the background. Dropping it kills it.
pub struct Running {
    child: Child,
}

impl Running {
    /// Sends SIGTERM and waits until it exits. It has then written all data that it buffers.
    #[track_caller]
    pub fn stop(self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.wait();
    }

    /// Waits until it exits.
    #[track_caller]
    pub fn wait(mut self) {
        wait_until("a program to end", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// An NBD server other than flexnbd.
pub struct Peer {
    process: Running,
    /// The endpoint at which it listens.
    pub endpoint: Endpoint,
}

impl Peer {
    /// The NBD URI of its default export.
    pub fn uri(&self) -> String {
        self.endpoint.uri()
    }

    /// Sends SIGTERM and waits until it exits. It has then written all data that it buffers.
    #[track_caller]
    pub fn stop(self) {
        self.process.stop();
    }
}

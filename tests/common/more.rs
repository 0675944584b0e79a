//! Running programs to their end, or as servers beside ours, and the disks that tests serve.
//! Never waits without a deadline, and never ends a process that it has not started itself.

#![allow(dead_code, reason = "every test binary compiles this file and uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a fixture that cannot go on fails the test that asked for it"
)]

use crate::common::{
    Builder, DEADLINE, MIB, Server, TempDir, comes_true, sparse_image, temp_dir, wait_until,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::io::{Read, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

/// A program that is about to be run.
pub(crate) struct Program {
    words: Vec<OsString>,
    input: Vec<u8>,
}

/// How a program ended, and what it said.
pub(crate) struct Outcome {
    pub(crate) shown: String,
    pub(crate) status: ExitStatus,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Program {
    pub(crate) fn new(name: impl AsRef<OsStr>) -> Program {
        Program { words: vec![name.as_ref().to_owned()], input: Vec::new() }
    }

    /// `flexnbd`, with its arguments in one string, separated by spaces.
    pub(crate) fn flexnbd(arguments: &str) -> Program {
        Program::new(env!("CARGO_BIN_EXE_flexnbd")).words(arguments)
    }

    /// Adds arguments, separated by spaces.
    pub(crate) fn words(self, arguments: &str) -> Program {
        self.args(arguments.split_whitespace())
    }

    /// Adds arguments.
    pub(crate) fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.words.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Has these bytes on its standard input; without, it has none.
    pub(crate) fn input(mut self, bytes: &[u8]) -> Program {
        self.input = bytes.to_vec();
        self
    }

    /// Runs it to its end, whatever that is.
    #[track_caller]
    pub(crate) fn run(self) -> Outcome {
        let shown = show(&self.words);
        let mut child = self.start(Stdio::piped(), Stdio::piped());
        let (mut stdin, input) = (child.stdin.take().unwrap(), self.input);
        // It may end without having read everything.
        let feed = thread::spawn(move || drop(stdin.write_all(&input)));
        let stdout = drain(child.stdout.take().unwrap());
        let stderr = drain(child.stderr.take().unwrap());
        let status = end_of(&mut child, &shown);
        feed.join().unwrap();
        let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
        Outcome { shown, status, stdout: stdout.join().unwrap(), stderr }
    }

    /// Runs it to its end, which must be a success, and returns what it printed.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        let outcome = self.run();
        outcome.succeeded();
        outcome.text()
    }

    /// Starts it with piped standard streams where asked for; the caller looks after it.
    #[track_caller]
    pub(crate) fn start(&self, stdin: Stdio, output: Stdio) -> Child {
        let mut command = Command::new(&self.words[0]);
        command.args(&self.words[1..]).stdin(stdin).stdout(output).stderr(Stdio::piped());
        command.spawn().unwrap_or_else(|e| panic!("cannot start {}: {e}", show(&self.words)))
    }

    /// Starts it as a server, and returns when somebody can connect to it there.
    #[track_caller]
    pub(crate) fn serve_at(self, place: Place) -> Peer {
        let there = place.clone();
        self.serve_when(move || there.answers(), place)
    }

    /// The same, for a server that is there when `up` says so.
    #[track_caller]
    pub(crate) fn serve_when(self, up: impl Fn() -> bool, place: Place) -> Peer {
        let mut child = self.start(Stdio::null(), Stdio::null());
        let shown = show(&self.words);
        let stderr = drain(child.stderr.take().unwrap());
        let mut ended = None;
        let ready = comes_true(DEADLINE, || {
            ended = child.try_wait().unwrap();
            ended.is_some() || up()
        });
        let peer = Peer { child, place };
        if let Some(status) = ended {
            let said = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
            panic!("{shown} ended with {status} and said: {said}");
        }
        assert!(ready, "{shown} does not answer");
        peer
    }
}

impl Outcome {
    /// What it printed, as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Fails unless it succeeded.
    #[track_caller]
    pub(crate) fn succeeded(&self) -> &Outcome {
        self.ended_with(0)
    }

    /// Fails unless it ended with this exit status.
    #[track_caller]
    pub(crate) fn ended_with(&self, code: i32) -> &Outcome {
        let Outcome { shown, status, stderr, .. } = self;
        let printed = self.text();
        assert_eq!(status.code(), Some(code), "{shown}: {status}; {stderr}{printed}");
        self
    }

    /// Fails unless it ended so, and said all of this on stderr.
    #[track_caller]
    pub(crate) fn refused(&self, code: i32, parts: &[&str]) -> &Outcome {
        self.ended_with(code);
        for part in parts {
            assert!(self.stderr.contains(part), "{}: no {part:?} in: {}", self.shown, self.stderr);
        }
        self
    }

    /// Fails unless it said nothing at all.
    #[track_caller]
    pub(crate) fn silently(&self) -> &Outcome {
        assert_eq!((self.text().as_str(), self.stderr.as_str()), ("", ""), "{}", self.shown);
        self
    }
}

fn show(words: &[OsString]) -> String {
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

/// Waits for a child that should end by itself; ends it when it does not, and fails.
#[track_caller]
pub(crate) fn end_of(child: &mut Child, shown: &str) -> ExitStatus {
    let mut status = None;
    let ended = comes_true(2 * DEADLINE, || {
        status = child.try_wait().unwrap();
        status.is_some()
    });
    if !ended {
        let _ = child.kill();
        let _ = child.wait();
        panic!("{shown} does not come to its end");
    }
    status.unwrap()
}

/// Where another program serves.
#[derive(Clone, Debug)]
pub(crate) enum Place {
    Tcp(u16),
    Unix(PathBuf),
    /// A file that it makes when it is ready.
    File(PathBuf),
}

impl Place {
    fn answers(&self) -> bool {
        match self {
            Place::Tcp(port) => TcpStream::connect(("127.0.0.1", *port)).is_ok(),
            Place::Unix(path) => UnixStream::connect(path).is_ok(),
            Place::File(path) => path.exists(),
        }
    }

    /// The place in our own client's words.
    pub(crate) fn flags(&self) -> String {
        match self {
            Place::Tcp(port) => format!("--addr 127.0.0.1 --port {port}"),
            Place::Unix(path) | Place::File(path) => format!("--addr {}", path.display()),
        }
    }
}

/// Another program that serves for the length of a test.
pub(crate) struct Peer {
    child: Child,
    pub(crate) place: Place,
}

impl Peer {
    pub(crate) fn uri(&self) -> String {
        match &self.place {
            Place::Tcp(port) => format!("nbd://127.0.0.1:{port}"),
            Place::Unix(path) | Place::File(path) => {
                format!("nbd+unix:///?socket={}", path.display())
            }
        }
    }

    /// Asks it to end, and waits until it has: everything it holds is then written.
    #[track_caller]
    pub(crate) fn end(self) {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).unwrap();
        self.ends();
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub(crate) fn ends(mut self) {
        wait_until("a program to end", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The two handshakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    New,
    Old,
}

/// The two kinds of socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Tcp,
    Unix,
}

/// A server of ours over an image, in a directory of their own.
pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) image: PathBuf,
    pub(crate) dir: TempDir,
}

impl Served {
    /// Serves a sparse image of 64 MiB.
    #[track_caller]
    pub(crate) fn start(transport: Transport, style: Style) -> Served {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 64 * MIB);
        Served::image(dir, image, transport, style, &[])
    }

    /// The same in newstyle over TCP, with arguments.
    #[track_caller]
    pub(crate) fn with(arguments: &[&str]) -> Served {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 64 * MIB);
        Served::image(dir, image, Transport::Tcp, Style::New, arguments)
    }

    /// Serves an image that is there.
    #[track_caller]
    pub(crate) fn image(
        dir: TempDir,
        image: PathBuf,
        transport: Transport,
        style: Style,
        arguments: &[&str],
    ) -> Served {
        let mut builder = Builder::serve(&image).args(arguments);
        if transport == Transport::Unix {
            builder = builder.unix(&dir.path().join("nbd.sock"));
        }
        if style == Style::Old {
            builder = builder.args(["--oldstyle"]);
        }
        Served { server: builder.start(), image, dir }
    }

    pub(crate) fn uri(&self) -> String {
        self.server.uri()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// Every way to reach a server of ours.
pub(crate) const WAYS: [(Transport, Style); 4] = [
    (Transport::Tcp, Style::New),
    (Transport::Unix, Style::New),
    (Transport::Tcp, Style::Old),
    (Transport::Unix, Style::Old),
];

/// Runs `test` against a server of 64 MiB reached in each way; a failure tells which.
#[track_caller]
pub(crate) fn in_every_way(test: impl Fn(&Served, Style)) {
    for (transport, style) in WAYS {
        let served = Served::start(transport, style);
        eprintln!("over {transport:?}, {style:?} style:");
        test(&served, style);
    }
}

/// How many bytes of a file are allocated.
pub(crate) fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// A TCP port of 127.0.0.1 that nobody uses now, and that the kernel gives to no client: it takes
/// theirs from 32768 on. For programs that have one chance to get their port.
pub(crate) fn quiet_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let start = std::process::id();
    loop {
        let step = start.wrapping_mul(97).wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = 15_000 + (step % 17_000) as u16;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

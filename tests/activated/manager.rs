//! A service manager of the test's own: hands over sockets, and hears what the service says.
//! Never restarts anything.

use crate::common::{DEADLINE, TempDir, comes_true, temp_dir, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Where the handed descriptors are in the service, beyond all that it opens by itself before.
const FIRST: RawFd = 200;

/// What is to be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Handed {
    Nothing,
    Nbd,
    NbdAndControl,
}

pub(crate) struct Manager {
    pub(crate) dir: TempDir,
    nbd: TcpListener,
    control: UnixListener,
    notify: UnixDatagram,
    variables: Vec<(&'static str, OsString)>,
}

impl Manager {
    pub(crate) fn new() -> Manager {
        let dir = temp_dir();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        notify.set_nonblocking(true).unwrap();
        Manager {
            nbd: TcpListener::bind("127.0.0.1:0").unwrap(),
            control: UnixListener::bind(dir.path().join("control.sock")).unwrap(),
            notify,
            dir,
            variables: Vec::new(),
        }
    }

    /// Sets a variable for the services started from now on.
    pub(crate) fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Manager {
        self.variables.push((name, value.into()));
        self
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.nbd.local_addr().unwrap()
    }

    /// Where operators connect.
    pub(crate) fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts `flexnbd LINE` with `--file` and such to follow as `paths`.
    #[track_caller]
    pub(crate) fn start(&self, handed: Handed, line: &str, paths: &[&Path]) -> Service {
        let (descriptors, names): (Vec<RawFd>, &str) = match handed {
            Handed::Nothing => (Vec::new(), ""),
            Handed::Nbd => (vec![self.nbd.as_raw_fd()], "nbd"),
            Handed::NbdAndControl => {
                (vec![self.control.as_raw_fd(), self.nbd.as_raw_fd()], "control:nbd")
            }
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
        command.args(line.split_whitespace()).args(paths);
        command.envs(self.variables.iter().cloned());
        command.env("NOTIFY_SOCKET", self.path("notify"));
        command.env("STATE_DIRECTORY", self.dir.path());
        if !descriptors.is_empty() {
            command.env("LISTEN_FDS", descriptors.len().to_string());
            command.env("LISTEN_FDS_FIRST_FD", FIRST.to_string());
            command.env("LISTEN_FDNAMES", names);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let hand_over = move || {
            for (place, descriptor) in (FIRST..).zip(&descriptors) {
                // SAFETY: two integers; the copy is not closed on exec, and its place is free.
                if unsafe { nix::libc::dup2(*descriptor, place) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: it calls nothing but dup2, which is async-signal-safe.
        unsafe { command.pre_exec(hand_over) };
        let mut child = command.spawn().unwrap();
        let (stderr, reader) = collect_stderr(&mut child);
        Service { child, stderr, reader: Some(reader) }
    }

    /// The next message, or none if there is none yet.
    pub(crate) fn message(&self) -> Option<String> {
        let mut buffer = [0; 8192];
        let count = self.notify.recv(&mut buffer).ok()?;
        Some(String::from_utf8_lossy(&buffer[..count]).into_owned())
    }

    /// Takes messages until one of them has this line; returns them all.
    #[track_caller]
    pub(crate) fn wait_for(&self, line: &str) -> Vec<String> {
        self.wait_for_message(line, |message| message.lines().any(|heard| heard == line))
    }

    /// Takes messages until one tells a status that has this in it; returns them all.
    #[track_caller]
    pub(crate) fn wait_for_status(&self, part: &str) -> Vec<String> {
        let tells = |message: &str| message.starts_with("STATUS=") && message.contains(part);
        self.wait_for_message(part, tells)
    }

    #[track_caller]
    fn wait_for_message(&self, what: &str, is_it: impl Fn(&str) -> bool) -> Vec<String> {
        let mut heard: Vec<String> = Vec::new();
        let found = comes_true(DEADLINE, || {
            while let Some(message) = self.message() {
                heard.push(message);
                if heard.last().is_some_and(|message| is_it(message)) {
                    return true;
                }
            }
            false
        });
        assert!(found, "waited in vain for {what:?}, heard {heard:?}");
        heard
    }

    /// Whether an operator has connected and nobody has accepted him.
    pub(crate) fn somebody_waits_for_control(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut sources = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        poll(&mut sources, PollTimeout::ZERO).unwrap() > 0
    }

    /// All messages up to now.
    pub(crate) fn messages(&self) -> Vec<String> {
        std::iter::from_fn(|| self.message()).collect()
    }
}

/// Reads the child's stderr to its end on a thread, so that it never blocks on a full pipe.
fn collect_stderr(child: &mut Child) -> (Arc<Mutex<String>>, JoinHandle<()>) {
    let mut pipe = child.stderr.take().unwrap();
    let text = Arc::new(Mutex::new(String::new()));
    let copy = Arc::clone(&text);
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            copy.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
    });
    (text, reader)
}

/// A service that was started. Dropping it kills it.
pub(crate) struct Service {
    child: Child,
    stderr: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
}

impl Service {
    pub(crate) fn stderr(&self) -> String {
        self.stderr.lock().unwrap().clone()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    #[track_caller]
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its end, and what it has said until then.
    #[track_caller]
    pub(crate) fn ends(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the service to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        status.unwrap()
    }

    #[track_caller]
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ends()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the service said:\n{}", self.stderr());
        }
    }
}

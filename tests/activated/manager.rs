//! A service manager of the test's own: hands over sockets, hears what the service says, and keeps
//! descriptors for the next one. Never restarts anything by itself.

use harness::{StderrReader, TIMEOUT, TempDir, poll_until, temp_dir, wait_until};
use nix::cmsg_space;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::io::IoSliceMut;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
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
    heard: Arc<Mutex<Heard>>,
    ear: Option<JoinHandle<()>>,
    variables: Vec<(&'static str, OsString)>,
}

/// What services have said and what they gave to keep.
#[derive(Default)]
struct Heard {
    messages: VecDeque<String>,
    store: BTreeMap<String, OwnedFd>,
}

/// Ends the thread that listens to services.
const ENOUGH: &str = "ENOUGH";

impl Manager {
    pub(crate) fn new() -> Manager {
        let dir = temp_dir();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let heard = Arc::default();
        let for_ear = Arc::clone(&heard);
        let ear = std::thread::spawn(move || while hear(&notify, &for_ear) {});
        Manager {
            nbd: TcpListener::bind("127.0.0.1:0").unwrap(),
            control: UnixListener::bind(dir.path().join("control.sock")).unwrap(),
            heard,
            ear: Some(ear),
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
        let (mut descriptors, mut names): (Vec<RawFd>, Vec<String>) = match handed {
            Handed::Nothing => (Vec::new(), Vec::new()),
            Handed::Nbd => (vec![self.nbd.as_raw_fd()], vec!["nbd".to_owned()]),
            Handed::NbdAndControl => (
                vec![self.control.as_raw_fd(), self.nbd.as_raw_fd()],
                vec!["control".to_owned(), "nbd".to_owned()],
            ),
        };
        let heard = self.heard();
        descriptors.extend(heard.store.values().map(OwnedFd::as_raw_fd));
        names.extend(heard.store.keys().cloned());
        let mut command = Command::new(env!("CARGO_BIN_EXE_flexnbd"));
        command.args(line.split_whitespace()).args(paths);
        command.envs(self.variables.iter().cloned());
        command.env("NOTIFY_SOCKET", self.path("notify"));
        command.env("STATE_DIRECTORY", self.dir.path());
        if !descriptors.is_empty() {
            command.env("LISTEN_FDS", descriptors.len().to_string());
            command.env("LISTEN_FDS_FIRST_FD", FIRST.to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
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
        let stderr = StderrReader::start(&mut child);
        Service { child, stderr }
    }

    /// The next message, or none if there is none yet.
    pub(crate) fn message(&self) -> Option<String> {
        self.heard().messages.pop_front()
    }

    /// The names of what services gave to keep.
    pub(crate) fn stored(&self) -> Vec<String> {
        self.heard().store.keys().cloned().collect()
    }

    /// Takes what is kept under this name away from the next service.
    pub(crate) fn take_from_store(&self, name: &str) -> OwnedFd {
        self.heard().store.remove(name).unwrap()
    }

    /// Keeps something for the next service.
    pub(crate) fn store(&self, name: &str, descriptor: OwnedFd) {
        self.heard().store.insert(name.to_owned(), descriptor);
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
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
        let found = poll_until(TIMEOUT, || {
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

impl Drop for Manager {
    fn drop(&mut self) {
        let said = UnixDatagram::unbound()
            .and_then(|socket| socket.send_to(ENOUGH.as_bytes(), self.path("notify")));
        if let Some(ear) = self.ear.take().filter(|_| said.is_ok()) {
            let _ = ear.join();
        }
    }
}

/// Takes the next message of a service; false after the last.
fn hear(notify: &UnixDatagram, heard: &Mutex<Heard>) -> bool {
    let mut buffer = [0; 8192];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut space = cmsg_space!([RawFd; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(notify.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
    let mut descriptors = Vec::new();
    for message in got.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just made these descriptors for us, and for nobody else.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let count = got.bytes;
    let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
    let mut heard = heard.lock().unwrap();
    let named = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let name = named("FDNAME=").unwrap_or_default().to_owned();
    if text.lines().any(|line| line == "FDSTORE=1") {
        heard.store.extend(descriptors.pop().map(|descriptor| (name, descriptor)));
    } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        heard.store.remove(&name);
    }
    // A barrier is confirmed by closing what came with it, which happens here.
    drop(descriptors);
    heard.messages.push_back(text.clone());
    text != ENOUGH
}

/// A service that was started. Dropping it kills it.
pub(crate) struct Service {
    child: Child,
    stderr: StderrReader,
}

impl Service {
    pub(crate) fn stderr(&self) -> String {
        self.stderr.text()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
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
        self.stderr.wait();
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

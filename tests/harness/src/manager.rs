//! A minimal service manager: passes sockets to the service, receives its notifications, and keeps
//! its fd store for the next process. Never restarts a service by itself.

use crate::{StderrReader, TIMEOUT, TempDir, poll_until, temp_dir};
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

/// The first inherited descriptor in the service, above all that it opens before.
const FIRST_FD: RawFd = 200;

/// The sockets that a service inherits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inherited {
    /// None.
    Nothing,
    /// The NBD socket.
    Nbd,
    /// Both sockets.
    NbdAndControl,
}

/// The manager, with the sockets and the fd store that it passes to services.
pub struct ServiceManager {
    /// The directory of its sockets, and the state directory of services.
    pub dir: TempDir,
    nbd: TcpListener,
    control: UnixListener,
    received: Arc<Mutex<Received>>,
    receiver: Option<JoinHandle<()>>,
    variables: Vec<(&'static str, OsString)>,
}

/// The messages and descriptors received from services.
#[derive(Default)]
struct Received {
    messages: VecDeque<String>,
    store: BTreeMap<String, OwnedFd>,
}

/// The message that ends the receiving thread.
const STOP_RECEIVING: &str = "STOP";
/// A message of the test, behind all that services have sent.
const FENCE: &str = "FENCE";

impl Default for ServiceManager {
    fn default() -> ServiceManager {
        ServiceManager::new()
    }
}

impl ServiceManager {
    /// A manager with an empty fd store and unused sockets.
    pub fn new() -> ServiceManager {
        let dir = temp_dir();
        let notify = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        let received = Arc::default();
        let shared = Arc::clone(&received);
        let receiver = std::thread::spawn(move || while receive(&notify, &shared) {});
        ServiceManager {
            nbd: TcpListener::bind("127.0.0.1:0").unwrap(),
            control: UnixListener::bind(dir.path().join("control.sock")).unwrap(),
            received,
            receiver: Some(receiver),
            dir,
            variables: Vec::new(),
        }
    }

    /// Sets an environment variable for the services started from now on.
    pub fn env(mut self, name: &'static str, value: impl Into<OsString>) -> ServiceManager {
        self.variables.push((name, value.into()));
        self
    }

    /// The address of the NBD socket.
    pub fn address(&self) -> SocketAddr {
        self.nbd.local_addr().unwrap()
    }

    /// The path of the control socket.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control.sock")
    }

    /// A path in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts `flexnbd LINE PATHS`, with the sockets and the fd store.
    #[track_caller]
    pub fn start(&self, inherited: Inherited, line: &str, paths: &[&Path]) -> Service {
        let (mut descriptors, mut names): (Vec<RawFd>, Vec<String>) = match inherited {
            Inherited::Nothing => (Vec::new(), Vec::new()),
            Inherited::Nbd => (vec![self.nbd.as_raw_fd()], vec!["nbd".to_owned()]),
            Inherited::NbdAndControl => (
                vec![self.control.as_raw_fd(), self.nbd.as_raw_fd()],
                vec!["control".to_owned(), "nbd".to_owned()],
            ),
        };
        let received = self.received();
        descriptors.extend(received.store.values().map(OwnedFd::as_raw_fd));
        names.extend(received.store.keys().cloned());
        let mut command = Command::new(crate::flexnbd());
        command.args(line.split_whitespace()).args(paths);
        command.envs(self.variables.iter().cloned());
        command.env("NOTIFY_SOCKET", self.path("notify"));
        command.env("STATE_DIRECTORY", self.dir.path());
        if !descriptors.is_empty() {
            command.env("LISTEN_FDS", descriptors.len().to_string());
            command.env("LISTEN_FDS_FIRST_FD", FIRST_FD.to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let inherit = move || {
            for (target, descriptor) in (FIRST_FD..).zip(&descriptors) {
                // SAFETY: dup2 takes two integers; its copy stays open on exec, its number is free.
                if unsafe { nix::libc::dup2(*descriptor, target) } < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        };
        // SAFETY: the closure calls nothing but dup2, which is async-signal-safe.
        unsafe { command.pre_exec(inherit) };
        let mut child = command.spawn().unwrap();
        let stderr = StderrReader::start(&mut child);
        Service { child, stderr }
    }

    /// The next message, if one has arrived.
    pub fn message(&self) -> Option<String> {
        self.received().messages.pop_front()
    }

    /// The names in the fd store.
    pub fn stored(&self) -> Vec<String> {
        self.received().store.keys().cloned().collect()
    }

    /// Removes a descriptor from the fd store.
    pub fn take_from_store(&self, name: &str) -> OwnedFd {
        self.received().store.remove(name).unwrap()
    }

    /// Adds a descriptor to the fd store.
    pub fn store(&self, name: &str, descriptor: OwnedFd) {
        self.received().store.insert(name.to_owned(), descriptor);
    }

    fn received(&self) -> MutexGuard<'_, Received> {
        self.received.lock().unwrap()
    }

    /// Takes messages until one contains this line; returns them all.
    #[track_caller]
    pub fn wait_for(&self, line: &str) -> Vec<String> {
        self.wait_for_message(line, |message| message.lines().any(|received| received == line))
    }

    /// Takes messages until one reports a status that contains `part`; returns them all.
    #[track_caller]
    pub fn wait_for_status(&self, part: &str) -> Vec<String> {
        let matches = |message: &str| message.starts_with("STATUS=") && message.contains(part);
        self.wait_for_message(part, matches)
    }

    #[track_caller]
    fn wait_for_message(&self, what: &str, matches: impl Fn(&str) -> bool) -> Vec<String> {
        let mut received: Vec<String> = Vec::new();
        let found = poll_until(TIMEOUT, || {
            while let Some(message) = self.message() {
                received.push(message);
                if received.last().is_some_and(|message| matches(message)) {
                    return true;
                }
            }
            false
        });
        assert!(found, "timed out waiting for {what:?}; received {received:?}");
        received
    }

    /// Whether a connection to the control socket waits to be accepted.
    pub fn control_connection_waits(&self) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut sources = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
        poll(&mut sources, PollTimeout::ZERO).unwrap() > 0
    }

    /// All messages that were sent before this call.
    #[track_caller]
    pub fn messages(&self) -> Vec<String> {
        // Datagrams keep their order, and the receiving thread may not have read the last ones.
        let socket = UnixDatagram::unbound().unwrap();
        socket.send_to(FENCE.as_bytes(), self.path("notify")).unwrap();
        let mut messages = self.wait_for(FENCE);
        messages.pop();
        messages
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        let sent = UnixDatagram::unbound()
            .and_then(|socket| socket.send_to(STOP_RECEIVING.as_bytes(), self.path("notify")));
        if let Some(receiver) = self.receiver.take().filter(|_| sent.is_ok()) {
            let _ = receiver.join();
        }
    }
}

/// Receives one message of a service; returns false after [`STOP_RECEIVING`].
fn receive(notify: &UnixDatagram, received: &Mutex<Received>) -> bool {
    let mut buffer = [0; 8192];
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let mut space = cmsg_space!([RawFd; 4]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let datagram = recvmsg::<()>(notify.as_raw_fd(), &mut slices, Some(&mut space), flags).unwrap();
    let mut descriptors = Vec::new();
    for message in datagram.cmsgs().unwrap() {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: the kernel has just created these descriptors; only this message has them.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let count = datagram.bytes;
    let text = String::from_utf8_lossy(&buffer[..count]).into_owned();
    let mut received = received.lock().unwrap();
    let value_of = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let name = value_of("FDNAME=").unwrap_or_default().to_owned();
    if text.lines().any(|line| line == "FDSTORE=1") {
        received.store.extend(descriptors.pop().map(|descriptor| (name, descriptor)));
    } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        received.store.remove(&name);
    }
    // Closing the descriptor of a `BARRIER=1` message confirms it.
    drop(descriptors);
    received.messages.push_back(text.clone());
    text != STOP_RECEIVING
}

/// A started service, which Drop kills.
pub struct Service {
    child: Child,
    stderr: StderrReader,
}

impl Service {
    /// The text printed to stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process has not exited.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Waits for its exit and the end of its stderr.
    #[track_caller]
    pub fn wait_for_exit(&mut self) -> ExitStatus {
        self.stderr.wait_for_exit(&mut self.child)
    }

    /// Sends SIGTERM and waits for its exit.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.wait_for_exit()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("stderr of the service:\n{}", self.stderr());
        }
    }
}

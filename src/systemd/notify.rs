//! Notifications to the service manager (sd_notify(3)).
//! Never decides when to send one; sends none without a service manager. A lost message never stops
//! the process.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::warn;

/// The variable with the socket's address.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// How long a message waits for a service manager that does not read. It is lost then, since the
/// sending thread has sessions and signals to handle.
pub const SEND_TIMEOUT: Duration = Duration::from_millis(250);

/// The connection to the service manager. A message that cannot be sent fails with the system's error;
/// without a service manager every message succeeds and does nothing.
#[derive(Clone, Debug)]
pub struct ServiceManager {
    is_connected: bool,
    /// Kept open, so that a process without a free descriptor can still send a watchdog message.
    socket: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
    /// The last message was lost, since the service manager does not read.
    is_blocked: Arc<AtomicBool>,
}

impl ServiceManager {
    /// Reads the socket's address and the watchdog interval from the environment.
    #[must_use]
    pub fn from_env() -> Self {
        let address = std::env::var_os(SOCKET_VARIABLE);
        let open = |path: &OsString| {
            let socket = UnixDatagram::unbound()?;
            socket.connect(path)?;
            socket.set_write_timeout(Some(SEND_TIMEOUT)).map(|()| Arc::new(socket))
        };
        Self {
            is_connected: address.is_some(),
            // If it cannot be connected now, each message tries again, and returns the error.
            socket: address.as_ref().and_then(|path| open(path).ok()),
            watchdog: sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()),
            is_blocked: Arc::default(),
        }
    }

    /// Never sends anything.
    #[must_use]
    pub fn silent() -> Self {
        Self { is_connected: false, socket: None, watchdog: None, is_blocked: Arc::default() }
    }

    /// Whether there is a service manager.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// `READY=1`: the start or the reload is complete.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn ready(&self) -> io::Result<()> {
        self.send(&[NotifyState::Ready])
    }

    /// `STATUS=`: a line for `systemctl status`.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn status(&self, text: &str) -> io::Result<()> {
        self.send(&[NotifyState::Status(&one_line(text))])
    }

    /// `RELOADING=1`: the configuration is being reloaded. [`ServiceManager::ready`] must follow.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn reloading(&self) -> io::Result<()> {
        self.send(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?])
    }

    /// `STOPPING=1`: the process is about to exit.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn stopping(&self) -> io::Result<()> {
        self.send(&[NotifyState::Stopping])
    }

    /// `ERRNO=`: the error number of the failure that ends the process.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn errno(&self, number: i32) -> io::Result<()> {
        u32::try_from(number).map_or(Ok(()), |number| self.send(&[NotifyState::Errno(number)]))
    }

    /// `EXTEND_TIMEOUT_USEC=`: starting, reloading or stopping takes up to this long from now. At most
    /// 71 minutes; longer times are cut to that.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn extend_timeout(&self, by: Duration) -> io::Result<()> {
        let microseconds = u32::try_from(by.as_micros()).unwrap_or(u32::MAX);
        self.send(&[NotifyState::ExtendTimeoutUsec(microseconds)])
    }

    /// The interval at which to call [`ServiceManager::watchdog`], half of what the service manager
    /// demands. `None` without a watchdog.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|limit| limit / 2)
    }

    /// `WATCHDOG=1`: the process makes progress.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn watchdog(&self) -> io::Result<()> {
        self.send(&[NotifyState::Watchdog])
    }

    /// `FDSTORE=1`: stores a descriptor for the next process, whatever its poll state.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        // Without FDPOLL=0 the store would drop a connection when its client closes it, and the last
        // replies would be lost.
        let poll = NotifyState::Custom("FDPOLL=0");
        let states = [NotifyState::FdStore, NotifyState::FdName(name), poll];
        self.wait_for_room()?;
        sd_notify::notify_with_fds(&states, &[descriptor])
    }

    /// `FDSTOREREMOVE=1`: removes the descriptors with this name from the store.
    ///
    /// # Errors
    ///
    /// The message cannot be sent.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
    }

    /// `BARRIER=1`: waits until the service manager has processed all earlier messages, at most for
    /// `limit`.
    ///
    /// # Errors
    ///
    /// The message cannot be sent, or `TimedOut`.
    pub fn barrier(&self, limit: Duration) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        self.wait_for_room()?;
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
        // The message has its own copy, which the service manager closes when it processes it.
        drop(theirs);
        wait_until_closed(&ours, limit)
    }

    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        let message: String = states.iter().map(|state| format!("{state}\n")).collect();
        let sent = self.socket.as_ref().map(|socket| socket.send(message.as_bytes()));
        let is_lost =
            matches!(&sent, Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock);
        let was_blocked = self.is_blocked.swap(is_lost, Ordering::Relaxed);
        match sent {
            Some(Ok(_)) => Ok(()),
            // Report the loss once: the service manager will not read the next message either.
            Some(Err(_)) if is_lost && was_blocked => Ok(()),
            Some(Err(_)) if is_lost => Err(does_not_read()),
            // The service manager may have a new socket at the address.
            Some(Err(_)) | None => sd_notify::notify(states),
        }
    }

    /// Waits for room in the socket buffer, at most for [`SEND_TIMEOUT`].
    fn wait_for_room(&self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let timeout = PollTimeout::try_from(SEND_TIMEOUT).unwrap_or(PollTimeout::MAX);
        let mut sources = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut sources, timeout) {
            Ok(0) => Err(does_not_read()),
            _ => Ok(()),
        }
    }
}

/// Logs that a message to the service manager could not be sent.
pub fn log_unsent(sent: io::Result<()>) {
    if let Err(error) = sent {
        warn!("cannot notify the service manager: {error}");
    }
}

fn does_not_read() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not read its messages")
}

/// Replaces line breaks, which would begin another variable.
fn one_line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}

fn wait_until_closed(pipe: &OwnedFd, limit: Duration) -> io::Result<()> {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    loop {
        let mut sources = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
        match poll(&mut sources, timeout) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => return Ok(()),
            // A signal restarts the wait, which may then take longer than `limit`; that is harmless.
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests;

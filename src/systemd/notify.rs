//! Tells the service manager how we are (sd_notify(3)).
//! Never decides when; and says nothing to nobody when there is no service manager.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sd_notify::NotifyState;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The variable that says where to.
const SOCKET_VARIABLE: &str = "NOTIFY_SOCKET";

/// How long a message waits while the service manager does not read. It is lost then: who sends it
/// has sessions to serve and signals to obey.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// The line to the service manager. Every message fails with the system's error when it could not
/// be sent, and succeeds without doing anything when there is no service manager.
#[derive(Clone, Debug)]
pub struct ServiceManager {
    is_connected: bool,
    /// Held open, so that a process that has no descriptor left can still say that it is alive.
    line: Option<Arc<UnixDatagram>>,
    watchdog: Option<Duration>,
    /// The last message was lost since the service manager does not read.
    is_deaf: Arc<AtomicBool>,
}

impl ServiceManager {
    /// Reads from the environment whether somebody listens and whether there is a watchdog.
    #[must_use]
    pub fn from_env() -> Self {
        let socket = std::env::var_os(SOCKET_VARIABLE);
        let open = |path: &OsString| {
            let line = UnixDatagram::unbound()?;
            line.connect(path)?;
            line.set_write_timeout(Some(PATIENCE)).map(|()| Arc::new(line))
        };
        Self {
            is_connected: socket.is_some(),
            // Without, each message finds its own way, and says what is wrong with it.
            line: socket.as_ref().and_then(|path| open(path).ok()),
            watchdog: sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()),
            is_deaf: Arc::default(),
        }
    }

    /// One that never says anything.
    #[must_use]
    pub fn silent() -> Self {
        Self { is_connected: false, line: None, watchdog: None, is_deaf: Arc::default() }
    }

    /// Whether a service manager listens.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// We are up, or done reloading.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn ready(&self) -> io::Result<()> {
        self.send(&[NotifyState::Ready])
    }

    /// What we are doing, for people; one line.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn status(&self, text: &str) -> io::Result<()> {
        self.send(&[NotifyState::Status(&one_line(text))])
    }

    /// We are reading our configuration again; [`ServiceManager::ready`] must follow.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn reloading(&self) -> io::Result<()> {
        self.send(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?])
    }

    /// We are about to end.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn stopping(&self) -> io::Result<()> {
        self.send(&[NotifyState::Stopping])
    }

    /// The error number that we end with.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn errno(&self, number: i32) -> io::Result<()> {
        u32::try_from(number).map_or(Ok(()), |number| self.send(&[NotifyState::Errno(number)]))
    }

    /// Starting, reloading or stopping takes up to this long from now. At most 71 minutes can be
    /// asked for; longer is cut to that.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn extend_timeout(&self, by: Duration) -> io::Result<()> {
        let microseconds = u32::try_from(by.as_micros()).unwrap_or(u32::MAX);
        self.send(&[NotifyState::ExtendTimeoutUsec(microseconds)])
    }

    /// How often to call [`ServiceManager::watchdog`]: twice as often as the service manager demands.
    /// `None` when it demands nothing.
    #[must_use]
    pub fn watchdog_interval(&self) -> Option<Duration> {
        self.watchdog.map(|limit| limit / 2)
    }

    /// We are making progress.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn watchdog(&self) -> io::Result<()> {
        self.send(&[NotifyState::Watchdog])
    }

    /// Keep this descriptor for the next process, whatever happens on it.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn store(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        // Without FDPOLL=0 a connection that its client ends would be dropped from the store at
        // once, and its last replies with it.
        let poll = NotifyState::Custom("FDPOLL=0");
        let states = [NotifyState::FdStore, NotifyState::FdName(name), poll];
        self.wait_for_room()?;
        sd_notify::notify_with_fds(&states, &[descriptor])
    }

    /// Forget the descriptors that were stored under this name.
    ///
    /// # Errors
    ///
    /// The message could not be sent.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
    }

    /// Waits until the service manager has taken in everything said before, at most for `limit`.
    ///
    /// # Errors
    ///
    /// The message could not be sent, or `TimedOut`.
    pub fn barrier(&self, limit: Duration) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        self.wait_for_room()?;
        let (ours, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
        sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
        // It is passed on by now; the service manager closes the last copy when it gets to it.
        drop(theirs);
        wait_until_closed(&ours, limit)
    }

    fn send(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        if !self.is_connected {
            return Ok(());
        }
        let message: String = states.iter().map(|state| format!("{state}\n")).collect();
        let sent = self.line.as_ref().map(|line| line.send(message.as_bytes()));
        let is_lost =
            matches!(&sent, Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock);
        let was_deaf = self.is_deaf.swap(is_lost, Ordering::Relaxed);
        match sent {
            Some(Ok(_)) => Ok(()),
            // Once is enough: it will not read the next message either.
            Some(Err(_)) if is_lost && was_deaf => Ok(()),
            Some(Err(_)) if is_lost => Err(does_not_read()),
            // Whoever listened there may have made way for another one.
            Some(Err(_)) | None => sd_notify::notify(states),
        }
    }

    /// Waits, at most for [`PATIENCE`], until a message can be sent without waiting.
    fn wait_for_room(&self) -> io::Result<()> {
        let Some(line) = &self.line else { return Ok(()) };
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut sources = [PollFd::new(line.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut sources, timeout) {
            Ok(0) => Err(does_not_read()),
            _ => Ok(()),
        }
    }
}

fn does_not_read() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it does not read its messages")
}

/// A line break would begin another message.
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
            // A signal; waiting anew may take longer than asked for, which does no harm.
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests;

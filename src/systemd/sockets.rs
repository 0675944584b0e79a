//! The sockets inherited from the service manager, by name (sd_listen_fds(3)).
//! Never relies on their order, which changes, and never accepts a connection.

use super::StoredDescriptors;
use listenfd::ListenFd;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// The name of the control socket (`FileDescriptorName=` of systemd.socket(5)).
pub const CONTROL_NAME: &str = "control";
/// The name of a socket that NBD clients connect to.
pub const NBD_NAME: &str = "nbd";
/// The name of a socket without a name in sd_listen_fds(3).
const UNNAMED: &str = "unknown";
/// The variable with the names, separated by colons.
const NAMES_VARIABLE: &str = "LISTEN_FDNAMES";
/// The first descriptor that a service manager passes (`SD_LISTEN_FDS_START`).
const FIRST_DESCRIPTOR: RawFd = 3;

/// A socket that NBD clients connect to.
#[derive(Debug)]
pub enum InheritedListener {
    /// Over IPv4 or IPv6.
    Tcp(TcpListener),
    /// Over a unix stream socket.
    Unix(UnixListener),
}

impl InheritedListener {
    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(listener) => Self::Tcp(listener.try_clone()?),
            Self::Unix(listener) => Self::Unix(listener.try_clone()?),
        })
    }
}

impl AsFd for InheritedListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener) => listener.as_fd(),
        }
    }
}

impl From<InheritedListener> for OwnedFd {
    fn from(listener: InheritedListener) -> Self {
        match listener {
            InheritedListener::Tcp(listener) => listener.into(),
            InheritedListener::Unix(listener) => listener.into(),
        }
    }
}

/// The inherited sockets.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// For NBD clients, in the inherited order.
    pub nbd: Vec<InheritedListener>,
    /// For operators.
    pub control: Option<UnixListener>,
    /// Unknown names, whose sockets are used for NBD clients; the daemon logs them.
    pub unfamiliar: Vec<String>,
    /// Descriptors from the store.
    pub stored: StoredDescriptors,
    /// Descriptors that do not fit their names.
    pub bad: Vec<BadDescriptor>,
}

impl InheritedSockets {
    /// Takes all inherited descriptors, and makes them close-on-exec.
    ///
    /// Those that cannot be used are in [`InheritedSockets::bad`]; the others are usable nevertheless.
    ///
    /// Changes the environment: call it once, and before any thread starts except the one that writes
    /// the log.
    #[must_use]
    pub fn from_env() -> Self {
        // Before `ListenFd`, which removes the variables.
        let names = std::env::var(NAMES_VARIABLE).unwrap_or_default();
        let mut inherited = Self::default();
        if let Err(missing) = check_all_open(&names) {
            // SAFETY: as this function demands, the only other thread is the one that writes the log. It
            // reads the environment only through `std::env`, which locks it.
            unsafe { std::env::set_var("LISTEN_FDS", missing.index.to_string()) };
            inherited.bad.push(missing);
        }
        let mut descriptors = ListenFd::from_env();
        for (index, name) in names_of(&names, descriptors.len()).into_iter().enumerate() {
            if let Err((fault, descriptor)) = inherited.adopt(&mut descriptors, index, &name) {
                let descriptor = descriptor.or_else(|| take_other(&mut descriptors, index));
                inherited.bad.push(BadDescriptor { index, name, fault, descriptor });
            }
        }
        inherited
    }

    /// Duplicates the sockets, without the stored and the bad descriptors.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            nbd: self.nbd.iter().map(InheritedListener::try_clone).collect::<io::Result<_>>()?,
            control: self.control.as_ref().map(UnixListener::try_clone).transpose()?,
            unfamiliar: self.unfamiliar.clone(),
            ..Self::default()
        })
    }

    /// The error has the descriptor if it was taken from `descriptors` already.
    fn adopt(
        &mut self,
        descriptors: &mut ListenFd,
        index: usize,
        name: &str,
    ) -> Result<(), (DescriptorFault, Option<OwnedFd>)> {
        match SocketRole::of(name) {
            SocketRole::Stored => {
                let descriptor =
                    take_other(descriptors, index).ok_or((DescriptorFault::Closed, None))?;
                self.stored.add(name.to_owned(), descriptor);
            }
            SocketRole::Control if self.control.is_some() => {
                return Err((DescriptorFault::SecondControl, None));
            }
            SocketRole::Control => {
                let listener =
                    take_unix(descriptors, index).ok_or((DescriptorFault::NotUnix, None))?;
                self.control = Some(accepting(listener)?);
            }
            SocketRole::Nbd { is_familiar } => {
                self.nbd.push(take_any(descriptors, index)?);
                if !is_familiar {
                    self.unfamiliar.push(name.to_owned());
                }
            }
        }
        Ok(())
    }
}

/// The use of a descriptor, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SocketRole {
    /// No listening socket, but a descriptor from the store.
    Stored,
    Control,
    Nbd {
        is_familiar: bool,
    },
}

impl SocketRole {
    /// Every socket except the control socket is for NBD clients: a socket unit without
    /// `FileDescriptorName=` passes its own name (`foo.socket`), other launchers `unknown` or
    /// `LISTEN_FD`.
    fn of(name: &str) -> Self {
        match name {
            CONTROL_NAME => Self::Control,
            name if StoredDescriptors::is_stored_name(name) => Self::Stored,
            NBD_NAME | UNNAMED | "LISTEN_FD" => Self::Nbd { is_familiar: true },
            _ => Self::Nbd { is_familiar: name.ends_with(".socket") },
        }
    }
}

/// Checks that all `LISTEN_FDS` descriptors are open, before memory for their number is allocated. Reads the variables as `ListenFd` does.
fn check_all_open(names: &str) -> Result<(), BadDescriptor> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<RawFd>().ok());
    let text = std::env::var("LISTEN_FDS").unwrap_or_default();
    let promised: usize = text.parse().unwrap_or(0);
    let first = number("LISTEN_FDS_FIRST_FD").unwrap_or(FIRST_DESCRIPTOR);
    let is_for_us = std::env::var("LISTEN_PID")
        .map_or(true, |pid| pid.is_empty() || pid.parse().ok() == Some(std::process::id()));
    if !is_for_us {
        return Ok(());
    }
    let Some(index) = (0..promised).find(|index| !is_open(first, *index)) else { return Ok(()) };
    let name = names.split(':').nth(index).filter(|name| !name.is_empty()).unwrap_or(UNNAMED);
    let fault = DescriptorFault::Missing { promised };
    Err(BadDescriptor { index, name: name.to_owned(), fault, descriptor: None })
}

/// Whether descriptor `first + index` exists and is open.
fn is_open(first: RawFd, index: usize) -> bool {
    let descriptor = RawFd::try_from(index).ok().and_then(|index| first.checked_add(index));
    descriptor.is_some_and(|descriptor| {
        // SAFETY: takes two integers, and fails with EBADF if the first is no open descriptor.
        unsafe { libc::fcntl(descriptor, libc::F_GETFD) >= 0 }
    })
}

/// One name for each of `count` descriptors: surplus names are dropped, missing and empty ones are
/// `unknown`.
fn names_of(names: &str, count: usize) -> Vec<String> {
    let given = names.split(':').map(|name| if name.is_empty() { UNNAMED } else { name });
    given.chain(std::iter::repeat(UNNAMED)).take(count).map(str::to_owned).collect()
}

fn take_any(
    descriptors: &mut ListenFd,
    index: usize,
) -> Result<InheritedListener, (DescriptorFault, Option<OwnedFd>)> {
    if let Some(listener) = take_unix(descriptors, index) {
        return Ok(InheritedListener::Unix(accepting(listener)?));
    }
    match descriptors.take_tcp_listener(index) {
        Ok(Some(listener)) => Ok(InheritedListener::Tcp(accepting(listener)?)),
        _ => Err((DescriptorFault::NotAStream, None)),
    }
}

/// `None` if it is no unix stream socket; it can then still be taken as another one.
fn take_unix(descriptors: &mut ListenFd, index: usize) -> Option<UnixListener> {
    descriptors.take_unix_listener(index).ok().flatten()
}

/// `None` if there is no such descriptor.
fn take_other(descriptors: &mut ListenFd, index: usize) -> Option<OwnedFd> {
    let descriptor = descriptors.take_raw_fd(index).ok().flatten()?;
    // SAFETY: takes three integers, and fails with EBADF if the first is no open descriptor.
    let set = unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(set).ok()?;
    // SAFETY: it is open, since the call before succeeded; this process owns it, and `ListenFd` returns
    // each descriptor once.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn accepting<L: AsFd + Into<OwnedFd>>(
    listener: L,
) -> Result<L, (DescriptorFault, Option<OwnedFd>)> {
    let fault = match getsockopt(&listener, AcceptConn) {
        Ok(true) => return Ok(listener),
        Ok(false) => DescriptorFault::NotListening,
        Err(errno) => DescriptorFault::Io(errno.into()),
    };
    Err((fault, Some(listener.into())))
}

/// An inherited descriptor that cannot be used; the text is for the operator.
#[derive(Debug, thiserror::Error)]
#[error("inherited socket {name:?} (number {index} of LISTEN_FDS): {fault}")]
pub struct BadDescriptor {
    /// Its index, from 0.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub fault: DescriptorFault,
    /// The descriptor, if it is open: a client may wait there.
    pub descriptor: Option<OwnedFd>,
}

/// Why a descriptor cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorFault {
    /// It is neither a TCP nor a unix stream socket.
    #[error("this is neither a TCP nor a unix stream socket; use ListenStream= in its unit")]
    NotAStream,
    /// It is named as the control socket, but is no unix stream socket.
    #[error("the control socket must be a unix stream socket; give ListenStream= a path")]
    NotUnix,
    /// It is the second control socket.
    #[error("there can be only one control socket; remove one ListenStream=")]
    SecondControl,
    /// It is a connection, not a listening socket.
    #[error("it does not take connections; its unit must say Accept=no")]
    NotListening,
    /// It is not open.
    #[error("it is not open")]
    Closed,
    /// It is not open, although it is one of the descriptors of `LISTEN_FDS`.
    #[error(
        "it is not open, though LISTEN_FDS={promised} promises it; start the service through its \
         socket units, or unset LISTEN_FDS"
    )]
    Missing {
        /// The number in `LISTEN_FDS`.
        promised: usize,
    },
    /// A system call failed.
    #[error("cannot find out what it is: {0}")]
    Io(io::Error),
}

#[cfg(test)]
mod tests;

//! The sockets that the service manager made for us, by name (sd_listen_fds(3)).
//! Never goes by their order, which changes, and never accepts a connection.

use super::StoredDescriptors;
use listenfd::ListenFd;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use std::fmt;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

/// The name of the control socket (`FileDescriptorName=` of systemd.socket(5)).
pub const CONTROL_NAME: &str = "control";
/// The name of a socket that NBD clients connect to.
pub const NBD_NAME: &str = "nbd";
/// What sd_listen_fds(3) calls a socket that was given no name.
const UNNAMED: &str = "unknown";
/// The variable that holds the names, divided by colons.
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

/// What we were handed.
#[derive(Debug, Default)]
pub struct InheritedSockets {
    /// For NBD clients, in the order they came; none when nobody handed us any.
    pub nbd: Vec<InheritedListener>,
    /// For operators.
    pub control: Option<UnixListener>,
    /// Names that mean nothing here. Their sockets were taken to be for NBD clients; whoever
    /// starts the log says so once.
    pub unfamiliar: Vec<String>,
    /// What an earlier process has left for this one.
    pub stored: StoredDescriptors,
    /// Descriptors that are not what their names promise.
    pub bad: Vec<BadDescriptor>,
}

impl InheritedSockets {
    /// Takes over every descriptor that was handed to this process, and sets it to be closed on
    /// exec.
    ///
    /// Descriptors that cannot be used are in [`InheritedSockets::bad`]; all others are there as well.
    ///
    /// Changes the environment, so call it once and before any thread starts (but the one that writes
    /// the log).
    #[must_use]
    pub fn from_env() -> Self {
        // Before `ListenFd`, which knows no names.
        let names = std::env::var(NAMES_VARIABLE).unwrap_or_default();
        let mut inherited = Self::default();
        if let Err(missing) = check_all_open(&names) {
            // SAFETY: no other thread runs yet, as this function demands, but the one that writes the
            // log, which reads the environment through `std::env` only if at all, and that locks it.
            unsafe { std::env::set_var("LISTEN_FDS", missing.index.to_string()) };
            inherited.bad.push(missing);
        }
        let mut descriptors = ListenFd::from_env();
        for (index, name) in names_of(&names, descriptors.len()).into_iter().enumerate() {
            if let Err((trouble, descriptor)) = inherited.adopt(&mut descriptors, index, &name) {
                let descriptor = descriptor.or_else(|| take_other(&mut descriptors, index));
                inherited.bad.push(BadDescriptor { index, name, trouble, descriptor });
            }
        }
        inherited
    }

    /// The same sockets once more; what was stored, and what is bad, is there only once.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            nbd: self.nbd.iter().map(InheritedListener::try_clone).collect::<io::Result<_>>()?,
            control: self.control.as_ref().map(UnixListener::try_clone).transpose()?,
            unfamiliar: self.unfamiliar.clone(),
            ..Self::default()
        })
    }

    /// The error has the descriptor if it was taken already.
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

/// What a socket of some name is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SocketRole {
    /// Not a socket to listen on, but from the store of descriptors.
    Stored,
    Control,
    Nbd {
        is_familiar: bool,
    },
}

impl SocketRole {
    /// Whatever is not the control socket is for NBD clients: a socket unit that gives no name
    /// passes its own (`foo.socket`), other launchers pass `unknown` or `LISTEN_FD`.
    fn of(name: &str) -> Self {
        match name {
            CONTROL_NAME => Self::Control,
            name if StoredDescriptors::owns(name) => Self::Stored,
            NBD_NAME | UNNAMED | "LISTEN_FD" => Self::Nbd { is_familiar: true },
            _ => Self::Nbd { is_familiar: name.ends_with(".socket") },
        }
    }
}

/// Checks that every descriptor that `LISTEN_FDS` promises is open, before anything of that size is
/// allocated. Reads the variables as `ListenFd` does.
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
    let trouble = DescriptorFault::Missing { promised };
    Err(BadDescriptor { index, name: name.to_owned(), trouble, descriptor: None })
}

/// Whether descriptor `first + index` exists and is open.
fn is_open(first: RawFd, index: usize) -> bool {
    let descriptor = RawFd::try_from(index).ok().and_then(|index| first.checked_add(index));
    descriptor.is_some_and(|descriptor| {
        // SAFETY: takes two integers, and fails with EBADF if the first is no open descriptor.
        unsafe { libc::fcntl(descriptor, libc::F_GETFD) >= 0 }
    })
}

/// One name for each of `count` descriptors; surplus names are dropped, missing and empty ones are
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

/// `None` when it is something else; it can then still be taken as that.
fn take_unix(descriptors: &mut ListenFd, index: usize) -> Option<UnixListener> {
    descriptors.take_unix_listener(index).ok().flatten()
}

/// `None` when there is no such descriptor.
fn take_other(descriptors: &mut ListenFd, index: usize) -> Option<OwnedFd> {
    let descriptor = descriptors.take_raw_fd(index).ok().flatten()?;
    // SAFETY: takes three integers, and fails with EBADF if the first is no open descriptor.
    let set = unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    Errno::result(set).ok()?;
    // SAFETY: it is open, as the call before has shown; it was handed to this process to be its
    // own, and `ListenFd` gives each descriptor away once.
    Some(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn accepting<L: AsFd + Into<OwnedFd>>(
    listener: L,
) -> Result<L, (DescriptorFault, Option<OwnedFd>)> {
    let trouble = match getsockopt(&listener, AcceptConn) {
        Ok(true) => return Ok(listener),
        Ok(false) => DescriptorFault::NotListening,
        Err(errno) => DescriptorFault::Io(errno.into()),
    };
    Err((trouble, Some(listener.into())))
}

/// A descriptor that cannot be used. Its `Display` is for the operator.
#[derive(Debug)]
pub struct BadDescriptor {
    /// Which one, counting from 0.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub trouble: DescriptorFault,
    /// The descriptor itself, if it is open: the service manager watches it for somebody who waits.
    pub descriptor: Option<OwnedFd>,
}

/// What can be wrong with a descriptor.
#[derive(Debug)]
pub enum DescriptorFault {
    /// It is no TCP and no unix stream socket.
    NotAStream,
    /// It is for operators and no unix stream socket.
    NotUnix,
    /// There is another for operators already.
    SecondControl,
    /// It is a connection, not a socket that takes connections.
    NotListening,
    /// It is not open.
    Closed,
    /// It is not open, though `LISTEN_FDS` promises this many descriptors.
    Missing {
        /// The number in `LISTEN_FDS`.
        promised: usize,
    },
    /// The system would not tell.
    Io(io::Error),
}

impl fmt::Display for BadDescriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { index, name, trouble, .. } = self;
        write!(f, "inherited socket {name:?} (number {index} of LISTEN_FDS): {trouble}")
    }
}

impl fmt::Display for DescriptorFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAStream => f.write_str(
                "this is neither a TCP nor a unix stream socket; use ListenStream= in its unit",
            ),
            Self::NotUnix => f.write_str(
                "the control socket must be a unix stream socket; give ListenStream= a path",
            ),
            Self::SecondControl => {
                f.write_str("there can be only one control socket; remove one ListenStream=")
            }
            Self::NotListening => {
                f.write_str("it does not take connections; its unit must say Accept=no")
            }
            Self::Closed => f.write_str("it is not open"),
            Self::Missing { promised } => write!(
                f,
                "it is not open, though LISTEN_FDS={promised} promises it; start the service \
                 through its socket units, or unset LISTEN_FDS"
            ),
            Self::Io(error) => write!(f, "cannot find out what it is: {error}"),
        }
    }
}

impl std::error::Error for BadDescriptor {}

#[cfg(test)]
mod tests;

//! A TLS session on a socket: the calls of a plain socket, over records. Never waits.

use super::super::transfer::{receive_now, send_now, send_pieces_now};
use super::explain::explain;
use super::failure::TlsFailure;
use super::kernel;
use super::session::{HandshakeNeed, TlsSession};
use crate::sync::{Mutex, lock};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ServerConfig};
use std::io::{self, IoSlice};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most bytes of several pieces that are encrypted at once.
const GATHERED_MAX: usize = 64 << 10;

/// The kernel refused the keys of a session, although it accepted others ([`kernel::is_usable`]). No other session
/// tries.
static KERNEL_REFUSES: AtomicBool = AtomicBool::new(false);

/// Which side of the handshake we are, with its configuration.
#[derive(Clone, Debug)]
pub enum TlsRole {
    /// The server. With `kernel`, the kernel does the records afterwards if it can.
    Server {
        /// Certificate, key, and demands on clients.
        config: Arc<ServerConfig>,
        /// Whether to try.
        kernel: bool,
    },
    /// The client of a server that must prove to be `name`.
    Client {
        /// Trust, and our certificate.
        config: Arc<ClientConfig>,
        /// The name in the server's certificate.
        name: ServerName<'static>,
    },
}

/// The event that a handshake waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::net) enum HandshakeWait {
    /// The socket is readable.
    Input,
    /// The socket is writable.
    Output,
}

/// The TLS session of one connection.
pub(in crate::net) enum TlsChannel {
    /// Records by this process.
    Own(Box<Mutex<TlsSession>>),
    /// Records by the kernel.
    Kernel,
}

impl std::fmt::Debug for TlsChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.is_by_kernel() { "TLS by the kernel" } else { "TLS" })
    }
}

impl TlsChannel {
    /// Does the handshake on a connected socket; `wait` waits for the socket, or fails.
    ///
    /// # Errors
    /// That of `wait`, of the connection, or of the session; the peer is told why, if its socket takes it.
    pub(in crate::net) fn open(
        socket: BorrowedFd<'_>,
        role: &TlsRole,
        wait: &mut dyn FnMut(HandshakeWait) -> io::Result<()>,
    ) -> Result<Self, TlsFailure> {
        let mut session = match role {
            TlsRole::Server { config, .. } => TlsSession::server(Arc::clone(config)),
            TlsRole::Client { config, name } => {
                TlsSession::client(Arc::clone(config), name.clone())
            }
        }?;
        loop {
            let need = session.shake_hands();
            if need.is_err() {
                // The alert, if there is room for it.
                let _ = send_records(socket, &mut session);
            }
            let need = need?;
            while !send_records(socket, &mut session)? {
                wait(HandshakeWait::Output)?;
            }
            if need == HandshakeNeed::Nothing {
                break;
            }
            while !receive_record(socket, &mut session)? {
                wait(HandshakeWait::Input)?;
            }
        }
        match role {
            TlsRole::Server { kernel: true, .. } => Self::hand_to_kernel(socket, session),
            TlsRole::Server { .. } | TlsRole::Client { .. } => {
                Ok(Self::Own(Box::new(Mutex::new(session))))
            }
        }
    }

    /// Lets the kernel do the records, if it can.
    fn hand_to_kernel(socket: BorrowedFd<'_>, session: TlsSession) -> Result<Self, TlsFailure> {
        let suits = session.suits_kernel()
            && !KERNEL_REFUSES.load(Ordering::Relaxed)
            && kernel::is_usable();
        let version = session.version().filter(|_| suits && kernel::attach(socket).is_ok());
        let Some(version) = version else { return Ok(Self::Own(Box::new(Mutex::new(session)))) };
        let secrets = session.into_secrets()?;
        if let Err(error) = kernel::set_keys(socket, version, &secrets) {
            KERNEL_REFUSES.store(true, Ordering::Relaxed);
            return Err(TlsFailure::Kernel(error));
        }
        Ok(Self::Kernel)
    }

    /// The session of a socket from the previous process; `None` if it has none.
    pub(in crate::net) fn inherited(socket: BorrowedFd<'_>) -> Option<Self> {
        kernel::is_enabled(socket).then_some(Self::Kernel)
    }

    pub(in crate::net) fn is_by_kernel(&self) -> bool {
        matches!(self, Self::Kernel)
    }

    /// Receives data that has arrived; 0 at the end of the stream, which need not be announced: the length of each
    /// NBD message is known.
    pub(in crate::net) fn try_recv(
        &self,
        socket: BorrowedFd<'_>,
        into: &mut [u8],
    ) -> io::Result<usize> {
        let Self::Own(session) = self else { return kernel::receive_now(socket, into) };
        let mut session = lock(session);
        loop {
            match session.decrypt(into) {
                Ok(Some(count)) => return Ok(count),
                Ok(None) => {}
                Err(error) => {
                    // The alert, if there is room for it.
                    let _ = send_records(socket, &mut session);
                    return Err(broken(&error));
                }
            }
            let space = session.space();
            if space.is_empty() {
                return Err(io::Error::other("a TLS record is too long"));
            }
            match receive_now(socket, space)? {
                0 => return Ok(0),
                count => session.received(count),
            }
        }
    }

    /// Encrypts and sends data from the front of the pieces. After `WouldBlock` the caller repeats the call with
    /// data that begins with the same bytes: a part of them may be encrypted already.
    pub(in crate::net) fn try_send(
        &self,
        socket: BorrowedFd<'_>,
        pieces: &[IoSlice<'_>],
        more: bool,
    ) -> io::Result<usize> {
        let session = match (self, pieces) {
            (Self::Own(session), _) => session,
            (Self::Kernel, [piece]) => return send_now(socket, piece, more),
            (Self::Kernel, pieces) => return send_pieces_now(socket, pieces),
        };
        let mut session = lock(session);
        if session.accepted() == 0 {
            let encrypted = match pieces {
                [piece] => session.encrypt(piece),
                pieces => session.encrypt(&gather(pieces)),
            };
            encrypted.map_err(|error| broken(&error))?;
        }
        let length: usize = pieces.iter().map(|piece| piece.len()).sum();
        if session.accepted() > length {
            return Err(io::Error::other("other data than that of which a part is encrypted"));
        }
        if !send_records(socket, &mut session)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(session.take_accepted())
    }

    /// Whether [`TlsChannel::try_recv`] returns data although the socket may not be readable.
    pub(in crate::net) fn has_received(&self) -> bool {
        matches!(self, Self::Own(session) if lock(session).has_decrypted())
    }

    /// Tells the peer that the stream ends, if the socket takes it.
    pub(in crate::net) fn close(&self, socket: BorrowedFd<'_>) {
        match self {
            Self::Kernel => kernel::close(socket),
            Self::Own(session) => {
                let mut session = lock(session);
                if session.encrypt_close().is_ok() {
                    let _ = send_records(socket, &mut session);
                }
            }
        }
    }

    /// Frees the buffers that are empty.
    pub(in crate::net) fn shrink(&self) {
        if let Self::Own(session) = self {
            lock(session).shrink();
        }
    }
}

/// Sends records; false if some are left, because the socket is full.
fn send_records(socket: BorrowedFd<'_>, session: &mut TlsSession) -> io::Result<bool> {
    while !session.unsent().is_empty() {
        match send_now(socket, session.unsent(), false) {
            Ok(count) => session.sent(count),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// Receives until the end of a record; false if the rest has not arrived.
fn receive_record(socket: BorrowedFd<'_>, session: &mut TlsSession) -> io::Result<bool> {
    loop {
        let Some(space) = session.record_space() else {
            return Err(io::Error::other("a message of the TLS handshake is in too many records"));
        };
        match receive_now(socket, space) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                if session.record_received(count) {
                    return Ok(true);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Copies the first bytes of several pieces together, so that they share records.
fn gather(pieces: &[IoSlice<'_>]) -> Vec<u8> {
    let mut gathered = Vec::new();
    for piece in pieces {
        let room = GATHERED_MAX - gathered.len();
        gathered.extend_from_slice(&piece[..piece.len().min(room)]);
    }
    gathered
}

fn broken(error: &rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("TLS failed: {}", explain(error)))
}

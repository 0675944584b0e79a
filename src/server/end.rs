//! Why a session ended, for the one line that the log has about it.
//! One variant for each way to end, so that a test can name exactly what it provokes.

use super::client_limits::LimitReached;
use super::stop_request::StopRequest;
use crate::nbd::handshake::server::ProtocolViolation;
use crate::net::tls::TlsFailure;
use std::io;
use thiserror::Error;

/// Why a session ended. The texts are part of log lines.
#[derive(Debug, Error)]
pub(super) enum SessionEnd {
    /// The client sent `NBD_CMD_DISC`.
    #[error("the client said goodbye")]
    Disconnected,
    /// The client sent `NBD_OPT_ABORT`.
    #[error("the client gave up the handshake")]
    Aborted,
    /// The client closed the connection between two requests.
    #[error("the client closed the connection")]
    Closed,
    /// The client closed the connection in the middle of a request or option.
    #[error("the client vanished in the middle of a message")]
    Truncated,
    #[error("the client did not finish the handshake in time")]
    HandshakeTimeout,
    /// The number of clients has reached this limit since this one began its handshake.
    #[error("{0}")]
    Full(LimitReached),
    #[error("the client broke the handshake: {0}")]
    Misbehaved(ProtocolViolation),
    /// A request has a wrong magic number: framing is lost.
    #[error("the client sent {0:#x} where a request should begin")]
    BadMagic(u32),
    /// A refused request announced a longer payload than we skip, in bytes.
    #[error("the client announced a payload of {0} bytes")]
    PayloadTooLong(u64),
    /// `--killswitch`: a request or a reply made no progress.
    #[error("killswitch: the client made no progress for too long")]
    Stalled,
    #[error("{}", describe(.0))]
    Connection(io::Error),
    /// TLS could not begin.
    #[error(transparent)]
    Tls(TlsFailure),
    /// The disk failed after the header of a simple reply was sent, which announced success.
    #[error("the disk failed in the middle of a reply that could not be taken back: {0}")]
    ReplyIncomplete(io::Error),
    /// The gate is retired: the disk has left this host.
    #[error("the disk is no longer served here")]
    DiskGone,
    /// The server requested it.
    #[error("{}", describe_request(*.0))]
    Requested(StopRequest),
    /// The policy refuses the client in old style, where no reply can say so.
    #[error("the client is not let in: {0}")]
    Refused(String),
    /// The next process restores the session.
    #[error("it goes on in the next process")]
    Suspended,
    /// The snapshot of the previous process does not fit this server.
    #[error("what the last process has left of it does not fit here")]
    NotRestorable,
}

impl SessionEnd {
    /// Whether the end deserves an operator's attention.
    pub(super) fn is_trouble(&self) -> bool {
        !matches!(
            self,
            Self::Disconnected
                | Self::Aborted
                | Self::Closed
                | Self::Requested(_)
                | Self::Suspended
                | Self::DiskGone
        )
    }

    /// Whether the client may still have to receive replies that are on their way.
    pub(super) fn needs_linger(&self) -> bool {
        matches!(self, Self::Aborted | Self::BadMagic(_) | Self::Requested(StopRequest::Finish))
    }
}

fn describe(error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::OutOfMemory {
        "the system has no memory left for its buffers".to_owned()
    } else {
        format!("the connection broke: {error}")
    }
}

fn describe_request(request: StopRequest) -> &'static str {
    match request {
        StopRequest::NotAdmitted => "the access control list no longer admits the client",
        StopRequest::Evict => "the client was slow to greet and another one was waiting",
        StopRequest::Displaced => "another connection has taken its place",
        StopRequest::Serve
        | StopRequest::Suspend
        | StopRequest::Finish
        | StopRequest::Disconnect => "the server is stopping",
    }
}

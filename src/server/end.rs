//! Why a session ended, for the one line in the log that says so.
//! One variant for each way, so that a test can name exactly what it provokes.

use super::control::StopRequest;
use crate::nbd::handshake::server::ProtocolViolation;
use std::io;

/// Why a session ended.
#[derive(Debug)]
pub(super) enum SessionEnd {
    /// The client said goodbye (`NBD_CMD_DISC`).
    Goodbye,
    /// The client gave up during the handshake (`NBD_OPT_ABORT`).
    Aborted,
    /// The client closed the connection between requests.
    Left,
    /// The client closed the connection in the middle of something.
    Vanished,
    /// The client did not finish the handshake in time.
    HandshakeTimeout,
    /// As many clients are connected as may be, since this one began its handshake.
    Full,
    /// The client broke the handshake.
    Misbehaved(ProtocolViolation),
    /// A request did not begin as one: framing is lost.
    NoRequest(u32),
    /// A request announced more payload than anybody waits for.
    AbsurdPayload(u64),
    /// `--killswitch`: a request or a reply made no progress.
    Stalled,
    /// The connection broke.
    Connection(io::Error),
    /// The disk failed after a part of a reply was sent that cannot be taken back.
    ReadBrokeOff(io::Error),
    /// The disk is not ours any more.
    DiskGone,
    /// We were told to end it.
    Ordered(StopRequest),
    /// Nobody is let in now; holds why.
    NotLetIn(String),
    /// It goes on in the next process.
    PackedUp,
    /// What another process has left of it does not fit here.
    Unfit,
}

impl SessionEnd {
    /// Whether it is worth an operator's attention.
    pub(super) fn is_trouble(&self) -> bool {
        !matches!(
            self,
            Self::Goodbye
                | Self::Aborted
                | Self::Left
                | Self::Ordered(_)
                | Self::PackedUp
                | Self::DiskGone
        )
    }

    /// Whether replies may be on their way that the client is still to read.
    pub(super) fn leaves_replies(&self) -> bool {
        matches!(self, Self::Aborted | Self::NoRequest(_) | Self::Ordered(StopRequest::Finish))
    }
}

impl std::fmt::Display for SessionEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Goodbye => f.write_str("the client said goodbye"),
            Self::Aborted => f.write_str("the client gave up the handshake"),
            Self::Left => f.write_str("the client closed the connection"),
            Self::Vanished => f.write_str("the client vanished in the middle of a message"),
            Self::HandshakeTimeout => {
                f.write_str("the client did not finish the handshake in time")
            }
            Self::Full => f.write_str("as many clients are connected as may be"),
            Self::Misbehaved(how) => write!(f, "the client broke the handshake: {how}"),
            Self::NoRequest(magic) => {
                write!(f, "the client sent {magic:#x} where a request should begin")
            }
            Self::AbsurdPayload(length) => {
                write!(f, "the client announced a payload of {length} bytes")
            }
            Self::Stalled => f.write_str("killswitch: the client made no progress for too long"),
            Self::Connection(error) if error.kind() == io::ErrorKind::OutOfMemory => {
                f.write_str("the system has no memory left for its buffers")
            }
            Self::Connection(error) => write!(f, "the connection broke: {error}"),
            Self::ReadBrokeOff(error) => {
                write!(
                    f,
                    "the disk failed in the middle of a reply that could not be taken back: {error}"
                )
            }
            Self::DiskGone => f.write_str("the disk is no longer served here"),
            Self::Ordered(StopRequest::NotAdmitted) => {
                f.write_str("the access control list no longer admits the client")
            }
            Self::Ordered(StopRequest::GiveWay) => {
                f.write_str("the client was slow to greet and another one was waiting")
            }
            Self::Ordered(StopRequest::Displaced) => {
                f.write_str("another connection has taken its place at the arriving disk")
            }
            Self::NotLetIn(why) => write!(f, "the client is not let in: {why}"),
            Self::Ordered(_) => f.write_str("the server is stopping"),
            Self::Unfit => f.write_str("what the last process has left of it does not fit here"),
            Self::PackedUp => f.write_str("it goes on in the next process"),
        }
    }
}

//! Access policy of an export: the decisions that the server leaves to its owner.
//! Only the questions. A server whose disk arrives by a migration answers them one way, a plain
//! server another.

use crate::nbd::handshake::option::OptionReply;
use crate::nbd::introduction::Introduction;
use crate::nbd::wire::ErrorCode;
use crate::net::Peer;
use std::io;
use std::time::Duration;

/// Id of a session, never used twice in a process.
pub type SessionId = u64;

/// What a policy may know of the sessions of its server.
pub trait SessionsView {
    /// The time since bytes last arrived from the session's client, or I/O for it completed.
    fn silence(&self, session: SessionId) -> Duration;
    /// The session's client; `None` once the session has ended.
    fn peer(&self, session: SessionId) -> Option<Peer>;
}

/// Decision about a client that sent the private option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeReply {
    /// Disconnect some sessions, wait for their end, then reply with data.
    Answer {
        /// Data of the reply.
        data: Vec<u8>,
        /// Sessions to disconnect.
        displaced: Vec<SessionId>,
        /// Whether the client counts as a source from now on, which is admitted whatever the number
        /// of clients. False where it can only probe.
        is_source: bool,
    },
    /// Reply with an error.
    Refuse {
        /// The error.
        reply: OptionReply,
        /// The session that is in the way; ask again if it is just ending.
        holder: Option<SessionId>,
    },
}

/// Decision about a client that wants to enter the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GoReply {
    /// Disconnect these sessions, wait for their end, then admit the client.
    Allow(Vec<SessionId>),
    /// Refuse it.
    Refuse {
        /// Message of `NBD_REP_ERR_POLICY`.
        why: String,
        /// The session that is in the way; ask again if it is just ending.
        holder: Option<SessionId>,
    },
}

/// Decision about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// Execute it.
    Granted,
    /// Reply with this error; the reason is for the log.
    Refused(ErrorCode, &'static str),
    /// Call [`ExportPolicy::record_change`], then ask again.
    RecordFirst,
}

/// Decision about the private command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverReply {
    /// Reply with success.
    Acknowledge,
    /// Reply with this error.
    Refuse(ErrorCode),
    /// Close the session without a reply.
    Close,
}

/// The owner's decisions about clients. Several sessions call it at once. By default a client may do
/// everything but hand a disk over, as at a disk that is served.
pub trait ExportPolicy: Send + Sync + std::fmt::Debug {
    /// A client sent the private option with this data.
    fn probe(&self, session: SessionId, data: &[u8], others: &dyn SessionsView) -> ProbeReply;
    /// A client requests the export. With `_enters`, it enters the transmission phase
    /// (`NBD_OPT_GO`); otherwise it only asks whether it could (`NBD_OPT_INFO`).
    fn go(&self, _session: SessionId, _enters: bool, _others: &dyn SessionsView) -> GoReply {
        GoReply::Allow(Vec::new())
    }
    /// Whether a request may be executed, which then happens at once. `_changes` tells whether it
    /// changes the disk. Never waits for a device.
    fn permit(&self, _: SessionId, _changes: bool) -> Permit {
        Permit::Granted
    }
    /// Records that the session changes the disk, after [`Permit::RecordFirst`]. Waits until the record is
    /// durable; a failure shows in the next [`ExportPolicy::permit`].
    fn record_change(&self, _: SessionId) {}
    /// A request that changes the disk or makes it durable has failed.
    fn on_write_failure(&self, _session: SessionId, _error: &io::Error) {}
    /// The private command has arrived, and all earlier requests are completed.
    fn handover(&self, _session: SessionId, _payload: &[u8]) -> HandoverReply {
        HandoverReply::Refuse(ErrorCode::Invalid)
    }
    /// The client has sent `NBD_CMD_DISC`, and all earlier requests are completed.
    fn on_disconnect(&self, _session: SessionId) {}
    /// The session has ended, with no request in flight.
    fn on_session_end(&self, _session: SessionId) {}
    /// The introduction of the session's client, to be saved with a suspended session. Called before
    /// [`ExportPolicy::on_session_end`].
    fn introduction(&self, _session: SessionId) -> Option<Introduction> {
        None
    }
    /// A session of the previous process goes on, whose client has introduced itself there. Called before
    /// any client of this process can introduce itself.
    fn restore_introduction(&self, _session: SessionId, _introduction: Introduction) {}
    /// Whether the policy admits one client at a time, so that the server must not offer several
    /// connections.
    fn is_exclusive(&self) -> bool {
        false
    }
}

/// Allows everything.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct AllowAll;

#[cfg(test)]
impl ExportPolicy for AllowAll {
    fn probe(&self, _: SessionId, _data: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), displaced: Vec::new(), is_source: true }
    }
}

/// Allows everything, and records the calls.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct RecordingPolicy(std::sync::Mutex<Vec<&'static str>>);

#[cfg(test)]
impl RecordingPolicy {
    fn record(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    /// The names of the calls so far.
    pub(crate) fn calls(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl ExportPolicy for RecordingPolicy {
    fn probe(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), displaced: Vec::new(), is_source: true }
    }
    fn go(&self, _: SessionId, _: bool, _: &dyn SessionsView) -> GoReply {
        GoReply::Allow(Vec::new())
    }
    fn on_write_failure(&self, _: SessionId, _: &io::Error) {
        self.record("on_write_failure");
    }
    fn handover(&self, _: SessionId, _: &[u8]) -> HandoverReply {
        self.record("handover");
        HandoverReply::Acknowledge
    }
    fn on_disconnect(&self, _: SessionId) {
        self.record("on_disconnect");
    }
    fn on_session_end(&self, _: SessionId) {
        self.record("on_session_end");
    }
}

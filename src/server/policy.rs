//! What a server asks of whoever knows whose the disk is.
//! Only the questions: a migration's destination answers them one way, a plain server another.

use crate::nbd::handshake::option::OptionReply;
use crate::nbd::wire::ErrorCode;
use crate::net::Peer;
use std::io;
use std::time::Duration;

/// Number of a session; never used twice in a process.
pub type SessionId = u64;

/// What a reception may ask about the sessions of its server.
pub trait SessionsView {
    /// For how long nothing has come from the session's client, nor anything been done that it
    /// waits for.
    fn silence(&self, session: SessionId) -> Duration;
    /// The session's client, while there is one.
    fn peer(&self, session: SessionId) -> Option<Peer>;
}

/// What to do about a client that sent the private option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProbeReply {
    /// End the sessions `retire` and wait until they are gone; then answer with this data.
    Answer {
        /// Data of the reply.
        data: Vec<u8>,
        /// Sessions that may do nothing any more.
        retire: Vec<SessionId>,
        /// Whether the client counts as a source from now on: it has a place whatever the number of
        /// clients. Not where it can only ask.
        is_source: bool,
    },
    /// Answer with this error.
    Refuse {
        /// The error.
        reply: OptionReply,
        /// The session because of which; ask again if it is just leaving.
        holder: Option<SessionId>,
    },
}

/// What to do about a client that wants to enter the transmission phase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GoReply {
    /// End these sessions and wait until they are gone; then let it in.
    Open(Vec<SessionId>),
    /// Do not.
    Closed {
        /// For `NBD_REP_ERR_POLICY`.
        why: String,
        /// The session because of which; ask again if it is just leaving.
        holder: Option<SessionId>,
    },
}

/// What to do about the private command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoverReply {
    /// Answer that it has been done.
    Acknowledge,
    /// Answer with this error.
    Refuse(ErrorCode),
    /// Close the session without another word.
    Silence,
}

/// Whoever knows whose the disk is. Called from many sessions at once.
pub trait ExportPolicy: Send + Sync + std::fmt::Debug {
    /// A client sent the private option with this data.
    fn introduced(&self, session: SessionId, data: &[u8], others: &dyn SessionsView) -> ProbeReply;
    /// A client asks about the export (`NBD_OPT_INFO`) as if it wanted to enter the transmission
    /// phase; or does enter it, if `now`.
    fn enters(&self, session: SessionId, now: bool, others: &dyn SessionsView) -> GoReply;
    /// Whether a request may be carried out; it is, directly after. `changes` tells whether it
    /// changes the disk.
    ///
    /// # Errors
    /// What to answer instead, and why, for the log.
    fn permit(&self, session: SessionId, changes: bool) -> Result<(), (ErrorCode, &'static str)>;
    /// A request that changes the disk, or makes it durable, failed for this reason.
    fn write_failed(&self, session: SessionId, error: &io::Error);
    /// The private command arrived, and every request before it has been carried out.
    fn handed_over(&self, session: SessionId, payload: &[u8]) -> HandoverReply;
    /// The client said goodbye (`NBD_CMD_DISC`), and every request before has been carried out.
    fn said_goodbye(&self, session: SessionId);
    /// The session is over, and none of its requests is under way.
    fn closed(&self, session: SessionId);
    /// Whether there is one client at a time, so that several connections are not offered.
    fn is_exclusive(&self) -> bool {
        false
    }
}

/// Lets everybody do everything, for tests of the server alone.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct AllowAll;

#[cfg(test)]
impl ExportPolicy for AllowAll {
    fn introduced(&self, _: SessionId, _data: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), retire: Vec::new(), is_source: true }
    }

    fn enters(&self, _: SessionId, _now: bool, _: &dyn SessionsView) -> GoReply {
        GoReply::Open(Vec::new())
    }

    fn permit(&self, _: SessionId, _changes: bool) -> Result<(), (ErrorCode, &'static str)> {
        Ok(())
    }

    fn write_failed(&self, _session: SessionId, _error: &io::Error) {}

    fn handed_over(&self, _session: SessionId, _payload: &[u8]) -> HandoverReply {
        HandoverReply::Refuse(ErrorCode::Invalid)
    }

    fn said_goodbye(&self, _session: SessionId) {}

    fn closed(&self, _session: SessionId) {}
}

/// Writes down what it is told, in order.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct RecordingPolicy(std::sync::Mutex<Vec<&'static str>>);

#[cfg(test)]
impl RecordingPolicy {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    /// All of it so far.
    pub(crate) fn all(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl ExportPolicy for RecordingPolicy {
    fn introduced(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), retire: Vec::new(), is_source: true }
    }
    fn enters(&self, _: SessionId, _: bool, _: &dyn SessionsView) -> GoReply {
        GoReply::Open(Vec::new())
    }
    fn permit(&self, _: SessionId, _: bool) -> Result<(), (ErrorCode, &'static str)> {
        Ok(())
    }
    fn write_failed(&self, _: SessionId, _: &io::Error) {
        self.note("failed");
    }
    fn handed_over(&self, _: SessionId, _: &[u8]) -> HandoverReply {
        self.note("handed over");
        HandoverReply::Acknowledge
    }
    fn said_goodbye(&self, _: SessionId) {
        self.note("goodbye");
    }
    fn closed(&self, _: SessionId) {
        self.note("closed");
    }
}

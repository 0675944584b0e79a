//! What a server asks of whoever knows whose the disk is.
//! Only the questions: a migration's destination answers them one way, a plain server another.

use crate::nbd::handshake::option::OptionReply;
use crate::nbd::wire::ErrorCode;
use std::io;

/// Number of a session; never used twice in a process.
pub type SessionId = u64;

/// What to do about a client that sent the private option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Introduction {
    /// End the session `retire` and wait until it is gone; then answer with this data.
    Answer {
        /// Data of the reply.
        data: Vec<u8>,
        /// An earlier session of the same client.
        retire: Option<SessionId>,
    },
    /// Answer with this error.
    Refuse(OptionReply),
}

/// What to do about the private command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conclusion {
    /// Answer that it has been done.
    Acknowledge,
    /// Answer with this error.
    Refuse(ErrorCode),
    /// Close the session without another word.
    Silence,
}

/// Whoever knows whose the disk is. Called from many sessions at once.
pub trait Reception: Send + Sync + std::fmt::Debug {
    /// A client sent the private option with this data.
    fn introduced(&self, session: SessionId, data: &[u8]) -> Introduction;
    /// Whether the client may go on to transmission.
    ///
    /// # Errors
    /// Why not, for `NBD_REP_ERR_POLICY`.
    fn admit(&self, session: SessionId) -> Result<(), &'static str>;
    /// Whether a request that changes the disk may be carried out; it is, directly after.
    ///
    /// # Errors
    /// What to answer instead, and why, for the log.
    fn permit(&self, session: SessionId) -> Result<(), (ErrorCode, &'static str)>;
    /// A request that changes the disk, or makes it durable, failed for this reason.
    fn write_failed(&self, session: SessionId, error: &io::Error);
    /// The private command arrived, and every request before it has been carried out.
    fn handed_over(&self, session: SessionId, payload: &[u8]) -> Conclusion;
    /// The client said goodbye (`NBD_CMD_DISC`), and every request before has been carried out.
    fn said_goodbye(&self, session: SessionId);
    /// The session is over, and none of its requests is under way.
    fn closed(&self, session: SessionId);
}

/// Lets everybody do everything, for tests of the server alone.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Anybody;

#[cfg(test)]
impl Reception for Anybody {
    fn introduced(&self, _session: SessionId, _data: &[u8]) -> Introduction {
        Introduction::Answer { data: Vec::new(), retire: None }
    }

    fn admit(&self, _session: SessionId) -> Result<(), &'static str> {
        Ok(())
    }

    fn permit(&self, _session: SessionId) -> Result<(), (ErrorCode, &'static str)> {
        Ok(())
    }

    fn write_failed(&self, _session: SessionId, _error: &io::Error) {}

    fn handed_over(&self, _session: SessionId, _payload: &[u8]) -> Conclusion {
        Conclusion::Refuse(ErrorCode::Invalid)
    }

    fn said_goodbye(&self, _session: SessionId) {}

    fn closed(&self, _session: SessionId) {}
}

/// Writes down what it is told, in order.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct Hears(std::sync::Mutex<Vec<&'static str>>);

#[cfg(test)]
impl Hears {
    fn note(&self, what: &'static str) {
        self.0.lock().unwrap().push(what);
    }

    /// All of it so far.
    pub(crate) fn all(&self) -> Vec<&'static str> {
        self.0.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl Reception for Hears {
    fn introduced(&self, _: SessionId, _: &[u8]) -> Introduction {
        Introduction::Answer { data: Vec::new(), retire: None }
    }
    fn admit(&self, _: SessionId) -> Result<(), &'static str> {
        Ok(())
    }
    fn permit(&self, _: SessionId) -> Result<(), (ErrorCode, &'static str)> {
        Ok(())
    }
    fn write_failed(&self, _: SessionId, _: &io::Error) {
        self.note("failed");
    }
    fn handed_over(&self, _: SessionId, _: &[u8]) -> Conclusion {
        self.note("handed over");
        Conclusion::Acknowledge
    }
    fn said_goodbye(&self, _: SessionId) {
        self.note("goodbye");
    }
    fn closed(&self, _: SessionId) {
        self.note("closed");
    }
}

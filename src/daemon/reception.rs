//! The two answers to "whose disk is this?" that sessions can get: it is ours and served, or it
//! is on its way to us. Translates between the server and the migration, which do not know each
//! other; decides nothing.

use crate::disk::ownership::Title;
use crate::migration::arrival::{self, Denied, answer_when_serving};
use crate::migration::destination::{Destination, Handed};
use crate::migration::wire::{Question, WireError};
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::wire::{ErrorCode, OptionReplyKind};
use crate::server::reception::{Conclusion, Introduction, Reception, SessionId};
use std::io;

/// A disk that is ours.
#[derive(Debug)]
pub(super) struct Serving(pub(super) Title);

impl Reception for Serving {
    fn introduced(&self, _session: SessionId, data: &[u8]) -> Introduction {
        match Question::decode(data) {
            Ok(question) => {
                let data = answer_when_serving(self.0, &question).encode().to_vec();
                Introduction::Answer { data, retire: None }
            }
            Err(error) => invalid(error),
        }
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

/// A disk that is on its way to us.
#[derive(Debug)]
pub(super) struct Receiving(pub(super) Destination);

impl Reception for Receiving {
    fn introduced(&self, session: SessionId, data: &[u8]) -> Introduction {
        match self.0.introduced(session, data) {
            Ok(arrival::Introduction::Answer { answer, retire }) => {
                Introduction::Answer { data: answer.encode().to_vec(), retire }
            }
            Ok(arrival::Introduction::Refuse(denied)) => {
                Introduction::Refuse(OptionReply::error(OptionReplyKind::ErrPolicy, why(denied)))
            }
            Err(error) => invalid(error),
        }
    }

    fn admit(&self, session: SessionId) -> Result<(), &'static str> {
        self.0.admit(session).map_err(why)
    }

    fn permit(&self, session: SessionId) -> Result<(), (ErrorCode, &'static str)> {
        self.0.permit(session).map_err(|denied| (ErrorCode::NotPermitted, why(denied)))
    }

    fn write_failed(&self, _session: SessionId, error: &io::Error) {
        self.0.failed(&format!("cannot write the incoming disk: {error}"));
    }

    fn handed_over(&self, session: SessionId, payload: &[u8]) -> Conclusion {
        match self.0.handed_over(session, payload) {
            Handed::Acknowledge => Conclusion::Acknowledge,
            Handed::Refuse => Conclusion::Refuse(ErrorCode::Invalid),
            Handed::Silence => Conclusion::Silence,
        }
    }

    fn said_goodbye(&self, session: SessionId) {
        self.0.said_goodbye(session);
    }

    fn closed(&self, session: SessionId) {
        self.0.closed(session);
    }
}

fn why(denied: Denied) -> &'static str {
    match denied {
        Denied::Taken => "the disk is being received from somebody else",
        Denied::Complete => "the disk has arrived",
        Denied::Failed => "the disk cannot be received here",
    }
}

fn invalid(error: WireError) -> Introduction {
    let message = error.to_string();
    Introduction::Refuse(OptionReply::error(OptionReplyKind::ErrInvalid, &message))
}

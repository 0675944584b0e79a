//! The two answers to "whose disk is this?" that sessions can get: it is ours and served, or it
//! is on its way to us. Translates between the server and the migration, which do not know each
//! other; decides nothing.

use crate::disk::ownership::Title;
use crate::migration::arrival::{self, Denied, Guest, answer_when_serving};
use crate::migration::destination::{Destination, Handed};
use crate::migration::wire::{Question, WireError};
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::wire::{ErrorCode, OptionReplyKind};
use crate::server::reception::{
    Conclusion, Entrance, Introduction, Reception, SessionId, Sessions,
};
use std::io;

/// A disk that is ours.
#[derive(Debug)]
pub(super) struct Serving(pub(super) Title);

impl Reception for Serving {
    fn introduced(&self, _: SessionId, data: &[u8], _: &dyn Sessions) -> Introduction {
        match Question::decode(data) {
            Ok(question) => {
                let data = answer_when_serving(self.0, &question).encode().to_vec();
                Introduction::Answer { data, retire: Vec::new(), is_source: false }
            }
            Err(error) => invalid(error),
        }
    }

    fn enters(&self, _: SessionId, _now: bool, _: &dyn Sessions) -> Entrance {
        Entrance::Open(Vec::new())
    }

    fn permit(&self, _: SessionId, _changes: bool) -> Result<(), (ErrorCode, &'static str)> {
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
    fn introduced(&self, session: SessionId, data: &[u8], others: &dyn Sessions) -> Introduction {
        match self.0.introduced(session, data, &|other| others.silence(other)) {
            Ok(arrival::Introduction::Answer { answer, retire }) => {
                Introduction::Answer { data: answer.encode().to_vec(), retire, is_source: true }
            }
            Ok(arrival::Introduction::Refuse(denied)) => {
                let (why, holder) = self.explain(denied, (session, Some(data)), others);
                let reply = OptionReply::error(OptionReplyKind::ErrPolicy, &why);
                Introduction::Refuse { reply, holder }
            }
            Err(error) => invalid(error),
        }
    }

    fn enters(&self, session: SessionId, now: bool, others: &dyn Sessions) -> Entrance {
        let silence = |other| others.silence(other);
        let entered = if now {
            self.0.enter(session, &silence)
        } else {
            self.0.admits(session, &silence).map(|()| Vec::new())
        };
        match entered {
            Ok(retire) => Entrance::Open(retire),
            Err(denied) => {
                let (why, holder) = self.explain(denied, (session, None), others);
                Entrance::Closed { why, holder }
            }
        }
    }

    fn permit(&self, session: SessionId, changes: bool) -> Result<(), (ErrorCode, &'static str)> {
        self.0.permit(session, changes).map_err(|denied| (ErrorCode::NotPermitted, why(denied)))
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

    fn is_exclusive(&self) -> bool {
        true
    }
}

impl Receiving {
    /// Why this client, with what it introduces itself with, is denied something, and the session
    /// that is in its way.
    fn explain(
        &self,
        denied: Denied,
        (session, introduction): (SessionId, Option<&[u8]>),
        others: &dyn Sessions,
    ) -> (String, Option<SessionId>) {
        let Denied::Taken(holder) = denied else { return (why(denied).to_owned(), None) };
        let who = others.peer(holder).map_or_else(String::new, |peer| format!(" {peer}"));
        let what = match self.0.holder(holder) {
            Some(Guest::Ours(id)) => format!("migration {id}"),
            _ => "not a flexnbd".to_owned(),
        };
        let silent = others.silence(holder).as_secs();
        // None if it has left by now.
        let patience = self.0.patience(session, introduction).map_or(0, |time| time.as_secs());
        let why = format!(
            "{}:{who} ({what}), silent for {silent} s; after {patience} s it loses its place",
            why(denied)
        );
        (why, Some(holder))
    }
}

fn why(denied: Denied) -> &'static str {
    match denied {
        Denied::Stranger => {
            "a disk is being received here: only its source is let in, a flexnbd that moves it \
             (flexnbd mirror)"
        }
        Denied::Taken(_) => "the disk is being received from another client",
        Denied::NotSeated => "the connection is not the one that the disk is received from",
        Denied::Incomplete => {
            "an incomplete copy of the disk lies here, which only a client that writes it may read"
        }
        Denied::Complete => "the disk has arrived",
        Denied::Failed => "the disk cannot be received here",
    }
}

fn invalid(error: WireError) -> Introduction {
    let message = error.to_string();
    let reply = OptionReply::error(OptionReplyKind::ErrInvalid, &message);
    Introduction::Refuse { reply, holder: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::memory::MemoryImage;
    use crate::migration::arrival::Admits;
    use crate::migration::wire::Token;
    use crate::net::Peer;
    use std::sync::Arc;
    use std::time::Duration;

    struct JustHeard;

    impl Sessions for JustHeard {
        fn silence(&self, _: SessionId) -> Duration {
            Duration::from_secs(1)
        }

        fn peer(&self, _: SessionId) -> Option<Peer> {
            None
        }
    }

    fn turned_away(receiving: &Receiving) -> String {
        match receiving.enters(2, true, &JustHeard) {
            Entrance::Closed { why, .. } => why,
            Entrance::Open(_) => panic!("let in"),
        }
    }

    #[test]
    fn a_refusal_names_the_time_that_applies() {
        let disk = Arc::new(Disk::new(Box::new(MemoryImage::new(4096)), false));
        let name = (Token([9; 16]), None);
        let told = Box::new(|_| {});
        let receiving = Receiving(Destination::new(disk, None, Admits::PlainWriter, name, told));
        receiving.enters(1, true, &JustHeard);
        let why = turned_away(&receiving);
        assert!(why.contains("after 5 s"), "nothing written: {why}");
        receiving.permit(1, true).unwrap();
        let why = turned_away(&receiving);
        assert!(why.contains("after 60 s"), "a writer: {why}");
    }
}

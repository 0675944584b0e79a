//! The three export policies: the disk is ours and is served, it is incoming, or it is that of
//! another server.
//! Translates between the server and the migration, which do not know each other; decides nothing.

use super::disk_identity::ServedDiskId;
use super::reconnecting_clients::ReconnectingClients;
use crate::disk::ownership::Provenance;
use crate::ids::DiskId;
use crate::migration::arrival::{self, AccessDenied, Sender, WritePermission, answer_when_serving};
use crate::migration::destination::{Destination, HandoverResult};
use crate::migration::wire::{DiskIdMessage, Question, WireError};
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::introduction::Introduction;
use crate::nbd::wire::{ErrorCode, OptionReplyKind};
use crate::server::export_policy::{
    ExportPolicy, GoReply, HandoverReply, Permit, ProbeReply, SessionId, SessionsView,
};
use crate::upstream::UpstreamHandle;
use std::io;

/// The policy of a disk that is ours.
#[derive(Debug)]
pub(super) struct ServingPolicy {
    pub(super) provenance: Provenance,
    pub(super) disk_id: ServedDiskId,
    pub(super) clients: ReconnectingClients,
}

impl ExportPolicy for ServingPolicy {
    fn probe(&self, session: SessionId, data: &[u8], _: &dyn SessionsView) -> ProbeReply {
        if let Some(introduction) = Introduction::decode(data) {
            return self.clients.introduce(session, introduction, self.disk_id.get());
        }
        match Question::decode(data) {
            Ok(question) => {
                let data = answer_when_serving(self.provenance, &question).encode().to_vec();
                ProbeReply::Answer { data, displaced: Vec::new(), is_source: false }
            }
            Err(error) => invalid(error),
        }
    }

    fn introduction(&self, session: SessionId) -> Option<Introduction> {
        self.clients.introduction(session)
    }

    fn restore_introduction(&self, session: SessionId, introduction: Introduction) {
        self.clients.restore(session, introduction);
    }

    fn on_session_end(&self, session: SessionId) {
        self.clients.on_session_end(session);
    }
}

/// The policy of a disk that is passed on from another server.
#[derive(Debug)]
pub(super) struct ProxyPolicy {
    /// One client is served at a time, and others wait: its further connections would wait as well.
    pub(super) is_exclusive: bool,
    pub(super) upstream: UpstreamHandle,
    pub(super) clients: ReconnectingClients,
}

impl ExportPolicy for ProxyPolicy {
    fn probe(&self, session: SessionId, data: &[u8], _: &dyn SessionsView) -> ProbeReply {
        if let Some(introduction) = Introduction::decode(data) {
            return self.clients.introduce(session, introduction, self.upstream.disk_id());
        }
        let why = "this is a proxy, which neither receives a disk nor knows its owner";
        let reply = OptionReply::error(OptionReplyKind::ErrPolicy, why);
        ProbeReply::Refuse { reply, holder: None }
    }

    fn is_exclusive(&self) -> bool {
        self.is_exclusive
    }

    fn introduction(&self, session: SessionId) -> Option<Introduction> {
        self.clients.introduction(session)
    }

    fn restore_introduction(&self, session: SessionId, introduction: Introduction) {
        self.clients.restore(session, introduction);
    }

    fn on_session_end(&self, session: SessionId) {
        self.clients.on_session_end(session);
    }
}

/// The policy of an incoming disk.
#[derive(Debug)]
pub(super) struct ReceivingPolicy(pub(super) Destination);

impl ExportPolicy for ReceivingPolicy {
    fn probe(&self, session: SessionId, data: &[u8], others: &dyn SessionsView) -> ProbeReply {
        if let Some(DiskIdMessage(id)) = DiskIdMessage::decode(data) {
            return self.take_disk_id(session, id);
        }
        match self.0.on_introduction(session, data, &|other| others.silence(other)) {
            Ok(arrival::ProbeDecision::Answer { answer, retire }) => ProbeReply::Answer {
                data: answer.encode().to_vec(),
                displaced: retire,
                is_source: true,
            },
            Ok(arrival::ProbeDecision::Refuse(denied)) => {
                let (why, holder) = self.explain(denied, session, Some(data), others);
                let reply = OptionReply::error(OptionReplyKind::ErrPolicy, &why);
                ProbeReply::Refuse { reply, holder }
            }
            Err(error) => invalid(error),
        }
    }

    fn go(&self, session: SessionId, enters: bool, others: &dyn SessionsView) -> GoReply {
        let silence = |other| others.silence(other);
        let entered = if enters {
            self.0.enter(session, &silence)
        } else {
            self.0.may_enter(session, &silence).map(|()| Vec::new())
        };
        match entered {
            Ok(retire) => GoReply::Allow(retire),
            Err(denied) => {
                let (why, holder) = self.explain(denied, session, None, others);
                GoReply::Refuse { why, holder }
            }
        }
    }

    fn permit(&self, session: SessionId, changes: bool) -> Permit {
        match self.0.permit(session, changes) {
            WritePermission::Go => Permit::Granted,
            WritePermission::RecordFirst(_) => Permit::RecordFirst,
            WritePermission::Refuse(denied) => {
                Permit::Refused(ErrorCode::NotPermitted, why(denied))
            }
        }
    }

    fn record_change(&self, session: SessionId) {
        self.0.record_change(session);
    }

    fn on_write_failure(&self, _session: SessionId, error: &io::Error) {
        self.0.on_write_failure(&format!("cannot write the incoming disk: {error}"));
    }

    fn handover(&self, session: SessionId, payload: &[u8]) -> HandoverReply {
        match self.0.on_handover(session, payload) {
            HandoverResult::Acknowledge => HandoverReply::Acknowledge,
            HandoverResult::Refuse => HandoverReply::Refuse(ErrorCode::Invalid),
            HandoverResult::NoReply => HandoverReply::Close,
        }
    }

    fn on_disconnect(&self, session: SessionId) {
        self.0.on_disconnect(session);
    }

    fn on_session_end(&self, session: SessionId) {
        self.0.on_close(session);
    }

    fn is_exclusive(&self) -> bool {
        true
    }
}

impl ReceivingPolicy {
    fn take_disk_id(&self, session: SessionId, id: DiskId) -> ProbeReply {
        if self.0.on_disk_id(session, id) {
            let data = DiskIdMessage::reply().to_vec();
            return ProbeReply::Answer { data, displaced: Vec::new(), is_source: true };
        }
        let why = "only a source that has introduced itself tells the id of its disk";
        let reply = OptionReply::error(OptionReplyKind::ErrInvalid, why);
        ProbeReply::Refuse { reply, holder: None }
    }

    /// Why a session is denied something, for its client, and the session that holds the slot
    /// instead. `introduction` is the data that the session introduces itself with, if any.
    fn explain(
        &self,
        denied: AccessDenied,
        session: SessionId,
        introduction: Option<&[u8]>,
        others: &dyn SessionsView,
    ) -> (String, Option<SessionId>) {
        let AccessDenied::SlotTaken(holder) = denied else { return (why(denied).to_owned(), None) };
        let who = others.peer(holder).map_or_else(String::new, |peer| format!(" {peer}"));
        let what = match self.0.holder(holder) {
            Some(Sender::Source(id)) => format!("migration {id}"),
            _ => "not a flexnbd".to_owned(),
        };
        let silent = others.silence(holder).as_secs();
        // `None` if the holder has left by now.
        let timeout = self.0.slot_timeout(session, introduction).map_or(0, |time| time.as_secs());
        let why = format!(
            "{}:{who} ({what}), silent for {silent} s; after {timeout} s it loses its place",
            why(denied)
        );
        (why, Some(holder))
    }
}

fn why(denied: AccessDenied) -> &'static str {
    match denied {
        AccessDenied::NotIntroduced => {
            "a disk is being received here: only its source is let in, a flexnbd that moves it \
             (flexnbd mirror)"
        }
        AccessDenied::SlotTaken(_) => "the disk is being received from another client",
        AccessDenied::NotSender => "the connection is not the one that the disk is received from",
        AccessDenied::Incomplete => {
            "an incomplete copy of the disk lies here, which only a client that writes it may read"
        }
        AccessDenied::Complete => "the disk has arrived",
        AccessDenied::Failed => "the disk cannot be received here",
    }
}

fn invalid(error: WireError) -> ProbeReply {
    let message = error.to_string();
    let reply = OptionReply::error(OptionReplyKind::ErrInvalid, &message);
    ProbeReply::Refuse { reply, holder: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Disk;
    use crate::disk::memory_backend::MemoryBackend;
    use crate::migration::arrival::{Admits, Arrival};
    use crate::migration::wire::Token;
    use crate::net::Peer;
    use std::sync::Arc;
    use std::time::Duration;

    /// Every session was active a second ago.
    struct ActiveSessions;

    impl SessionsView for ActiveSessions {
        fn silence(&self, _: SessionId) -> Duration {
            Duration::from_secs(1)
        }

        fn peer(&self, _: SessionId) -> Option<Peer> {
            None
        }
    }

    fn refusal(receiving: &ReceivingPolicy) -> String {
        match receiving.go(2, true, &ActiveSessions) {
            GoReply::Refuse { why, .. } => why,
            GoReply::Allow(_) => panic!("admitted"),
        }
    }

    #[test]
    fn a_refusal_names_the_timeout_of_the_holder() {
        let disk = Arc::new(Disk::new(Box::new(MemoryBackend::new(4096)), false));
        let arrival = Arrival::new(Token([9; 16]), None, Admits::PlainWriter);
        let receiving = ReceivingPolicy(Destination::new(disk, None, arrival, Box::new(|_| {})));
        receiving.go(1, true, &ActiveSessions);
        let why = refusal(&receiving);
        assert!(why.contains("after 5 s"), "nothing written: {why}");
        receiving.record_change(1);
        assert_eq!(receiving.permit(1, true), Permit::Granted);
        let why = refusal(&receiving);
        assert!(why.contains("after 60 s"), "a writer: {why}");
    }
}

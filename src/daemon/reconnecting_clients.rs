//! Clients that introduce themselves ([`Introduction`]): which of the sessions belong to lost connections.

use crate::ids::DiskId;
use crate::nbd::introduction::Introduction;
use crate::server::export_policy::{ProbeReply, SessionId};
use crate::sync::lock;
use std::collections::HashMap;
use std::sync::Mutex;

/// The introductions of the current sessions.
#[derive(Debug, Default)]
pub(super) struct ReconnectingClients(Mutex<HashMap<SessionId, Introduction>>);

impl ReconnectingClients {
    /// A client introduces itself over a new connection: its sessions of earlier generations end first.
    /// It is told the id of the disk.
    pub(super) fn introduce(
        &self,
        session: SessionId,
        introduction: Introduction,
        disk_id: Option<DiskId>,
    ) -> ProbeReply {
        let mut sessions = lock(&self.0);
        sessions.insert(session, introduction);
        let is_lost = |other: &Introduction| {
            other.client == introduction.client && other.generation < introduction.generation
        };
        let lost = sessions.iter().filter(|(_, other)| is_lost(other));
        let displaced = lost.map(|(session, _)| *session).collect();
        ProbeReply::Answer { data: Introduction::reply(disk_id), displaced, is_source: false }
    }

    /// The introduction of a session's client, if it has introduced itself.
    pub(super) fn introduction(&self, session: SessionId) -> Option<Introduction> {
        lock(&self.0).get(&session).copied()
    }

    /// A session of the previous process goes on.
    pub(super) fn restore(&self, session: SessionId, introduction: Introduction) {
        lock(&self.0).insert(session, introduction);
    }

    /// The session has ended, with no request in flight.
    pub(super) fn on_session_end(&self, session: SessionId) {
        lock(&self.0).remove(&session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_earlier_connections_of_the_same_client_are_lost() {
        let clients = ReconnectingClients::default();
        let introduce = |session, client, generation| {
            let introduction = Introduction { client: [client; 16], generation };
            match clients.introduce(session, introduction, None) {
                ProbeReply::Answer { mut displaced, is_source: false, .. } => {
                    displaced.sort_unstable();
                    displaced
                }
                other => panic!("{other:?}"),
            }
        };
        let none: [SessionId; 0] = [];
        assert_eq!(introduce(1, 7, 0), none);
        assert_eq!(introduce(2, 7, 0), none, "another connection of the same generation");
        assert_eq!(introduce(3, 8, 5), none);
        assert_eq!(introduce(4, 7, 1), [1, 2]);
        clients.on_session_end(1);
        assert_eq!(introduce(5, 7, 1), [2], "it has not ended yet");
        assert_eq!(introduce(6, 7, 0), none, "a late connection of an earlier generation");
    }

    #[test]
    fn restored_session_is_one_of_its_client() {
        let introduction = |generation| Introduction { client: [7; 16], generation };
        let before = ReconnectingClients::default();
        before.introduce(3, introduction(4), None);
        assert_eq!((before.introduction(3), before.introduction(2)), (Some(introduction(4)), None));
        let clients = ReconnectingClients::default();
        clients.restore(3, introduction(4));
        let reply = clients.introduce(5, introduction(5), None);
        assert!(matches!(reply, ProbeReply::Answer { displaced, .. } if displaced == [3]));
    }
}

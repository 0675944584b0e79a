//! The files of `src/server` that are modelled.

#[path = "../../../src/server/acl.rs"]
pub mod acl;
#[path = "../../../src/server/client_limits.rs"]
pub mod client_limits;
#[path = "../../../src/server/events.rs"]
pub mod events;
#[path = "../../../src/server/handshake_slots.rs"]
mod handshake_slots;
#[path = "../../../src/server/heartbeat.rs"]
mod heartbeat;
#[path = "../../../src/server/sessions.rs"]
mod sessions;
pub mod sessions_models;
pub mod stop_models;
#[path = "../../../src/server/stop_request.rs"]
mod stop_request;

/// Stands for `src/server/export_policy.rs`, which uses the protocol.
mod export_policy {
    use crate::net::Peer;
    use std::time::Duration;

    pub(super) type SessionId = u64;

    /// What a policy may know of the sessions.
    pub(super) trait SessionsView {
        fn silence(&self, session: SessionId) -> Duration;
        fn peer(&self, session: SessionId) -> Option<Peer>;
    }
}

/// Stands for `src/server/snapshot.rs`.
mod snapshot {
    /// A snapshot, which no model has.
    #[derive(Debug)]
    pub(super) struct SessionSnapshot;
}

//! Another server's export as a backend of a disk: it may go away and come back, here or at another address,
//! and the sessions on the disk do not notice more than a delay.
//!
//! ```text
//! session ─▶ queue ─▶ machine ─▶ tx ─▶ link ─▶ the server
//!    ▲                   ▲                        │
//!    └──── completion ───┴────── rx ◀── link ◀────┘
//! ```
//!
//! * `machine`: which requests to send, and which again after a loss. Pure; checked by `simulation_tests`.
//! * `unflushed`: the acknowledged changes that a server may still lose.
//! * `rx`, `tx`: bytes of replies and of requests. Pure.
//! * `read_ahead`: what sequential reads will ask for next. Pure.
//! * `rotation`: which address is next, and when. `terms`: whether a server has the same disk. Pure.
//! * `link`: threads and sockets. `attempts`, `connecting`: how to get a `connection`. `backend`: the disk's view. `queue`: one session's.
//!
//! # What a client may rely on
//!
//! A request is answered once. A change is acknowledged when the server has acknowledged it, so nothing
//! acknowledged exists only in this process. FLUSH and FUA are acknowledged when the *current* server has
//! made everything acknowledged before durable, including what an earlier server had acknowledged and may
//! have lost. If this process ends, its clients are disconnected, and everything flushed is durable.
//!
//! The disk must have no other writer: a replay after a loss would overwrite its changes.
//!
//! A lost connection is reset, so that the old server process receives nothing more of it. Requests that it
//! has received already may still be executing when the new connection sends them again, and could overwrite
//! later ones. Our own server ends the old sessions first ([`crate::nbd::introduction`]). With others, only a
//! request that they delay for longer than the reconnection takes could do harm. And a server that reports a
//! failed flush once may report it to a lost connection, which receives nothing; ours remembers it.

mod attempts;
mod backend;
mod connecting;
mod connection;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
mod link;
mod machine;
#[cfg(test)]
mod mutation;
mod options;
mod queue;
mod read_ahead;
mod rotation;
mod rx;
#[cfg(test)]
mod simulation_tests;
mod spare_buffers;
mod terms;
#[cfg(test)]
mod tests;
mod tx;
mod unflushed;

pub use backend::{UpstreamBackend, connect};
pub use link::UpstreamHandle;
pub use options::{
    CONNECTIONS_DEFAULT, UNFLUSHED_BYTES_DEFAULT, UPSTREAM_TIMEOUT_DEFAULT, UpstreamError,
    UpstreamEvents, UpstreamOptions, UpstreamState, UpstreamTarget,
};

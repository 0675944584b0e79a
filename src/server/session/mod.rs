//! One client's session.
//!
//! A session is a state machine, its `phase`: the `handshake`, then the `engine` of the transmission phase.
//! They decide: options and requests in, operations on the disk and replies out, and what they wait for.
//! The `driver` acts: it receives, sends and waits, and asks the policy. Data flows
//!
//! ```text
//!            ┌▶ handshake ─────────────────────────────────────────┐
//! driver ─▶ rx ─▶ engine ─▶ reads, writes ─▶ disk_io ─▶ (disk) ─▶ replies ─▶ tx ─▶ driver
//! ```

mod attached;
mod disk_io;
mod driver;
mod engine;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
mod handshake;
mod inline_reads;
mod phase;
mod pinned;
mod polling;
mod reads;
mod receive_delay;
mod replies;
mod rx;
#[expect(clippy::module_inception, reason = "the file of the type `Session`")]
mod session;
#[cfg(test)]
mod simulation_tests;
mod stall;
mod tx;
mod writes;

pub use phase::{PAYLOAD_MAX, PAYLOAD_MAX_OLDSTYLE};
#[cfg(test)]
pub(super) use reads::WHOLE_READ_MAX;
pub(super) use session::{EndedSession, Session};

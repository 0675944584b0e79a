//! One client's session.
//!
//! `Session` performs the handshake, and then has a driver run the engine of the transmission phase. The
//! engine decides: requests in, operations on the disk and replies out, and what it waits for. The driver
//! acts: it receives, sends and waits. Data flows
//!
//! ```text
//! driver ─▶ rx ─▶ engine ─▶ reads, writes ─▶ disk_io ─▶ (disk) ─▶ replies ─▶ tx ─▶ driver
//! ```

mod disk_io;
mod driver;
mod engine;
mod inline_reads;
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

#[cfg(test)]
pub(super) use reads::WHOLE_READ_MAX;
pub(super) use session::Session;
pub use session::{PAYLOAD_MAX, PAYLOAD_MAX_OLDSTYLE};

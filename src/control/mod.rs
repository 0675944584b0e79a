//! The control socket, on which operators send commands: its protocol, its server, its client.
//!
//! Never executes a command, which the [`Operator`] does, and never parses an access control list.
//!
//! ```text
//! client ──Command──▶ listener ──execute──▶ Operator
//!        ◀──Reply───           ◀──Reply────
//! ```

pub mod client;
pub mod command;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
pub mod listener;
pub mod reply;
pub mod socket;
pub mod status;
pub mod summary;

pub use client::{AskError, ask, ask_and_wait, ask_within};
pub use command::Command;
pub use listener::{Credentials, Handle, Operator};
pub use reply::Reply;
pub use socket::{ControlSocket, ControlSocketError};
pub use status::Status;
pub use summary::Summary;

//! Orders from operators: the control socket, what is said over it, and both ends of it.
//!
//! Says what was asked and carries back what was answered; never decides what an order means to
//! the server (that is the [`Operator`]'s part) and never parses an access control list.
//!
//! ```text
//! client ──Command──▶ listener ──obey──▶ Operator
//!        ◀──Reply───           ◀─Reply──
//! ```

pub mod client;
pub mod command;
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

//! Sockets as NBD wants them: TCP and unix sockets alike, never waiting without a deadline.
//! Knows nothing of what the bytes mean, and never logs; errors go to the caller.
//!
//! * [`Address`] is where to listen or connect, [`Remote`] the same with a host name in it.
//! * [`Listener`] accepts, [`connect()`] connects; either gives a [`Stream`].
//! * [`Peer`] is who is at the other end.
//! * [`Wake`] ends somebody's waiting from another thread.
//!
//! Every descriptor made here closes on exec. Reads and writes never block by themselves
//! (`MSG_DONTWAIT`), whatever mode the descriptor is in, so that one inherited from elsewhere
//! behaves as one of ours.

mod address;
mod bind_error;
mod connect;
mod listener;
mod peer;
mod stream;
mod user;
mod wait;
mod wake;

pub use address::{Address, AddressError, Host, Remote, parse_port, resolve, unbracket};
pub use bind_error::{BindError, BindReason};
pub use connect::connect;
pub use listener::{BACKLOG, Listener};
pub use peer::Peer;
pub use stream::{
    Interest, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES_MAX, PEER_TIMEOUT, Ready, Stream,
};
pub use user::visible_user;
pub use wait::wait_readable;
pub use wake::Wake;

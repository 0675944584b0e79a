//! TCP and unix sockets with the options and deadlines that NBD needs.
//! Never interprets the bytes, and never logs; errors go to the caller.
//!
//! * [`Address`] is an address to listen on or to connect to, [`Remote`] the same with a host name.
//! * [`Listener`] accepts, [`connect()`] connects; either gives a [`Stream`].
//! * A [`Stream`] can begin TLS ([`Stream::start_tls`]); its users send and receive as before.
//! * [`resolve_within`] finds the addresses of a host, and [`connect_first`] connects to the first of several.
//! * [`Peer`] is the address or process of the client.
//! * [`tls`]: certificates, keys, and the demands on a peer.
//! * [`Wake`] wakes a waiting thread from another one.
//!
//! Every descriptor created here is close-on-exec. Reads and writes never block (`MSG_DONTWAIT`),
//! whatever the mode of the descriptor, so that an inherited one behaves like ours.

mod address;
mod bind_error;
mod connect;
mod listener;
mod peer;
mod resolve;
mod stream;
pub mod tls;
mod transfer;
mod user;
mod wait;
mod wake;

pub use address::{Address, AddressError, Host, Remote, parse_port, resolve, unbracket};
pub use bind_error::{BindError, BindReason};
pub use connect::{connect, connect_first};
pub use listener::{BACKLOG, Listener};
pub use peer::Peer;
pub use resolve::resolve_within;
pub use stream::{
    Interest, KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES_MAX, PEER_TIMEOUT, Ready, Stream,
};
pub use user::visible_user;
pub use wait::wait_readable;
pub use wake::Wake;

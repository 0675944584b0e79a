//! Helpers of this module's tests: listeners, connections and waits with a deadline.

use super::Server;
use crate::net::{Address, Listener};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

/// Every wait of a test fails after this time.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);

/// A listener on a free port of the loopback interface, and its address.
pub(super) fn listen() -> (Listener, Address) {
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let address = listener.local_address().unwrap();
    (listener, address)
}

/// A connection whose reads fail after [`TIMEOUT`].
pub(super) fn connect_tcp(address: &Address) -> TcpStream {
    let Address::Tcp(address) = address else { panic!("{address} is not TCP") };
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream
}

/// Polls until `condition` holds; `what` is the message after [`TIMEOUT`].
pub(super) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}");
        thread::yield_now();
    }
}

pub(super) fn wait_for_clients(server: &Server, count: usize) {
    wait_until(&format!("the server never has {count} clients"), || server.client_count() == count);
}

/// Gives other threads time to do something that they must not do.
pub(super) fn let_others_run() {
    (0..1000).for_each(|_| thread::yield_now());
}

//! A disk that may have left: only the other host knows, and may not answer for long.

use crate::manager::{Handed, Manager, Service};
use crate::refusing::{client, order, record, was_refused};
use harness::{Builder, MIB, Server, poll_until, sparse_image};
use nix::sys::signal::Signal;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

const ID: &str = "0123456789abcdef0123456789abcdef";

/// An image that is perhaps at the other host now.
fn departing(manager: &Manager, to: SocketAddr) -> PathBuf {
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    record(manager, &image, &format!("departing id={ID} before=native to={to}"));
    image
}

/// A port of this machine where no process listens.
fn nowhere() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// Another host, at this address, whose image has this record.
fn other(manager: &Manager, mode: &str, at: SocketAddr, of: &str) -> Server {
    let image = sparse_image(manager.dir.path(), "other.img", MIB);
    record(manager, &image, of);
    let state = manager.dir.path();
    let place = harness::Endpoint::Tcp(at);
    Builder::mode(mode, &image).at(place).env("STATE_DIRECTORY", state).start()
}

/// A service that refuses, since the other host does not answer.
fn refusing(manager: &Manager, to: SocketAddr) -> Service {
    let image = departing(manager, to);
    let service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for_status("refusing clients: ");
    was_refused(client(manager));
    assert!(order(&manager.control(), "status").contains("was being handed over"));
    service
}

#[test]
fn a_stop_ends_the_asking_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let manager = Manager::new();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let image = departing(&manager, silent.local_addr().unwrap());
        let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
        let (mut asked, _) = silent.accept().unwrap();
        service.signal(signal);
        assert_eq!(service.ends().code(), Some(0));
        assert!(manager.messages().iter().any(|message| message == "STOPPING=1\n"));
        silent.set_nonblocking(true).unwrap();
        assert!(silent.accept().is_err(), "it was still waiting for the first answer");
        assert_eq!(asked.read(&mut [0; 64]).unwrap(), 0);
    }
}

#[test]
fn a_refusing_service_serves_once_the_disk_has_not_arrived() {
    let manager = Manager::new();
    let to = nowhere();
    let mut service = refusing(&manager, to);
    let _other = other(&manager, "listen", to, &format!("incoming id={ID}"));
    manager.wait_for_status("serving ");
    let mut greeting = [0; 8];
    client(&manager).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    assert!(order(&manager.control(), "status").starts_with("0: "));
    assert_eq!(service.stop().code(), Some(0));
    assert!(service.stderr().lines().filter(|line| line.contains(":E:")).count() == 1);
}

#[test]
fn a_refusing_service_learns_that_the_disk_has_arrived() {
    let manager = Manager::new();
    let to = nowhere();
    let mut service = refusing(&manager, to);
    let other = other(&manager, "serve", to, &format!("ours title={ID}"));
    manager.wait_for_status("has moved to");
    assert!(order(&manager.control(), "status").contains("(record: departed"));
    was_refused(client(&manager));
    drop(other);
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn a_stop_is_heard_while_a_refusing_service_asks() {
    let manager = Manager::new();
    let to = nowhere();
    let mut service = refusing(&manager, to);
    let silent = TcpListener::bind(to).unwrap();
    silent.set_nonblocking(true).unwrap();
    let mut asked = None;
    assert!(poll_until(harness::TIMEOUT, || {
        asked = silent.accept().ok();
        asked.is_some()
    }));
    was_refused(client(&manager));
    assert_eq!(service.stop().code(), Some(0));
}

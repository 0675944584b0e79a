//! A disk in doubt: only the destination knows whether it has arrived there, and may not answer.

use crate::degraded::{assert_refused, client, record, send_command};
use harness::manager::{Inherited, Service, ServiceManager};
use harness::{Builder, MIB, Server, poll_until, sparse_image};
use nix::sys::signal::Signal;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

const ID: &str = "0123456789abcdef0123456789abcdef";

/// An image whose record says that it is being handed over to `to`.
fn departing(manager: &ServiceManager, to: SocketAddr) -> PathBuf {
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    record(manager, &image, &format!("departing id={ID} before=native to={to}"));
    image
}

/// An address of this machine where no process listens.
fn unused_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The other host: `flexnbd MODE` at this address with an image that has the record `record_text`.
fn other_host(manager: &ServiceManager, mode: &str, at: SocketAddr, record_text: &str) -> Server {
    let image = sparse_image(manager.dir.path(), "other.img", MIB);
    record(manager, &image, record_text);
    let state = manager.dir.path();
    let place = harness::Endpoint::Tcp(at);
    Builder::mode(mode, &image).at(place).env("STATE_DIRECTORY", state).start()
}

/// A service that refuses clients because the other host does not answer.
fn refusing_service(manager: &ServiceManager, to: SocketAddr) -> Service {
    let image = departing(manager, to);
    let service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for_status("refusing clients: ");
    assert_refused(client(manager));
    assert!(send_command(&manager.control(), "status").contains("was being handed over"));
    service
}

#[test]
fn a_stop_interrupts_the_query_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let manager = ServiceManager::new();
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let image = departing(&manager, silent.local_addr().unwrap());
        let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
        let (mut connection, _) = silent.accept().unwrap();
        service.signal(signal);
        assert_eq!(service.wait_for_exit().code(), Some(0));
        assert!(manager.messages().iter().any(|message| message == "STOPPING=1\n"));
        silent.set_nonblocking(true).unwrap();
        assert!(silent.accept().is_err(), "the service has connected a second time");
        assert_eq!(connection.read(&mut [0; 64]).unwrap(), 0);
    }
}

#[test]
fn a_refusing_service_serves_if_the_handover_failed() {
    let manager = ServiceManager::new();
    let to = unused_address();
    let mut service = refusing_service(&manager, to);
    let _other = other_host(&manager, "listen", to, &format!("incoming id={ID}"));
    manager.wait_for_status("serving ");
    let mut greeting = [0; 8];
    client(&manager).read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
    assert!(send_command(&manager.control(), "status").starts_with("0: "));
    assert_eq!(service.stop().code(), Some(0));
    assert!(service.stderr().lines().filter(|line| line.contains(":E:")).count() == 1);
}

#[test]
fn a_refusing_service_records_a_completed_handover() {
    let manager = ServiceManager::new();
    let to = unused_address();
    let mut service = refusing_service(&manager, to);
    let other_host = other_host(&manager, "serve", to, &format!("ours title={ID}"));
    manager.wait_for_status("has moved to");
    assert!(send_command(&manager.control(), "status").contains("(record: departed"));
    assert_refused(client(&manager));
    drop(other_host);
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn a_stop_interrupts_a_query_while_refusing() {
    let manager = ServiceManager::new();
    let to = unused_address();
    let mut service = refusing_service(&manager, to);
    let silent = TcpListener::bind(to).unwrap();
    silent.set_nonblocking(true).unwrap();
    let mut connection = None;
    assert!(poll_until(harness::TIMEOUT, || {
        connection = silent.accept().ok();
        connection.is_some()
    }));
    assert_refused(client(&manager));
    assert_eq!(service.stop().code(), Some(0));
}

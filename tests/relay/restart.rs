//! A service that relays: its status, and restarts that keep clients.

use crate::{RELAY, SIZE};
use harness::host::Host;
use harness::image::{stamped_image, used_image};
use harness::manager::{Inherited, Service, ServiceManager};
use harness::raw::{FLUSH, READ, Wire};
use harness::session::{Mode, Request, Session};
use harness::writers::Writers;
use harness::{Endpoint, Server, TempDir, temp_dir};
use std::collections::HashMap;
use std::time::Duration;

/// A service whose disk can move to another host.
struct Relayed {
    manager: ServiceManager,
    _dir: TempDir,
    destination: Host,
    service: Service,
    line: String,
}

impl Relayed {
    fn start(options: &str) -> Self {
        let dir = temp_dir();
        let image = dir.path().join("image");
        stamped_image(&image, SIZE);
        let destination = Host::new(dir.path(), "destination");
        used_image(&destination.image, SIZE);
        let manager = ServiceManager::new().env("FDSTORE", "9").env("WATCHDOG_USEC", "400000");
        let line = format!("serve --file {} {options}", image.display());
        let service = manager.start(Inherited::NbdAndControl, &line, &[]);
        manager.wait_for("READY=1");
        Self { manager, _dir: dir, destination, service, line }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.manager.address())
    }

    /// Moves the disk, and waits until its clients are passed on to it.
    fn relay(&self, more: &[&str]) -> Server {
        let mut listening = self.destination.listen();
        let source = self.source();
        source.mirror_to(self.destination.address, &[&RELAY[..], more].concat());
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        let serving = self.destination.serve();
        source.wait_for_status("relaying_to", &self.destination.address.to_string());
        serving
    }

    /// The service, as the target of commands.
    fn source(&self) -> Host {
        let mut host = Host::new(self._dir.path(), "image").at(self.manager.address());
        host.control = self.manager.control();
        host
    }

    fn stop(&mut self) {
        assert!(self.service.stop().success(), "{}", self.service.stderr());
    }

    fn start_again(&mut self) {
        self.service = self.manager.start(Inherited::NbdAndControl, &self.line, &[]);
    }
}

#[test]
fn restarts_go_on_relaying() {
    let mut relayed = Relayed::start("");
    let writers = Writers::start(relayed.endpoint(), SIZE, (4, 1, Duration::from_millis(10)));
    writers.wait_for_writes(100);
    let _serving = relayed.relay(&[]);
    let to = relayed.destination.address;
    relayed.manager.wait_for_status(&format!("relaying 4 clients to {to}"));
    for _ in 0..4 {
        writers.wait_for_writes(100);
        relayed.stop();
        relayed.start_again();
        relayed.manager.wait_for("READY=1");
        relayed.manager.wait_for_status(&format!("relaying 4 clients to {to}"));
        Wire::connect(&relayed.endpoint()).expect_closed("the disk has left");
        assert_eq!(relayed.source().status_of("ownership"), "departed");
    }
    writers.wait_for_writes(100);
    let written = writers.stop();
    assert_eq!(written.connections, 4, "{}", relayed.service.stderr());
    assert!(relayed.service.wait_for_exit().success());
    written.assert_all_present(&relayed.destination.image, "the destination");
}

#[test]
fn time_goes_on_after_a_restart() {
    let mut relayed = Relayed::start("--verbose");
    let mut client = Session::open(&relayed.endpoint(), Mode::Simple).unwrap();
    let _serving = relayed.relay(&["relay-for=2"]);
    relayed.stop();
    relayed.start_again();
    assert!(relayed.service.wait_for_exit().success());
    assert!(relayed.service.stderr().contains("its time is over"), "{}", relayed.service.stderr());
    client.wire.expect_closed("the time is over");
}

#[test]
fn restart_without_clients_refuses_as_before() {
    let mut relayed = Relayed::start("");
    let client = Session::open(&relayed.endpoint(), Mode::Simple).unwrap();
    let _serving = relayed.relay(&[]);
    drop(client);
    assert!(relayed.service.wait_for_exit().success(), "{}", relayed.service.stderr());
    relayed.start_again();
    relayed.manager.wait_for_status("refusing clients: ");
}

#[test]
fn deleted_image_does_not_end_the_relay() {
    let mut relayed = Relayed::start("");
    let mut client = Session::open(&relayed.endpoint(), Mode::Extended).unwrap();
    let mut listening = relayed.destination.listen();
    let arguments = ["unlink", "0.0.0.0", "0", "relay"];
    relayed.source().mirror_to(relayed.destination.address, &arguments);
    assert!(listening.wait_for_end().success());
    let _serving = relayed.destination.serve();
    let to = relayed.destination.address;
    relayed.manager.wait_for_status(&format!("relaying 1 client to {to}"));
    client.ok(Request::write(4096, b"relayed"));
    relayed.stop();
    relayed.start_again();
    relayed.manager.wait_for("READY=1");
    assert_eq!(client.read(4096, 7), b"relayed");
    client.ok(Request::new(FLUSH, 0, 0));
}

#[test]
fn lost_destination_does_not_starve_the_watchdog() {
    let mut relayed = Relayed::start("");
    let mut client = Session::open(&relayed.endpoint(), Mode::Simple).unwrap();
    let serving = relayed.relay(&[]);
    drop(serving);
    let read = Request::new(READ, 0, 512);
    let cookie = client.send(&read);
    relayed.manager.wait_for_status("the connection is lost");
    for _ in 0..10 {
        relayed.manager.wait_for("WATCHDOG=1");
    }
    assert!(relayed.service.is_running());
    let _serving = relayed.destination.serve();
    assert_eq!(client.recv_reply(&HashMap::from([(cookie, read)])).1.error, 0);
}

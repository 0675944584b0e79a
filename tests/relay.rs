//! `mirror --relay`: clients that stay at the source while their disk moves. No client loses its connection,
//! and every acknowledged write is at the destination, whatever happens to the hosts.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "relay/peers.rs"]
mod peers;
#[path = "relay/restart.rs"]
mod restart;

use harness::host::{Host, MIRROR_STARTED};
use harness::image::{stamped_image, used_image};
use harness::raw::{FLUSH, TRIM, Wire};
use harness::session::{Mode, Request, Session};
use harness::writers::{Writers, Written};
use harness::{Endpoint, MIB, Program, Server, TempDir, noise, read_at, sparse_file, temp_dir};
use nix::sys::signal::Signal;
use std::time::Duration;

const SIZE: u64 = 32 * MIB;
/// Pause between two batches of a writer, so that the copy keeps up with it.
const PAUSE: Duration = Duration::from_millis(10);
/// The arguments of `mirror` after the port, without a bind address or a speed limit.
const RELAY: [&str; 4] = ["exit", "0.0.0.0", "0", "relay"];

/// The hosts of a test, which their disk visits in turn.
struct Hosts {
    _dir: TempDir,
    hosts: Vec<Host>,
}

impl Hosts {
    /// The first host has a disk with data, the others images with other data.
    fn new(count: usize) -> Self {
        let dir = temp_dir();
        let hosts: Vec<Host> =
            (0..count).map(|number| Host::new(dir.path(), &format!("host{number}"))).collect();
        stamped_image(&hosts[0].image, SIZE);
        hosts[1..].iter().for_each(|host| used_image(&host.image, SIZE));
        Self { _dir: dir, hosts }
    }

    fn endpoint(&self, number: usize) -> Endpoint {
        Endpoint::Tcp(self.hosts[number].address)
    }

    /// Writers that are connected to a host.
    fn writers(&self, number: usize) -> Writers {
        let writers = Writers::start(self.endpoint(number), SIZE, (4, 1, PAUSE));
        writers.wait_for_writes(200);
        writers
    }

    /// Moves the disk, and returns the server that has it then.
    #[track_caller]
    fn relay(&self, from: usize, to: usize, more: &[&str]) -> Server {
        let (source, destination) = (&self.hosts[from], &self.hosts[to]);
        let mut listening = destination.listen();
        let arguments = [&RELAY[..], more].concat();
        assert_eq!(source.mirror_to(destination.address, &arguments), MIRROR_STARTED);
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        let serving = destination.serve();
        source.wait_for_status("relaying_to", &destination.address.to_string());
        assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
        serving
    }

    fn assert_at(&self, number: usize, written: &Written) {
        written.assert_all_present(&self.hosts[number].image, "the destination");
    }
}

/// A client, and the disk that it has written to.
fn client(hosts: &Hosts, number: usize) -> Session {
    Session::open(&hosts.endpoint(number), Mode::Extended).unwrap()
}

#[test]
fn clients_stay_connected_and_lose_no_write() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let writers = hosts.writers(0);
    let serving = hosts.relay(0, 1, &[]);
    writers.wait_for_writes(400);
    let status = hosts.hosts[0].status();
    for (key, value) in [
        ("ownership", "departed"),
        ("clients_allowed", "false"),
        ("has_control", "false"),
        ("num_clients", "4"),
        ("upstream_connected", "true"),
    ] {
        assert_eq!(status[key], value, "{status:?}");
    }
    assert_eq!(hosts.hosts[0].command(&["mirror", "127.0.0.1", "7"]), "1: the disk has moved away");
    let written = writers.stop();
    assert_eq!(written.connections, 4, "no client has connected again");
    assert!(source.wait_for_end().success(), "{}", source.stderr());
    for part in ["relaying 4 clients to", "stopped relaying to", "the last client has gone"] {
        assert!(source.stderr().contains(part), "{part}: {}", source.stderr());
    }
    hosts.assert_at(1, &written);
    drop(serving);
}

#[test]
fn requests_of_every_kind_are_passed_on() {
    let hosts = Hosts::new(2);
    let _source = hosts.hosts[0].serve();
    let mut client = client(&hosts, 0);
    client.ok(Request::write(4096, b"before"));
    let _serving = hosts.relay(0, 1, &[]);
    assert_eq!(client.read(4096, 6), b"before");
    let data = noise(100_000, 3);
    client.ok(Request::write(MIB + 1, &data));
    client.ok(Request::new(FLUSH, 0, 0));
    assert!(read_at(&hosts.hosts[1].image, MIB + 1, 100_000) == data);
    client.ok(Request::new(TRIM, MIB, MIB));
    assert!(client.read(MIB, 100_000).iter().all(|byte| *byte == 0));
    assert!(
        read_at(&hosts.hosts[0].image, MIB + 1, 100_000) != data,
        "the image here is left alone"
    );
}

#[test]
fn new_clients_are_turned_away() {
    let hosts = Hosts::new(2);
    let source = hosts.hosts[0].serve();
    let mut client = client(&hosts, 0);
    let _serving = hosts.relay(0, 1, &[]);
    Wire::connect(&hosts.endpoint(0)).expect_closed("the disk has left");
    let to = hosts.hosts[1].address;
    source.wait_for_stderr(&format!("host0.img has moved to {to}"));
    client.assert_in_sync();
}

#[test]
fn relaying_ends_after_its_time() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let mut client = client(&hosts, 0);
    let _serving = hosts.relay(0, 1, &["relay-for=1"]);
    assert!(source.wait_for_end().success(), "{}", source.stderr());
    assert!(source.stderr().contains("its time is over; disconnecting 1 client"));
    client.wire.expect_closed("the time is over");
}

#[test]
fn killed_source_loses_no_acknowledged_write() {
    let hosts = Hosts::new(2);
    let source = hosts.hosts[0].serve();
    let writers = hosts.writers(0);
    let _serving = hosts.relay(0, 1, &[]);
    writers.wait_for_writes(200);
    writers.add_destination(hosts.endpoint(1));
    source.signal(Signal::SIGKILL);
    writers.wait_for_writes(200);
    hosts.assert_at(1, &writers.stop());
}

#[test]
fn clients_wait_while_the_destination_restarts() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let writers = hosts.writers(0);
    let mut serving = hosts.relay(0, 1, &[]);
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGKILL] {
        writers.wait_for_writes(100);
        serving.signal(signal);
        serving.wait_for_end();
        hosts.hosts[0].wait_for_status("upstream_connected", "false");
        serving = hosts.hosts[1].serve();
    }
    writers.wait_for_writes(100);
    let written = writers.stop();
    assert_eq!(written.connections, 4, "{}", source.stderr());
    assert!(source.wait_for_end().success());
    hosts.assert_at(1, &written);
}

#[test]
fn disk_moves_on_under_clients_of_the_first_host() {
    let hosts = Hosts::new(3);
    let mut first = hosts.hosts[0].serve();
    let writers = hosts.writers(0);
    let mut second = hosts.relay(0, 1, &[]);
    writers.wait_for_writes(100);
    let _third = hosts.relay(1, 2, &[]);
    writers.wait_for_writes(200);
    let written = writers.stop();
    assert_eq!(written.connections, 4, "{}", first.stderr());
    assert!(first.wait_for_end().success(), "{}", first.stderr());
    assert!(second.wait_for_end().success(), "{}", second.stderr());
    hosts.assert_at(2, &written);
}

#[test]
fn clients_stay_when_the_image_is_deleted() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let mut listening = hosts.hosts[1].listen();
    let writers = hosts.writers(0);
    let arguments = ["unlink", "0.0.0.0", "0", "relay"];
    hosts.hosts[0].mirror_to(hosts.hosts[1].address, &arguments);
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let _serving = hosts.hosts[1].serve();
    hosts.hosts[0].wait_for_status("relaying_to", &hosts.hosts[1].address.to_string());
    assert!(!hosts.hosts[0].image.exists());
    writers.wait_for_writes(200);
    let written = writers.stop();
    assert_eq!(written.connections, 4);
    assert!(source.wait_for_end().success());
    hosts.assert_at(1, &written);
}

#[test]
fn without_clients_the_source_ends_at_once() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let mut listening = hosts.hosts[1].listen();
    hosts.hosts[0].mirror_to(hosts.hosts[1].address, &RELAY);
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert!(source.wait_for_end().success(), "{}", source.stderr());
    let log = source.stderr();
    assert!(!log.contains("relaying") && !log.contains("cannot be passed on"), "{log}");
}

#[test]
fn stopping_while_the_destination_does_not_serve_ends_well() {
    let hosts = Hosts::new(2);
    let mut source = hosts.hosts[0].serve();
    let mut client = client(&hosts, 0);
    let mut listening = hosts.hosts[1].listen();
    hosts.hosts[0].mirror_to(hosts.hosts[1].address, &RELAY);
    assert!(listening.wait_for_end().success());
    hosts.hosts[0].wait_for_status("migration_waiting", "relay");
    assert!(source.stop().success(), "{}", source.stderr());
    client.wire.expect_closed("its disk has left");
    assert_eq!(hosts.hosts[0].record(), "departed");
}

#[test]
fn clients_are_disconnected_from_a_server_with_another_disk() {
    let hosts = Hosts::new(2);
    let other = temp_dir();
    let image = other.path().join("image");
    sparse_file(&image, SIZE);
    let wrong = harness::Builder::serve(&image).start();
    let mut source = hosts.hosts[0].serve();
    let _client = client(&hosts, 0);
    let mut listening = hosts.hosts[1].listen();
    let to = format!("relay-to=127.0.0.1:{}", wrong.port());
    hosts.hosts[0].mirror_to(hosts.hosts[1].address, &[&RELAY[..], &[&to]].concat());
    assert!(listening.wait_for_end().success());
    hosts.hosts[0].wait_for_status("migration_waiting", "relay");
    assert!(
        hosts.hosts[0].status_of("migration_reason").contains("does%20not%20have%20the%20disk")
    );
    assert!(source.stop().success(), "{}", source.stderr());
}

#[test]
fn options_and_the_configuration_decide() {
    let hosts = Hosts::new(2);
    let source = &hosts.hosts[0];
    let mut serving = source.mode("serve").args(["--relay", "yes"]).start();
    let mut client = client(&hosts, 0);
    let mut listening = hosts.hosts[1].listen();
    let (ip, port) = (hosts.hosts[1].address.ip(), hosts.hosts[1].address.port());
    let mirror = Program::flexnbd("mirror --sock").args([&source.control]);
    let mirror = mirror.words(&format!("-l {ip} -p {port} --wait"));
    let waiting = std::thread::spawn(move || mirror.run());
    assert!(listening.wait_for_end().success());
    let _destination = hosts.hosts[1].serve();
    let text = waiting.join().unwrap().succeeded().text();
    assert!(text.contains("the source relays 1 client"), "{text}");
    client.assert_in_sync();
    drop(client);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
}

#[test]
fn option_against_relaying_wins() {
    let hosts = Hosts::new(2);
    let mut serving = hosts.hosts[0].mode("serve").args(["--relay", "60"]).start();
    let mut client = client(&hosts, 0);
    let mut listening = hosts.hosts[1].listen();
    let arguments = ["exit", "0.0.0.0", "0", "no-relay"];
    hosts.hosts[0].mirror_to(hosts.hosts[1].address, &arguments);
    assert!(listening.wait_for_end().success());
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    client.wire.expect_closed("the disk has left");
}

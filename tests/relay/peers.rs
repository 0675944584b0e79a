//! Destinations that are not flexnbd: they cannot acknowledge the disk, but can have its clients passed on.

use crate::{Hosts, RELAY, SIZE};
use harness::raw::FLUSH;
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, Program, free_port, noise, require_tools, sparse_file};

/// Relays to a server that this command starts with the image or its size, and the port.
fn relay_to(command: &str) {
    let hosts = Hosts::new(1);
    let directory = hosts.hosts[0].image.parent().unwrap().to_owned();
    let image = directory.join("theirs");
    sparse_file(&image, SIZE);
    let port = free_port();
    let line = command
        .replace("IMAGE", image.to_str().unwrap())
        .replace("PORT", &port.to_string())
        .replace("SIZE", &SIZE.to_string());
    let (program, words) = line.split_once(' ').unwrap();
    let to = Endpoint::localhost(port);
    let _server = Program::new(program).words(words).serve_at(to.clone());
    let mut source = hosts.hosts[0].serve();
    let mut client = Session::open(&hosts.endpoint(0), Mode::Structured).unwrap();
    client.ok(Request::write(4096, b"before"));
    let address = format!("127.0.0.1:{port}");
    hosts.hosts[0].mirror_to(address.parse().unwrap(), &RELAY);
    hosts.hosts[0].wait_for_status("relaying_to", &address);
    let data = noise(100_000, 4);
    client.ok(Request::write(8192, &data));
    client.ok(Request::new(FLUSH, 0, 0));
    assert_eq!(client.read(4096, 6), b"before");
    drop(client);
    assert!(source.wait_for_end().success(), "{}", source.stderr());
    let mut other = Session::open(&to, Mode::Structured).unwrap();
    assert!(other.read(8192, 100_000) == data);
    assert_eq!(hosts.hosts[0].record(), "departed");
}

#[test]
fn clients_are_passed_on_to_qemu_nbd() {
    if require_tools(&["qemu-nbd"]) {
        relay_to("qemu-nbd -f raw -t -e 9 --discard=unmap -b 127.0.0.1 -p PORT IMAGE");
    }
}

#[test]
fn clients_are_passed_on_to_nbdkit() {
    if require_tools(&["nbdkit"]) {
        relay_to("nbdkit -f -i 127.0.0.1 -p PORT memory SIZE");
    }
}

#[test]
fn server_that_offers_less_is_refused_at_the_start() {
    if !require_tools(&["nbdkit"]) {
        return;
    }
    let hosts = Hosts::new(1);
    let port = free_port();
    let words = format!("-f -i 127.0.0.1 -p {port} --filter=nozero memory {SIZE} zeromode=none");
    let _server = Program::new("nbdkit").words(&words).serve_at(Endpoint::localhost(port));
    let mut source = hosts.hosts[0].serve();
    let to = format!("127.0.0.1:{port}").parse().unwrap();
    let reply = hosts.hosts[0].mirror_to(to, &RELAY);
    assert!(reply.starts_with("1: Mirror was rejected") && reply.contains("SEND_"), "{reply}");
    assert!(reply.contains("without --relay"), "{reply}");
    assert!(source.stop().success());
}

//! Where a server can listen, and how it ends: IPv4, IPv6, both at once, unix sockets, signals.

use crate::{flags_of, read};
use harness::{Builder, MIB, Program, Served, Style, Transport, free_port, sparse_image, temp_dir};
use nix::sys::signal::Signal;
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::net::UnixListener;

fn ipv6() -> bool {
    let there = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if !there {
        harness::skip("what needs IPv6", "this host has no ::1");
    }
    there
}

/// Serves on this address, tells which places then answer.
#[track_caller]
fn answers(address: &str, entries: &str, places: &[&str]) -> Vec<bool> {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let port = free_port();
    let serve = Program::flexnbd("serve --file").args([&image]);
    let serve = serve.words(&format!("--addr {address} --port {port} {entries}"));
    // Any address that it may listen on is in the tables of the kernel.
    let up = || {
        let port = format!(":{port:04X} ");
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
            let text = std::fs::read_to_string(table).unwrap_or_default();
            text.lines().any(|line| line.contains(&port) && line.contains(" 0A "))
        })
    };
    let server = serve.start_until(up);
    let answered = |place: &&str| {
        let arguments = format!("--addr {place} --port {port}");
        read(&arguments, 0, 512).run().status.success()
    };
    let answers = places.iter().map(answered).collect();
    server.stop();
    answers
}

#[test]
fn an_ipv6_address_is_served_with_and_without_brackets() {
    if !ipv6() {
        return;
    }
    assert_eq!(answers("::1", "", &["::1", "[::1]", "127.0.0.1"]), [true, true, false]);
    assert_eq!(answers("[::1]", "", &["::1"]), [true]);
}

#[test]
fn every_address_in_ipv6_means_ipv4_as_well() {
    if !ipv6() {
        return;
    }
    assert_eq!(answers("::", "", &["127.0.0.1", "::1"]), [true, true]);
    assert_eq!(answers("::", "", &["localhost"]), [true], "by either address");
    assert_eq!(answers("0.0.0.0", "", &["127.0.0.1", "::1"]), [true, false]);
}

#[test]
fn an_ipv4_client_of_a_dual_stack_server_matches_ipv4_entries() {
    if !ipv6() {
        return;
    }
    assert_eq!(answers("::", "127.0.0.0/8", &["127.0.0.1", "::1"]), [true, false]);
    assert_eq!(answers("::", "::1", &["127.0.0.1", "::1"]), [false, true]);
}

#[test]
fn without_entries_default_deny_admits_nobody() {
    assert_eq!(answers("127.0.0.1", "--default-deny", &["127.0.0.1"]), [false]);
    assert_eq!(answers("127.0.0.1", "--default-deny 127.0.0.1", &["127.0.0.1"]), [true]);
}

#[test]
fn unix_clients_are_not_the_acls_business() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let served =
        Served::existing(dir, image, Transport::Unix, Style::New, &["--default-deny", "192.0.2.1"]);
    read(&flags_of(&served.server), 0, 512).run().succeeded();
}

#[test]
fn each_signal_that_ends_it_ends_it_well_and_leaves_no_sockets() {
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", MIB);
        let (nbd, control) = (dir.path().join("nbd.sock"), dir.path().join("control.sock"));
        let builder = Builder::serve(&image).unix(&nbd).args(["--sock"]).args([&control]);
        let mut server = builder.start();
        harness::wait_until("the control socket", || control.exists());
        read(&flags_of(&server), 0, 512).run().succeeded();
        server.signal(signal);
        let status = server.wait_for_end();
        assert_eq!(status.code(), Some(0), "{signal}: {status}");
        assert!(!nbd.exists() && !control.exists(), "{signal}: the sockets are gone");
        assert_eq!(server.stderr(), "");
    }
}

#[test]
fn a_stale_socket_to_serve_on_is_replaced_and_a_live_one_left_alone() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let sock = dir.path().join("nbd.sock");
    drop(UnixListener::bind(&sock).unwrap());
    let served = Served::existing(dir, image, Transport::Unix, Style::New, &[]);
    let other = sparse_image(served.dir.path(), "other", MIB);
    let second = Program::flexnbd("serve --file").args([&other]).words("--addr").args([&sock]);
    second.run().refused(78, &["cannot listen on /", "another program answers there"]);
    read(&flags_of(&served.server), 0, 512).run().succeeded();
}

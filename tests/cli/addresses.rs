//! Addresses that a server listens on (IPv4, IPv6, dual stack, unix sockets), and its exit on signals.

use crate::{flags_of, read};
use harness::{Builder, MIB, Program, Served, Style, Transport, free_port, sparse_image, temp_dir};
use nix::sys::signal::Signal;
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::net::UnixListener;

fn has_ipv6() -> bool {
    let has_ipv6 = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok();
    if !has_ipv6 {
        harness::skip("a test that needs IPv6", "this host has no ::1");
    }
    has_ipv6
}

/// Serves on this address with these ACL entries; returns at which of `targets` a client can read.
#[track_caller]
fn readable_at(address: &str, acl: &str, targets: &[&str]) -> Vec<bool> {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let port = free_port();
    let serve = Program::flexnbd("serve --file").args([&image]);
    let serve = serve.words(&format!("--addr {address} --port {port} {acl}"));
    // The kernel's socket tables show a listening socket (state 0A) on any address.
    let is_listening = || {
        let port = format!(":{port:04X} ");
        ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
            let text = std::fs::read_to_string(table).unwrap_or_default();
            text.lines().any(|line| line.contains(&port) && line.contains(" 0A "))
        })
    };
    let server = serve.start_until(is_listening);
    let is_readable = |target: &&str| {
        let arguments = format!("--addr {target} --port {port}");
        read(&arguments, 0, 512).run().status.success()
    };
    let results = targets.iter().map(is_readable).collect();
    server.stop();
    results
}

#[test]
fn ipv6_addresses_work_with_and_without_brackets() {
    if !has_ipv6() {
        return;
    }
    assert_eq!(readable_at("::1", "", &["::1", "[::1]", "127.0.0.1"]), [true, true, false]);
    assert_eq!(readable_at("[::1]", "", &["::1"]), [true]);
}

#[test]
fn the_ipv6_wildcard_address_includes_ipv4() {
    if !has_ipv6() {
        return;
    }
    assert_eq!(readable_at("::", "", &["127.0.0.1", "::1"]), [true, true]);
    assert_eq!(readable_at("::", "", &["localhost"]), [true], "over either address");
    assert_eq!(readable_at("0.0.0.0", "", &["127.0.0.1", "::1"]), [true, false]);
}

#[test]
fn ipv4_acl_entries_match_in_dual_stack() {
    if !has_ipv6() {
        return;
    }
    assert_eq!(readable_at("::", "127.0.0.0/8", &["127.0.0.1", "::1"]), [true, false]);
    assert_eq!(readable_at("::", "::1", &["127.0.0.1", "::1"]), [false, true]);
}

#[test]
fn default_deny_without_entries_admits_no_client() {
    assert_eq!(readable_at("127.0.0.1", "--default-deny", &["127.0.0.1"]), [false]);
    assert_eq!(readable_at("127.0.0.1", "--default-deny 127.0.0.1", &["127.0.0.1"]), [true]);
}

#[test]
fn the_acl_ignores_unix_clients() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let served =
        Served::existing(dir, image, Transport::Unix, Style::New, &["--default-deny", "192.0.2.1"]);
    read(&flags_of(&served.server), 0, 512).run().succeeded();
}

#[test]
fn termination_signals_exit_with_0_and_remove_sockets() {
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
        assert!(!nbd.exists() && !control.exists(), "{signal}: the sockets are removed");
        assert_eq!(server.stderr(), "");
    }
}

#[test]
fn only_stale_nbd_sockets_are_replaced() {
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

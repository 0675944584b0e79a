//! Errors of `read` and `write`, and their messages.

use crate::transfer::nbdkit;
use crate::{flags_of, read, write};
use harness::{
    Endpoint, KIB, MIB, Served, free_port, noise, read_at, require_tool, sparse_image, temp_dir,
    wait_for_exit,
};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Stdio;

#[test]
fn a_refused_connection_is_reported_once_with_address() {
    let endpoint = Endpoint::localhost(free_port());
    let outcome = read(&endpoint.flags(), 0, 512).run();
    outcome.refused(1, &["flexnbd read: cannot connect to 127.0.0.1:", "refused"]);
    assert_eq!(outcome.stderr.matches("cannot connect").count(), 1, "{}", outcome.stderr);
    let dir = temp_dir();
    let missing = Endpoint::Unix(dir.path().join("none.sock"));
    let outcome = write(&missing.flags(), 0, b"x").run();
    outcome.refused(1, &["flexnbd write: cannot connect to /", "none.sock"]);
    assert_eq!(outcome.stderr.matches("cannot connect").count(), 1, "{}", outcome.stderr);
}

/// A server that sends these bytes to one client and then EOF.
fn scripted_server(bytes: &'static [u8]) -> (Endpoint, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(bytes).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = stream.read(&mut [0; 512]);
    });
    (Endpoint::localhost(port), thread)
}

#[test]
fn servers_of_other_protocols_are_recognised() {
    let ssh = b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n";
    let unknown_magic = b"NBDMAGICSOMETHNG and so on and on and on and on";
    for bytes in [&ssh[..], unknown_magic] {
        let (endpoint, thread) = scripted_server(bytes);
        read(&endpoint.flags(), 0, 512).run().refused(1, &["flexnbd read: 127.0.0.1:", "NBD"]);
        thread.join().unwrap();
    }
    for bytes in [&b""[..], b"NBDMAGIC", b"NBDM"] {
        let (endpoint, thread) = scripted_server(bytes);
        read(&endpoint.flags(), 0, 512).run().refused(1, &["flexnbd read: 127.0.0.1:", "closed"]);
        thread.join().unwrap();
    }
}

#[test]
fn a_server_that_requires_tls_is_refused() {
    if !require_tool("nbdkit") {
        return;
    }
    let dir = temp_dir();
    let keys = dir.path().join("keys.psk");
    std::fs::write(&keys, "me:00112233445566778899aabbccddeeff\n").unwrap();
    let keys = format!("--tls-psk={}", keys.display());
    let endpoint = Endpoint::Unix(dir.path().join("tls.sock"));
    let peer = nbdkit(endpoint, &["--tls=require", &keys, "memory", "size=1M"]);
    read(&peer.endpoint.flags(), 0, 512).run().refused(1, &["flexnbd read: /", "TLS"]);
    write(&peer.endpoint.flags(), 0, b"x").run().refused(1, &["flexnbd write: /", "TLS"]);
}

#[test]
fn block_size_constraints_of_servers_are_respected() {
    if !require_tool("nbdkit") {
        return;
    }
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let endpoint = Endpoint::Unix(dir.path().join("nbdkit.sock"));
    let policy = ["blocksize-minimum=512", "blocksize-preferred=4K", "blocksize-maximum=64K"];
    let file = ["--filter=blocksize-policy", "file", image.to_str().unwrap()];
    let strict = ["blocksize-error-policy=error"];
    let peer = nbdkit(endpoint, &[&file[..], &policy[..], &strict[..]].concat());
    let flags = peer.endpoint.flags();
    for (from, size) in [(0, 100), (1, 512), (512, 513)] {
        let outcome = read(&flags, from, size).run();
        outcome.refused(1, &["flexnbd read: ", "multiples of 512"]);
        assert!(outcome.stdout.is_empty());
    }
    // Longer than the server's maximum, so the client splits it.
    let data = noise(300 * KIB as usize, 9);
    write(&flags, 512, &data).run().succeeded().prints_nothing();
    assert!(read(&flags, 512, 300 * KIB).run().succeeded().stdout == data);
    assert!(read_at(&image, 512, data.len()) == data);
}

#[test]
fn a_short_input_writes_nothing() {
    let served = Served::with(&[]);
    let flags = flags_of(&served.server);
    let write_1000 = |input: &[u8]| write(&flags, 0, &[0; 1000]).input(input).run();
    let message = "flexnbd write: standard input ended after 999 of 1000 bytes";
    write_1000(&[7; 999]).refused(1, &[message]);
    write_1000(b"").refused(1, &["after 0 of 1000 bytes"]);
    assert_eq!(read_at(&served.image, 0, 1000), [0; 1000]);
    write_1000(&[7; 1001]).succeeded().prints_nothing();
    assert_eq!(read_at(&served.image, 0, 1001), [vec![7; 1000], vec![0]].concat());
}

#[test]
fn a_read_only_export_refuses_writes() {
    let served = Served::with(&["--read-only"]);
    let flags = flags_of(&served.server);
    read(&flags, 0, 512).run().succeeded();
    write(&flags, 0, b"x").run().refused(1, &["flexnbd write: 127.0.0.1:", "EPERM"]);
    assert_eq!(read_at(&served.image, 0, 1), [0]);
}

#[test]
fn a_closed_output_pipe_ends_read_silently() {
    let served = Served::with(&[]);
    let mut child =
        read(&flags_of(&served.server), 0, 16 * MIB).start(Stdio::null(), Stdio::piped());
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 10]).unwrap();
    drop(stdout);
    let status = wait_for_exit(&mut child, "flexnbd read");
    assert_eq!(status.code(), Some(1), "{status}");
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(stderr, "");
}

#[test]
fn a_full_output_is_reported() {
    let served = Served::with(&[]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut child = read(&flags_of(&served.server), 0, 512).start(Stdio::null(), full.into());
    assert_eq!(wait_for_exit(&mut child, "flexnbd read").code(), Some(1));
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert!(stderr.contains("cannot write to standard output: No space left"), "{stderr}");
}

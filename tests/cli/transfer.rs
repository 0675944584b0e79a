//! `read` and `write` against flexnbd, nbdkit and qemu-nbd.

use crate::{flags_of, read, write};
use harness::{
    Endpoint, MIB, Peer, Program, Served, Transport, for_each_transport_and_style, free_port,
    noise, read_at, require_tool, sparse_image, temp_dir,
};
use std::path::Path;

/// Range without any block alignment.
const FROM: u64 = 12_345;
const LENGTH: usize = 1_000_003;

/// Writes, reads back, and checks the image.
#[track_caller]
fn assert_round_trip(server: &str, image: &Path) {
    let data = noise(LENGTH, 6);
    write(server, FROM, &data).run().succeeded().prints_nothing();
    let outcome = read(server, FROM, LENGTH as u64).run();
    assert_eq!(outcome.succeeded().stderr, "");
    assert!(outcome.stdout == data, "wrong data read back");
    assert!(read_at(image, FROM, LENGTH) == data, "wrong data in the image");
    assert_eq!(read_at(image, FROM - 1, 1), [0], "the byte before");
    assert_eq!(read_at(image, FROM + LENGTH as u64, 1), [0], "the byte after");
}

#[test]
fn flexnbd_round_trips_over_every_transport_and_style() {
    for_each_transport_and_style(|served, _| {
        assert_round_trip(&flags_of(&served.server), &served.image);
        let by_uri = format!("--uri {}", served.uri());
        assert_round_trip(&by_uri, &served.image);
        assert_eq!(served.server.stderr(), "");
    });
}

fn endpoint(transport: Transport, dir: &Path) -> Endpoint {
    match transport {
        Transport::Tcp => Endpoint::localhost(free_port()),
        Transport::Unix => Endpoint::Unix(dir.join("peer.sock")),
    }
}

/// Starts nbdkit with these arguments on either kind of socket.
#[track_caller]
pub(crate) fn nbdkit(endpoint: Endpoint, arguments: &[&str]) -> Peer {
    let nbdkit = Program::new("nbdkit").words("-f");
    let nbdkit = match &endpoint {
        Endpoint::Tcp(address) => nbdkit.words(&format!("-i 127.0.0.1 -p {}", address.port())),
        Endpoint::Unix(path) => nbdkit.args(["-U"]).args([path]),
    };
    nbdkit.args(arguments).serve_at(endpoint)
}

#[test]
fn nbdkit_round_trips_over_every_transport_and_style() {
    if !require_tool("nbdkit") {
        return;
    }
    for transport in [Transport::Tcp, Transport::Unix] {
        for style in ["--newstyle", "--oldstyle"] {
            let dir = temp_dir();
            let image = sparse_image(dir.path(), "image", 8 * MIB);
            let endpoint = endpoint(transport, dir.path());
            let peer = nbdkit(endpoint, &[style, "file", image.to_str().unwrap()]);
            assert_round_trip(&peer.endpoint.flags(), &image);
            peer.stop();
        }
    }
}

/// Starts qemu-nbd with an export named `disk` on either kind of socket.
#[track_caller]
pub(crate) fn qemu_nbd(endpoint: Endpoint, image: &Path) -> Peer {
    let qemu_nbd = Program::new("qemu-nbd").words("-f raw -t -e 8 -x disk");
    let qemu_nbd = match &endpoint {
        Endpoint::Tcp(address) => qemu_nbd.words(&format!("-b 127.0.0.1 -p {}", address.port())),
        Endpoint::Unix(path) => qemu_nbd.args(["-k"]).args([path]),
    };
    qemu_nbd.args([image]).serve_at(endpoint)
}

#[test]
fn qemu_nbd_round_trips_over_every_transport() {
    if !require_tool("qemu-nbd") {
        return;
    }
    for transport in [Transport::Tcp, Transport::Unix] {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 8 * MIB);
        let peer = qemu_nbd(endpoint(transport, dir.path()), &image);
        assert_round_trip(&format!("{} --export disk", peer.endpoint.flags()), &image);
        let uri = peer.endpoint.uri_of("disk");
        assert_round_trip(&format!("--uri {uri}"), &image);
        let unknown = format!("{} --export other", peer.endpoint.flags());
        read(&unknown, 0, 512).run().refused(1, &["no export of that name"]);
    }
}

#[test]
fn exports_match_their_name_or_the_empty_name() {
    let served = Served::with(&["--export", "my disk"]);
    let flags = flags_of(&served.server);
    let named = |name: &str| read(&flags, 0, 512).args(["--export", name]).run();
    named("my disk").succeeded();
    named("").succeeded();
    read(&flags, 0, 512).run().succeeded();
    let refused = named("yours");
    refused.refused(1, &["flexnbd read: 127.0.0.1:", "no export of that name"]);
    assert!(refused.stdout.is_empty());
    let by_uri = |uri: &str| read("", 0, 512).args(["--uri", uri]).run();
    by_uri(&format!("{}/my%20disk", served.uri())).succeeded();
    by_uri(&format!("{}/yours", served.uri())).refused(1, &["no export of that name"]);
    let both = read("", 0, 512).args(["--uri", &served.uri(), "--export", "my disk"]);
    both.run().succeeded();
}

#[test]
fn bind_sets_the_source_address() {
    let served = Served::with(&["127.0.0.2"]);
    let flags = flags_of(&served.server);
    let from = |address: &str| read(&flags, 0, 512).args(["--bind", address]).run();
    from("127.0.0.2").succeeded();
    // The server closes the connection without a greeting.
    from("127.0.0.1").refused(1, &["flexnbd read: 127.0.0.1:", "connection"]);
    served.server.wait_for_stderr("refused 127.0.0.1:");
    from("192.0.2.1").refused(1, &["192.0.2.1"]);
    from("::1").refused(1, &["::1"]);
}

#[test]
fn writes_past_the_last_byte_are_refused() {
    let served = Served::with(&[]);
    let flags = flags_of(&served.server);
    write(&flags, 64 * MIB - 1, b"x").run().succeeded().prints_nothing();
    assert_eq!(read_at(&served.image, 64 * MIB - 1, 1), b"x");
    let size = (64 * MIB).to_string();
    write(&flags, 64 * MIB, b"x").run().refused(1, &["flexnbd write: ", &size, "1 byte from"]);
    write(&flags, 64 * MIB - 1, b"xy").run().refused(1, &[&size]);
    let read = read(&flags, 64 * MIB - 1, 2).run();
    assert!(read.refused(1, &["flexnbd read: ", &size]).stdout.is_empty());
    assert_eq!(served.server.stderr(), "", "the client sends no request");
}

//! Changes that are still in flight when their client has gone: they are never made over what is
//! written and acknowledged later. Real processes, on a file whose changes take long (nbdfuse on top
//! of nbdkit's delay filter), with io_uring and without.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

use harness::mount::{NbdFile, mount_nbd_as_file};
use harness::raw::{FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES};
use harness::session::{Mode, Request, Session};
use harness::{Builder, Endpoint, Peer, Program, failing_fsync, require_tool, temp_dir};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::path::Path;

/// How many changes the client has in flight, and how long each is.
const COUNT: u64 = 8;
const LENGTH: u64 = 64 << 10;
const SLOW: &str = "delay-trim=100ms delay-zero=100ms";
const SLOW_WRITES: &str = "delay-write=50ms";

/// What becomes of the first connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client closes it.
    Closed,
    /// It is reset.
    Reset,
    /// Nothing is heard of it, as after a cable was cut.
    Silence,
}

/// A file of which some changes take long.
struct SlowFile {
    file: NbdFile,
    _nbdkit: Peer,
}

fn slow_file(dir: &Path, delays: &str) -> Option<SlowFile> {
    if !require_tool("nbdkit") {
        return None;
    }
    let socket = dir.join("nbdkit");
    let nbdkit = Program::new("nbdkit").words("-f -U").args([&socket]);
    let nbdkit = nbdkit.words("--filter=delay memory 16M").words(delays);
    let nbdkit = nbdkit.serve_at(Endpoint::Unix(socket.clone()));
    let uri = format!("nbd+unix://?socket={}", socket.display());
    let file = mount_nbd_as_file(&uri, &dir.join("mount"))?;
    Some(SlowFile { file, _nbdkit: nbdkit })
}

/// A client has slow changes in flight when it loses its connection, comes back, and writes new data
/// in the same places; afterwards that is there.
fn new_data_stays(old: &Request, delays: &str, end: End, has_io_uring: bool) {
    let dir = temp_dir();
    let Some(slow) = slow_file(dir.path(), delays) else { return };
    let mut builder = Builder::serve(&slow.file.file).args(["--quiet"]);
    if !has_io_uring {
        builder = builder.env("LD_PRELOAD", failing_fsync(dir.path()));
    }
    let mut server = builder.start();
    let mut first = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let mut pending = HashMap::new();
    for place in 0..COUNT {
        let request = Request { offset: place * LENGTH, ..old.clone() };
        pending.insert(first.send(&request), request);
    }
    // The server has received them: the first is made.
    assert_eq!(first.recv_reply(&pending).1.error, 0);
    let kept = match end {
        End::Closed => {
            drop(first);
            None
        }
        End::Reset => {
            first.wire.reset();
            None
        }
        End::Silence => Some(first),
    };
    let mut second = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let new = vec![0xaa; LENGTH as usize];
    for place in (0..COUNT).rev() {
        second.ok(Request::write(place * LENGTH, &new));
        let found = second.read(place * LENGTH, LENGTH);
        let lost = found.iter().position(|byte| *byte != 0xaa);
        assert_eq!(lost, None, "place {place}, {end:?}: just written");
    }
    second.ok(Request::new(FLUSH, 0, 0));
    // The server ends when nothing is in flight any more.
    server.signal(Signal::SIGTERM);
    drop(second);
    server.wait_for_end();
    drop(kept);
    let found = harness::read_at(&slow.file.file, 0, (COUNT * LENGTH) as usize);
    let lost = (0..COUNT).find(|place| found[(place * LENGTH) as usize..][..new.len()] != new);
    assert_eq!(lost, None, "command {}, {end:?}, io_uring: {has_io_uring}", old.command);
    slow.file.unmount();
}

fn in_every_way(old: &Request, delays: &str, ends: &[End]) {
    for has_io_uring in [true, false] {
        for end in ends {
            new_data_stays(old, delays, *end, has_io_uring);
        }
    }
}

const ALL: [End; 3] = [End::Closed, End::Reset, End::Silence];
/// That a write which the server has not read from its socket is an old one is known only when the
/// connection is known to be broken.
const BROKEN: [End; 2] = [End::Closed, End::Reset];

#[test]
fn zeroing_in_flight_never_overwrites_later_data() {
    in_every_way(&Request::new(WRITE_ZEROES, 0, LENGTH), SLOW, &ALL);
}

#[test]
fn trimming_in_flight_never_overwrites_later_data() {
    in_every_way(&Request::new(TRIM, 0, LENGTH), SLOW, &ALL);
}

#[test]
fn durable_writes_in_flight_never_overwrite_later_data() {
    in_every_way(&Request::new(WRITE, 0, LENGTH).flags(FUA), SLOW_WRITES, &BROKEN);
}

#[test]
fn plain_writes_in_flight_never_overwrite_later_data() {
    in_every_way(&Request::new(WRITE, 0, LENGTH), SLOW_WRITES, &BROKEN);
}

#[test]
fn changes_of_a_killed_server_never_overwrite_later_data() {
    let dir = temp_dir();
    let Some(slow) = slow_file(dir.path(), SLOW) else { return };
    let mut server = Builder::serve(&slow.file.file).args(["--quiet"]).start();
    let mut first = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let mut pending = HashMap::new();
    for place in 0..COUNT {
        let request = Request::new(WRITE_ZEROES, place * LENGTH, LENGTH);
        pending.insert(first.send(&request), request);
    }
    assert_eq!(first.recv_reply(&pending).1.error, 0);
    // The process is not gone before the kernel has ended what it was doing for it.
    server.signal(Signal::SIGKILL);
    server.wait_for_end();
    let mut server = Builder::serve(&slow.file.file).args(["--quiet"]).start();
    let mut second = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let new = vec![0xaa; (COUNT * LENGTH) as usize];
    second.ok(Request::write(0, &new));
    second.ok(Request::new(FLUSH, 0, 0));
    drop(second);
    assert!(server.stop().success());
    assert!(harness::read_at(&slow.file.file, 0, new.len()) == new);
    slow.file.unmount();
}

//! Writes in flight at the end of their connection: they never overwrite data that the server has
//! acknowledged to a later connection. The image is a file with slow writes (nbdfuse over nbdkit's
//! delay filter), with io_uring and without.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

use harness::mount::{NbdFile, mount_nbd_as_file};
use harness::raw::{FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES};
use harness::session::{Mode, Request, Session};
use harness::{Builder, Endpoint, Peer, Program, failing_fsync, require_tool, temp_dir};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::path::Path;

/// Operations in flight, and their length in bytes.
const COUNT: u64 = 8;
const LENGTH: u64 = 64 << 10;
const SLOW_ZEROING: &str = "delay-trim=100ms delay-zero=100ms";
const SLOW_WRITES: &str = "delay-write=50ms";

/// How the first connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By FIN.
    Closed,
    /// By RST.
    Reset,
    /// Not at all, as after a link failure.
    Silence,
}

/// A file with slow operations, and the nbdkit process that provides it.
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

/// A client has slow operations in flight when its connection ends. It reconnects and writes new
/// data to the same ranges, which must persist.
fn check_later_data(old: &Request, delays: &str, end: End, has_io_uring: bool) {
    let dir = temp_dir();
    let Some(slow) = slow_file(dir.path(), delays) else { return };
    let mut builder = Builder::serve(&slow.file.file).args(["--quiet"]);
    if !has_io_uring {
        builder = builder.env("LD_PRELOAD", failing_fsync(dir.path()));
    }
    let mut server = builder.start();
    let mut first = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let mut pending = HashMap::new();
    for block in 0..COUNT {
        let request = Request { offset: block * LENGTH, ..old.clone() };
        pending.insert(first.send(&request), request);
    }
    // After the first reply the server has received them.
    assert_eq!(first.recv_reply(&pending).1.error, 0);
    let silent = match end {
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
    for block in (0..COUNT).rev() {
        second.ok(Request::write(block * LENGTH, &new));
        let found = second.read(block * LENGTH, LENGTH);
        let lost = found.iter().position(|byte| *byte != 0xaa);
        assert_eq!(lost, None, "block {block}, {end:?}: read after its write");
    }
    second.ok(Request::new(FLUSH, 0, 0));
    // The server exits once nothing is in flight.
    server.signal(Signal::SIGTERM);
    drop(second);
    server.wait_for_end();
    drop(silent);
    let found = harness::read_at(&slow.file.file, 0, (COUNT * LENGTH) as usize);
    let lost = (0..COUNT).find(|block| found[(block * LENGTH) as usize..][..new.len()] != new);
    assert_eq!(lost, None, "command {}, {end:?}, io_uring: {has_io_uring}", old.command);
    slow.file.unmount();
}

fn check_all_ends(old: &Request, delays: &str, ends: &[End]) {
    for has_io_uring in [true, false] {
        for end in ends {
            check_later_data(old, delays, *end, has_io_uring);
        }
    }
}

const ALL_ENDS: [End; 3] = [End::Closed, End::Reset, End::Silence];
/// Only if the server detects the end of the connection does it discard writes that are still in
/// the socket buffer.
const DETECTED_ENDS: [End; 2] = [End::Closed, End::Reset];

#[test]
fn zeroing_in_flight_never_overwrites_later_data() {
    check_all_ends(&Request::new(WRITE_ZEROES, 0, LENGTH), SLOW_ZEROING, &ALL_ENDS);
}

#[test]
fn trimming_in_flight_never_overwrites_later_data() {
    check_all_ends(&Request::new(TRIM, 0, LENGTH), SLOW_ZEROING, &ALL_ENDS);
}

#[test]
fn durable_writes_in_flight_never_overwrite_later_data() {
    check_all_ends(&Request::new(WRITE, 0, LENGTH).flags(FUA), SLOW_WRITES, &DETECTED_ENDS);
}

#[test]
fn plain_writes_in_flight_never_overwrite_later_data() {
    check_all_ends(&Request::new(WRITE, 0, LENGTH), SLOW_WRITES, &DETECTED_ENDS);
}

#[test]
fn operations_of_a_killed_server_never_overwrite_later_data() {
    let dir = temp_dir();
    let Some(slow) = slow_file(dir.path(), SLOW_ZEROING) else { return };
    let mut server = Builder::serve(&slow.file.file).args(["--quiet"]).start();
    let mut first = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let mut pending = HashMap::new();
    for block in 0..COUNT {
        let request = Request::new(WRITE_ZEROES, block * LENGTH, LENGTH);
        pending.insert(first.send(&request), request);
    }
    assert_eq!(first.recv_reply(&pending).1.error, 0);
    // The process exits only after the kernel has completed its operations.
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

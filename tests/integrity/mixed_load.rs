//! Data integrity under a mixed load: fio verifies its writes over four connections at depth 32,
//! other clients write, flush, trim and zero, and the page cache is dropped continuously. With
//! io_uring and without.

use fastrand::Rng;
use harness::raw::{FLUSH, FUA, NO_HOLE, TRIM, WRITE_ZEROES};
use harness::session::{MODES, Mode, Request, Session};
use harness::{
    Builder, Endpoint, MIB, Program, failing_fsync, noise, require_tool, sparse_image, temp_dir,
};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Size in bytes of the range that fio uses. The part of each other client follows.
const FIO_SIZE: u64 = 4 * 16 * MIB;
const PART_SIZE: u64 = 8 * MIB;
/// Requests in flight of each other client.
const DEPTH: u64 = 16;
/// Size in bytes of a slot. A part has one for each request in flight, so that they never overlap.
const SLOT_SIZE: u64 = PART_SIZE / DEPTH;

/// Drops clean pages of `image` from the page cache.
pub(crate) fn drop_page_cache(image: &Path) {
    let file = File::open(image).unwrap();
    let _ = file.sync_data();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// A client that writes, zeroes, trims and flushes its own part of the disk, and keeps the expected
/// content.
struct Client {
    session: Session,
    random: Rng,
    start: u64,
    expected: Vec<u8>,
    /// Set for trimmed bytes, which may have any value.
    unknown: Vec<bool>,
}

impl Client {
    fn new(target: &Endpoint, mode: Mode, number: u64) -> Client {
        Client {
            session: Session::open(target, mode).unwrap(),
            random: Rng::with_seed(number + 1),
            start: FIO_SIZE + number * PART_SIZE,
            expected: vec![0; PART_SIZE as usize],
            unknown: vec![false; PART_SIZE as usize],
        }
    }

    /// Returns a random request for a slot, and updates the expected content.
    fn request(&mut self, slot: u64) -> Request {
        let (offset, length) = (self.random.u64(..SLOT_SIZE - 1), 1 + self.random.u64(..40_000));
        let length = length.min(SLOT_SIZE - offset);
        let at = slot * SLOT_SIZE + offset;
        let range = at as usize..(at + length) as usize;
        let durable = if self.random.u64(..3) == 0 { FUA } else { 0 };
        let at = self.start + at;
        match self.random.u64(..6) {
            0 => Request::new(FLUSH, 0, 0),
            1 => {
                self.unknown[range].fill(true);
                Request::new(TRIM, at, length).flags(durable)
            }
            2 => {
                self.unknown[range.clone()].fill(false);
                self.expected[range].fill(0);
                let hole = if self.random.u64(..2) == 0 { NO_HOLE } else { 0 };
                Request::new(WRITE_ZEROES, at, length).flags(durable | hole)
            }
            _ => {
                let data = noise(length as usize, self.random.u64(..1 << 40));
                self.unknown[range.clone()].fill(false);
                self.expected[range].copy_from_slice(&data);
                Request::write(at, &data).flags(durable)
            }
        }
    }

    /// Sends a request for each slot, receives the replies in any order, then compares the part
    /// with its expected content.
    fn run_round(&mut self) {
        let mut pending = HashMap::new();
        for slot in 0..DEPTH {
            let request = self.request(slot);
            pending.insert(self.session.send(&request), request);
        }
        while !pending.is_empty() {
            let (cookie, reply) = self.session.recv_reply(&pending);
            assert_eq!(reply.error, 0, "{:?}", pending[&cookie]);
            pending.remove(&cookie);
        }
        let found = self.session.read(self.start, PART_SIZE);
        let differs =
            (0..found.len()).find(|at| !self.unknown[*at] && found[*at] != self.expected[*at]);
        assert_eq!(differs, None, "first wrong byte in the part at {}", self.start);
    }
}

fn check_mixed_load(has_io_uring: bool) {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", FIO_SIZE + MODES.len() as u64 * PART_SIZE);
    let mut builder = Builder::serve(&image).args(["--quiet"]);
    if !has_io_uring {
        let library = failing_fsync(dir.path());
        // The library counts in a file of its own.
        builder = builder.args(["--no-sandbox"]);
        builder = builder.env("LD_PRELOAD", library).env("FAILING_FSYNC_DIR", dir.path());
    }
    let server = builder.start();
    let is_stopping = AtomicBool::new(false);
    thread::scope(|scope| {
        let (is_stopping, image, server) = (&is_stopping, &image, &server);
        scope.spawn(move || {
            while !is_stopping.load(Ordering::Acquire) {
                drop_page_cache(image);
            }
        });
        for (number, mode) in (0..).zip(MODES) {
            scope.spawn(move || {
                let mut client = Client::new(server.endpoint(), mode, number);
                while !is_stopping.load(Ordering::Acquire) {
                    client.run_round();
                }
            });
        }
        let fio = Program::new("fio").words(
            "--name=verify --ioengine=nbd --rw=randrw --rwmixread=30 --bsrange=512-128k \
             --bs_unaligned=0 --size=16m --loops=3 --offset_increment=16m --numjobs=4 \
             --iodepth=32 --verify=crc32c --verify_backlog=256 --verify_fatal=1 \
             --verify_state_save=0 --fsync=50 --randseed=11 --group_reporting",
        );
        let outcome = fio.args([format!("--uri={}", server.uri())]).run();
        is_stopping.store(true, Ordering::Release);
        outcome.succeeded();
    });
    assert_eq!(server.stderr(), "", "no warnings");
    let flushes = std::fs::metadata(dir.path().join("count")).map_or(0, |count| count.len());
    assert!(has_io_uring || flushes > 0, "no fsync was intercepted: io_uring is in use");
}

#[test]
fn data_survives_a_mixed_load() {
    if require_tool("fio") {
        check_mixed_load(true);
    }
}

#[test]
fn data_survives_a_mixed_load_without_io_uring() {
    if require_tool("fio") && require_tool("cc") {
        check_mixed_load(false);
    }
}

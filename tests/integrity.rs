//! Nothing is lost or mixed up while everything happens at once: fio verifies what it writes over
//! four connections at depth 32, others flush, trim and zero meanwhile, and the kernel is made to
//! forget what it has in memory again and again. With io_uring and without.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

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

/// What fio works on, and behind it a part for each of those who disturb it.
const FIO: u64 = 4 * 16 * MIB;
const PART: u64 = 8 * MIB;
/// A disturber asks for so many things at once.
const DEPTH: u64 = 16;
/// Its part is divided into spans, in each of which at most one thing is under way.
const SPAN: u64 = PART / DEPTH;

/// Makes the kernel forget what it has of `image`, as far as that is written.
fn forget(image: &Path) {
    let file = File::open(image).unwrap();
    let _ = file.sync_data();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// Writes, zeroes, trims and flushes in its own part of the disk until told to stop, and knows what
/// must be there at any time.
struct Disturber {
    session: Session,
    dice: Rng,
    start: u64,
    expected: Vec<u8>,
    /// Trimmed bytes may read as anything.
    unknown: Vec<bool>,
}

impl Disturber {
    fn new(target: &Endpoint, mode: Mode, number: u64) -> Disturber {
        Disturber {
            session: Session::open(target, mode).unwrap(),
            dice: Rng::with_seed(number + 1),
            start: FIO + number * PART,
            expected: vec![0; PART as usize],
            unknown: vec![false; PART as usize],
        }
    }

    /// Something to do in a span, and what it does to the bytes there.
    fn thing(&mut self, span: u64) -> Request {
        let (offset, length) = (self.dice.u64(..SPAN - 1), 1 + self.dice.u64(..40_000));
        let length = length.min(SPAN - offset);
        let at = span * SPAN + offset;
        let place = at as usize..(at + length) as usize;
        let durable = if self.dice.u64(..3) == 0 { FUA } else { 0 };
        let at = self.start + at;
        match self.dice.u64(..6) {
            0 => Request::new(FLUSH, 0, 0),
            1 => {
                self.unknown[place].fill(true);
                Request::new(TRIM, at, length).flags(durable)
            }
            2 => {
                self.unknown[place.clone()].fill(false);
                self.expected[place].fill(0);
                let hole = if self.dice.u64(..2) == 0 { NO_HOLE } else { 0 };
                Request::new(WRITE_ZEROES, at, length).flags(durable | hole)
            }
            _ => {
                let data = noise(length as usize, self.dice.u64(..1 << 40));
                self.unknown[place.clone()].fill(false);
                self.expected[place].copy_from_slice(&data);
                Request::write(at, &data).flags(durable)
            }
        }
    }

    /// Many things at once, answered in whatever order; then everything is read and compared.
    fn round(&mut self) {
        let mut pending = HashMap::new();
        for span in 0..DEPTH {
            let request = self.thing(span);
            pending.insert(self.session.send(&request), request);
        }
        while !pending.is_empty() {
            let (cookie, answer) = self.session.recv_reply(&pending);
            assert_eq!(answer.error, 0, "{:?}", pending[&cookie]);
            pending.remove(&cookie);
        }
        let found = self.session.read(self.start, PART);
        let differs =
            (0..found.len()).find(|at| !self.unknown[*at] && found[*at] != self.expected[*at]);
        assert_eq!(differs, None, "of the part that begins at {}", self.start);
    }
}

/// Everything at once.
fn everything_at_once(has_io_uring: bool) {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", FIO + MODES.len() as u64 * PART);
    let mut builder = Builder::serve(&image).args(["--quiet"]);
    if !has_io_uring {
        let library = failing_fsync(dir.path());
        builder = builder.env("LD_PRELOAD", library).env("FAILING_FSYNC_DIR", dir.path());
    }
    let server = builder.start();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let (over, image, server) = (&over, &image, &server);
        scope.spawn(move || {
            while !over.load(Ordering::Acquire) {
                forget(image);
            }
        });
        for (number, mode) in (0..).zip(MODES) {
            scope.spawn(move || {
                let mut disturber = Disturber::new(server.endpoint(), mode, number);
                while !over.load(Ordering::Acquire) {
                    disturber.round();
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
        over.store(true, Ordering::Release);
        outcome.succeeded();
    });
    assert_eq!(server.stderr(), "", "nothing went wrong");
    let flushes = std::fs::metadata(dir.path().join("count")).map_or(0, |count| count.len());
    assert!(has_io_uring || flushes > 0, "it was not seen to flush: with io_uring after all?");
}

#[test]
fn nothing_is_lost_or_mixed_up_while_everything_happens_at_once() {
    if require_tool("fio") {
        everything_at_once(true);
    }
}

#[test]
fn nothing_is_lost_or_mixed_up_where_there_is_no_io_uring() {
    if require_tool("fio") && require_tool("cc") {
        everything_at_once(false);
    }
}

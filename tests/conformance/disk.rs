//! Points 16 and 17: what becomes of zeroes, and when data is durable.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{MIB, compile, failing_fsync, noise, read_at, require_tool, skip, temp_dir};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size of the patch of noise into which the tests of edges zero.
const PATCH: u64 = 64 << 10;

#[test]
fn point_16_zeroes_are_zeroes_to_the_byte_and_holes_only_where_allowed() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        if session.offers(WRITE_ZEROES) {
            edges_are_exact(&mut session);
        }
        if session.offers(TRIM) {
            trim_stays_inside(&mut session);
        }
    }
    zeroes_punch_unless_told_not_to();
}

/// Spans within the patch whose edges do not align with anything.
const SPANS: [(u64, u64); 8] = [
    (0, PATCH),
    (1, 1),
    (511, 2),
    (4095, 2),
    (4096, 4096),
    (4097, 8190),
    (1000, 50_000),
    (1, PATCH - 2),
];

fn edges_are_exact(session: &mut Session) {
    let fast = if session.flags & SEND_FAST_ZERO != 0 { FAST_ZERO } else { 0 };
    let mut at = MIB + 1;
    for flags in [0, NO_HOLE, FUA, NO_HOLE | FUA, fast, fast | NO_HOLE] {
        for (offset, length) in SPANS {
            let before = noise(PATCH as usize, at);
            session.ok(Request::write(at, &before));
            let answer = session.ask(Request::new(WRITE_ZEROES, at + offset, length).flags(flags));
            let mut expected = before;
            if answer.error == 0 {
                expected[offset as usize..(offset + length) as usize].fill(0);
            } else {
                assert_ne!(flags & FAST_ZERO, 0, "only FAST_ZERO may be refused");
                assert_eq!(answer.error, ENOTSUP, "the refusal of FAST_ZERO");
            }
            let same = session.read(at, PATCH) == expected;
            assert!(same, "{length} zeroes at {offset} of the patch, flags {flags:#x}");
            at += PATCH + 1;
        }
    }
}

fn trim_stays_inside(session: &mut Session) {
    for (offset, length) in SPANS {
        let before = noise(PATCH as usize, offset);
        session.ok(Request::write(MIB, &before));
        session.ok(Request::new(TRIM, MIB + offset, length));
        let after = session.read(MIB, PATCH);
        let (start, end) = (offset as usize, (offset + length) as usize);
        let same = after[..start] == before[..start] && after[end..] == before[end..];
        assert!(same, "TRIM of {length} at {offset} changed its neighbours");
    }
}

/// Bytes that the file system has allocated for the image.
fn allocated(image: &Path) -> u64 {
    File::open(image).unwrap().metadata().unwrap().blocks() * 512
}

fn zeroes_punch_unless_told_not_to() {
    const SPAN: u64 = 4 * MIB;
    /// What a file system may need for itself.
    const SLACK: u64 = 64 << 10;
    let Some(ours) = Ours::start("what the image occupies", 64 * MIB, &[]) else { return };
    for (i, mode) in MODES.into_iter().enumerate() {
        let mut session = ours.session(mode);
        let at = i as u64 * 4 * SPAN;
        let data = noise(SPAN as usize, 16);
        let mut after = |request: Request| {
            session.ok(request);
            session.ok(Request::new(FLUSH, 0, 0));
            allocated(&ours.image)
        };
        let empty = allocated(&ours.image);
        let full = after(Request::write(at, &data));
        assert!(full >= empty + SPAN, "noise occupies its space");
        let kept = after(Request::new(WRITE_ZEROES, at, SPAN).flags(NO_HOLE));
        assert!(kept >= full, "NO_HOLE keeps the space ({mode:?})");
        for punching in [WRITE_ZEROES, TRIM] {
            after(Request::write(at, &data));
            let punched = after(Request::new(punching, at, SPAN));
            assert!(punched <= empty + SLACK, "command {punching} gives the space back ({mode:?})");
        }
        let provisioned = after(Request::new(WRITE_ZEROES, at, SPAN).flags(NO_HOLE));
        assert!(provisioned >= empty + SPAN, "NO_HOLE takes the space for a hole ({mode:?})");
        assert!(session.read(at, SPAN).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn point_17_flush_and_fua_wait_for_the_disk_and_a_failure_is_not_forgotten() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        session.ok(Request::write(0, &noise(4096, 17)));
        if session.offers(FLUSH) {
            session.ok(Request::new(FLUSH, 0, 0));
        }
        if session.flags & SEND_FUA != 0 {
            session.ok(Request::write(4096, &noise(4096, 18)).flags(FUA));
        }
    }
    durable_before_it_is_answered();
    written_before_it_is_answered();
    a_failed_sync_stays_failed();
    a_failed_fua_stays_failed_too();
}

/// A server of our own with `failing_fsync.c` in it; the directory that steers it.
fn with_steered_sync(what: &str) -> Option<(Ours, PathBuf)> {
    if !require_tool("cc") {
        return None;
    }
    let mut steering = PathBuf::new();
    let ours = Ours::start_with(what, 8 * MIB, |builder, _, dir| {
        let library = failing_fsync(dir.path());
        steering = dir.path().to_owned();
        builder.env("LD_PRELOAD", library).env("FAILING_FSYNC_DIR", dir.path())
    })?;
    Some((ours, steering))
}

fn durable_before_it_is_answered() {
    let Some((ours, steering)) = with_steered_sync("when data is durable") else { return };
    let syncs = || std::fs::metadata(steering.join("count")).map_or(0, |m| m.len());
    for mode in MODES {
        let mut session = ours.session(mode);
        let mut other = ours.session(Mode::Simple);
        let requests = [
            Request::new(FLUSH, 0, 0),
            Request::write(0, &[1; 4096]).flags(FUA),
            Request::new(WRITE_ZEROES, 0, 4096).flags(FUA),
            Request::new(WRITE_ZEROES, 100, 100).flags(FUA | NO_HOLE),
            Request::new(TRIM, 0, 4096).flags(FUA),
        ];
        for request in requests {
            other.ok(Request::write(8192, &[2; 4096]));
            let before = syncs();
            let command = request.command;
            session.ok(request);
            assert!(syncs() > before, "command {command} is answered before the disk has it");
        }
    }
}

/// The same as the kernel sees it, which knows what it still has to write.
fn written_before_it_is_answered() {
    let what = "what the kernel has written";
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let tool = compile(dir.path(), "tests/conformance/unwritten.c", &[]);
    let Some(ours) = Ours::start(what, 8 * MIB, &[]) else { return };
    let unwritten = |length: u64| {
        let asked = Command::new(&tool).arg(&ours.image).args(["0", &length.to_string()]).output();
        let asked = asked.unwrap();
        assert!(matches!(asked.status.code(), Some(0 | 2)), "{asked:?}");
        String::from_utf8(asked.stdout).unwrap().trim().parse::<u64>().ok()
    };
    let mut other = ours.session(Mode::Simple);
    other.ok(Request::write(0, &[1; 8192]));
    File::open(&ours.image).unwrap().sync_all().unwrap();
    if unwritten(0) != Some(0) {
        return skip(what, "the kernel does not tell, or the file system is in memory");
    }
    for mode in MODES {
        let mut session = ours.session(mode);
        // A write is durable by itself; the others are, with everything before.
        let requests = [
            (Request::write(0, &[1; 4096]).flags(FUA), 4096),
            (Request::new(FLUSH, 0, 0), 0),
            (Request::write(0, &[0; 8192]).flags(FUA), 8192),
            (Request::new(WRITE_ZEROES, 100, 100).flags(FUA | NO_HOLE), 0),
            (Request::new(WRITE_ZEROES, 0, 4096).flags(FUA), 0),
            (Request::new(TRIM, 0, 8192).flags(FUA), 0),
        ];
        for (request, length) in requests {
            other.ok(Request::write(16384, &[2; 4096]));
            assert_ne!(unwritten(0), Some(0));
            let command = request.command;
            session.ok(request);
            assert_eq!(unwritten(length), Some(0), "command {command} is answered too early");
        }
    }
}

/// A write that wanted to be durable and was not leaves the disk as doubtful as a failed FLUSH.
fn a_failed_fua_stays_failed_too() {
    let write = Request::write(4096, &[3; 4096]).flags(FUA);
    for request in [write, Request::new(WRITE_ZEROES, 4096, 4096).flags(FUA)] {
        let Some((ours, steering)) = with_steered_sync("a failing FUA") else { return };
        let mut session = ours.session(Mode::Extended);
        let mut other = ours.session(Mode::Simple);
        other.ok(Request::write(4096, &[2; 4096]));
        File::create(steering.join("fail")).unwrap();
        session.refused(request, &[EIO]);
        std::fs::remove_file(steering.join("fail")).unwrap();
        other.refused(Request::new(FLUSH, 0, 0), &[EIO]);
    }
}

fn a_failed_sync_stays_failed() {
    for mode in MODES {
        let Some((ours, steering)) = with_steered_sync("a failing fsync") else { return };
        let mut session = ours.session(mode);
        let mut other = ours.session(mode);
        let flush = || Request::new(FLUSH, 0, 0);
        session.ok(Request::write(0, &[1; 4096]));
        session.ok(flush());
        session.ok(Request::write(0, &[2; 4096]));

        File::create(steering.join("fail")).unwrap();
        session.refused(flush(), &[EIO]);
        other.refused(Request::write(4096, &[3; 4096]).flags(FUA), &[EIO]);

        std::fs::remove_file(steering.join("fail")).unwrap();
        session.refused(flush(), &[EIO]);
        other.refused(flush(), &[EIO]);
        ours.session(mode).refused(flush(), &[EIO]);
        assert_eq!(read_at(&ours.image, 0, 4096), [2; 4096], "reads and writes are not at fault");
    }
}

//! Effects of WRITE_ZEROES and TRIM on data and allocation, and durability after FLUSH and FUA.

use crate::subject::{Ours, Subject};
use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{MIB, compile, failing_fsync, noise, read_at, require_tool, skip, temp_dir};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Size in bytes of a block of noise, parts of which are zeroed or trimmed.
const BLOCK: u64 = 64 << 10;

/// "... the server MAY use trimming to zero out the area ...; but it MUST ensure that the data
/// reads back as zero" ("Request types", WRITE_ZEROES).
#[test]
fn write_zeroes_is_exact_to_the_byte() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        if session.offers(WRITE_ZEROES) {
            check_write_zeroes(&mut session);
        }
    }
}

/// "A server MAY discard *length* bytes starting at offset, but is not required to" ("Request
/// types", TRIM).
#[test]
fn trim_changes_only_its_range() {
    let subject = Subject::any();
    for mut session in subject.sessions() {
        if session.offers(TRIM) {
            check_trim(&mut session);
        }
    }
}

/// Offset and length of ranges within a block, most of them unaligned.
const RANGES: [(u64, u64); 8] = [
    (0, BLOCK),
    (1, 1),
    (511, 2),
    (4095, 2),
    (4096, 4096),
    (4097, 8190),
    (1000, 50_000),
    (1, BLOCK - 2),
];

fn check_write_zeroes(session: &mut Session) {
    let fast = if session.flags & SEND_FAST_ZERO != 0 { FAST_ZERO } else { 0 };
    let mut at = MIB + 1;
    for flags in [0, NO_HOLE, FUA, NO_HOLE | FUA, fast, fast | NO_HOLE] {
        for (offset, length) in RANGES {
            let before = noise(BLOCK as usize, at);
            session.ok(Request::write(at, &before));
            let answer = session.ask(Request::new(WRITE_ZEROES, at + offset, length).flags(flags));
            let mut expected = before;
            if answer.error == 0 {
                expected[offset as usize..(offset + length) as usize].fill(0);
            } else {
                assert_ne!(flags & FAST_ZERO, 0, "a refusal without FAST_ZERO");
                assert_eq!(answer.error, ENOTSUP, "error of FAST_ZERO");
            }
            let same = session.read(at, BLOCK) == expected;
            assert!(same, "{length} zeroes at {offset} of the block, flags {flags:#x}");
            at += BLOCK + 1;
        }
    }
}

fn check_trim(session: &mut Session) {
    for (offset, length) in RANGES {
        let before = noise(BLOCK as usize, offset);
        session.ok(Request::write(MIB, &before));
        session.ok(Request::new(TRIM, MIB + offset, length));
        let after = session.read(MIB, BLOCK);
        let (start, end) = (offset as usize, (offset + length) as usize);
        let same = after[..start] == before[..start] && after[end..] == before[end..];
        assert!(same, "TRIM of {length} at {offset} changed other bytes");
    }
}

/// Bytes that the file system has allocated for the image.
fn allocated(image: &Path) -> u64 {
    File::open(image).unwrap().metadata().unwrap().blocks() * 512
}

/// "... the client MAY set the command flag `NBD_CMD_FLAG_NO_HOLE` to inform the server that the
/// area MUST be fully provisioned" ("Request types", WRITE_ZEROES).
#[test]
fn write_zeroes_punches_holes_unless_no_hole() {
    const LENGTH: u64 = 4 * MIB;
    /// Metadata of the file system, in bytes.
    const SLACK: u64 = 64 << 10;
    let Some(ours) = Ours::start("allocation of the image", 64 * MIB, &[]) else { return };
    for (i, mode) in MODES.into_iter().enumerate() {
        let mut session = ours.session(mode);
        let at = i as u64 * 4 * LENGTH;
        let data = noise(LENGTH as usize, 16);
        let mut after = |request: Request| {
            session.ok(request);
            session.ok(Request::new(FLUSH, 0, 0));
            allocated(&ours.image)
        };
        let empty = allocated(&ours.image);
        let full = after(Request::write(at, &data));
        assert!(full >= empty + LENGTH, "written data is allocated");
        let kept = after(Request::new(WRITE_ZEROES, at, LENGTH).flags(NO_HOLE));
        assert!(kept >= full, "NO_HOLE keeps the allocation ({mode:?})");
        for punching in [WRITE_ZEROES, TRIM] {
            after(Request::write(at, &data));
            let punched = after(Request::new(punching, at, LENGTH));
            assert!(punched <= empty + SLACK, "command {punching} deallocates ({mode:?})");
        }
        let provisioned = after(Request::new(WRITE_ZEROES, at, LENGTH).flags(NO_HOLE));
        assert!(provisioned >= empty + LENGTH, "NO_HOLE allocates a hole ({mode:?})");
        assert!(session.read(at, LENGTH).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn flush_and_fua_succeed() {
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
}

/// Starts a server with `failing_fsync.c` preloaded; also returns the directory that controls it.
fn with_failing_fsync(what: &str) -> Option<(Ours, PathBuf)> {
    if !require_tool("cc") {
        return None;
    }
    let mut control = PathBuf::new();
    let ours = Ours::start_with(what, 8 * MIB, |builder, _, dir| {
        let library = failing_fsync(dir.path());
        control = dir.path().to_owned();
        // The library counts in a file of its own.
        let builder = builder.args(["--no-sandbox"]);
        builder.env("LD_PRELOAD", library).env("FAILING_FSYNC_DIR", dir.path())
    })?;
    Some((ours, control))
}

/// "The server MUST NOT send a successful reply header for this request before all write requests
/// for which a reply has already been sent to the client have reached permanent storage (using
/// fsync() or similar)" ("Request types", FLUSH).
#[test]
fn flush_and_fua_sync_before_the_reply() {
    let Some((ours, control)) = with_failing_fsync("calls of fsync") else { return };
    let syncs = || std::fs::metadata(control.join("count")).map_or(0, |m| m.len());
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
            assert!(syncs() > before, "command {command} is replied to before a sync");
        }
    }
}

/// "A server MUST NOT reply to a command that has `NBD_CMD_FLAG_FUA` set in its command flags until
/// the data (if any) written by that command is persisted to non-volatile storage" ("Ordering of
/// messages and writes"). cachestat(2) counts the dirty pages of the kernel.
#[test]
fn flush_and_fua_leave_no_dirty_pages() {
    let what = "dirty pages of the kernel";
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let tool = compile(dir.path(), "tests/conformance/dirty_pages.c", &[]);
    let Some(ours) = Ours::start(what, 8 * MIB, &[]) else { return };
    let dirty_pages = |length: u64| {
        let asked = Command::new(&tool).arg(&ours.image).args(["0", &length.to_string()]).output();
        let asked = asked.unwrap();
        assert!(matches!(asked.status.code(), Some(0 | 2)), "{asked:?}");
        String::from_utf8(asked.stdout).unwrap().trim().parse::<u64>().ok()
    };
    let mut other = ours.session(Mode::Simple);
    other.ok(Request::write(0, &[1; 8192]));
    File::open(&ours.image).unwrap().sync_all().unwrap();
    if dirty_pages(0) != Some(0) {
        return skip(what, "no cachestat(2), or a file system in memory");
    }
    for mode in MODES {
        let mut session = ours.session(mode);
        // WRITE with FUA persists only its own range, the others all earlier writes.
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
            assert_ne!(dirty_pages(0), Some(0));
            let command = request.command;
            session.ok(request);
            assert_eq!(dirty_pages(length), Some(0), "command {command} is replied to too early");
        }
    }
}

/// The specification defines FUA for the data of its own command ("Ordering of messages and
/// writes"), and does not say what its failure means for earlier writes. flexnbd treats the failed
/// fsync like that of a FLUSH: earlier writes may be lost, so that every later FLUSH fails.
#[test]
fn flush_fails_after_a_failed_fua() {
    let write = Request::write(4096, &[3; 4096]).flags(FUA);
    for request in [write, Request::new(WRITE_ZEROES, 4096, 4096).flags(FUA)] {
        let Some((ours, control)) = with_failing_fsync("a failing FUA") else { return };
        let mut session = ours.session(Mode::Extended);
        let mut other = ours.session(Mode::Simple);
        other.ok(Request::write(4096, &[2; 4096]));
        File::create(control.join("fail")).unwrap();
        session.refused(request, &[EIO]);
        std::fs::remove_file(control.join("fail")).unwrap();
        other.refused(Request::new(FLUSH, 0, 0), &[EIO]);
    }
}

/// The kernel may drop dirty pages after a failed fsync, so that a later fsync that succeeds proves
/// nothing.
#[test]
fn flush_fails_after_a_failed_flush() {
    for mode in MODES {
        let Some((ours, control)) = with_failing_fsync("a failing fsync") else { return };
        let mut session = ours.session(mode);
        let mut other = ours.session(mode);
        let flush = || Request::new(FLUSH, 0, 0);
        session.ok(Request::write(0, &[1; 4096]));
        session.ok(flush());
        session.ok(Request::write(0, &[2; 4096]));

        File::create(control.join("fail")).unwrap();
        session.refused(flush(), &[EIO]);
        other.refused(Request::write(4096, &[3; 4096]).flags(FUA), &[EIO]);

        std::fs::remove_file(control.join("fail")).unwrap();
        session.refused(flush(), &[EIO]);
        other.refused(flush(), &[EIO]);
        ours.session(mode).refused(flush(), &[EIO]);
        assert_eq!(read_at(&ours.image, 0, 4096), [2; 4096], "READ and WRITE still work");
    }
}

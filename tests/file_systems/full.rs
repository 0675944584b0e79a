//! Full file systems, and devices that have become shorter: the write that finds no place fails with the
//! right error, and nothing else does.

use crate::mounted::{KINDS, Mounted};
use harness::host::Host;
use harness::mount::Loop;
use harness::raw::*;
use harness::session::*;
use harness::{
    Builder, Endpoint, MIB, compile, require_root, require_tool, skip, sparse_file, sparse_image,
    temp_dir,
};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::{self, File};
use std::path::Path;

/// Size of an image, of which one half is allocated.
const SIZE: u64 = 8 * MIB;
const HALF: u64 = SIZE / 2;

/// Takes all space.
fn fill(filler: &Path) {
    let file = File::create(filler).unwrap();
    let (mut at, mut length) = (0, 64 << 20);
    while length >= 1024 {
        match fallocate(&file, FallocateFlags::empty(), at, length) {
            Ok(()) => at += length,
            Err(_) => length /= 2,
        }
    }
}

fn check_full(directory: &Path, flags: &[&str]) {
    let host = Host::new(directory, "a");
    sparse_file(&host.image, SIZE);
    harness::write_at(&host.image, 0, &vec![1; HALF as usize]);
    File::open(&host.image).unwrap().sync_all().unwrap();
    let server = host.mode("serve").args(flags).start();
    let connect = || Session::open(&Endpoint::Tcp(host.address), Mode::Extended).unwrap();
    let (mut victim, mut other) = (connect(), connect());
    let filler = directory.join("filler");
    fill(&filler);
    let megabyte = vec![2; MIB as usize];
    for flags in [0, FUA] {
        victim.refused(Request::write(HALF, &megabyte).flags(flags), &[ENOSPC]);
        let zeroes = Request::new(WRITE_ZEROES, HALF + MIB, MIB).flags(NO_HOLE | flags);
        victim.refused(zeroes, &[ENOSPC]);
        other.ok(Request::write(0, &megabyte).flags(flags));
    }
    server.wait_for_stderr("answered no space");
    other.ok(Request::new(FLUSH, 0, 0));
    assert_eq!(other.read(0, MIB), megabyte);
    assert_eq!(host.status_of("flush_failed"), "", "no data is lost");
    fs::remove_file(filler).unwrap();
    victim.ok(Request::write(HALF, &megabyte).flags(FUA));
    assert_eq!(victim.read(HALF, MIB), megabyte);
}

#[test]
fn only_the_write_without_space_fails() {
    for kind in KINDS.iter().filter(|kind| ["xfs", "ext4", "tmpfs"].contains(&kind.name)) {
        // A new file system each time: one frees the space of a deleted image when it likes.
        for flags in [&[][..], &["--direct"]] {
            if kind.name == "tmpfs" && !flags.is_empty() {
                continue;
            }
            let Some(mounted) = Mounted::new(*kind) else { continue };
            check_full(mounted.path(), flags);
        }
    }
}

/// The kernel answers a write beyond the end of a device with `ENOSPC`, as if it were full.
#[test]
fn writes_beyond_a_shrunk_device_fail_with_eio() {
    if !require_root("a device that shrinks") || !require_tool("cc") {
        return;
    }
    for (flags, has_io_uring) in [("", true), ("", false), ("--direct", true)] {
        let dir = temp_dir();
        let file = sparse_image(dir.path(), "file", SIZE);
        let Some(device) = Loop::attach(&file) else {
            return skip("a device that shrinks", "there is no loop device");
        };
        let mut builder = Builder::serve(device.path()).args(flags.split_whitespace());
        if !has_io_uring {
            let options = ["-shared", "-fPIC", "-ldl"];
            let quirks = compile(dir.path(), "tests/file_systems/quirks.c", &options);
            builder = builder.env("LD_PRELOAD", quirks);
        }
        let server = builder.start();
        let mut session = Session::open(server.endpoint(), Mode::Extended).unwrap();
        File::options().write(true).open(&file).unwrap().set_len(HALF).unwrap();
        harness::Program::new("losetup").words("-c").args([device.path()]).ok();
        for offset in [HALF, SIZE - 4096] {
            for flags in [0, FUA] {
                session.refused(Request::write(offset, &[1; 4096]).flags(flags), &[EIO]);
                let zeroes = Request::new(WRITE_ZEROES, offset, 4096).flags(NO_HOLE | flags);
                session.refused(zeroes, &[EIO]);
            }
            session.refused(Request::new(READ, offset, 4096), &[EIO]);
        }
        server.wait_for_stderr("has become shorter");
        session.ok(Request::write(HALF - 4096, &[2; 4096]).flags(FUA));
        session.ok(Request::new(FLUSH, 0, 0));
    }
}

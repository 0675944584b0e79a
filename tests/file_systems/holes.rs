//! File systems whose `SEEK_DATA` is wrong, inconsistent or slow.

use harness::host::Host;
use harness::raw::*;
use harness::session::*;
use harness::{
    Builder, GIB, MIB, Server, compile, noise, read_at, require_tool, sparse_image, temp_dir,
};
use std::path::{Path, PathBuf};

const SIZE: u64 = 4 * MIB;
/// `f_type` of NFS.
const NFS: &str = "6969";
/// The most `lseek(2)` calls that one request may cause: few enough that their time stays small.
const SEEKS_MAX: u64 = 10_000;

fn odd(dir: &Path) -> PathBuf {
    compile(dir, "tests/file_systems/odd.c", &["-shared", "-fPIC", "-ldl"])
}

/// A server of `image` with the variables of `odd.c` in its environment.
fn serve(image: &Path, dir: &Path, oddities: &[(&str, &str)], arguments: &[&str]) -> Server {
    let builder = Builder::serve(image).args(arguments).env("LD_PRELOAD", odd(dir));
    oddities.iter().fold(builder, |builder, (name, value)| builder.env(name, value)).start()
}

/// An image without holes, filled with noise.
fn full(dir: &Path) -> (PathBuf, Vec<u8>) {
    let (image, content) = (dir.join("image"), noise(SIZE as usize, 7));
    std::fs::write(&image, &content).unwrap();
    (image, content)
}

fn status(session: &mut Session, size: u64) -> Vec<(u64, u64)> {
    session.ok(Request::new(BLOCK_STATUS, 0, size.min(2 * GIB))).extents
}

#[test]
fn zeros_are_written_over_falsely_reported_holes() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let (image, mut content) = full(dir.path());
    let server = serve(&image, dir.path(), &[("ODD_SEEK", "hole"), ("ODD_FALLOCATE", "95")], &[]);
    let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let changes = [(0, 4096), (10_000, 100_000), (MIB, MIB), (SIZE - 700, 700)];
    for (offset, length) in changes {
        for (at, command, flags) in
            [(0, WRITE, 0), (1, WRITE, FUA), (2, WRITE_ZEROES, 0), (3, WRITE_ZEROES, FUA)]
        {
            let old = noise(length as usize, at);
            session.ok(Request::write(offset, &old));
            session.ok(Request::new(command, offset, length).flags(flags));
            content[offset as usize..][..length as usize].fill(0);
            let found = read_at(&image, 0, SIZE as usize);
            assert!(found == content, "command {command} flags {flags} at {offset} of {length}");
        }
    }
}

#[test]
fn holes_on_unknown_file_systems_are_data() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let (image, content) = full(dir.path());
    let wrong = [("ODD_SEEK", "hole"), ("ODD_TYPE", NFS)];
    let known = [("ODD_SEEK", "hole")];
    for (oddities, policy, is_believed) in [
        (&wrong[..], &[][..], false),
        (&wrong, &["--holes", "auto"], false),
        (&wrong, &["--holes", "trust"], true),
        (&known, &["--holes", "ignore"], false),
        (&known, &[], true),
    ] {
        let server = serve(&image, dir.path(), oddities, policy);
        let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
        let state = if is_believed { STATE_HOLE | STATE_ZERO } else { 0 };
        assert_eq!(status(&mut session, SIZE), [(SIZE, state)], "{oddities:?}, {policy:?}");
        let found = session.read(0, SIZE) == content;
        assert_eq!(found, !is_believed, "{oddities:?}, {policy:?}");
    }
}

#[test]
fn a_migration_copies_unverified_holes_as_data() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let library = odd(dir.path());
    let here = Host::new(dir.path(), "here").env("LD_PRELOAD", library.to_str().unwrap());
    let here = here.env("ODD_SEEK", "hole").env("ODD_TYPE", NFS);
    let there = Host::new(dir.path(), "there");
    let mut content = noise(SIZE as usize, 8);
    content[MIB as usize..2 * MIB as usize].fill(0);
    std::fs::write(&here.image, &content).unwrap();
    sparse_image(dir.path(), "there.img", SIZE);
    let (mut listener, mut server) = (there.listen(), here.serve());
    let reply = here.mirror_to(there.address, &[]);
    assert!(reply.starts_with("0:"), "{reply}");
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    assert!(read_at(&there.image, 0, SIZE as usize) == content);
}

#[test]
fn inconsistent_seek_results_are_reported_as_data() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let (image, content) = full(dir.path());
    for how in ["stuck", "back"] {
        let count = dir.path().join(how);
        let oddities = [("ODD_SEEK", how), ("ODD_SEEK_COUNT", count.to_str().unwrap())];
        let server = serve(&image, dir.path(), &oddities, &["--holes", "trust"]);
        let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
        let extents = session.ok(Request::new(BLOCK_STATUS, MIB, MIB)).extents;
        assert_eq!(extents, [(MIB, 0)], "{how}");
        assert!(session.read(0, SIZE) == content, "{how}");
        let seeks = std::fs::metadata(&count).unwrap().len();
        assert!(seeks <= 10, "{how}: {seeks} calls");
    }
}

#[test]
fn block_status_makes_a_bounded_number_of_seeks() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4 * GIB);
    let count = dir.path().join("count");
    let oddities = [("ODD_SEEK", "striped"), ("ODD_SEEK_COUNT", count.to_str().unwrap())];
    let server = serve(&image, dir.path(), &oddities, &[]);
    let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
    let extents = status(&mut session, 2 * GIB);
    assert!(!extents.is_empty() && extents.iter().all(|(length, _)| *length == 4096));
    let seeks = std::fs::metadata(&count).unwrap().len();
    assert!(seeks <= SEEKS_MAX, "{seeks} calls for {} extents", extents.len());
    let one = session.ok(Request::new(BLOCK_STATUS, 0, 2 * GIB - 512).flags(REQ_ONE)).extents;
    assert_eq!(one, [(4096, 0)]);
}

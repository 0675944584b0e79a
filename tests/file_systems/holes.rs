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
/// Limit of the `lseek(2)` calls for one request, which bounds their time.
const SEEKS_MAX: u64 = 10_000;

fn quirks_library(dir: &Path) -> PathBuf {
    compile(dir, "tests/file_systems/quirks.c", &["-shared", "-fPIC", "-ldl"])
}

/// Starts a server of `image` with these variables of `quirks.c`.
fn serve(image: &Path, dir: &Path, quirks: &[(&str, &str)], arguments: &[&str]) -> Server {
    // The library counts in a file of its own.
    let builder = Builder::serve(image).args(["--no-sandbox"]).args(arguments);
    let builder = builder.env("LD_PRELOAD", quirks_library(dir));
    quirks.iter().fold(builder, |builder, (name, value)| builder.env(name, value)).start()
}

/// An image without holes, filled with noise.
fn image_without_holes(dir: &Path) -> (PathBuf, Vec<u8>) {
    let (image, content) = (dir.join("image"), noise(SIZE as usize, 7));
    std::fs::write(&image, &content).unwrap();
    (image, content)
}

fn block_status(session: &mut Session, size: u64) -> Vec<(u64, u64)> {
    session.ok(Request::new(BLOCK_STATUS, 0, size.min(2 * GIB))).extents
}

#[test]
fn zeros_are_written_over_falsely_reported_holes() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let (image, mut content) = image_without_holes(dir.path());
    let server =
        serve(&image, dir.path(), &[("QUIRK_SEEK", "hole"), ("QUIRK_FALLOCATE", "95")], &[]);
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
    let (image, content) = image_without_holes(dir.path());
    let unknown = [("QUIRK_SEEK", "hole"), ("QUIRK_TYPE", NFS)];
    let known = [("QUIRK_SEEK", "hole")];
    for (quirks, policy, is_trusted) in [
        (&unknown[..], &[][..], false),
        (&unknown, &["--holes", "auto"], false),
        (&unknown, &["--holes", "trust"], true),
        (&known, &["--holes", "ignore"], false),
        (&known, &[], true),
    ] {
        let server = serve(&image, dir.path(), quirks, policy);
        let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
        let state = if is_trusted { STATE_HOLE | STATE_ZERO } else { 0 };
        assert_eq!(block_status(&mut session, SIZE), [(SIZE, state)], "{quirks:?}, {policy:?}");
        let found = session.read(0, SIZE) == content;
        assert_eq!(found, !is_trusted, "{quirks:?}, {policy:?}");
    }
}

#[test]
fn a_migration_copies_unverified_holes_as_data() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let library = quirks_library(dir.path());
    let source = Host::new(dir.path(), "source").env("LD_PRELOAD", library.to_str().unwrap());
    let source = source.env("QUIRK_SEEK", "hole").env("QUIRK_TYPE", NFS);
    let destination = Host::new(dir.path(), "destination");
    let mut content = noise(SIZE as usize, 8);
    content[MIB as usize..2 * MIB as usize].fill(0);
    std::fs::write(&source.image, &content).unwrap();
    sparse_image(dir.path(), "destination.img", SIZE);
    let (mut listener, mut server) = (destination.listen(), source.serve());
    let reply = source.mirror_to(destination.address, &[]);
    assert!(reply.starts_with("0:"), "{reply}");
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    assert!(read_at(&destination.image, 0, SIZE as usize) == content);
}

#[test]
fn inconsistent_seek_results_are_reported_as_data() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let (image, content) = image_without_holes(dir.path());
    for quirk in ["stuck", "back"] {
        let count = dir.path().join(quirk);
        let quirks = [("QUIRK_SEEK", quirk), ("QUIRK_SEEK_COUNT", count.to_str().unwrap())];
        let server = serve(&image, dir.path(), &quirks, &["--holes", "trust"]);
        let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
        let extents = session.ok(Request::new(BLOCK_STATUS, MIB, MIB)).extents;
        assert_eq!(extents, [(MIB, 0)], "{quirk}");
        assert!(session.read(0, SIZE) == content, "{quirk}");
        let seeks = std::fs::metadata(&count).unwrap().len();
        assert!(seeks <= 10, "{quirk}: {seeks} calls");
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
    let quirks = [("QUIRK_SEEK", "striped"), ("QUIRK_SEEK_COUNT", count.to_str().unwrap())];
    let server = serve(&image, dir.path(), &quirks, &[]);
    let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
    let extents = block_status(&mut session, 2 * GIB);
    assert!(!extents.is_empty() && extents.iter().all(|(length, _)| *length == 4096));
    let seeks = std::fs::metadata(&count).unwrap().len();
    assert!(seeks <= SEEKS_MAX, "{seeks} calls for {} extents", extents.len());
    let one = session.ok(Request::new(BLOCK_STATUS, 0, 2 * GIB - 512).flags(REQ_ONE)).extents;
    assert_eq!(one, [(4096, 0)]);
}

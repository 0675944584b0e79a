//! nbdkit as a source of known data, as the verifier of a copy, and as a proxy.

use crate::{assert_same_files, image_with_holes};
use harness::{
    Endpoint, MIB, Program, Served, allocated, for_each_transport_and_style, require_tools,
};

/// Runs nbdkit with these arguments, and copies its disk to flexnbd (`to_flexnbd`) or the reverse.
#[track_caller]
fn copy(nbdkit: &str, served: &Served, to_flexnbd: bool) {
    let uri = served.uri();
    let (from, to) = if to_flexnbd { ("$uri", uri.as_str()) } else { (uri.as_str(), "$uri") };
    let script = format!("nbdcopy --connections=4 --flush \"{from}\" \"{to}\"");
    Program::new("nbdkit").words("-U -").words(nbdkit).args(["--run", &script]).ok();
}

#[test]
fn the_nbdkit_pattern_is_copied_exactly() {
    if !require_tools(&["nbdkit", "nbdcopy"]) {
        return;
    }
    for_each_transport_and_style(|served, _| {
        copy("pattern size=48M", served, true);
        let bytes = std::fs::read(&served.image).unwrap();
        let (head, tail) = bytes.split_at(48 << 20);
        // The pattern is its own offset, in 8 bytes, big-endian.
        let is_offset = |(i, bytes): (usize, &[u8])| bytes == (i as u64 * 8).to_be_bytes();
        assert!(head.chunks(8).enumerate().all(is_offset), "pattern");
        assert!(tail.iter().all(|byte| *byte == 0), "zeros after the pattern");
    });
}

#[test]
fn nbdkit_verifies_its_sparse_disk_after_a_round_trip() {
    if !require_tools(&["nbdkit", "nbdcopy"]) {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let disk = "sparse-random size=64M seed=42 percent=20";
        copy(disk, served, true);
        assert!(allocated(&served.image) < 40 * MIB, "the copy is sparse");
        copy(&format!("--filter=checkwrite {disk}"), served, false);
    });
}

#[test]
fn nbdkit_proxies_the_disk() {
    if !require_tools(&["nbdkit", "nbdcopy"]) {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let socket = served.path("nbdkit.sock");
        let nbdkit = Program::new("nbdkit").words("-f -U").args([&socket]).args(["nbd"]);
        let nbdkit = nbdkit.args([format!("uri={}", served.uri())]);
        let upstream = nbdkit.serve_at(Endpoint::Unix(socket));
        let original = image_with_holes(served.dir.path(), "original");
        let out = served.path("out");
        let copy = || Program::new("nbdcopy").words("--flush");
        copy().args([&original]).args([upstream.uri()]).ok();
        copy().args([upstream.uri()]).args([&out]).ok();
        upstream.stop();
        assert_same_files(&original, &served.image);
        assert_same_files(&original, &out);
    });
}

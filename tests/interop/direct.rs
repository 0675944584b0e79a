//! Clients of a server with direct I/O (`--direct`), at offsets that the device does not align.

use crate::{assert_same_files, image_with_holes, qemu};
use harness::{MIB, Program, Served, Style, Transport, allocated, require_tools, temp_dir};

fn served(dir: harness::TempDir, image: std::path::PathBuf) -> Served {
    Served::existing(dir, image, Transport::Unix, Style::New, &["--direct"])
}

#[test]
fn fio_verifies_unaligned_writes() {
    if !require_tools(&["fio"]) {
        return;
    }
    for more in ["--bsrange=512-64k --bs_unaligned=1", "--bs=4k"] {
        let served = Served::with(&["--direct"]);
        let fio = Program::new("fio").words(
            "--name=verify --ioengine=nbd --rw=randwrite --size=2m --offset_increment=16m --numjobs=4 \
             --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --randseed=7 \
             --group_reporting --output-format=json",
        );
        let text = fio.words(more).args([format!("--uri={}", served.uri())]).ok();
        // Messages may precede the report.
        let report: serde_json::Value =
            serde_json::from_str(&text[text.find('{').unwrap()..]).unwrap();
        let job = &report["jobs"][0];
        let bytes = |direction: &str| job[direction]["io_bytes"].as_u64().unwrap();
        assert_eq!(job["error"], 0, "errors");
        assert!(bytes("write") > 7 * MIB && bytes("read") == bytes("write"), "{job}");
        assert_eq!(served.server.stderr(), "");
    }
}

#[test]
fn nbdcopy_copies_in_and_out_and_keeps_holes() {
    if !require_tools(&["nbdcopy"]) {
        return;
    }
    let dir = temp_dir();
    let original = image_with_holes(dir.path(), "original");
    let target = harness::sparse_image(dir.path(), "target", 64 * MIB);
    let served = served(dir, target);
    let nbdcopy = || Program::new("nbdcopy").words("--connections=4 --flush");
    nbdcopy().args([&original]).args([served.uri()]).ok();
    assert_same_files(&original, &served.image);
    assert!(allocated(&served.image) <= allocated(&original) + MIB, "holes stay holes");
    let copy = served.path("copy");
    nbdcopy().args([served.uri()]).args([&copy]).ok();
    assert_same_files(&original, &copy);
    assert_eq!(served.server.stderr(), "");
}

#[test]
fn qemu_io_reads_back_its_changes() {
    if !require_tools(&["qemu-io"]) {
        return;
    }
    qemu::check_reads_after_changes(&Served::with(&["--direct"]));
}

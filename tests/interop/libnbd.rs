//! libnbd's programs: nbdinfo, nbdcopy, nbdsh and nbdfuse.

use crate::{assert_same_files, image_with_holes};
use harness::mount::mount_nbd_as_file;
use harness::{
    MIB, Program, Served, Style, Transport, for_each_transport_and_style, noise, read_at,
    require_tool,
};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};

/// The queries of `nbdinfo --can` and `--is`, with the expected results in newstyle and in old
/// style.
const ABILITIES: [(&str, bool, bool); 14] = [
    ("--can connect", true, true),
    ("--can read", true, true),
    ("--can write", true, true),
    ("--can trim", true, true),
    ("--can flush", true, true),
    ("--can fua", true, true),
    ("--can zero", true, true),
    ("--can fast-zero", true, true),
    ("--can cache", true, true),
    ("--can multi-conn", true, true),
    ("--can df", true, false),
    ("--can structured-reply", true, false),
    ("--is read-only", false, false),
    ("--is tls", false, false),
];

fn nbdinfo(arguments: &str, served: &Served) -> Program {
    Program::new("nbdinfo").words(arguments).args([served.uri()])
}

#[test]
fn nbdinfo_reports_the_abilities_of_the_export() {
    if !require_tool("nbdinfo") {
        return;
    }
    for_each_transport_and_style(|served, style| {
        assert_eq!(nbdinfo("--size", served).ok(), "67108864\n");
        for (query, new, old) in ABILITIES {
            let is_able = if style == Style::New { new } else { old };
            nbdinfo(query, served).run().ended_with(if is_able { 0 } else { 2 }).prints_nothing();
        }
        let json = nbdinfo("--json", served).ok();
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        let protocol = if style == Style::New { "newstyle-fixed" } else { "oldstyle" };
        assert_eq!(report["protocol"], protocol);
        let export = &report["exports"][0];
        assert_eq!(export["export-size"], 64 * MIB);
        if style == Style::New {
            let sizes =
                ["minimum", "preferred", "maximum"].map(|s| &export[format!("block_size_{s}")]);
            assert_eq!(sizes, [1, 4096, 32 << 20]);
            assert_eq!(export["contexts"][0], "base:allocation");
        }
    });
}

#[test]
fn nbdinfo_finds_the_export_with_and_without_name() {
    if !require_tool("nbdinfo") {
        return;
    }
    let served = Served::with(&["--export", "a disk/ä", "--read-only"]);
    let report = nbdinfo("--list --json", &served).ok();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let exports = report["exports"].as_array().unwrap();
    let names: Vec<_> = exports.iter().map(|e| e["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["a disk/ä"]);
    let by_name = format!("{}/a%20disk/%C3%A4", served.uri());
    for uri in [by_name, served.uri()] {
        Program::new("nbdinfo").words("--is read-only").args([&uri]).run().ended_with(0);
        Program::new("nbdinfo").words("--can write").args([&uri]).run().ended_with(2);
    }
    let unknown = format!("{}/another", served.uri());
    Program::new("nbdinfo").args([unknown]).run().ended_with(1);
}

#[test]
fn nbdcopy_copies_both_ways_over_four_connections() {
    if !require_tool("nbdcopy") {
        return;
    }
    for_each_transport_and_style(|served, _| {
        let original = image_with_holes(served.dir.path(), "original");
        let copy = || Program::new("nbdcopy").words("--connections=4 --requests=64 --flush");
        copy().args([&original]).args([served.uri()]).ok();
        assert_same_files(&original, &served.image);
        let out = served.path("out");
        copy().args([served.uri()]).args([&out]).ok();
        assert_same_files(&original, &out);
    });
}

/// Invalid requests and their expected errors; the session must stay usable after each.
const INVALID_REQUESTS: &str = r#"
h.set_strict_mode(0)
size = h.get_size()
old = h.get_protocol() == "oldstyle"

def refused(code, what, *arguments, **flags):
    try:
        getattr(h, what)(*arguments, **flags)
    except nbd.Error as error:
        assert error.errno == code, (what, arguments, flags, error)
    else:
        raise AssertionError((what, arguments, flags))
    assert h.pread(512, 0) == bytearray(512)

for offset in size - 511, size, 2**63, 2**64 - 512:
    refused("ENOSPC" if old else "EINVAL", "pread", 512, offset)
    refused("ENOSPC", "pwrite", b"x" * 512, offset)
    refused("ENOSPC", "zero", 512, offset)
    refused("EINVAL", "trim", 512, offset)
    refused("EINVAL", "cache", 512, offset)
for flags in 0x8000, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO:
    refused("EINVAL", "pread", 512, 0, flags=flags)
    refused("EINVAL", "pwrite", b"x" * 512, 0, flags=flags)
    refused("EINVAL", "trim", 512, 0, flags=flags)
    refused("EINVAL", "flush", flags=flags)
if old:
    refused("EINVAL", "pread", 512, 0, flags=nbd.CMD_FLAG_DF)
h.pread(0, 0)
h.zero(0, 0)
h.trim(0, 0)
h.pread(512, 0, flags=nbd.CMD_FLAG_FUA)
h.pwrite(b"odd" * 333, 1000001)
assert h.pread(999, 1000001) == b"odd" * 333
h.flush(flags=nbd.CMD_FLAG_FUA)
h.shutdown()
"#;

#[test]
fn invalid_requests_of_nbdsh_get_specified_errors() {
    if !require_tool("nbdsh") {
        return;
    }
    for_each_transport_and_style(|served, _| {
        // The module nbd is installed for the system's Python; PATH may begin with another one.
        let nbdsh = Program::new("env").args(["PATH=/usr/bin:/bin", "nbdsh"]);
        let nbdsh = nbdsh.args(["-u", &served.uri(), "-c", INVALID_REQUESTS]);
        nbdsh.run().succeeded().prints_nothing();
        assert_eq!(read_at(&served.image, 1_000_001, 999), b"odd".repeat(333));
    });
}

#[test]
fn nbdfuse_reads_and_writes_the_disk() {
    for_each_transport_and_style(|served, _| {
        let Some(disk) = mount_nbd_as_file(&served.uri(), &served.path("fuse")) else { return };
        assert_eq!(disk.file.metadata().unwrap().len(), 64 * MIB);
        let mut file = File::options().read(true).write(true).open(&disk.file).unwrap();
        let data = noise(1_234_567, 5);
        file.seek(SeekFrom::Start(4321)).unwrap();
        file.write_all(&data).unwrap();
        file.sync_all().unwrap();
        assert!(read_at(&served.image, 4321, data.len()) == data, "data in the image");
        let mut back = vec![0; data.len()];
        file.seek(SeekFrom::Start(4321)).unwrap();
        file.read_exact(&mut back).unwrap();
        assert!(back == data, "data read through nbdfuse");
        drop(file);
        disk.unmount();
    });
}

#[test]
fn nbdinfo_fails_to_map_and_list_old_style() {
    if !require_tool("nbdinfo") {
        return;
    }
    let served = Served::start(Transport::Tcp, Style::Old);
    nbdinfo("--map", &served).run().refused(1, &["base:allocation"]);
    assert!(!nbdinfo("--list", &served).run().status.success());
    assert_eq!(nbdinfo("--size", &served).ok(), "67108864\n");
}

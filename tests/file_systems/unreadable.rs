//! Disks with an unreadable part: a READ of it fails with EIO, and the connection stays usable.

use harness::raw::*;
use harness::session::*;
use harness::{
    Builder, KIB, MIB, Program, Server, TempDir, compile, require_root, require_tool, skip,
    sparse_image, temp_dir, wait_until,
};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

const SIZE: u64 = 36 * MIB;
/// Offset from which reads fail.
const BAD: u64 = 34 * MIB;
/// The longest read that the server advertises.
const LONGEST: u64 = 32 * MIB;
/// Limit of the server's peak resident memory, in bytes.
const MEMORY_MAX: u64 = 32 * MIB;

/// A device of zeros with an unreadable end: a loop device over a file that was truncated.
struct BadDisk {
    device: PathBuf,
    _dir: TempDir,
}

impl BadDisk {
    /// `None`, with a visible skip, where there are no loop devices.
    fn new() -> Option<BadDisk> {
        if !require_root("an unreadable disk") {
            return None;
        }
        let dir = temp_dir();
        let file = sparse_image(dir.path(), "file", SIZE);
        let device =
            PathBuf::from(Program::new("losetup").words("--show -f").args([&file]).ok().trim());
        let disk = BadDisk { device, _dir: dir };
        File::options().write(true).open(&file).unwrap().set_len(BAD).unwrap();
        let opened = File::open(&disk.device).unwrap();
        assert!(
            opened.read_exact_at(&mut [0; 512], BAD).is_err(),
            "reads beyond the truncation succeed"
        );
        Some(disk)
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let detach = || Program::new("losetup").words("-d").args([&self.device]).run();
        let _ = detach();
    }
}

/// Reads of all lengths before, across and after the first unreadable byte.
fn assert_only_bad_reads_fail(session: &mut Session) {
    let flag_sets = if session.mode == Mode::Simple { &[0][..] } else { &[0, DF] };
    for length in [512, 64 * KIB, 256 * KIB, MIB, MIB + 4096] {
        for flags in flag_sets.iter().filter(|flags| **flags == 0 || length <= MIB) {
            let read = |offset| Request::new(READ, offset, length).flags(*flags);
            let good = session.ok(read(BAD - length));
            assert!(good.data.iter().all(|byte| *byte == 0) && good.data.len() as u64 == length);
            for offset in [BAD - length / 2, BAD, SIZE - length] {
                let reply = session.ask(read(offset));
                assert_eq!(reply.error, EIO, "{length} bytes at {offset}, {:?}", session.mode);
                session.assert_in_sync();
            }
        }
    }
    let longest = session.ask(Request::new(READ, BAD - 31 * MIB, LONGEST));
    assert_eq!(longest.error, EIO, "{LONGEST} bytes, {:?}", session.mode);
    session.ok(Request::new(READ, BAD - LONGEST, LONGEST));
    let _ = session.ask(Request::new(CACHE, BAD - MIB, 2 * MIB));
    let reads = (0..40).map(|at| Request::new(READ, BAD - MIB + at * 50 * KIB, 64 * KIB));
    session.pipeline(reads, |read, reply| {
        let expected = if read.offset + read.length > BAD { EIO } else { 0 };
        assert_eq!(reply.error, expected, "at {}", read.offset);
    });
    session.assert_in_sync();
}

fn assert_only_bad_reads_fail_in_all_modes(server: &Server) {
    for mode in MODES {
        assert_only_bad_reads_fail(&mut Session::open(server.endpoint(), mode).unwrap());
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak_kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(peak_kib * KIB <= MEMORY_MAX, "{peak_kib} KiB of memory");
}

fn quirks_library(dir: &Path) -> PathBuf {
    compile(dir, "tests/file_systems/quirks.c", &["-shared", "-fPIC", "-ldl"])
}

#[test]
fn reads_of_a_bad_sector_fail_with_eio() {
    if let Some(disk) = BadDisk::new() {
        assert_only_bad_reads_fail_in_all_modes(
            &Builder::serve(&disk.device).args(["--quiet"]).start(),
        );
        let old = Builder::serve(&disk.device).args(["--quiet", "--oldstyle"]).start();
        assert_only_bad_reads_fail(&mut Session::open_oldstyle(old.endpoint()));
    }
}

#[test]
fn reads_of_a_bad_sector_fail_without_io_uring() {
    let (Some(disk), true) = (BadDisk::new(), require_tool("cc")) else { return };
    let dir = temp_dir();
    let builder = Builder::serve(&disk.device).args(["--quiet"]);
    assert_only_bad_reads_fail_in_all_modes(
        &builder.env("LD_PRELOAD", quirks_library(dir.path())).start(),
    );
}

#[test]
fn reads_of_a_bad_sector_fail_over_unix() {
    if let Some(disk) = BadDisk::new() {
        let dir = temp_dir();
        let builder = Builder::serve(&disk.device).args(["--quiet"]);
        assert_only_bad_reads_fail_in_all_modes(
            &builder.unix(&dir.path().join("nbd.sock")).start(),
        );
    }
}

/// FUSE is not among the known file systems, so the server copies its pages.
#[test]
fn reads_of_a_bad_sector_fail_under_fuse() {
    if !["nbdkit", "nbdfuse", "fusermount3"].into_iter().all(require_tool) {
        return;
    }
    let (Some(disk), dir) = (BadDisk::new(), temp_dir()) else { return };
    if File::options().read(true).write(true).open("/dev/fuse").is_err() {
        return skip("a disk under FUSE", "/dev/fuse cannot be opened");
    }
    let (point, file) = (dir.path().join("point"), dir.path().join("point/disk"));
    std::fs::create_dir(&point).unwrap();
    let mut nbdfuse = Command::new("nbdfuse");
    nbdfuse.arg(&file).args(["--command", "nbdkit", "-s", "file"]).arg(&disk.device);
    let child = nbdfuse.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let _fuse = Fuse { child, point };
    wait_until("a file under FUSE", || file.exists());
    assert_only_bad_reads_fail_in_all_modes(&Builder::serve(&file).args(["--quiet"]).start());
}

/// A FUSE mount; unmounted when dropped.
struct Fuse {
    child: Child,
    point: PathBuf,
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = Program::new("fusermount3").words("-u").args([&self.point]).run();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn reads_beyond_a_truncated_file_fail_with_eio() {
    let dir = temp_dir();
    let image = dir.path().join("image");
    std::fs::write(&image, vec![0; SIZE as usize]).unwrap();
    let server = Builder::serve(&image).args(["--quiet"]).start();
    File::options().write(true).open(&image).unwrap().set_len(BAD).unwrap();
    assert_only_bad_reads_fail_in_all_modes(&server);
}

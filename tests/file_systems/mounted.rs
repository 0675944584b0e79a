//! A file system in a file, mounted for the length of a test.

use harness::{
    GIB, MIB, Program, TempDir, require_root, require_tool, skip, sparse_image, temp_dir,
};
use std::path::{Path, PathBuf};

/// Size of the file that holds the file system. mkfs.xfs refuses less than 300 MiB.
const SIZE: u64 = 512 * MIB;

/// A file system type, with the command that makes it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// The argument of `mount -t`.
    kind: &'static str,
    /// The mkfs program and its arguments; empty for tmpfs.
    make: &'static str,
}

/// Skipped where the host's kernel does not mount them.
pub(crate) const KINDS: [Kind; 7] = [
    Kind { name: "xfs", kind: "xfs", make: "mkfs.xfs -q" },
    Kind { name: "xfs, 1 KiB blocks", kind: "xfs", make: "mkfs.xfs -q -b size=1024" },
    Kind { name: "xfs, 64 KiB blocks", kind: "xfs", make: "mkfs.xfs -q -b size=65536" },
    Kind { name: "btrfs", kind: "btrfs", make: "mkfs.btrfs -q" },
    Kind { name: "ext4", kind: "ext4", make: "mkfs.ext4 -q -F -E lazy_itable_init=1" },
    Kind { name: "ext4, 1 KiB blocks", kind: "ext4", make: "mkfs.ext4 -q -F -b 1024" },
    Kind { name: "tmpfs", kind: "tmpfs", make: "" },
];

/// A mounted file system; unmounted when dropped.
pub(crate) struct Mounted {
    point: PathBuf,
    _dir: TempDir,
}

impl Mounted {
    /// Makes and mounts one. `None`, with a visible skip, where that is not possible.
    #[track_caller]
    pub(crate) fn new(kind: Kind) -> Option<Mounted> {
        if !require_root(kind.name) {
            return None;
        }
        let dir = fast_dir();
        let (device, point) = (sparse_image(dir.path(), "device", SIZE), dir.path().join("point"));
        std::fs::create_dir(&point).unwrap();
        if let Some((program, arguments)) = kind.make.split_once(' ') {
            if !require_tool(program) {
                return None;
            }
            Program::new(program).words(arguments).args([&device]).ok();
        }
        let options = if kind.make.is_empty() { "-o size=256m -t" } else { "-o loop -t" };
        let mount = Program::new("mount").words(options).args([kind.kind]);
        let outcome = mount.args([&device, &point]).run();
        if !outcome.status.success() {
            // Only recent kernels mount block sizes above a page; CI mounts all others.
            let is_optional = kind.name.contains("64 KiB") || std::env::var_os("CI").is_none();
            assert!(is_optional, "{} cannot be mounted: {}", kind.name, outcome.stderr);
            skip(kind.name, &format!("it cannot be mounted: {}", outcome.stderr.trim()));
            return None;
        }
        Some(Mounted { point, _dir: dir })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.point
    }
}

/// A directory in memory if there is room: punching a hole writes back the dirty pages around it.
fn fast_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    let has_room = nix::sys::statvfs::statvfs(memory)
        .is_ok_and(|found| found.blocks_available() * found.fragment_size() > 2 * GIB);
    let made =
        has_room.then(|| tempfile::Builder::new().prefix("flexnbd-test-").tempdir_in(memory));
    made.and_then(Result::ok).unwrap_or_else(temp_dir)
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmount = |how| Program::new("umount").words(how).args([&self.point]).run();
        if !unmount("").status.success() {
            let _ = unmount("-l");
        }
    }
}

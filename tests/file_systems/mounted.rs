//! A file system in a file, unmounted when dropped.

use harness::{
    GIB, MIB, Program, TempDir, require_root, require_tool, skip, sparse_image, temp_dir,
};
use std::path::{Path, PathBuf};

/// Size of the file that holds the file system. mkfs.xfs refuses less than 300 MiB.
const SIZE: u64 = 512 * MIB;

/// A file system type and its mkfs command.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// The argument of `mount -t`.
    mount_type: &'static str,
    /// The mkfs program and its arguments; empty for tmpfs.
    mkfs: &'static str,
}

/// The types under test. Those that the kernel cannot mount are skipped.
pub(crate) const KINDS: [Kind; 7] = [
    Kind { name: "xfs", mount_type: "xfs", mkfs: "mkfs.xfs -q" },
    Kind { name: "xfs, 1 KiB blocks", mount_type: "xfs", mkfs: "mkfs.xfs -q -b size=1024" },
    Kind { name: "xfs, 64 KiB blocks", mount_type: "xfs", mkfs: "mkfs.xfs -q -b size=65536" },
    Kind { name: "btrfs", mount_type: "btrfs", mkfs: "mkfs.btrfs -q" },
    Kind { name: "ext4", mount_type: "ext4", mkfs: "mkfs.ext4 -q -F -E lazy_itable_init=1" },
    Kind { name: "ext4, 1 KiB blocks", mount_type: "ext4", mkfs: "mkfs.ext4 -q -F -b 1024" },
    Kind { name: "tmpfs", mount_type: "tmpfs", mkfs: "" },
];

/// A mounted file system; unmounted when dropped.
pub(crate) struct Mounted {
    point: PathBuf,
    _dir: TempDir,
}

impl Mounted {
    /// Creates and mounts a file system. `None`, with a skip line, where that is impossible.
    #[track_caller]
    pub(crate) fn new(kind: Kind) -> Option<Mounted> {
        if !require_root(kind.name) {
            return None;
        }
        let dir = fast_dir();
        let (device, point) = (sparse_image(dir.path(), "device", SIZE), dir.path().join("point"));
        std::fs::create_dir(&point).unwrap();
        if let Some((program, arguments)) = kind.mkfs.split_once(' ') {
            if !require_tool(program) {
                return None;
            }
            Program::new(program).words(arguments).args([&device]).ok();
        }
        let options = if kind.mkfs.is_empty() { "-o size=256m -t" } else { "-o loop -t" };
        let mount = Program::new("mount").words(options).args([kind.mount_type]);
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

/// A directory in memory if it has space: on a disk, punching a hole writes back the dirty pages around it.
fn fast_dir() -> TempDir {
    let memory = Path::new("/dev/shm");
    let has_space = nix::sys::statvfs::statvfs(memory)
        .is_ok_and(|found| found.blocks_available() * found.fragment_size() > 2 * GIB);
    let created =
        has_space.then(|| tempfile::Builder::new().prefix("flexnbd-test-").tempdir_in(memory));
    created.and_then(Result::ok).unwrap_or_else(temp_dir)
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmount = |options| Program::new("umount").words(options).args([&self.point]).run();
        if !unmount("").status.success() {
            let _ = unmount("-l");
        }
    }
}

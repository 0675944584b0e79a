//! A file system in a file, unmounted when dropped.

use harness::mount::Loop;
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
    /// The mkfs program and its arguments; empty for tmpfs and ramfs.
    mkfs: &'static str,
    /// Logical sector size of the device, in bytes.
    sector: u32,
}

impl Kind {
    const fn new(name: &'static str, mount_type: &'static str, mkfs: &'static str) -> Kind {
        Kind { name, mount_type, mkfs, sector: 512 }
    }
}

/// The types under test. Those that the kernel cannot mount are skipped.
pub(crate) const KINDS: [Kind; 7] = [
    Kind::new("xfs", "xfs", "mkfs.xfs -q"),
    Kind::new("xfs, 1 KiB blocks", "xfs", "mkfs.xfs -q -b size=1024"),
    Kind::new("xfs, 64 KiB blocks", "xfs", "mkfs.xfs -q -b size=65536"),
    Kind::new("btrfs", "btrfs", "mkfs.btrfs -q"),
    Kind::new("ext4", "ext4", "mkfs.ext4 -q -F -E lazy_itable_init=1"),
    Kind::new("ext4, 1 KiB blocks", "ext4", "mkfs.ext4 -q -F -b 1024"),
    Kind::new("tmpfs", "tmpfs", ""),
];

/// The same on a device that transfers at least 4096 bytes.
pub(crate) const SECTORS_OF_4096: [Kind; 2] = [
    Kind { name: "xfs, 4 KiB sectors", sector: 4096, ..KINDS[0] },
    Kind { name: "ext4, 4 KiB sectors", sector: 4096, ..KINDS[4] },
];

/// Memory without direct I/O.
pub(crate) const RAMFS: Kind = Kind::new("ramfs", "ramfs", "");

/// A mounted file system; unmounted when dropped.
pub(crate) struct Mounted {
    point: PathBuf,
    /// Declared before the directory, which holds its file.
    _device: Option<Loop>,
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
        let (file, point) = (sparse_image(dir.path(), "device", SIZE), dir.path().join("point"));
        std::fs::create_dir(&point).unwrap();
        let with_device = !kind.mkfs.is_empty();
        let attached = with_device.then(|| Loop::attach_with_sectors(&file, kind.sector));
        let device = match &attached {
            Some(None) => {
                skip(kind.name, "there is no loop device");
                return None;
            }
            Some(Some(device)) => device.path(),
            None => &file,
        };
        if let Some((program, arguments)) = kind.mkfs.split_once(' ') {
            if !require_tool(program) {
                return None;
            }
            Program::new(program).words(arguments).args([device]).ok();
        }
        let options = if with_device { "-t" } else { "-o size=256m -t" };
        let mount = Program::new("mount").words(options).args([kind.mount_type]);
        let outcome = mount.args([device, &point]).run();
        if !outcome.status.success() {
            // Only recent kernels mount block sizes above a page; CI mounts all others.
            let is_optional = kind.name.contains("64 KiB") || std::env::var_os("CI").is_none();
            assert!(is_optional, "{} cannot be mounted: {}", kind.name, outcome.stderr);
            skip(kind.name, &format!("it cannot be mounted: {}", outcome.stderr.trim()));
            return None;
        }
        Some(Mounted { point, _device: attached.flatten(), _dir: dir })
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

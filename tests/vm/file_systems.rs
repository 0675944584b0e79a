//! File systems on the kernel's client: written to, trimmed, unmounted, checked, and read again from
//! another server process.

use crate::machine::{KernelLog, ok};
use crate::nbd_device::{DEVICE, NbdDevice};
use crate::session::with_kernel;
use harness::{Builder, MIB, Program, sparse_image, temp_dir};

/// mkfs.xfs makes no smaller file system than 300 MiB.
const SIZE: u64 = 320 * MIB;
const CONNECTIONS: u32 = 4;
const BLOCK_SIZE: u32 = 4096;

/// A file system: how to make it, and how to check it without a repair.
struct FileSystem {
    make: &'static str,
    check: &'static str,
}

const FILE_SYSTEMS: [FileSystem; 3] = [
    FileSystem { make: "mkfs.ext4 -q", check: "e2fsck -fn" },
    FileSystem { make: "mkfs.xfs -q", check: "xfs_repair -n" },
    FileSystem { make: "mkfs.btrfs -q", check: "btrfs check --force" },
];

/// Runs fio on a file in /mnt, which it writes, or only verifies.
#[track_caller]
fn fio(words: &str) {
    let fio = Program::new("fio").words(
        "--name=verify --directory=/mnt --size=16m --rw=randwrite --bs=4k --ioengine=libaio \
         --iodepth=16 --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 \
         --verify_state_save=0",
    );
    fio.words(words).ok();
}

impl FileSystem {
    fn check_on_device(&self) {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", SIZE);
        let attach = || {
            let server = Builder::serve(&image).args(["--quiet"]).start();
            let device = NbdDevice::attach(server.endpoint(), CONNECTIONS, BLOCK_SIZE);
            (server, device)
        };
        let (mut server, device) = attach();
        ok(&format!("{} {DEVICE} && mount {DEVICE} /mnt", self.make));
        fio("");
        ok(&format!("fstrim /mnt && umount /mnt && {} {DEVICE}", self.check));
        device.detach();
        server.stop();
        let (_server, device) = attach();
        ok(&format!("mount {DEVICE} /mnt"));
        fio("--verify_only");
        ok("umount /mnt");
        device.detach();
    }
}

#[test]
fn file_systems_stay_consistent_on_the_kernels_client() {
    with_kernel(|| {
        let log = KernelLog::from_now();
        for file_system in FILE_SYSTEMS {
            file_system.check_on_device();
        }
        log.assert_no_error();
    });
}

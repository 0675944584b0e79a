//! Mounts: an export as a file (nbdfuse), a file as a device (loop), a device as a directory.
//! Never leaves a mount behind, even if the test fails.

use crate::{Program, Running, TIMEOUT, poll_until, require_tool, skip};
use std::path::{Path, PathBuf};

/// An export, mounted as a file by nbdfuse(1).
pub struct NbdFile {
    /// The path of that file.
    pub file: PathBuf,
    point: PathBuf,
    nbdfuse: Option<Running>,
}

/// Mounts the export at `uri` as a file in the directory `point`, which it creates. Where that is
/// not permitted, prints a skip and returns `None`.
#[track_caller]
pub fn mount_nbd_as_file(uri: &str, point: &Path) -> Option<NbdFile> {
    if !require_tool("nbdfuse") {
        return None;
    }
    if std::fs::File::options().read(true).write(true).open("/dev/fuse").is_err() {
        skip("a test that needs nbdfuse", "/dev/fuse cannot be opened");
        return None;
    }
    std::fs::create_dir_all(point).unwrap();
    let file = point.join("disk");
    let nbdfuse = Program::new("nbdfuse").args([&file]).args([uri]);
    let nbdfuse = nbdfuse.start_until(|| file.exists());
    Some(NbdFile { file, point: point.to_owned(), nbdfuse: Some(nbdfuse) })
}

impl NbdFile {
    /// Unmounts it, and waits for nbdfuse to exit.
    #[track_caller]
    pub fn unmount(mut self) {
        unmount_fuse(&self.point);
        self.nbdfuse.take().unwrap().wait();
    }
}

impl Drop for NbdFile {
    fn drop(&mut self) {
        if self.nbdfuse.is_some() {
            let _ = Program::new("umount").words("-l").args([&self.point]).run();
        }
    }
}

/// Unmounts `point`. Retries while it is busy: other processes, such as scanners, may open new
/// mounts.
#[track_caller]
fn unmount_fuse(point: &Path) {
    let unmount = || Program::new("fusermount3").words("-u").args([point]).run();
    let mut last = unmount();
    let unmounted = poll_until(TIMEOUT, || {
        let unmounted = last.status.success();
        if !unmounted {
            last = unmount();
        }
        unmounted
    });
    assert!(unmounted, "{} cannot be unmounted: {}", point.display(), last.stderr);
}

/// A loop device backed by a file.
pub struct Loop {
    device: Option<String>,
}

impl Loop {
    /// Attaches `file` to a free loop device. `None` where that is not permitted.
    pub fn attach(file: &Path) -> Option<Loop> {
        Loop::attach_with_sectors(file, 512)
    }

    /// Attaches `file` to a free loop device with logical sectors of this size, in bytes. `None` where
    /// that is not permitted.
    pub fn attach_with_sectors(file: &Path, bytes: u32) -> Option<Loop> {
        let losetup = Program::new("losetup").words("--show -f --sector-size");
        let outcome = losetup.args([bytes.to_string()]).args([file]).run();
        let device = outcome.status.success().then(|| outcome.text().trim().to_owned());
        device.map(|device| Loop { device: Some(device) })
    }

    /// The device.
    pub fn path(&self) -> &Path {
        self.device.as_deref().unwrap().as_ref()
    }

    /// Detaches the device, which must succeed.
    #[track_caller]
    pub fn detach(mut self) {
        let device = self.device.take().unwrap();
        Program::new("losetup").words("-d").args([device]).ok();
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(device) = self.device.take() {
            let _ = Program::new("losetup").words("-d").args([device]).run();
        }
    }
}

/// A mounted file system.
pub struct Mount {
    point: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts the ext4 file system on `device` at `point`.
    #[track_caller]
    pub fn ext4(device: &Loop, point: &Path) -> Mount {
        let device = device.device.as_deref().unwrap();
        Program::new("mount").words("-t ext4").args([Path::new(device), point]).ok();
        Mount { point: point.to_owned(), mounted: true }
    }

    /// Unmounts it, which must succeed.
    #[track_caller]
    pub fn unmount(mut self) {
        self.mounted = false;
        Program::new("umount").args([&self.point]).ok();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted {
            let _ = Program::new("umount").words("-l").args([&self.point]).run();
        }
    }
}

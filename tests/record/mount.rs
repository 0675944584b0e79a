//! Small file systems in files, unmounted when dropped.

use harness::{MIB, require_root, require_tool, sparse_image};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system.
pub(crate) struct Mount {
    pub(crate) root: PathBuf,
}

impl Mount {
    /// An ext4 file system of 16 MiB. Inodes of 256 bytes have space for short attributes, inodes
    /// of 128 bytes for none. `None`, with a skip line, where it cannot be mounted.
    pub(crate) fn ext4(directory: &Path, inode_bytes: u32) -> Option<Mount> {
        if !require_root("a full file system") || !require_tool("mke2fs") {
            return None;
        }
        let image = sparse_image(directory, "device", 16 * MIB);
        let inode = inode_bytes.to_string();
        let options = ["-q", "-F", "-t", "ext4", "-m", "0", "-I", &inode];
        assert!(run("mke2fs", &options, &[&image]), "mke2fs");
        let root = directory.join("mounted");
        fs::create_dir(&root).unwrap();
        assert!(run("mount", &["-o", "loop"], &[&image, &root]), "mount");
        Some(Mount { root })
    }

    /// Runs mount(8) with these options and paths on the existing mount point `root`. `None` if that
    /// fails.
    pub(crate) fn new(options: &[&str], paths: &[&Path], root: &Path) -> Option<Mount> {
        if !require_root("a mount") || !run("mount", options, &[paths, &[root]].concat()) {
            return None;
        }
        Some(Mount { root: root.to_owned() })
    }

    /// Writes a file until no block is free.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.root.join("filler")).unwrap();
        for length in [1 << 20, 4096, 1024] {
            while file.write_all(&vec![1; length]).and_then(|()| file.sync_data()).is_ok() {}
        }
    }

    /// Deletes the file of [`Mount::fill`].
    pub(crate) fn free(&self) {
        fs::remove_file(self.root.join("filler")).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("umount", &["-l"], &[&self.root]);
    }
}

fn run(program: &str, options: &[&str], paths: &[&Path]) -> bool {
    Command::new(program).args(options).args(paths).status().is_ok_and(|status| status.success())
}

//! Small file systems in files, mounted for the length of a test.
//! Never leaves anything mounted.

use harness::{MIB, require_root, require_tool, sparse_image};
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system.
pub(crate) struct Medium {
    pub(crate) root: PathBuf,
}

impl Medium {
    /// An ext4 file system of 16 MiB with inodes of so many bytes: 256 have room for short
    /// attributes, 128 for none. `None`, and a visible skip, where it cannot be mounted.
    pub(crate) fn ext4(directory: &Path, inode_bytes: u32) -> Option<Medium> {
        if !require_root("a full file system") || !require_tool("mke2fs") {
            return None;
        }
        let image = sparse_image(directory, "medium", 16 * MIB);
        let inode = inode_bytes.to_string();
        let words = ["-q", "-F", "-t", "ext4", "-m", "0", "-I", &inode];
        assert!(run("mke2fs", &words, &[&image]), "mke2fs");
        let root = directory.join("mounted");
        fs::create_dir(&root).unwrap();
        assert!(run("mount", &["-o", "loop"], &[&image, &root]), "mount");
        Some(Medium { root })
    }

    /// Something mounted at a place that exists.
    pub(crate) fn mount(words: &[&str], paths: &[&Path], root: &Path) -> Option<Medium> {
        if !require_root("a mount") || !run("mount", words, &[paths, &[root]].concat()) {
            return None;
        }
        Some(Medium { root: root.to_owned() })
    }

    /// Leaves no block free.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.root.join("filler")).unwrap();
        for length in [1 << 20, 4096, 1024] {
            while file.write_all(&vec![1; length]).and_then(|()| file.sync_data()).is_ok() {}
        }
    }

    /// Makes room again.
    pub(crate) fn empty(&self) {
        fs::remove_file(self.root.join("filler")).unwrap();
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        run("umount", &["-l"], &[&self.root]);
    }
}

fn run(program: &str, words: &[&str], paths: &[&Path]) -> bool {
    Command::new(program).args(words).args(paths).status().is_ok_and(|status| status.success())
}

//! The file systems that hold images, among them an ext4 without a free block.
//! Unmounts what it mounted, whether or not the test succeeds.

use crate::plan::StorageKind;
use harness::mount::{Loop, Mount};
use harness::{FILE_SYSTEMS, MIB, TempDir, require_tool, skip, sparse_image, temp_dir_in};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// The size of the full file system beyond that of the image, in bytes.
const EXTRA_BYTES: u64 = 16 * MIB;
/// The file that occupies the free blocks.
const FILLER: &str = "filler";

/// The file system and directory of one image. Drop unmounts and deletes them.
pub(crate) struct Storage {
    // Dropped in this order: the mount uses the device, the device a file in the directory.
    mount: Option<Mount>,
    _device: Option<Loop>,
    directory: TempDir,
}

impl Storage {
    /// Storage for an image of `size` bytes. Without the right to mount, a full ext4 is replaced
    /// by a plain directory.
    pub(crate) fn new(kind: StorageKind, size: u64) -> Storage {
        let place = if kind == StorageKind::Tmpfs { FILE_SYSTEMS[1] } else { FILE_SYSTEMS[0] };
        let mut storage = Storage { mount: None, _device: None, directory: temp_dir_in(place) };
        if let StorageKind::FullExt4 { inode_bytes } = kind
            && require_tool("mkfs.ext4")
        {
            storage.mount_ext4(inode_bytes, size + EXTRA_BYTES);
        }
        storage
    }

    fn mount_ext4(&mut self, inode_bytes: u32, size: u64) {
        let file = sparse_image(self.directory.path(), "ext4", size);
        let point = self.directory.path().join("mounted");
        std::fs::create_dir(&point).unwrap();
        let Some(device) = Loop::attach(&file) else {
            return skip("a full file system", "loop devices need root");
        };
        let words = format!("-q -F -O ^has_journal -m 0 -b 4096 -I {inode_bytes}");
        harness::Program::new("mkfs.ext4").words(&words).args([&file]).ok();
        self.mount = Some(Mount::ext4(&device, &point));
        self._device = Some(device);
    }

    /// The directory of the image.
    pub(crate) fn image_directory(&self) -> PathBuf {
        let path = self.directory.path();
        if self.mount.is_some() { path.join("mounted") } else { path.to_owned() }
    }

    /// The directory of all other files, never full.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Allocates all blocks of the image, then every free block of a full file system.
    pub(crate) fn fill(&self, image: &Path) {
        if self.mount.is_none() {
            return;
        }
        let bytes = std::fs::read(image).unwrap();
        std::fs::write(image, bytes).unwrap();
        let mut filler = File::create(self.image_directory().join(FILLER)).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        File::open(self.image_directory()).unwrap().sync_all().unwrap();
        let _ = filler.sync_all();
    }

    /// Deletes the filler.
    pub(crate) fn free_space(&self) {
        let _ = std::fs::remove_file(self.image_directory().join(FILLER));
    }
}

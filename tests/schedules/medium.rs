//! The file systems that images lie on, one of them full to the last block.
//! Never leaves anything mounted, whether or not the test succeeds.

use crate::plan::Medium;
use harness::mount::{Loop, Mount};
use harness::{FILE_SYSTEMS, MIB, TempDir, require_tool, skip, sparse_image, temp_dir_in};
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// How much larger than the image its file system is, in bytes.
const ROOM: u64 = 16 * MIB;
/// What fills the rest of it.
const FILLER: &str = "filler";

/// Where an image lies. Dropping it unmounts and deletes everything.
pub(crate) struct Ground {
    // In the order in which they must be dropped.
    mount: Option<Mount>,
    _device: Option<Loop>,
    directory: TempDir,
}

impl Ground {
    /// The ground for an image of `size` bytes. Who may not mount gets another one.
    pub(crate) fn new(medium: Medium, size: u64) -> Ground {
        let place = if medium == Medium::Memory { FILE_SYSTEMS[1] } else { FILE_SYSTEMS[0] };
        let mut ground = Ground { mount: None, _device: None, directory: temp_dir_in(place) };
        if let Medium::FullExt4 { inode_bytes } = medium
            && require_tool("mkfs.ext4")
        {
            ground.mount_ext4(inode_bytes, size + ROOM);
        }
        ground
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

    /// Where to put the image.
    pub(crate) fn path(&self) -> PathBuf {
        let path = self.directory.path();
        if self.mount.is_some() { path.join("mounted") } else { path.to_owned() }
    }

    /// Where to put everything else, with room.
    pub(crate) fn beside(&self) -> &Path {
        self.directory.path()
    }

    /// Leaves no block free beside the image, which gets all of its own.
    pub(crate) fn fill(&self, image: &Path) {
        if self.mount.is_none() {
            return;
        }
        let bytes = std::fs::read(image).unwrap();
        std::fs::write(image, bytes).unwrap();
        let mut filler = File::create(self.path().join(FILLER)).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
        File::open(self.path()).unwrap().sync_all().unwrap();
        let _ = filler.sync_all();
    }

    /// Makes room.
    pub(crate) fn relieve(&self) {
        let _ = std::fs::remove_file(self.path().join(FILLER));
    }
}

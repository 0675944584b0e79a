//! Drops the page cache of an image whose pages may differ from the disk, because a flush has failed.

use super::RecordStore;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::io;

impl RecordStore {
    /// Drops what the page cache has of the image. Dirty pages stay: flush the disk before.
    ///
    /// # Errors
    /// Of posix_fadvise(2).
    pub fn drop_page_cache(&self) -> io::Result<()> {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        Ok(posix_fadvise(&self.image, 0, 0, advice)?)
    }
}

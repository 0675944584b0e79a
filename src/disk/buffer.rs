//! Memory that a disk operation reads into or writes from, aligned for `O_DIRECT`.
//! Never grows or moves: the kernel may access it while the operation is in flight.
//!
//! A thread keeps some of the buffers that it has dropped, and uses them again. A new large one has to be
//! mapped, and the kernel fills each page of it with zeros. (Direct reads of 256 KiB took 1.9 times the
//! processor time with new buffers: `cargo bench --bench peers -- --servers flexnbd-direct`.)

use nix::errno::Errno;
use std::cell::RefCell;
use std::io;
use std::ops::{Deref, DerefMut};

/// Smallest buffer that a thread keeps, in bytes.
const SPARE_MIN: usize = 4 << 10;
/// Most buffers that a thread keeps.
const SPARES_MAX: usize = 64;
/// Most bytes in the buffers that a thread keeps: those of all reads that a session may have in flight, with
/// some room for their alignment.
const SPARE_BYTES_MAX: usize = (8 << 20) + (128 << 10);

thread_local! {
    static SPARES: RefCell<Vec<Vec<u8>>> = const { RefCell::new(Vec::new()) };
}

/// Bytes that begin at a multiple of an alignment.
#[derive(Default)]
pub struct Buffer {
    /// Not reallocated, so that its alignment does not change.
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// `length` zeros, at an address that is a multiple of `align`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn zeroed(length: usize, align: usize) -> io::Result<Self> {
        let mut buffer = Self::reserve(length, align)?;
        buffer.bytes.truncate(buffer.start);
        buffer.bytes.resize(buffer.start + length, 0);
        Ok(buffer)
    }

    /// `length` bytes to be overwritten, at an address that is a multiple of `align`. They may be those
    /// of an earlier buffer of this thread.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn to_fill(length: usize, align: usize) -> io::Result<Self> {
        let mut buffer = Self::reserve(length, align)?;
        buffer.bytes.resize(buffer.start + length, 0);
        Ok(buffer)
    }

    /// A copy of `data`, at an address that is a multiple of `align`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn copy_of(data: &[u8], align: usize) -> io::Result<Self> {
        let mut buffer = Self::reserve(data.len(), align)?;
        buffer.bytes.truncate(buffer.start);
        buffer.bytes.extend_from_slice(data);
        Ok(buffer)
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Bytes in the buffers that this thread keeps.
    #[must_use]
    pub fn spare_memory() -> usize {
        SPARES.with_borrow(|spares| spares.iter().map(Vec::capacity).sum())
    }

    /// Whether it begins at a multiple of `align`.
    #[must_use]
    pub fn is_aligned_to(&self, align: usize) -> bool {
        self.as_ptr().addr().is_multiple_of(align.max(1))
    }

    /// Frees the buffers that this thread keeps.
    pub fn free_spares() {
        SPARES.with_borrow_mut(|spares| *spares = Vec::new());
    }

    /// Whether this thread keeps buffers.
    #[must_use]
    pub fn has_spares() -> bool {
        SPARES.with_borrow(|spares| !spares.is_empty())
    }

    /// Room for `length` bytes behind `start`, with at least `start` bytes in it.
    fn reserve(length: usize, align: usize) -> io::Result<Self> {
        let align = align.max(1);
        let room = length.checked_add(align - 1).ok_or(Errno::ENOMEM)?;
        let mut bytes = take_spare(room).unwrap_or_default();
        if bytes.capacity() < room && bytes.try_reserve_exact(room).is_err() {
            Self::free_spares();
            bytes.try_reserve_exact(room).map_err(|_| Errno::ENOMEM)?;
        }
        let address = bytes.as_ptr().addr();
        let start = address.next_multiple_of(align) - address;
        if bytes.len() < start {
            bytes.resize(start, 0);
        }
        Ok(Self { bytes, start })
    }
}

/// A kept buffer with this much room, but not much more.
fn take_spare(room: usize) -> Option<Vec<u8>> {
    if room < SPARE_MIN {
        return None;
    }
    let take = |spares: &RefCell<Vec<Vec<u8>>>| {
        let mut spares = spares.borrow_mut();
        let fits = |spare: &Vec<u8>| (room..=4 * room).contains(&spare.capacity());
        let at = spares.iter().rposition(fits)?;
        Some(spares.swap_remove(at))
    };
    SPARES.try_with(take).ok().flatten()
}

impl Drop for Buffer {
    /// Keeps the buffer for this thread.
    fn drop(&mut self) {
        let size = self.bytes.capacity();
        if size < SPARE_MIN {
            return;
        }
        let bytes = std::mem::take(&mut self.bytes);
        // The thread may be ending.
        let _ = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let kept: usize = spares.iter().map(Vec::capacity).sum();
            if kept + size <= SPARE_BYTES_MAX && spares.len() < SPARES_MAX {
                spares.push(bytes);
            }
        });
    }
}

impl From<Vec<u8>> for Buffer {
    /// Without alignment.
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, start: 0 }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..]
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_begins_at_its_alignment_and_has_its_length() {
        for align in [1, 512, 4096] {
            for length in [0, 1, 511, 4096, 70_000] {
                let zeros = Buffer::zeroed(length, align).unwrap();
                let copy = Buffer::copy_of(&vec![7; length], align).unwrap();
                assert!(*zeros == vec![0; length] && *copy == vec![7; length]);
                for buffer in [zeros, copy] {
                    assert_eq!(buffer.as_ptr().addr() % align, 0, "{length} at {align}");
                }
            }
        }
    }

    #[test]
    fn a_dropped_buffer_is_used_again_at_any_alignment() {
        for align in [512, 4096, 65_536] {
            Buffer::free_spares();
            let first = Buffer::copy_of(&[7; 300_000], align).unwrap();
            let address = first.as_ptr().addr();
            drop(first);
            assert!(Buffer::has_spares());
            let filled = Buffer::to_fill(299_000, align).unwrap();
            assert_eq!((filled.as_ptr().addr(), filled.len()), (address, 299_000));
            assert!(!Buffer::has_spares());
            drop(filled);
            let zeros = Buffer::zeroed(300_000, align).unwrap();
            assert!(zeros.as_ptr().addr() == address && *zeros == [0; 300_000]);
            drop(zeros);
            let copy = Buffer::copy_of(&[9; 150_000], align).unwrap();
            assert!(copy.as_ptr().addr() == address && *copy == [9; 150_000]);
            drop(copy);
            // With another start than before.
            let copy = Buffer::copy_of(&[5; 100_000], 8).unwrap();
            assert!(copy.as_ptr().addr().is_multiple_of(8) && *copy == [5; 100_000]);
        }
    }

    #[test]
    fn a_thread_keeps_a_bounded_number_of_bytes() {
        Buffer::free_spares();
        let all: Vec<_> = (0..40).map(|_| Buffer::zeroed(256 << 10, 4096).unwrap()).collect();
        drop(all);
        let kept = Buffer::spare_memory();
        assert!((SPARE_BYTES_MAX - (512 << 10)..=SPARE_BYTES_MAX).contains(&kept), "{kept}");
        Buffer::free_spares();
        drop(Buffer::zeroed(SPARE_MIN - 1, 1));
        assert!(!Buffer::has_spares());
        let all: Vec<_> = (0..2 * SPARES_MAX).map(|_| Buffer::zeroed(SPARE_MIN, 1)).collect();
        drop(all);
        assert_eq!(SPARES.with_borrow(Vec::len), SPARES_MAX);
    }

    #[test]
    fn missing_memory_is_an_error() {
        for align in [1, 4096] {
            let error = Buffer::zeroed(usize::MAX, align).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOMEM));
        }
    }
}

//! Memory that a disk operation reads into or writes from, aligned for `O_DIRECT`.
//! Never grows or moves: the kernel may access it while the operation is in flight.

use nix::errno::Errno;
use std::io;
use std::ops::{Deref, DerefMut};

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
        buffer.bytes.resize(buffer.start + length, 0);
        Ok(buffer)
    }

    /// A copy of `data`, at an address that is a multiple of `align`.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn copy_of(data: &[u8], align: usize) -> io::Result<Self> {
        let mut buffer = Self::reserve(data.len(), align)?;
        buffer.bytes.extend_from_slice(data);
        Ok(buffer)
    }

    /// Room for `length` bytes behind `start`.
    fn reserve(length: usize, align: usize) -> io::Result<Self> {
        let align = align.max(1);
        let room = length.checked_add(align - 1).ok_or(Errno::ENOMEM)?;
        let mut bytes = Vec::<u8>::new();
        bytes.try_reserve_exact(room).map_err(|_| Errno::ENOMEM)?;
        let address = bytes.as_ptr().addr();
        let start = address.next_multiple_of(align) - address;
        bytes.resize(start, 0);
        Ok(Self { bytes, start })
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
    fn missing_memory_is_an_error() {
        for align in [1, 4096] {
            let error = Buffer::zeroed(usize::MAX, align).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(nix::libc::ENOMEM));
        }
    }
}

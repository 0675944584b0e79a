//! One read: the unanswered rest of its range, and the bytes that are loaded for it.
//! Never accesses the disk but through the visit that it is given.

use super::super::attached::LOADED_MIN;
use super::super::tx::Tx;
#[cfg(test)]
use crate::disk::mutation::{Mutation, is_active};
use crate::disk::{Buffer, Visit};
use crate::nbd::reply::ReplyTo;
use crate::range::Range;
use crate::server::snapshot::ReadSnapshot;
use std::io;
use std::sync::Arc;

/// A read with a part still to be answered.
#[derive(Debug)]
pub(in crate::server::session) struct Read {
    pub(super) to: ReplyTo,
    pub(super) rest: Range,
    /// The reply has to be one chunk (`NBD_CMD_FLAG_DF`).
    pub(super) whole: bool,
    /// A part is answered.
    pub(super) begun: bool,
    /// The rest of the data is announced in the send buffer.
    pub(super) announced: bool,
    /// The read was tried up to this offset.
    pub(super) tried_to: u64,
    /// Up to this offset it may be read blocking, until it is announced.
    blocking_to: u64,
    /// The result of the last load.
    pub(super) loaded: Option<Box<Load>>,
}

/// Bytes that an operation in flight has read, or its error.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) range: Range,
    pub(super) outcome: io::Result<Arc<Buffer>>,
}

impl Load {
    /// Bytes of memory that it holds.
    pub(super) fn memory(&self) -> usize {
        self.outcome.as_ref().map_or(0, |bytes| bytes.len())
    }
}

impl Read {
    pub(super) fn save(self) -> ReadSnapshot {
        let Self { to, rest, whole, begun, announced, .. } = self;
        ReadSnapshot { to: to.into(), rest: rest.into(), whole, begun, announced }
    }

    /// Restores a read on a disk of `size` bytes; `None` if its range exceeds it.
    pub(super) fn restore(saved: ReadSnapshot, size: u64) -> Option<Self> {
        let ReadSnapshot { to, rest, whole, begun, announced } = saved;
        Some(Self { begun, announced, ..Self::new(to.into(), rest.within(size)?, whole) })
    }

    pub(super) fn new(to: ReplyTo, rest: Range, whole: bool) -> Self {
        let (begun, announced) = (false, false);
        Self { to, rest, whole, begun, announced, tried_to: 0, blocking_to: 0, loaded: None }
    }

    /// Allows to read up to the end of this range blocking.
    pub(super) fn allow_blocking(&mut self, range: Range) {
        self.blocking_to = range.end();
    }

    /// Fills `data` with the bytes from `offset` on: the loaded ones, those in the page cache, or, where
    /// that is allowed, from the device. Fails with `WouldBlock` if they have to be loaded.
    pub(super) fn fill(
        &mut self,
        visit: &Visit<'_>,
        offset: u64,
        data: &mut [u8],
    ) -> io::Result<()> {
        let end = offset + data.len() as u64;
        if let Some(Load { range, outcome }) = self.loaded.as_deref_mut()
            && range.offset() <= offset
            && end <= range.end()
        {
            return match outcome {
                Ok(bytes) => {
                    data.copy_from_slice(&bytes[place(*range, offset, data.len())]);
                    Ok(())
                }
                Err(error) => Err(std::mem::replace(error, io::ErrorKind::Other.into())),
            };
        }
        self.loaded = None;
        if end <= self.blocking_to {
            visit.read(offset, data)
        } else {
            visit.read_now(offset, data)
        }
    }

    /// Where the bytes of a long `piece` are, if they are loaded: the buffer, and their place in it.
    pub(super) fn loaded_part(
        &self,
        piece: Range,
    ) -> Option<(Arc<Buffer>, std::ops::Range<usize>)> {
        let Load { range, outcome } = self.loaded.as_deref()?;
        let is_inside = range.offset() <= piece.offset() && piece.end() <= range.end();
        let bytes = outcome.as_ref().ok().filter(|_| is_inside && piece.length() >= LOADED_MIN)?;
        // It fits: within the length of the loaded bytes.
        Some((Arc::clone(bytes), place(*range, piece.offset(), piece.length() as usize)))
    }

    /// Whether the bytes of `piece` are loaded, or may be read blocking.
    pub(super) fn is_certain(&self, piece: Range) -> bool {
        let loaded = self.loaded.as_ref().map(|load| load.range);
        piece.end() <= self.blocking_to || loaded.is_some_and(|range| piece.end() <= range.end())
    }

    pub(super) fn announce(&mut self, out: &mut Tx) {
        out.announce(self.rest);
        self.answered(self.rest.length());
        self.announced = true;
        // Its data is read once more, from the beginning.
        self.blocking_to = 0;
    }

    pub(super) fn answered(&mut self, length: u64) {
        self.rest = self.rest.split(length).1;
        self.begun = true;
    }
}

/// The place of `length` bytes from `offset` on in the bytes of a loaded range, which contains them.
fn place(loaded: Range, offset: u64, length: usize) -> std::ops::Range<usize> {
    // It fits: within the length of the loaded bytes.
    let start = (offset - loaded.offset()) as usize;
    #[cfg(test)]
    let start = if is_active(Mutation::MisplaceLoad) { 0 } else { start };
    start..start + length
}

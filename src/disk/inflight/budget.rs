//! The budget of a session: how many operations it may have in flight, and how many bytes they may hold.

#[cfg(test)]
use super::super::mutation::{self, Mutation};
use super::{BYTES_MAX, IN_FLIGHT_MAX, InFlight, READ_BYTES_MAX};

impl<T> InFlight<'_, T> {
    /// Whether an operation that holds this many bytes to write may begin.
    #[must_use]
    pub fn has_room(&self, bytes: usize) -> bool {
        #[cfg(test)]
        if mutation::is_active(Mutation::ExceedBytes) {
            return self.has_slot();
        }
        self.has_slot() && (self.bytes == 0 || self.bytes + bytes <= BYTES_MAX)
    }

    /// Whether a read of this many bytes may begin.
    #[must_use]
    pub fn has_room_to_read(&self, bytes: usize) -> bool {
        self.has_slot() && (self.read_bytes == 0 || self.read_bytes + bytes <= READ_BYTES_MAX)
    }

    /// Bytes of data that the operations hold to write.
    #[must_use]
    pub fn write_memory(&self) -> usize {
        self.bytes
    }

    /// Bytes of data that they read.
    #[must_use]
    pub fn read_memory(&self) -> usize {
        self.read_bytes
    }

    /// Bytes that the operations read, or that they hold to write.
    pub(super) fn bytes_held(&mut self, is_read: bool) -> &mut usize {
        if is_read { &mut self.read_bytes } else { &mut self.bytes }
    }

    fn has_slot(&self) -> bool {
        #[cfg(test)]
        if mutation::is_active(Mutation::ExceedOperations) {
            return true;
        }
        self.operations.len() + self.completed.len() < IN_FLIGHT_MAX
    }
}

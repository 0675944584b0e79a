//! The caller's tag of an operation.

/// What the caller of [`super::InFlight`] gets back with each outcome.
pub trait OpTag {
    /// See [`crate::disk::OpId::cookie`].
    fn cookie(&self) -> Option<u64> {
        None
    }
}

#[cfg(test)]
impl OpTag for () {}

#[cfg(test)]
impl OpTag for u32 {}

#[cfg(test)]
impl OpTag for (usize, u64) {}

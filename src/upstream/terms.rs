//! What a server offers, and whether it can take the place of the first one.
//! Pure.

use crate::disk::{FeatureFlags, Features};
use crate::ids::DiskId;
use crate::nbd::handshake::Agreement;
use crate::nbd::reply::Dialect;
use crate::nbd::wire::{PAYLOAD_LENGTH_DEFAULT, TransmissionFlags};
use thiserror::Error;

/// The flags that our clients see. A server that lacks one of those of the first server cannot replace it.
const PROMISED: TransmissionFlags = TransmissionFlags::SEND_FLUSH
    .union(TransmissionFlags::SEND_FUA)
    .union(TransmissionFlags::SEND_TRIM)
    .union(TransmissionFlags::SEND_WRITE_ZEROES)
    .union(TransmissionFlags::SEND_FAST_ZERO)
    .union(TransmissionFlags::SEND_CACHE);

/// The preferred block of a server that advertises none, in bytes ("Block size constraints").
const BLOCK_PREFERRED: u32 = 4096;

/// The terms of a connection to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ServerTerms {
    /// Size of the export in bytes.
    pub(super) size: u64,
    /// Transmission flags of the export.
    pub(super) flags: TransmissionFlags,
    /// The form of request headers and replies.
    pub(super) dialect: Dialect,
    /// Offsets and lengths are multiples of it.
    pub(super) block_min: u32,
    /// Aligned requests of at least this length are efficient, in bytes.
    pub(super) block_preferred: u32,
    /// Longest payload in bytes.
    pub(super) payload_max: u32,
    /// Id of the metadata context `base:allocation`, if it was selected.
    pub(super) allocation_context: Option<u32>,
    /// The id of the disk, if the server tells it. In terms that are promised: that which an earlier server
    /// has told.
    pub(super) disk_id: Option<DiskId>,
}

/// Largest minimum block that is accepted, in bytes ("Block size constraints").
const BLOCK_MIN_MAX: u32 = 64 << 10;

/// Why a server cannot take the place of the first one.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum OtherDisk {
    /// The size differs.
    #[error("its disk has {theirs} bytes, and ours {ours}: it is another disk")]
    Size {
        /// Of the first server, in bytes.
        ours: u64,
        /// Of this one.
        theirs: u64,
    },
    /// The ids of the disks differ.
    #[error("its disk has the id {theirs}, and ours {ours}: it is another disk")]
    Id {
        /// That an earlier server has told.
        ours: DiskId,
        /// Of this one.
        theirs: DiskId,
    },
    /// It does not permit writes.
    #[error("its disk is read-only, and ours is not")]
    ReadOnly,
    /// It lacks commands that our clients may use.
    #[error("it does not offer {0:?}, which our clients were offered")]
    Flags(TransmissionFlags),
    /// The specification does not permit its minimum block.
    #[error("its minimum block of {0} bytes is not a power of two up to 65536")]
    BlockMin(u32),
    /// Its minimum block does not divide ours.
    #[error("it takes only multiples of {theirs} bytes, and our clients were told {ours}")]
    Blocks {
        /// Of the first server, in bytes.
        ours: u32,
        /// Of this one.
        theirs: u32,
    },
}

impl ServerTerms {
    /// The terms of an agreement with a server that tells this id of its disk.
    #[must_use]
    pub(super) fn of(agreement: &Agreement, disk_id: Option<DiskId>) -> Self {
        let blocks = agreement.block_sizes;
        let payload_max = blocks.map_or(PAYLOAD_LENGTH_DEFAULT, |sizes| sizes.maximum);
        let block_min = blocks.map_or(1, |sizes| sizes.minimum.max(1));
        // A maximum below the minimum is nonsense; one block always has to fit.
        let blocks_max = payload_max.min(PAYLOAD_LENGTH_DEFAULT) / block_min;
        Self {
            size: agreement.size,
            flags: agreement.flags,
            dialect: agreement.dialect,
            block_min,
            block_preferred: blocks.map_or(BLOCK_PREFERRED, |sizes| sizes.preferred.max(block_min)),
            payload_max: blocks_max.max(1) * block_min,
            allocation_context: agreement.allocation_context,
            disk_id,
        }
    }

    /// Whether a disk can be on this server.
    ///
    /// # Errors
    /// [`OtherDisk::BlockMin`].
    pub(super) fn check(&self) -> Result<(), OtherDisk> {
        let is_valid = self.block_min.is_power_of_two() && self.block_min <= BLOCK_MIN_MAX;
        if is_valid { Ok(()) } else { Err(OtherDisk::BlockMin(self.block_min)) }
    }

    /// Whether it offers everything that a server with the terms `self` has offered.
    ///
    /// # Errors
    /// [`OtherDisk`].
    pub(super) fn check_replacement(&self, other: &Self) -> Result<(), OtherDisk> {
        if other.size != self.size {
            return Err(OtherDisk::Size { ours: self.size, theirs: other.size });
        }
        if let (Some(ours), Some(theirs)) = (self.disk_id, other.disk_id)
            && ours != theirs
        {
            return Err(OtherDisk::Id { ours, theirs });
        }
        if other.is_read_only() && !self.is_read_only() {
            return Err(OtherDisk::ReadOnly);
        }
        let missing = (self.flags & PROMISED) - other.flags;
        if !missing.is_empty() {
            return Err(OtherDisk::Flags(missing));
        }
        if !self.block_min.is_multiple_of(other.block_min) {
            return Err(OtherDisk::Blocks { ours: self.block_min, theirs: other.block_min });
        }
        Ok(())
    }

    /// Whether a further connection to the same address has led to the same disk, on the same terms.
    #[must_use]
    pub(super) fn is_same(&self, other: &Self) -> bool {
        // A server may get to know the id between two connections.
        let disk_id = other.disk_id.or(self.disk_id);
        Self { disk_id, ..*self } == Self { disk_id, ..*other }
            && self.disk_id.is_none_or(|id| disk_id == Some(id))
    }

    /// The features of a disk that the server exports.
    #[must_use]
    pub(super) fn features(&self) -> Features {
        let mut flags = FeatureFlags::empty();
        for (offered, feature) in [
            (TransmissionFlags::SEND_FLUSH, FeatureFlags::FLUSH),
            // A durable change may take a flush.
            (TransmissionFlags::SEND_FUA | TransmissionFlags::SEND_FLUSH, FeatureFlags::DURABLE),
            (TransmissionFlags::SEND_TRIM, FeatureFlags::TRIM),
            (TransmissionFlags::SEND_WRITE_ZEROES, FeatureFlags::ZERO),
            (TransmissionFlags::SEND_FAST_ZERO, FeatureFlags::FAST_ZERO),
            (TransmissionFlags::SEND_CACHE, FeatureFlags::CACHE),
            (TransmissionFlags::ROTATIONAL, FeatureFlags::ROTATIONAL),
        ] {
            flags.set(feature, self.has(offered));
        }
        // Of all sessions here, whatever the server offers: they share its connections, and there are
        // several of them only if one flush covers all.
        flags.insert(FeatureFlags::MULTI_CONN);
        Features {
            flags,
            minimum_block: self.block_min,
            preferred_block: self.block_preferred,
            // Longer requests of clients are split.
            payload_max: PAYLOAD_LENGTH_DEFAULT / self.block_min * self.block_min,
        }
    }

    /// These terms without what the server with the terms `first` has not offered: our clients do not know
    /// of it, and the server after this one need not have it. A known id of the disk stays known.
    #[must_use]
    pub(super) fn limited_to(self, first: &Self) -> Self {
        let disk_id = first.disk_id.or(self.disk_id);
        Self { flags: self.flags - (PROMISED - first.flags), disk_id, ..self }
    }

    /// Whether it refuses changes.
    #[must_use]
    pub(super) fn is_read_only(&self) -> bool {
        self.has(TransmissionFlags::READ_ONLY)
    }

    /// Whether it has all these flags.
    #[must_use]
    pub(super) fn has(&self, flags: TransmissionFlags) -> bool {
        self.flags.contains(flags)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::handshake::BlockSizes;

    fn terms(change: impl FnOnce(&mut Agreement)) -> ServerTerms {
        let mut agreement = Agreement {
            size: 1 << 20,
            flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
            dialect: Dialect::Structured,
            allocation_context: Some(1),
            block_sizes: Some(BlockSizes { minimum: 512, preferred: 4096, maximum: 1 << 20 }),
            oldstyle: false,
        };
        change(&mut agreement);
        ServerTerms::of(&agreement, None)
    }

    #[test]
    fn a_server_that_offers_less_cannot_replace_the_first() {
        let first = terms(|_| {});
        let check = |change: fn(&mut Agreement)| first.check_replacement(&terms(change));
        assert_eq!(check(|_| {}), Ok(()));
        assert_eq!(check(|other| other.flags |= TransmissionFlags::ROTATIONAL), Ok(()));
        assert_eq!(check(|other| other.block_sizes = None), Ok(()));
        let size = OtherDisk::Size { ours: 1 << 20, theirs: 1 << 21 };
        assert_eq!(check(|other| other.size = 1 << 21), Err(size));
        let read_only = check(|other| other.flags |= TransmissionFlags::READ_ONLY);
        assert_eq!(read_only, Err(OtherDisk::ReadOnly));
        let flags = TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_FUA;
        let lacks = check(|other| {
            other.flags -= TransmissionFlags::SEND_TRIM | TransmissionFlags::SEND_FUA;
        });
        assert_eq!(lacks, Err(OtherDisk::Flags(flags)));
        let larger = check(|other| other.block_sizes.as_mut().unwrap().minimum = 4096);
        assert_eq!(larger, Err(OtherDisk::Blocks { ours: 512, theirs: 4096 }));
        let odd = check(|other| other.block_sizes.as_mut().unwrap().minimum = 384);
        assert_eq!(odd, Err(OtherDisk::Blocks { ours: 512, theirs: 384 }));
    }

    #[test]
    fn a_server_that_tells_another_id_cannot_replace_the_first() {
        let (ours, theirs) = (DiskId([1; 16]), DiskId([2; 16]));
        let with = |disk_id| ServerTerms { disk_id, ..terms(|_| {}) };
        let other = Err(OtherDisk::Id { ours, theirs });
        assert_eq!(with(Some(ours)).check_replacement(&with(Some(theirs))), other);
        for (known, told) in
            [(None, None), (None, Some(ours)), (Some(ours), None), (Some(ours), Some(ours))]
        {
            assert_eq!(with(known).check_replacement(&with(told)), Ok(()), "{known:?} {told:?}");
            assert_eq!(with(told).limited_to(&with(known)).disk_id, known.or(told));
        }
    }

    #[test]
    fn further_connections_lead_to_the_same_disk() {
        let with = |disk_id: Option<u8>| ServerTerms {
            disk_id: disk_id.map(|id| DiskId([id; 16])),
            ..terms(|_| {})
        };
        for (first, further, is_same) in [
            (None, None, true),
            (None, Some(1), true),
            (Some(1), Some(1), true),
            (Some(1), None, true),
            (Some(1), Some(2), false),
        ] {
            assert_eq!(with(first).is_same(&with(further)), is_same, "{first:?} {further:?}");
        }
        assert!(!with(None).is_same(&terms(|other| other.size += 512)));
    }

    #[test]
    fn a_minimum_block_against_the_specification_is_refused() {
        let check = |minimum| {
            let sizes = BlockSizes { minimum, preferred: 4096, maximum: 1 << 25 };
            terms(|terms| terms.block_sizes = Some(sizes)).check()
        };
        for minimum in [0, 1, 512, BLOCK_MIN_MAX] {
            assert_eq!(check(minimum), Ok(()), "{minimum}");
        }
        for minimum in [3, 2 * BLOCK_MIN_MAX, 1 << 26] {
            assert_eq!(check(minimum), Err(OtherDisk::BlockMin(minimum)));
        }
    }

    #[test]
    fn a_read_only_disk_may_become_writable() {
        let first = terms(|terms| terms.flags |= TransmissionFlags::READ_ONLY);
        assert_eq!(first.check_replacement(&terms(|_| {})), Ok(()));
    }

    #[test]
    fn payloads_are_limited_by_the_server_and_by_the_specification() {
        let payload_max = |sizes| terms(|terms| terms.block_sizes = sizes).payload_max;
        let sizes = |minimum, maximum| Some(BlockSizes { minimum, preferred: 4096, maximum });
        assert_eq!(payload_max(None), PAYLOAD_LENGTH_DEFAULT);
        assert_eq!(payload_max(sizes(1, u32::MAX)), PAYLOAD_LENGTH_DEFAULT);
        assert_eq!(payload_max(sizes(1, 65_536)), 65_536);
        assert_eq!(payload_max(sizes(4096, 0)), 4096);
        assert_eq!(payload_max(sizes(4096, 10_000)), 8192);
        assert_eq!(terms(|terms| terms.block_sizes = sizes(0, 1)).block_min, 1);
    }

    #[test]
    fn commands_that_the_first_server_lacks_are_not_used() {
        let lacks = TransmissionFlags::SEND_TRIM | TransmissionFlags::ROTATIONAL;
        let first = terms(|terms| terms.flags -= lacks);
        let limited = terms(|_| {}).limited_to(&first);
        assert_eq!(limited.flags, terms(|_| {}).flags - TransmissionFlags::SEND_TRIM);
        assert_eq!(first.limited_to(&limited), first);
    }
}

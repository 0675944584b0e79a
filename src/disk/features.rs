//! What a backend can do for clients, and the sizes of requests that suit it.
//! Pure. The server offers its clients exactly these, so a backend that is exchanged for another must not
//! have fewer.

use bitflags::bitflags;
use std::fmt;

bitflags! {
    /// The features of a backend that clients may use only if they are offered.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FeatureFlags: u16 {
        /// Executes flushes.
        const FLUSH = 1;
        /// Makes single changes durable (`NBD_CMD_FLAG_FUA`). Then it executes flushes as well, because
        /// durable changes may share one ([`super::inflight`]).
        const DURABLE = 1 << 1;
        /// Executes trims.
        const TRIM = 1 << 2;
        /// Executes zeroing.
        const ZERO = 1 << 3;
        /// Refuses a zeroing that is to be fast and cannot be ([`super::Zeroing::only_if_fast`]).
        const FAST_ZERO = 1 << 4;
        /// Loads data into a cache on request ([`super::Op::Cache`]).
        const CACHE = 1 << 5;
        /// A flush covers the completed changes of all sessions (`NBD_FLAG_CAN_MULTI_CONN`).
        const MULTI_CONN = 1 << 6;
        /// Seeks are slow (`NBD_FLAG_ROTATIONAL`): a hint, which clients do not depend on.
        const ROTATIONAL = 1 << 7;
    }
}

/// What a backend can do. The default is that of a file or block device: everything, for any range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// The requests that it can execute.
    pub flags: FeatureFlags,
    /// Offsets and lengths should be multiples of it, in bytes: a power of two, at most 64 KiB.
    pub minimum_block: u32,
    /// Aligned requests of at least this length are efficient, in bytes: a power of two.
    pub preferred_block: u32,
    /// Most bytes of a read or write of a client: a multiple of the smallest block. An operation that
    /// the backend receives has at most 1 MiB.
    pub payload_max: u32,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            flags: FeatureFlags::all().difference(FeatureFlags::ROTATIONAL),
            minimum_block: 1,
            preferred_block: 4096,
            payload_max: 32 << 20,
        }
    }
}

impl Features {
    /// Whether a backend with these features can serve clients that were offered those of `other`.
    #[must_use]
    pub fn cover(&self, other: &Self) -> bool {
        let needed = other.flags.difference(FeatureFlags::ROTATIONAL);
        self.flags.contains(needed)
            && self.minimum_block <= other.minimum_block
            && self.payload_max >= other.payload_max
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, _) in self.flags.iter_names() {
            write!(f, "{name}, ")?;
        }
        let Self { minimum_block, payload_max, .. } = self;
        write!(f, "blocks of {minimum_block} bytes, and up to {payload_max} bytes per request")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_more_features_and_finer_sizes_cover_others() {
        let file = Features::default();
        assert!(file.cover(&file));
        for feature in FeatureFlags::all().iter() {
            let less = Features { flags: FeatureFlags::all().difference(feature), ..file };
            assert!(file.cover(&less), "{feature:?}");
            assert_eq!(less.cover(&file), feature == FeatureFlags::ROTATIONAL, "{feature:?}");
        }
        let coarse = Features { minimum_block: 512, ..file };
        assert!(file.cover(&coarse) && !coarse.cover(&file));
        let short = Features { payload_max: (32 << 20) - 512, ..file };
        assert!(file.cover(&short) && !short.cover(&file));
        assert!(Features { preferred_block: 1 << 16, ..file }.cover(&file));
    }

    #[test]
    fn features_are_named_for_operators() {
        let flags = FeatureFlags::FLUSH | FeatureFlags::FAST_ZERO;
        let text = Features { flags, minimum_block: 512, ..Features::default() }.to_string();
        let expected =
            "FLUSH, FAST_ZERO, blocks of 512 bytes, and up to 33554432 bytes per request";
        assert_eq!(text, expected);
    }
}

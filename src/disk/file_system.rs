//! What lies under an image: how coarse its file system works, and what it is known to do right.
//! What is concluded is pure; [`probe`] asks the kernel, and changes nothing.
//!
//! # Whole blocks
//!
//! `fallocate(2)` takes any range, and is exact on the disk. In memory it need not be: XFS rounds a
//! range outwards to its allocation unit and to pages, writes back what is unwritten there, and
//! drops it from the page cache; where the rounded range ends inside a large folio, its part of the
//! folio is zeroed first. Whoever holds a reference to such a page, as a socket does after
//! `splice(2)` or `sendfile(2)`, then reads zeros in place of bytes that nobody changed. So only
//! whole blocks are given to `fallocate`: blocks of [`FileSystem::block`], which are pages at least.
//! What is left over at the edges is written (a zero) or left alone (a trim).
//!
//! # By reference
//!
//! A reply that refers to the page cache changes with it until it has been received. That is right
//! as long as a page changes only in bytes that a client changes: it then gets what it would get if
//! its read had been a little earlier or later. Writes do so everywhere, and punches of whole blocks
//! on the file systems listed here, and on block devices. Of others nothing is known, and what is
//! sent is copied first.
//!
//! # Holes
//!
//! The same file systems keep `SEEK_DATA` right (`lseek(2)`): what is only in memory is data to
//! them, and the kernel's own tests hold them to that. Elsewhere data was seen in what was called a
//! hole: ZFS before 2.2.2, FUSE servers and network file systems, which answer for what they know.
//! There everything is data, unless an operator says otherwise ([`HolePolicy`]). Wherever a hole is
//! believed, it is so for reads, block status and migrations; a write of zeros is left out only after
//! its place was read, and found to be zero.

use super::open::FileKind;
use super::syscalls;
use nix::unistd::{SysconfVar, sysconf};
use std::fs::File;

/// The size of a page where the kernel does not tell, in bytes.
const PAGE: u64 = 4096;
/// The largest block that a file system is believed to have, in bytes. Network file systems give
/// the size of a transfer, and others that of a record, of which they change parts without harm.
const BLOCK_MAX: u64 = 64 << 10;

/// `f_type` of `statfs(2)`.
mod magic {
    /// ext2, ext3 and ext4.
    pub(super) const EXT: u64 = 0xef53;
    pub(super) const XFS: u64 = 0x5846_5342;
    pub(super) const BTRFS: u64 = 0x9123_683e;
    pub(super) const TMPFS: u64 = 0x0102_1994;
    pub(super) const F2FS: u64 = 0xf2f5_2010;
}

/// File systems that are known to change no page but where they are told to, and to tell data from
/// holes.
const KNOWN: [u64; 5] = [magic::EXT, magic::XFS, magic::BTRFS, magic::TMPFS, magic::F2FS];

/// Whether a file system is believed when it says where a file has no data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HolePolicy {
    /// If it is one of those that are known to be right.
    #[default]
    Auto,
    /// Always: an operator knows it to be right.
    Trust,
    /// Never: everything is data.
    Ignore,
}

impl HolePolicy {
    /// Whether to believe one that is known to be right, or is not.
    pub(super) fn trusts(self, is_known: bool) -> bool {
        match self {
            Self::Auto => is_known,
            Self::Trust => true,
            Self::Ignore => false,
        }
    }
}

/// What is known of what lies under an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileSystem {
    /// In bytes: what `fallocate(2)` is given begins and ends at multiples of it.
    pub(super) block: u64,
    /// Whether a reference to a page may be handed to a socket.
    pub(super) has_stable_pages: bool,
    /// Whether what it calls a hole is one.
    pub(super) reports_holes: bool,
}

/// What the kernel says of it.
#[derive(Clone, Copy, Debug)]
struct ProbeResult {
    /// `f_type` of `statfs(2)`.
    kind: u64,
    /// `f_bsize` of `statfs(2)`.
    block: u64,
    /// What XFS allocates at least, in bytes; none where it did not say.
    xfs_unit: Option<u64>,
    page: u64,
}

/// Asks what lies under `file`.
pub(super) fn probe(file: &File, kind: FileKind) -> FileSystem {
    let page = match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(page)) => u64::try_from(page).unwrap_or(PAGE),
        _ => PAGE,
    };
    if let FileKind::BlockDevice { sector } = kind {
        return device(sector, page);
    }
    match nix::sys::statfs::fstatfs(file) {
        Ok(found) => {
            // The type has the sign and width that the machine likes; the magic number has 32 bits.
            let kind = found.filesystem_type().0 as u64 & 0xffff_ffff;
            let block = u64::try_from(found.block_size()).unwrap_or(0);
            let xfs_unit = if kind == magic::XFS { syscalls::xfs_unit(file).ok() } else { None };
            file_system(ProbeResult { kind, block, xfs_unit, page })
        }
        Err(_) => file_system(ProbeResult { kind: 0, block: 0, xfs_unit: None, page }),
    }
}

fn device(sector: u64, page: u64) -> FileSystem {
    FileSystem { block: sector.max(page), has_stable_pages: true, reports_holes: false }
}

fn file_system(found: ProbeResult) -> FileSystem {
    let known = KNOWN.contains(&found.kind);
    let unit = match found.kind {
        // Of realtime files it may be a gigabyte, and is not what statfs says.
        magic::XFS => found.xfs_unit,
        _ => Some(found.block),
    };
    let block = unit.filter(|unit| unit.is_power_of_two() && *unit <= BLOCK_MAX);
    FileSystem {
        block: block.unwrap_or(0).max(found.page),
        has_stable_pages: known && block.is_some(),
        reports_holes: known,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(kind: u64, block: u64) -> FileSystem {
        let xfs_unit = Some(block);
        file_system(ProbeResult { kind, block, xfs_unit, page: 4096 })
    }

    #[test]
    fn blocks_are_pages_at_least() {
        for kind in KNOWN {
            for (block, whole) in [(1024, 4096), (4096, 4096), (16_384, 16_384), (65_536, 65_536)] {
                let expected =
                    FileSystem { block: whole, has_stable_pages: true, reports_holes: true };
                assert_eq!(found(kind, block), expected);
            }
        }
    }

    #[test]
    fn block_sizes_that_cannot_be_are_not_believed() {
        let nfs = found(0x6969, 1 << 20);
        assert_eq!(nfs, FileSystem { block: 4096, has_stable_pages: false, reports_holes: false });
        for block in [0, 3000, 2 * BLOCK_MAX, u64::MAX] {
            let odd = found(magic::EXT, block);
            assert_eq!(
                odd,
                FileSystem { block: 4096, has_stable_pages: false, reports_holes: true }
            );
        }
        assert_eq!(found(magic::EXT, BLOCK_MAX).block, BLOCK_MAX);
    }

    #[test]
    fn pages_of_xfs_with_large_or_unknown_units_are_copied() {
        let xfs = |xfs_unit| {
            let known = ProbeResult { kind: magic::XFS, block: 4096, xfs_unit, page: 4096 };
            let found = file_system(known);
            (found.block, found.has_stable_pages)
        };
        assert_eq!(xfs(Some(4096)), (4096, true));
        assert_eq!(xfs(Some(BLOCK_MAX)), (BLOCK_MAX, true));
        // Realtime extents: of 28 KiB, of 1 GiB.
        assert_eq!(xfs(Some(28 << 10)), (4096, false));
        assert_eq!(xfs(Some(1 << 30)), (4096, false));
        assert_eq!(xfs(None), (4096, false));
    }

    #[test]
    fn large_pages_count_for_files_and_devices() {
        let page = 65_536;
        assert_eq!(device(512, page).block, page);
        assert_eq!(device(512, 4096).block, 4096);
        assert_eq!(device(8192, 4096).block, 8192);
        let ext4 = ProbeResult { kind: magic::EXT, block: 4096, xfs_unit: None, page };
        assert_eq!(file_system(ext4).block, page);
    }

    #[test]
    fn an_operator_can_have_holes_trusted_or_ignored() {
        for is_known in [false, true] {
            assert_eq!(HolePolicy::Auto.trusts(is_known), is_known);
            assert!(HolePolicy::Trust.trusts(is_known));
            assert!(!HolePolicy::Ignore.trusts(is_known));
        }
        for unknown in [0x6969, 0x6573_5546, 0x2fc1_2fc1, 0x794c_7630, 0] {
            assert!(!found(unknown, 4096).reports_holes, "{unknown:#x}");
        }
    }

    #[test]
    fn what_lies_under_a_file_is_found() {
        let file = tempfile::tempfile().unwrap();
        let found = probe(&file, FileKind::File);
        assert!(found.block >= PAGE && found.block.is_power_of_two());
    }
}

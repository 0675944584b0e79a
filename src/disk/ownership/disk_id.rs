//! The id of a disk, as it is kept beside the image. Pure.
//!
//! A proxy that connects again, perhaps to another address, has to find the same disk. Size and flags do
//! not tell two disks of one size apart; the id does.
//!
//! # Where it is kept
//!
//! Beside the record and not in it: earlier programs refuse a record with a field that they do not know,
//! and they have to serve the disk as before. It is a line of its own, in the attribute
//! `user.flexnbd.disk`, or in the state directory where the image cannot have attributes.
//!
//! Earlier programs neither read nor change it, so it can be left behind when one of them receives another
//! disk into the image. Therefore the line names the provenance that the disk had when it was written, and
//! counts only for an image whose record has the same one; each arrival has a provenance of its own.
//!
//! # Where it comes from
//!
//! * `serve` draws one for a disk that never moved, has none, and may be changed; and stores it only as an
//!   attribute, which is part of the image. The state directory belongs to one host, but several hosts may share
//!   a block device, and each would draw a different id for the same disk.
//! * The source of a migration tells it to the destination.
//! * `adopt --force` draws a new one: the copy may differ from the bytes that clients have seen, and a running
//!   proxy must not continue with it. A disk that can be adopted without force keeps its id.
//!
//! A disk that has moved and came without an id (from an earlier program, or from one that is not flexnbd)
//! gets none: it may have one elsewhere, under which a proxy knows it. Without an id everything is as it
//! was before there were ids.
//!
//! A copy of the image file has the id if its attributes are copied as well (`cp -a`, `rsync -X`), so proxies
//! accept a disk that an operator moves in that way. An operator who makes a second disk of the copy removes
//! the attribute. A copy without attributes is another disk, and gets another id.
//!
//! # Durability
//!
//! A power cut must not undo an id that a client knows: the disk would get another one, and proxies would
//! refuse it. The id of an arrived disk is stored before the record, and counts with it. An id that `serve`
//! draws is written twice: first without a provenance, which does not count, and with it once the first line
//! is durable. So a process that finds an id need not sync the image, which can take long.

use super::{Provenance, VERSION, decode_provenance, encode_provenance};
use crate::ids::DiskId;

/// Longest encoded id of a disk that never moved, in bytes. Up to this length ext4 stores the attribute in an
/// inode of 256 bytes; a longer one takes a block.
#[cfg(test)]
const NATIVE_ID_MAX: usize = 60;

/// An id beside an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredDiskId {
    /// The id.
    pub id: DiskId,
    /// The provenance of the disk that has the id; `None` until the id is durable.
    pub of: Option<Provenance>,
}

impl StoredDiskId {
    /// The line, line break included.
    #[must_use]
    pub fn encode(&self) -> String {
        let title = self.of.map_or_else(|| "-".to_owned(), encode_provenance);
        format!("disk {VERSION} id={} title={title}\n", self.id)
    }

    /// Parses exactly what [`StoredDiskId::encode`] writes. Other bytes are no error: the id is then unknown.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let line = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
        let rest = line.strip_prefix("disk ")?.strip_prefix(VERSION)?;
        let (id, title) = rest.strip_prefix(" id=")?.split_once(" title=")?;
        let of = match title {
            "-" => None,
            title => Some(decode_provenance(title)?),
        };
        Some(Self { id: DiskId::parse(id)?, of })
    }

    /// The id of a disk with this provenance.
    #[must_use]
    pub fn id_of(&self, provenance: Provenance) -> Option<DiskId> {
        (self.of == Some(provenance)).then_some(self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, Record};

    const ID: DiskId = DiskId([0xab; 16]);

    #[test]
    fn an_id_has_one_line() {
        let text = "ab".repeat(16);
        for (of, title) in [
            (None, "-"),
            (Some(Provenance::Native), "native"),
            (Some(Provenance::Adopted), "adopted"),
            (Some(Provenance::Arrived(Id([7; 16]))), "07070707070707070707070707070707"),
        ] {
            let stored = StoredDiskId { id: ID, of };
            let line = stored.encode();
            assert_eq!(line, format!("disk 1 id={text} title={title}\n"));
            assert_eq!(StoredDiskId::decode(line.as_bytes()), Some(stored));
            assert!(line.len() <= NATIVE_ID_MAX || matches!(of, Some(Provenance::Arrived(_))));
            assert!(Record::decode(line.as_bytes()).is_err(), "it is no record");
        }
        for bad in [
            String::new(),
            format!("disk 1 id={text} title=native"),
            format!("disk 2 id={text} title=native\n"),
            format!("disk 1 id={text} title=\n"),
            format!("disk 1 id={text} title=native more=1\n"),
            format!("disk 1 id={} title=native\n", &text[1..]),
            "flexnbd 1 ours title=adopted\n".to_owned(),
        ] {
            assert_eq!(StoredDiskId::decode(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn an_id_counts_for_one_provenance() {
        let arrived = |id| Provenance::Arrived(Id([id; 16]));
        let stored = StoredDiskId { id: ID, of: Some(arrived(1)) };
        assert_eq!(stored.id_of(arrived(1)), Some(ID));
        assert_eq!((stored.id_of(arrived(2)), stored.id_of(Provenance::Native)), (None, None));
        let unsynced = StoredDiskId { of: None, ..stored };
        assert_eq!(unsynced.id_of(Provenance::Native), None);
    }
}

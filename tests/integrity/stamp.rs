//! Contents of sectors, in which every word names the run, the sector, the word and the value. So data of
//! another run or of another place, and torn sectors, are recognized.

use crate::register::Value;

/// The size of a sector in bytes.
pub(crate) const SECTOR: u64 = 512;
/// Count of words of a sector.
pub(crate) const WORDS: usize = SECTOR as usize / 8;
/// The value of a sector of zeros.
pub(crate) const ZEROS: Value = Value(0);

/// Data of one sector that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// All of it has this value.
    Whole(Value),
    /// These bytes, with more than one value, or none.
    Torn(Box<[u8]>),
}

/// One word, as a number: the value in the lowest 32 bits, the sector in 16, the word in 6, and a hash
/// of the seed.
pub(crate) fn word(seed: u64, value: Value, sector: u64, index: usize) -> [u8; 8] {
    if value == ZEROS {
        return [0; 8];
    }
    (first_word(seed, value, sector) | (index as u64) << 48).to_le_bytes()
}

fn first_word(seed: u64, value: Value, sector: u64) -> u64 {
    let hash = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    hash << 54 | sector << 32 | u64::from(value.0)
}

/// The value of a word; `None` if it has none.
pub(crate) fn value_of(seed: u64, sector: u64, index: usize, found: &[u8]) -> Option<Value> {
    let value = Value(u32::from_le_bytes(found[..4].try_into().unwrap()));
    (found == word(seed, value, sector, index)).then_some(value)
}

/// The content of `count` sectors from `first` on that all have this value.
pub(crate) fn encode(seed: u64, value: Value, first: u64, count: u64) -> Vec<u8> {
    let mut data = Vec::with_capacity((count * SECTOR) as usize);
    if value == ZEROS {
        data.resize((count * SECTOR) as usize, 0);
        return data;
    }
    for sector in first..first + count {
        let first = first_word(seed, value, sector);
        for index in 0..WORDS as u64 {
            data.extend_from_slice(&(first | index << 48).to_le_bytes());
        }
    }
    data
}

/// What one sector of data says.
pub(crate) fn decode(seed: u64, sector: u64, data: &[u8]) -> Content {
    let value = value_of(seed, sector, 0, &data[..8]);
    match value.filter(|value| encode(seed, *value, sector, 1) == data) {
        Some(value) => Content::Whole(value),
        None => Content::Torn(data.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 3;

    fn is_torn(sector: u64, data: &[u8]) -> bool {
        matches!(decode(SEED, sector, data), Content::Torn(_))
    }

    #[test]
    fn whole_sectors_are_decoded() {
        let data = encode(SEED, Value(9), 6, 2);
        assert_eq!(decode(SEED, 7, &data[512..]), Content::Whole(Value(9)));
        assert_eq!(decode(SEED, 7, &[0; 512]), Content::Whole(ZEROS));
        assert_eq!(encode(SEED, ZEROS, 6, 2), [0; 1024]);
    }

    #[test]
    fn torn_sectors_are_recognized_at_every_word() {
        let data = encode(SEED, Value(9), 7, 1);
        for at in (8..512).step_by(8) {
            for other in [encode(SEED, Value(10), 7, 1), vec![0; 512]] {
                assert!(is_torn(7, &[&data[..at], &other[at..]].concat()), "{at}");
                assert!(is_torn(7, &[&other[..at], &data[at..]].concat()), "{at}");
            }
        }
    }

    #[test]
    fn data_from_elsewhere_is_recognized() {
        let data = encode(SEED, Value(9), 7, 2);
        assert!(is_torn(8, &data[..512]), "another sector");
        assert!(is_torn(7, &data[8..][..512]), "shifted");
        assert!(is_torn(7, &encode(SEED + 1, Value(9), 7, 1)), "another run");
    }
}

//! Ids of 128 random bits, as text of 32 lower-case hexadecimal digits.
//! Pure: draws no id, and keeps none.

use std::fmt;

/// The id of a disk, the same on every host and at every address: a proxy recognizes the disk by it.
/// `disk/ownership/disk_id` describes its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DiskId(pub [u8; 16]);

impl DiskId {
    /// Parses exactly what [`Display`](fmt::Display) writes.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        parse(text).map(Self)
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write(self.0, f)
    }
}

impl fmt::Debug for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskId({self})")
    }
}

/// The bits of an id, which has one spelling.
pub(crate) fn parse(text: &str) -> Option<[u8; 16]> {
    let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let is_id = text.len() == 32 && text.bytes().all(is_digit);
    let number = is_id.then(|| u128::from_str_radix(text, 16).ok())??;
    Some(number.to_be_bytes())
}

/// Writes the text of an id.
pub(crate) fn write(id: [u8; 16], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    write!(f, "{:032x}", u128::from_be_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_spelling() {
        let mut bits = [0; 16];
        (bits[1], bits[15]) = (0xab, 7);
        let text = "00ab0000000000000000000000000007";
        assert_eq!(DiskId(bits).to_string(), text);
        assert_eq!(DiskId::parse(text), Some(DiskId(bits)));
        for other in
            [&text[1..], &format!("0{text}"), &text.to_uppercase(), &format!("+{}", &text[1..])]
        {
            assert_eq!(DiskId::parse(other), None, "{other}");
        }
    }
}

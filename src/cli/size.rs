//! Numbers of bytes as operators write them.
//! Pure; a number that parses is within its limits.
//!
//! A number may end in `K`, `M`, `G` or `T` (either case), which are powers of 1024, and those in
//! `iB`: `4096`, `4K`, `4k` and `4KiB` are the same. `4KB` is refused, since to many it means 4000.

use std::fmt;
use std::ops::RangeInclusive;

/// Where a `read` or `write` may begin, in bytes (flexnbd(1), `--from`).
pub const FROM_RANGE: RangeInclusive<u64> = 0..=1 << 62;
/// How many bytes a `read` or `write` may move (flexnbd(1), `--size`).
pub const LENGTH_RANGE: RangeInclusive<u64> = 1..=1 << 30;
/// How large an image may be created: from one sector to what a file offset can say.
pub const CREATE_RANGE: RangeInclusive<u64> = 512..=i64::MAX as u64;

/// What is wrong with a number of bytes; each holds the text as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SizeError {
    /// Not digits with a known suffix.
    NotASize(String),
    /// A suffix that means powers of 1000 to some and of 1024 to others.
    Ambiguous(String),
    /// More than 64 bits.
    Overflow(String),
    /// Outside of what it may be here.
    OutOfRange(String, RangeInclusive<u64>),
}

/// A number of bytes.
///
/// # Errors
/// One [`SizeError`] for each way to get it wrong, but for the range.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, suffix) = text.split_at(end);
    if digits.is_empty() {
        return Err(SizeError::NotASize(text.to_owned()));
    }
    let unit = unit(suffix, text)?;
    let number = digits.parse::<u64>().ok();
    number
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(|| SizeError::Overflow(text.to_owned()))
}

/// `--from`: within [`FROM_RANGE`].
///
/// # Errors
/// As [`parse_size`], and [`SizeError::OutOfRange`].
pub fn parse_from(text: &str) -> Result<u64, SizeError> {
    parse_within(text, FROM_RANGE)
}

/// `--size`: within [`LENGTH_RANGE`].
///
/// # Errors
/// As [`parse_size`], and [`SizeError::OutOfRange`].
pub fn parse_length(text: &str) -> Result<u64, SizeError> {
    parse_within(text, LENGTH_RANGE)
}

/// `--create`: within [`CREATE_RANGE`].
///
/// # Errors
/// As [`parse_size`], and [`SizeError::OutOfRange`].
pub fn parse_create(text: &str) -> Result<u64, SizeError> {
    parse_within(text, CREATE_RANGE)
}

fn parse_within(text: &str, range: RangeInclusive<u64>) -> Result<u64, SizeError> {
    let size = parse_size(text)?;
    if range.contains(&size) {
        Ok(size)
    } else {
        Err(SizeError::OutOfRange(text.to_owned(), range))
    }
}

fn unit(suffix: &str, text: &str) -> Result<u64, SizeError> {
    match suffix.to_ascii_lowercase().as_str() {
        "" => Ok(1),
        "k" | "kib" => Ok(1 << 10),
        "m" | "mib" => Ok(1 << 20),
        "g" | "gib" => Ok(1 << 30),
        "t" | "tib" => Ok(1 << 40),
        "kb" | "mb" | "gb" | "tb" => Err(SizeError::Ambiguous(text.to_owned())),
        _ => Err(SizeError::NotASize(text.to_owned())),
    }
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotASize(text) => {
                write!(f, "`{text}` is not a number of bytes, such as 4096, 4K, 100M, 20G or 1T")
            }
            Self::Ambiguous(text) => {
                write!(f, "`{text}` may mean powers of 1000 or of 1024; leave out the B for 1024")
            }
            Self::Overflow(text) => write!(f, "`{text}` is more than 64 bits can hold"),
            Self::OutOfRange(text, range) => {
                write!(f, "`{text}` is not between {} and {}", range.start(), range.end())
            }
        }
    }
}

impl std::error::Error for SizeError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_are_powers_of_1024_in_either_case() {
        let cases = [("0", 0), ("512", 512), ("4K", 4096), ("4k", 4096), ("4KiB", 4096)];
        let more = [("3M", 3 << 20), ("3mib", 3 << 20), ("2G", 2 << 30), ("1T", 1 << 40)];
        for (text, bytes) in cases.into_iter().chain(more) {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "K", "-1", "+1", "1.5G", "4 K", "4P", "4Ki", "0x10", "1_000", "4B"] {
            assert_eq!(parse_size(text), Err(SizeError::NotASize(text.to_owned())), "{text}");
        }
        for text in ["4KB", "4kb", "1TB"] {
            assert_eq!(parse_size(text), Err(SizeError::Ambiguous(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_size_fits_into_64_bits_or_is_refused() {
        assert_eq!(parse_size("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse_size("16777215T"), Ok(16_777_215 << 40));
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(parse_size(text), Err(SizeError::Overflow(text.to_owned())));
        }
    }

    #[test]
    fn from_reaches_to_two_to_the_62_and_no_further() {
        assert_eq!(parse_from("0"), Ok(0));
        assert_eq!(parse_from("4611686018427387904"), Ok(1 << 62));
        assert!(matches!(parse_from("4611686018427387905"), Err(SizeError::OutOfRange(..))));
    }

    #[test]
    fn a_transfer_is_of_one_byte_to_one_gibibyte() {
        assert!(matches!(parse_length("0"), Err(SizeError::OutOfRange(..))));
        assert_eq!(parse_length("1"), Ok(1));
        assert_eq!(parse_length("1G"), Ok(1_073_741_824));
        let error = parse_length("1073741825").unwrap_err();
        assert_eq!(error.to_string(), "`1073741825` is not between 1 and 1073741824");
    }

    #[test]
    fn an_image_is_created_of_at_least_one_sector() {
        assert!(matches!(parse_create("511"), Err(SizeError::OutOfRange(..))));
        assert_eq!(parse_create("512"), Ok(512));
        assert_eq!(parse_create("9223372036854775807"), Ok(i64::MAX as u64));
        assert!(matches!(parse_create("9223372036854775808"), Err(SizeError::OutOfRange(..))));
    }

    proptest! {
        #[test]
        fn every_text_is_a_size_or_an_error_that_shows_it(text: String) {
            if let Err(error) = parse_size(&text) {
                let quoted = format!("`{text}`");
                prop_assert!(error.to_string().contains(&quoted));
            }
        }
    }
}

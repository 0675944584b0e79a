//! Parses numbers of bytes with an optional unit, and checks their limits. Pure.
//!
//! The units `K`, `M`, `G` and `T`, in either case and with or without `iB`, are powers of 1024:
//! `4096`, `4K`, `4k` and `4KiB` are equal. `4KB` is refused, because it can also mean 4000.

use std::ops::RangeInclusive;

/// Range of `--from` of `read` and `write`, in bytes (flexnbd(1)).
pub const FROM_RANGE: RangeInclusive<u64> = 0..=1 << 62;
/// Range of `--size` of `read` and `write`, in bytes (flexnbd(1)).
pub const LENGTH_RANGE: RangeInclusive<u64> = 1..=1 << 30;
/// Range of `--create`, in bytes: from one sector to the largest file offset.
pub const CREATE_RANGE: RangeInclusive<u64> = 512..=i64::MAX as u64;

/// Range of `--cache` of `proxy`, in bytes: memory for each client.
pub const CACHE_RANGE: RangeInclusive<u64> = 0..=16 << 20;
/// Range of `--unflushed` of `proxy`, in bytes.
pub const UNFLUSHED_RANGE: RangeInclusive<u64> = 1 << 20..=1 << 40;

/// Range of `--payload-memory`, in bytes.
pub const PAYLOAD_MEMORY_RANGE: RangeInclusive<u64> = 1 << 20..=1 << 40;

/// An invalid number of bytes; holds the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not digits with a known unit.
    #[error("`{0}` is not a number of bytes, such as 4096, 4K, 100M, 20G or 1T")]
    NotASize(String),
    /// A unit that can mean a power of 1000 or of 1024.
    #[error("`{0}` may mean powers of 1000 or of 1024; leave out the B for 1024")]
    Ambiguous(String),
    /// More than 64 bits.
    #[error("`{0}` is more than 64 bits can hold")]
    Overflow(String),
    /// Outside the range of the option.
    #[error("`{0}` is not between {least} and {most}", least = .1.start(), most = .1.end())]
    OutOfRange(String, RangeInclusive<u64>),
}

/// Parses a number of bytes.
///
/// # Errors
/// [`SizeError`], except [`SizeError::OutOfRange`].
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if digits.is_empty() {
        return Err(SizeError::NotASize(text.to_owned()));
    }
    let factor = unit_factor(unit, text)?;
    let number = digits.parse::<u64>().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| SizeError::Overflow(text.to_owned()))
}

/// Parses `--from`: a number of bytes within [`FROM_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_from(text: &str) -> Result<u64, SizeError> {
    parse_within(text, FROM_RANGE)
}

/// Parses `--size`: a number of bytes within [`LENGTH_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_length(text: &str) -> Result<u64, SizeError> {
    parse_within(text, LENGTH_RANGE)
}

/// Parses `--create`: a number of bytes within [`CREATE_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_create(text: &str) -> Result<u64, SizeError> {
    parse_within(text, CREATE_RANGE)
}

/// Parses `--cache`: a number of bytes within [`CACHE_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_cache(text: &str) -> Result<u64, SizeError> {
    parse_within(text, CACHE_RANGE)
}

/// Parses `--payload-memory`: a number of bytes within [`PAYLOAD_MEMORY_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_payload_memory(text: &str) -> Result<u64, SizeError> {
    parse_within(text, PAYLOAD_MEMORY_RANGE)
}

/// Parses `--unflushed`: a number of bytes within [`UNFLUSHED_RANGE`].
///
/// # Errors
/// [`SizeError`].
pub fn parse_unflushed(text: &str) -> Result<u64, SizeError> {
    parse_within(text, UNFLUSHED_RANGE)
}

fn parse_within(text: &str, range: RangeInclusive<u64>) -> Result<u64, SizeError> {
    let size = parse_size(text)?;
    if range.contains(&size) {
        Ok(size)
    } else {
        Err(SizeError::OutOfRange(text.to_owned(), range))
    }
}

fn unit_factor(unit: &str, text: &str) -> Result<u64, SizeError> {
    match unit.to_ascii_lowercase().as_str() {
        "" => Ok(1),
        "k" | "kib" => Ok(1 << 10),
        "m" | "mib" => Ok(1 << 20),
        "g" | "gib" => Ok(1 << 30),
        "t" | "tib" => Ok(1 << 40),
        "kb" | "mb" | "gb" | "tb" => Err(SizeError::Ambiguous(text.to_owned())),
        _ => Err(SizeError::NotASize(text.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_are_powers_of_1024_in_either_case() {
        let cases = [("0", 0), ("512", 512), ("4K", 4096), ("4k", 4096), ("4KiB", 4096)];
        let more = [("3M", 3 << 20), ("3mib", 3 << 20), ("2G", 2 << 30), ("1T", 1 << 40)];
        for (text, bytes) in cases.into_iter().chain(more) {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn invalid_and_ambiguous_sizes_are_refused() {
        for text in ["", "K", "-1", "+1", "1.5G", "4 K", "4P", "4Ki", "0x10", "1_000", "4B"] {
            assert_eq!(parse_size(text), Err(SizeError::NotASize(text.to_owned())), "{text}");
        }
        for text in ["4KB", "4kb", "1TB"] {
            assert_eq!(parse_size(text), Err(SizeError::Ambiguous(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn a_size_over_64_bits_is_refused() {
        assert_eq!(parse_size("18446744073709551615"), Ok(u64::MAX));
        assert_eq!(parse_size("16777215T"), Ok(16_777_215 << 40));
        for text in ["18446744073709551616", "16777216T"] {
            assert_eq!(parse_size(text), Err(SizeError::Overflow(text.to_owned())));
        }
    }

    #[test]
    fn from_is_at_most_2_to_the_62() {
        assert_eq!(parse_from("0"), Ok(0));
        assert_eq!(parse_from("4611686018427387904"), Ok(1 << 62));
        assert!(matches!(parse_from("4611686018427387905"), Err(SizeError::OutOfRange(..))));
    }

    #[test]
    fn length_is_between_1_byte_and_1_gib() {
        assert!(matches!(parse_length("0"), Err(SizeError::OutOfRange(..))));
        assert_eq!(parse_length("1"), Ok(1));
        assert_eq!(parse_length("1G"), Ok(1_073_741_824));
        let error = parse_length("1073741825").unwrap_err();
        assert_eq!(error.to_string(), "`1073741825` is not between 1 and 1073741824");
    }

    #[test]
    fn create_takes_at_least_one_sector() {
        assert!(matches!(parse_create("511"), Err(SizeError::OutOfRange(..))));
        assert_eq!(parse_create("512"), Ok(512));
        assert_eq!(parse_create("9223372036854775807"), Ok(i64::MAX as u64));
        assert!(matches!(parse_create("9223372036854775808"), Err(SizeError::OutOfRange(..))));
    }

    #[test]
    fn payload_memory_is_between_1m_and_1t() {
        assert_eq!(parse_payload_memory("1M"), Ok(1 << 20));
        assert_eq!(parse_payload_memory("1T"), Ok(1 << 40));
        for text in ["0", "1048575", "1025G"] {
            assert!(matches!(parse_payload_memory(text), Err(SizeError::OutOfRange(..))), "{text}");
        }
    }

    #[test]
    fn cache_and_unflushed_have_ranges() {
        assert_eq!((parse_cache("0"), parse_cache("16M")), (Ok(0), Ok(16 << 20)));
        assert!(matches!(parse_cache("16777217"), Err(SizeError::OutOfRange(..))));
        assert_eq!((parse_unflushed("1M"), parse_unflushed("1T")), (Ok(1 << 20), Ok(1 << 40)));
        for text in ["1048575", "1099511627777"] {
            assert!(matches!(parse_unflushed(text), Err(SizeError::OutOfRange(..))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_error_quotes_the_text(text: String) {
            if let Err(error) = parse_size(&text) {
                let quoted = format!("`{text}`");
                prop_assert!(error.to_string().contains(&quoted));
            }
        }
    }
}

//! Counts, sizes, times and percentages in texts for operators. Pure.

use std::time::Duration;

/// Formats a count with its noun, whose plural ends in s: `1 session`, `2 sessions`.
#[must_use]
pub fn counted(count: impl TryInto<u64>, noun: &str) -> String {
    let count: u64 = count.try_into().unwrap_or(u64::MAX);
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// Formats a size in bytes with a binary unit and at least two significant digits, rounded down:
/// `512 bytes`, `4.5 KiB`, `112 MiB`.
#[must_use]
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return counted(bytes, "byte");
    }
    let (mut unit, mut name) = (1024, UNITS[0]);
    for larger in &UNITS[1..] {
        if bytes / unit < 1024 {
            break;
        }
        (unit, name) = (unit * 1024, larger);
    }
    let (whole, tenths) = (bytes / unit, bytes % unit * 10 / unit);
    if whole < 10 && tenths > 0 {
        format!("{whole}.{tenths} {name}")
    } else {
        format!("{whole} {name}")
    }
}

/// Formats a duration, rounded down: `812 ms`, `12.3 s`, `4 min 5 s`, `3 h 20 min`.
#[must_use]
pub fn duration(duration: Duration) -> String {
    let (seconds, milliseconds) = (duration.as_secs(), duration.subsec_millis());
    match seconds {
        0 if milliseconds > 0 => format!("{milliseconds} ms"),
        0..60 if milliseconds >= 100 => format!("{seconds}.{} s", milliseconds / 100),
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// The percentage that is done of `total`, rounded down: 100 only if nothing is left.
#[must_use]
pub fn percent_done(total: u64, left: u64) -> u64 {
    let done = u128::from(total.saturating_sub(left));
    u64::try_from(done * 100 / u128::from(total.max(1))).unwrap_or(100)
}

/// Formats a time, in seconds since 1970, in UTC as in ISO 8601: `2023-11-14T22:13:20Z`.
#[must_use]
pub fn utc(seconds: u64) -> String {
    /// Seconds in a day.
    const DAY: u64 = 86_400;
    /// Days in 400 years, after which the calendar repeats.
    const ERA: u64 = 146_097;
    /// Days from 0000-03-01 to 1970-01-01.
    const TO_1970: u64 = 719_468;
    let (days, time) = (seconds / DAY + TO_1970, seconds % DAY);
    let (era, day) = (days / ERA, days % ERA);
    // Years begin in March here, so that the leap day is the last of its year.
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) =
        (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (time / 3600, time / 60 % 60, time % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_takes_the_singular() {
        let texts = [0_usize, 1, 2].map(|count| counted(count, "session"));
        assert_eq!(texts, ["0 sessions", "1 session", "2 sessions"]);
    }

    #[test]
    fn sizes_have_two_significant_digits() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (4608, "4.5 KiB"),
            ((1 << 20) - 1, "1023 KiB"),
            (10 << 20 | 1 << 19, "10 MiB"),
            (3 << 39, "1.5 TiB"),
            (u64::MAX, "16383 PiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn durations_have_two_units_at_most() {
        for (milliseconds, expected) in [
            (0, "0 s"),
            (1, "1 ms"),
            (999, "999 ms"),
            (1000, "1 s"),
            (1099, "1 s"),
            (1100, "1.1 s"),
            (59_999, "59.9 s"),
            (60_000, "1 min 0 s"),
            (3_599_000, "59 min 59 s"),
            (3_600_000, "1 h 0 min"),
            (90_060_000, "25 h 1 min"),
        ] {
            assert_eq!(duration(Duration::from_millis(milliseconds)), expected);
        }
    }

    #[test]
    fn only_a_complete_whole_is_100_percent() {
        assert_eq!(percent_done(u64::MAX, 1), 99);
        assert_eq!(percent_done(u64::MAX, 0), 100);
        assert_eq!(percent_done(512, 512), 0);
        assert_eq!(percent_done(512, 600), 0, "more is left than the total");
        assert_eq!(percent_done(0, 0), 0);
    }

    #[test]
    fn times_are_formatted_in_utc() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), expected);
        }
        assert!(utc(u64::MAX).ends_with('Z'));
    }
}

//! Numbers and times in sentences for people. Pure.

/// `1 session`, `2 sessions`: a count and its noun, which takes an s.
#[must_use]
pub fn counted(count: impl TryInto<u64>, noun: &str) -> String {
    let count: u64 = count.try_into().unwrap_or(u64::MAX);
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

/// The time that is so many seconds after the beginning of 1970, in UTC as ISO 8601 writes it:
/// `2023-11-14T22:13:20Z`.
#[must_use]
pub fn utc(seconds: u64) -> String {
    /// Seconds of a day.
    const DAY: u64 = 86_400;
    /// Days of 400 years, after which the calendar repeats itself.
    const ERA: u64 = 146_097;
    /// Days from the first of March of the year 0 to the beginning of 1970.
    const TO_1970: u64 = 719_468;
    let (days, time) = (seconds / DAY + TO_1970, seconds % DAY);
    let (era, day) = (days / ERA, days % ERA);
    // Years begin in March here, so that a leap day is the last of its year.
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
    fn one_takes_the_singular() {
        let told = [0_usize, 1, 2].map(|count| counted(count, "session"));
        assert_eq!(told, ["0 sessions", "1 session", "2 sessions"]);
    }

    #[test]
    fn times_are_told_in_utc() {
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

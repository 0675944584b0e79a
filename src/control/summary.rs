//! The result of a migration: [`Summary`] ⇄ the `key=value` pairs in the reply to `mirror_wait`.
//! Pure.

use super::status::{Pairs, StatusError, pairs};
use std::fmt;
use std::time::Duration;

/// The statistics of a successful migration. Times are encoded in whole milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Whether the destination acknowledged the disk; the original flexnbd cannot.
    pub acknowledged: bool,
    /// Time from the command to the end.
    pub duration: Duration,
    /// Bytes of data sent, including those sent again.
    pub bytes_sent: u64,
    /// Passes over the disk.
    pub passes: u64,
    /// How long clients were paused at the end.
    pub pause: Duration,
    /// How many clients have stayed, and are passed on to the destination; `None` if none were to.
    pub relayed_clients: Option<u64>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "acknowledged={}", self.acknowledged)?;
        write!(f, " duration_ms={} bytes_sent={}", self.duration.as_millis(), self.bytes_sent)?;
        write!(f, " passes={} pause_ms={}", self.passes, self.pause.as_millis())?;
        self.relayed_clients.map_or(Ok(()), |clients| write!(f, " relayed_clients={clients}"))
    }
}

impl Summary {
    /// Parses a server's line. Keys may come in any order; unknown ones are ignored.
    ///
    /// # Errors
    ///
    /// A word is not a pair, a key is missing, or a value has the wrong type.
    pub fn from_line(line: &str) -> Result<Self, StatusError> {
        let mut pairs = Pairs(pairs(line)?);
        Ok(Self {
            acknowledged: pairs.take("acknowledged")?,
            duration: Duration::from_millis(pairs.take("duration_ms")?),
            bytes_sent: pairs.take("bytes_sent")?,
            passes: pairs.take("passes")?,
            pause: Duration::from_millis(pairs.take("pause_ms")?),
            relayed_clients: pairs.take_optional("relayed_clients")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_summary_is_a_line_of_pairs() {
        let summary = Summary {
            acknowledged: true,
            duration: Duration::from_micros(1_234_567),
            bytes_sent: 5,
            passes: 2,
            pause: Duration::from_micros(7_900),
            relayed_clients: None,
        };
        let line = "acknowledged=true duration_ms=1234 bytes_sent=5 passes=2 pause_ms=7";
        assert_eq!(summary.to_string(), line);
        let relayed = Summary { relayed_clients: Some(3), ..summary };
        assert_eq!(relayed.to_string(), format!("{line} relayed_clients=3"));
    }

    #[test]
    fn parsing_reports_what_is_wrong() {
        assert_eq!(Summary::from_line("done"), Err(StatusError::NotAPair("done".into())));
        assert_eq!(Summary::from_line("acknowledged=true"), Err(missing("duration_ms")));
        assert_eq!(Summary::from_line(""), Err(missing("acknowledged")));
    }

    fn missing(key: &'static str) -> StatusError {
        StatusError::Missing(key)
    }

    proptest! {
        #[test]
        fn every_summary_round_trips(
            acknowledged: bool, duration: u64, bytes_sent: u64, passes: u64, pause: u64,
            relayed_clients: Option<u64>,
        ) {
            let (duration, pause) = (Duration::from_millis(duration), Duration::from_millis(pause));
            let summary =
                Summary { acknowledged, duration, bytes_sent, passes, pause, relayed_clients };
            prop_assert_eq!(Summary::from_line(&summary.to_string()), Ok(summary));
            let newer = format!("{summary} newer=1");
            prop_assert_eq!(Summary::from_line(&newer), Ok(summary));
        }
    }
}

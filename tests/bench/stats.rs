//! Figures of one run, and what several runs amount to.
//! Pure: values in, values out.

use serde::{Deserialize, Serialize};

/// What one run of one server under one load showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    pub(super) requests_per_sec: f64,
    /// Millions of bytes.
    pub(super) mb_per_sec: f64,
    /// User and system time of the server's processes, in microseconds.
    pub(super) server_cpu_us_per_request: f64,
    /// Part of the time in which the client was computing; near 1 it was the limit.
    pub(super) client_busy: f64,
    /// Peak resident memory of the server's processes, in MiB.
    pub(super) rss_peak_mib: f64,
}

impl Sample {
    /// The median of each figure by itself; nothing if there are no samples.
    pub(super) fn median(samples: &[Self]) -> Option<Self> {
        let of = |figure: fn(&Self) -> f64| median(samples.iter().map(figure).collect());
        Some(Self {
            requests_per_sec: of(|s| s.requests_per_sec)?,
            mb_per_sec: of(|s| s.mb_per_sec)?,
            server_cpu_us_per_request: of(|s| s.server_cpu_us_per_request)?,
            client_busy: of(|s| s.client_busy)?,
            rss_peak_mib: of(|s| s.rss_peak_mib)?,
        })
    }
}

/// The middle value, or the mean of the two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[half]),
        _ => Some(f64::midpoint(values[half - 1], values[half])),
    }
}

/// The mean that treats twice as fast and half as fast as opposites.
pub(super) fn geometric_mean(values: &[f64]) -> Option<f64> {
    if values.is_empty() || values.iter().any(|value| *value <= 0.0) {
        return None;
    }
    let sum: f64 = values.iter().map(|value| value.ln()).sum();
    Some((sum / values.len() as f64).exp())
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;

    #[test]
    fn one_odd_round_does_not_move_the_median() {
        assert_eq!(median(vec![3.0, 1000.0, 2.0]), Some(3.0));
        assert_eq!(median(vec![4.0, 2.0]), Some(3.0));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn each_figure_has_its_own_median() {
        let sample = |rate, cpu| Sample {
            requests_per_sec: rate,
            server_cpu_us_per_request: cpu,
            ..Sample::default()
        };
        let samples = [sample(1.0, 9.0), sample(2.0, 7.0), sample(3.0, 8.0)];
        assert_eq!(Sample::median(&samples), Some(sample(2.0, 8.0)));
        assert_eq!(Sample::median(&[]), None);
    }

    #[test]
    fn twice_and_half_cancel_out() {
        let mean = geometric_mean(&[2.0, 0.5]).unwrap();
        assert!((mean - 1.0).abs() < 1e-12, "{mean}");
        assert_eq!(geometric_mean(&[]), None);
        assert_eq!(geometric_mean(&[1.0, 0.0]), None);
    }
}

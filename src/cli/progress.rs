//! Progress display of a migration: a bar on a terminal, lines of text elsewhere.
//! Never contacts the server and never reads a clock: the caller passes status samples and times.

use crate::control::status::{MIGRATION_PASSES, MIGRATION_STAGE};
use crate::control::{Status, Summary};
use crate::human;
use crate::milestones::Milestones;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// The progress of a migration, as one status reply reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StatusSample {
    /// Size of the disk in bytes.
    size: u64,
    bytes_left: u64,
    bytes_per_sec: u64,
    /// 0 if unknown.
    seconds_left: u64,
    /// Completed passes.
    passes: u64,
    obstacle: Option<ShownObstacle>,
}

/// The reason why a migration makes no progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ShownObstacle {
    Unreachable,
    InDoubt,
}

impl StatusSample {
    /// Extracts the sample from a status; `None` if no migration is running.
    pub(super) fn of(status: &Status) -> Option<Self> {
        let migration = status.migration.as_ref()?;
        Some(Self {
            size: status.size,
            bytes_left: migration.bytes_left,
            bytes_per_sec: migration.speed,
            seconds_left: migration.seconds_left,
            passes: status.extra(MIGRATION_PASSES).and_then(|n| n.parse().ok()).unwrap_or(0),
            obstacle: match status.extra(MIGRATION_STAGE) {
                Some("connecting") => Some(ShownObstacle::Unreachable),
                Some("in-doubt") => Some(ShownObstacle::InDoubt),
                _ => None,
            },
        })
    }

    fn bytes_done(&self) -> u64 {
        self.size.saturating_sub(self.bytes_left)
    }

    fn percent(&self) -> u64 {
        human::percent_done(self.size, self.bytes_left)
    }

    /// `40 %, 12 MiB/s, 1.2 GiB left, about 12 s, pass 2`, or the obstacle.
    fn describe(&self) -> String {
        let left = human::size(self.bytes_left);
        match self.obstacle {
            Some(ShownObstacle::Unreachable) => {
                return format!("{left} left; the destination cannot be reached, trying again");
            }
            Some(ShownObstacle::InDoubt) => {
                return "the destination does not say whether the disk has arrived; clients wait \
                        until it does, see flexnbd-migration(7)"
                    .to_owned();
            }
            None => {}
        }
        let time = match self.seconds_left {
            0 => String::new(),
            seconds => format!(", about {}", human::duration(Duration::from_secs(seconds))),
        };
        let (percent, speed, pass) =
            (self.percent(), human::size(self.bytes_per_sec), self.passes + 1);
        format!("{percent} %, {speed}/s, {left} left{time}, pass {pass}")
    }
}

/// Displays the progress of one migration.
#[derive(Debug)]
pub(super) enum ProgressDisplay {
    /// A bar on a terminal.
    Bar(ProgressBar),
    /// Lines of text, which the caller prints.
    Lines(LineFilter),
}

impl ProgressDisplay {
    /// A bar if standard error is a terminal, else lines.
    pub(super) fn new(on_terminal: bool) -> Self {
        if !on_terminal {
            return Self::Lines(LineFilter::default());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        // The template is valid: a test parses it. Otherwise indicatif's default is used.
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self::Bar(bar)
    }

    /// Updates the bar, or returns a line to print if one is due. `at` is the time since the start.
    pub(super) fn show(&mut self, at: Duration, sample: &StatusSample) -> Option<String> {
        match self {
            Self::Lines(lines) => lines.next(at, sample),
            Self::Bar(bar) => {
                bar.set_length(sample.size);
                bar.set_position(sample.bytes_done());
                bar.set_message(sample.describe());
                None
            }
        }
    }

    /// Removes the bar, so that later output starts on a clean line.
    pub(super) fn end(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

const TEMPLATE: &str = "[{wide_bar}] {msg}";

/// Selects the samples that get a line: milestones, and those with another obstacle than before.
#[derive(Debug, Default)]
pub(super) struct LineFilter {
    milestones: Milestones,
    obstacle: Option<ShownObstacle>,
}

impl LineFilter {
    fn next(&mut self, at: Duration, sample: &StatusSample) -> Option<String> {
        let percent = sample.percent();
        if !self.milestones.pass(at, percent) {
            if sample.obstacle == self.obstacle {
                return None;
            }
            self.milestones.record(at, percent);
        }
        self.obstacle = sample.obstacle;
        Some(sample.describe())
    }
}

/// The last line of the display: the outcome of the migration.
pub(super) fn describe_summary(summary: &Summary) -> String {
    let &Summary { acknowledged, duration, bytes_sent, passes, pause, relayed_clients } = summary;
    let passes = if passes == 1 { "1 pass".to_owned() } else { format!("{passes} passes") };
    let doubt = match acknowledged {
        true => "",
        false => "; the destination cannot tell whether the disk has arrived, look there",
    };
    let relay = relayed_clients.map_or_else(String::new, |clients| {
        let clients = human::counted(clients, "client");
        format!("; the source relays {clients}")
    });
    format!(
        "Migration finished: {} sent in {}, {passes}, clients paused for {}{relay}{doubt}",
        human::size(bytes_sent),
        human::duration(duration),
        human::duration(pause),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: StatusSample = StatusSample {
        size: 100 << 20,
        bytes_left: 100 << 20,
        bytes_per_sec: 10 << 20,
        seconds_left: 10,
        passes: 0,
        obstacle: None,
    };

    fn at(percent: u64) -> StatusSample {
        StatusSample { bytes_left: (100 - percent) << 20, ..START }
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_sample_is_parsed_from_a_status_line() {
        let line = "pid=1 size=200 is_mirroring=true clients_allowed=true num_clients=0 \
            has_control=true migration_speed=5 migration_duration=6 migration_seconds_left=7 \
            migration_bytes_left=50 migration_stage=connecting migration_passes=2";
        let expected = StatusSample {
            size: 200,
            bytes_left: 50,
            bytes_per_sec: 5,
            seconds_left: 7,
            passes: 2,
            obstacle: Some(ShownObstacle::Unreachable),
        };
        let sample = |line: &str| StatusSample::of(&Status::from_line(line).unwrap());
        assert_eq!(sample(line), Some(expected));
        // The original flexnbd reports neither stages nor passes.
        let (original, _) = line.split_once(" migration_stage").unwrap();
        assert_eq!(sample(original), Some(StatusSample { passes: 0, obstacle: None, ..expected }));
        let idle = "pid=1 size=2 is_mirroring=false clients_allowed=true num_clients=0 \
            has_control=true";
        assert_eq!(sample(idle), None);
    }

    #[test]
    fn a_sample_is_described_in_one_line() {
        assert_eq!(at(40).describe(), "40 %, 10 MiB/s, 60 MiB left, about 10 s, pass 1");
        let stalled = StatusSample { bytes_per_sec: 0, seconds_left: 0, passes: 3, ..at(99) };
        assert_eq!(stalled.describe(), "99 %, 0 bytes/s, 1 MiB left, pass 4");
        let unreachable = StatusSample { obstacle: Some(ShownObstacle::Unreachable), ..at(99) };
        assert!(unreachable.describe().contains("cannot be reached, trying again"));
        let in_doubt = StatusSample { obstacle: Some(ShownObstacle::InDoubt), ..at(99) };
        assert!(in_doubt.describe().contains("does not say whether the disk has arrived"));
    }

    #[test]
    fn a_milestone_gets_a_line() {
        let mut lines = LineFilter::default();
        assert_eq!(lines.next(seconds(1), &at(9)), None);
        assert_eq!(lines.next(seconds(2), &at(10)), Some(at(10).describe()));
        assert_eq!(lines.next(seconds(3), &at(11)), None);
    }

    #[test]
    fn an_obstacle_gets_a_line_when_it_changes() {
        let mut lines = LineFilter::default();
        let mut prints =
            |obstacle| lines.next(seconds(1), &StatusSample { obstacle, ..START }).is_some();
        assert!(prints(Some(ShownObstacle::Unreachable)));
        assert!(!prints(Some(ShownObstacle::Unreachable)));
        assert!(prints(None));
        assert!(!prints(None));
    }

    #[test]
    fn a_bar_is_updated_and_prints_no_lines() {
        let bar = ProgressBar::hidden();
        let mut display = ProgressDisplay::Bar(bar.clone());
        assert_eq!(display.show(seconds(60), &at(40)), None);
        assert_eq!((bar.position(), bar.length()), (40 << 20, Some(100 << 20)));
        assert_eq!(bar.message(), at(40).describe());
        display.end();
        assert!(bar.is_finished());
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn the_summary_describes_the_migrations_outcome() {
        let summary = Summary {
            acknowledged: true,
            duration: Duration::from_millis(12_345),
            bytes_sent: 100 << 20,
            passes: 3,
            pause: Duration::from_millis(12),
            relayed_clients: None,
        };
        let expected = "Migration finished: 100 MiB sent in 12.3 s, 3 passes, clients paused for \
            12 ms";
        assert_eq!(describe_summary(&summary), expected);
        let relayed = Summary { relayed_clients: Some(3), ..summary };
        assert_eq!(describe_summary(&relayed), format!("{expected}; the source relays 3 clients"));
        let in_doubt = Summary { acknowledged: false, passes: 1, ..summary };
        assert!(describe_summary(&in_doubt).contains(", 1 pass, "));
        assert!(
            describe_summary(&in_doubt)
                .ends_with("cannot tell whether the disk has arrived, look there")
        );
    }
}

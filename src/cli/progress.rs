//! How a migration under way is shown to people: as a bar on a terminal, as lines elsewhere.
//! Never asks a server and never looks at a clock; what was seen, and when, is given to it.

use crate::control::status::{MIGRATION_PASSES, MIGRATION_STAGE};
use crate::control::{Status, Summary};
use crate::human;
use crate::milestones::Milestones;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// What one status tells of a running migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StatusSample {
    /// Bytes of the disk.
    size: u64,
    bytes_left: u64,
    /// Bytes per second.
    speed: u64,
    /// 0 when nobody knows.
    seconds_left: u64,
    /// Passes completed.
    passes: u64,
    obstacle: Option<ShownObstacle>,
}

/// What keeps a migration from going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ShownObstacle {
    Unreachable,
    InDoubt,
}

impl StatusSample {
    /// None when the server tells of no migration.
    pub(super) fn of(status: &Status) -> Option<Self> {
        let migration = status.migration.as_ref()?;
        Some(Self {
            size: status.size,
            bytes_left: migration.bytes_left,
            speed: migration.speed,
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

    /// `40 %, 12 MiB/s, 1.2 GiB left, about 12 s, pass 2`, or what is in the way.
    fn told(&self) -> String {
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
        let (percent, speed, pass) = (self.percent(), human::size(self.speed), self.passes + 1);
        format!("{percent} %, {speed}/s, {left} left{time}, pass {pass}")
    }
}

/// A migration that is being shown.
#[derive(Debug)]
pub(super) enum Display {
    /// On a terminal.
    Bar(ProgressBar),
    /// Elsewhere.
    Lines(LineFilter),
}

impl Display {
    /// On the terminal that standard error is, or line by line.
    pub(super) fn new(on_terminal: bool) -> Self {
        if !on_terminal {
            return Self::Lines(LineFilter::default());
        }
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        // A test reads the same template; were it wrong, the crate's own would do.
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self::Bar(bar)
    }

    /// Shows what was seen `at` this time since the beginning. Returns the line to print, if one
    /// is due.
    pub(super) fn show(&mut self, at: Duration, sight: &StatusSample) -> Option<String> {
        match self {
            Self::Lines(lines) => lines.next(at, sight),
            Self::Bar(bar) => {
                bar.set_length(sight.size);
                bar.set_position(sight.bytes_done());
                bar.set_message(sight.told());
                None
            }
        }
    }

    /// Takes the bar away; what comes now is printed.
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
    fn next(&mut self, at: Duration, sight: &StatusSample) -> Option<String> {
        let percent = sight.percent();
        if !self.milestones.pass(at, percent) {
            if sight.obstacle == self.obstacle {
                return None;
            }
            self.milestones.record(at, percent);
        }
        self.obstacle = sight.obstacle;
        Some(sight.told())
    }
}

/// The last line.
pub(super) fn ended(summary: &Summary) -> String {
    let &Summary { acknowledged, duration, bytes_sent, passes, pause } = summary;
    let passes = if passes == 1 { "1 pass".to_owned() } else { format!("{passes} passes") };
    let doubt = match acknowledged {
        true => "",
        false => "; the destination cannot tell whether the disk has arrived, look there",
    };
    format!(
        "Migration finished: {} sent in {}, {passes}, clients paused for {}{doubt}",
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
        speed: 10 << 20,
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
    fn a_sight_is_read_from_the_servers_line() {
        let line = "pid=1 size=200 is_mirroring=true clients_allowed=true num_clients=0 \
            has_control=true migration_speed=5 migration_duration=6 migration_seconds_left=7 \
            migration_bytes_left=50 migration_stage=connecting migration_passes=2";
        let expected = StatusSample {
            size: 200,
            bytes_left: 50,
            speed: 5,
            seconds_left: 7,
            passes: 2,
            obstacle: Some(ShownObstacle::Unreachable),
        };
        let sight = |line: &str| StatusSample::of(&Status::from_line(line).unwrap());
        assert_eq!(sight(line), Some(expected));
        // The original knows neither stages nor passes.
        let (original, _) = line.split_once(" migration_stage").unwrap();
        assert_eq!(sight(original), Some(StatusSample { passes: 0, obstacle: None, ..expected }));
        let idle = "pid=1 size=2 is_mirroring=false clients_allowed=true num_clients=0 \
            has_control=true";
        assert_eq!(sight(idle), None);
    }

    #[test]
    fn a_sight_tells_percent_rate_rest_time_and_pass() {
        assert_eq!(at(40).told(), "40 %, 10 MiB/s, 60 MiB left, about 10 s, pass 1");
        let stalled = StatusSample { speed: 0, seconds_left: 0, passes: 3, ..at(99) };
        assert_eq!(stalled.told(), "99 %, 0 bytes/s, 1 MiB left, pass 4");
        let unreachable = StatusSample { obstacle: Some(ShownObstacle::Unreachable), ..at(99) };
        assert!(unreachable.told().contains("cannot be reached, trying again"));
        let in_doubt = StatusSample { obstacle: Some(ShownObstacle::InDoubt), ..at(99) };
        assert!(in_doubt.told().contains("does not say whether the disk has arrived"));
    }

    #[test]
    fn a_milestone_gets_a_line() {
        let mut lines = LineFilter::default();
        assert_eq!(lines.next(seconds(1), &at(9)), None);
        assert_eq!(lines.next(seconds(2), &at(10)), Some(at(10).told()));
        assert_eq!(lines.next(seconds(3), &at(11)), None);
    }

    #[test]
    fn an_obstacle_is_told_when_it_comes_and_when_it_goes() {
        let mut lines = LineFilter::default();
        let mut told =
            |obstacle| lines.next(seconds(1), &StatusSample { obstacle, ..START }).is_some();
        assert!(told(Some(ShownObstacle::Unreachable)));
        assert!(!told(Some(ShownObstacle::Unreachable)));
        assert!(told(None));
        assert!(!told(None));
    }

    #[test]
    fn a_bar_shows_what_is_done_and_prints_nothing() {
        let bar = ProgressBar::hidden();
        let mut display = Display::Bar(bar.clone());
        assert_eq!(display.show(seconds(60), &at(40)), None);
        assert_eq!((bar.position(), bar.length()), (40 << 20, Some(100 << 20)));
        assert_eq!(bar.message(), at(40).told());
        display.end();
        assert!(bar.is_finished());
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
    }

    #[test]
    fn the_end_tells_bytes_time_and_pause_and_what_is_not_known() {
        let summary = Summary {
            acknowledged: true,
            duration: Duration::from_millis(12_345),
            bytes_sent: 100 << 20,
            passes: 3,
            pause: Duration::from_millis(12),
        };
        let told = "Migration finished: 100 MiB sent in 12.3 s, 3 passes, clients paused for \
            12 ms";
        assert_eq!(ended(&summary), told);
        let plain = Summary { acknowledged: false, passes: 1, ..summary };
        assert!(ended(&plain).contains(", 1 pass, "));
        assert!(ended(&plain).ends_with("cannot tell whether the disk has arrived, look there"));
    }
}

//! The texts of the status line, for people who look at `systemctl status`. Pure.

use crate::migration::job::{Obstacle, Progress, Stage};
use crate::words::counted;

/// The status while no migration runs.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct IdleStatus {
    /// `serving` or `receiving`.
    pub(in crate::daemon) verb: &'static str,
    pub(in crate::daemon) image: String,
    /// Bytes of the disk.
    pub(in crate::daemon) size: u64,
    /// The addresses that the server listens on.
    pub(in crate::daemon) addresses: String,
}

impl IdleStatus {
    /// `serving /srv/disk.img (10 GiB) on [::]:10809, 3 clients`.
    pub(super) fn describe(&self, clients: usize) -> String {
        let Self { verb, image, size, addresses } = self;
        let clients = match clients {
            0 => "no clients".to_owned(),
            count => counted(count, "client"),
        };
        format!("{verb} {image} ({}) on {addresses}, {clients}", bytes(*size))
    }
}

/// `43 % copied, 112 MiB/s, about 12 s left`, and the obstacle, if there is one; or what the migration
/// does instead of copying.
pub(super) fn progress(size: u64, progress: Option<&Progress>) -> String {
    let Some(now) = progress else { return "connecting".to_owned() };
    match (now.stage, &now.obstacle) {
        (Stage::Connecting | Stage::InDoubt, Some(obstacle)) => obstacle.to_string(),
        (Stage::Connecting, None) => "connecting".to_owned(),
        (Stage::Copying, _) => {
            let left = now.seconds_left.map(|seconds| format!(", about {} left", time(seconds)));
            let why = match &now.obstacle {
                None => String::new(),
                Some(Obstacle::Writers) => ", clients are slowed down".to_owned(),
                Some(obstacle) => format!("; {obstacle}"),
            };
            let (percent, speed) = (percent(size, now.bytes_left), bytes(now.bytes_per_second));
            format!("{percent} % copied, {speed}/s{}{why}", left.unwrap_or_default())
        }
        (Stage::Closing, _) => {
            format!("clients wait while the last {} are sent", bytes(now.bytes_left))
        }
        (Stage::HandingOver, _) => "handing the disk over".to_owned(),
        (Stage::InDoubt, None) => {
            "clients wait until the destination says whether the disk has arrived".to_owned()
        }
        (Stage::Leaving | Stage::Ended, _) => "the disk is at its destination".to_owned(),
    }
}

/// The percentage of the disk that has been copied; 100 only if nothing is left.
pub(super) fn percent(size: u64, bytes_left: u64) -> u64 {
    let done = u128::from(size.saturating_sub(bytes_left));
    u64::try_from(done * 100 / u128::from(size.max(1))).unwrap_or(100)
}

/// `512 bytes`, `4.5 KiB`, `112 MiB`: at least two significant digits.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return counted(count, "byte");
    }
    let mut unit = 1024;
    let mut name = UNITS[0];
    for larger in &UNITS[1..] {
        if count / unit < 1024 {
            break;
        }
        (unit, name) = (unit * 1024, larger);
    }
    let (whole, tenths) = (count / unit, count % unit * 10 / unit);
    if whole < 10 && tenths > 0 {
        format!("{whole}.{tenths} {name}")
    } else {
        format!("{whole} {name}")
    }
}

/// `12 s`, `4 min`, `3 h 20 min`.
fn time(seconds: u64) -> String {
    match seconds {
        0..90 => format!("{seconds} s"),
        90..3600 => format!("{} min", (seconds + 30) / 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::Id;
    use crate::migration::job::Trouble;
    use std::time::Duration;

    const COPYING: Progress = Progress {
        id: Id([0; 16]),
        stage: Stage::Copying,
        bytes_per_second: 112 << 20,
        seconds_left: Some(12),
        bytes_left: 57,
        speed_limit: None,
        passes: 0,
        hold: Duration::ZERO,
        owes_record: false,
        obstacle: None,
    };

    #[test]
    fn the_idle_status_counts_clients() {
        let status = IdleStatus {
            verb: "serving",
            image: "/srv/disk.img".to_owned(),
            size: 10 << 30,
            addresses: "[::]:10809".to_owned(),
        };
        let start = "serving /srv/disk.img (10 GiB) on [::]:10809, ";
        for (count, clients) in [(0, "no clients"), (1, "1 client"), (3, "3 clients")] {
            assert_eq!(status.describe(count), format!("{start}{clients}"));
        }
    }

    #[test]
    fn a_migration_shows_its_progress_or_its_obstacle() {
        let text = |now: &Progress| progress(100, Some(now));
        assert_eq!(text(&COPYING), "43 % copied, 112 MiB/s, about 12 s left");
        let stuck = Progress { seconds_left: None, bytes_per_second: 0, ..COPYING };
        assert_eq!(text(&stuck), "43 % copied, 0 bytes/s");
        let at = |stage, obstacle| text(&Progress { stage, obstacle, ..COPYING });
        let slowed = "43 % copied, 112 MiB/s, about 12 s left, clients are slowed down";
        assert_eq!(at(Stage::Copying, Some(Obstacle::Writers)), slowed);
        let no_route = Trouble::Connect("no route".to_owned());
        let trouble = Some(Obstacle::Trouble(no_route.clone()));
        assert_eq!(at(Stage::Connecting, None), "connecting");
        assert_eq!(at(Stage::Connecting, trouble), "no route; trying again every second");
        let flush = at(Stage::Copying, Some(Obstacle::Flush));
        let why = "; the destination takes long to flush what it has";
        assert_eq!(flush, format!("43 % copied, 112 MiB/s, about 12 s left{why}"));
        assert_eq!(at(Stage::Closing, None), "clients wait while the last 57 bytes are sent");
        assert!(at(Stage::InDoubt, None).starts_with("clients wait until the destination says"));
        let doubt = at(Stage::InDoubt, Some(Obstacle::Acknowledgement(no_route)));
        assert!(doubt.starts_with("the handover was not acknowledged (no route)"), "{doubt}");
        assert_eq!(progress(100, None), "connecting");
    }

    #[test]
    fn only_a_complete_copy_is_100_percent() {
        assert_eq!(percent(u64::MAX, 1), 99);
        assert_eq!(percent(u64::MAX, 0), 100);
        assert_eq!(percent(512, 512), 0);
        assert_eq!(percent(512, 600), 0, "more is left than there is");
        assert_eq!(percent(0, 0), 0);
    }

    #[test]
    fn sizes_and_times_are_rounded() {
        let sizes = [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (4608, "4.5 KiB")];
        for (count, expected) in sizes {
            assert_eq!(bytes(count), expected);
        }
        assert_eq!(bytes((1 << 20) - 1), "1023 KiB");
        assert_eq!(bytes(10 << 20 | 1 << 19), "10 MiB");
        assert_eq!(bytes(3 << 39), "1.5 TiB");
        assert_eq!(bytes(u64::MAX), "16383 PiB");
        for (seconds, expected) in
            [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (12_000, "3 h 20 min")]
        {
            assert_eq!(time(seconds), expected);
        }
    }
}

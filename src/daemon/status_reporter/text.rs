//! The texts of the status line, for people who look at `systemctl status`. Pure.

use crate::human::{self, counted};
use crate::migration::job::{Obstacle, Progress, Stage};
use crate::upstream::UpstreamState;
use std::time::Duration;

/// The status while no migration runs.
#[derive(Clone, Debug)]
pub(in crate::daemon) struct IdleStatus {
    /// `serving`, `receiving` or `proxying`.
    pub(in crate::daemon) verb: &'static str,
    /// The image's path. An upstream tells its own address.
    pub(in crate::daemon) disk: String,
    /// Bytes of the disk.
    pub(in crate::daemon) size: u64,
    /// The addresses that the server listens on.
    pub(in crate::daemon) addresses: String,
}

impl IdleStatus {
    /// `serving /srv/disk.img (10 GiB) on [::]:10809, 3 clients`; of an upstream its address, and
    /// whether its connection is lost.
    pub(super) fn describe(&self, clients: usize, upstream: Option<&UpstreamState>) -> String {
        let Self { verb, disk, size, addresses } = self;
        let disk = upstream.map_or(disk, |upstream| &upstream.target);
        let lost = upstream.map(loss).unwrap_or_default();
        let clients = match clients {
            0 => "no clients".to_owned(),
            count => counted(count, "client"),
        };
        format!("{verb} {disk} ({}) on {addresses}, {clients}{lost}", human::size(*size))
    }
}

/// `relaying 3 clients to 192.0.2.2:10809`, and whether the connection is lost.
pub(super) fn relay(clients: usize, upstream: &UpstreamState) -> String {
    format!("relaying {} to {}{}", counted(clients, "client"), upstream.target, loss(upstream))
}

/// That a flush has failed, at a time in seconds since 1970.
pub(super) fn flush_failed(since: u64) -> String {
    format!("; a flush failed at {}: data may be lost", human::utc(since))
}

/// That the connection to an upstream is lost, if it is.
fn loss(upstream: &UpstreamState) -> String {
    match upstream {
        UpstreamState { connected: false, last_error: Some(why), .. } => {
            format!("; the connection is lost: {why}")
        }
        UpstreamState { connected: false, .. } => "; the connection is lost".to_owned(),
        _ => String::new(),
    }
}

/// `43 % copied, 112 MiB/s, about 12 s left`, and the obstacle, if there is one; or the stage of
/// the migration, if it does not copy.
pub(super) fn progress(size: u64, progress: Option<&Progress>) -> String {
    let Some(now) = progress else { return "connecting".to_owned() };
    match (now.stage, &now.obstacle) {
        (Stage::Connecting | Stage::InDoubt, Some(obstacle)) => obstacle.to_string(),
        (Stage::Connecting, None) => "connecting".to_owned(),
        (Stage::Copying, _) => {
            let left = now.seconds_left.map(Duration::from_secs).map(human::duration);
            let left = left.map(|left| format!(", about {left} left"));
            let why = match &now.obstacle {
                None => String::new(),
                Some(Obstacle::Writers) => ", clients are slowed down".to_owned(),
                Some(obstacle) => format!("; {obstacle}"),
            };
            let percent = human::percent_done(size, now.bytes_left);
            let speed = human::size(now.bytes_per_second);
            format!("{percent} % copied, {speed}/s{}{why}", left.unwrap_or_default())
        }
        (Stage::Closing, _) => {
            format!("clients wait while the last {} are sent", human::size(now.bytes_left))
        }
        (Stage::HandingOver, _) => "handing the disk over".to_owned(),
        (Stage::InDoubt, None) => {
            "clients wait until the destination says whether the disk has arrived".to_owned()
        }
        (Stage::Leaving | Stage::Ended, _) => "the disk is at its destination".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::Id;
    use crate::migration::job::Trouble;

    const COPYING: Progress = Progress {
        id: Id([0; 16]),
        stage: Stage::Copying,
        bytes_per_second: 112 << 20,
        seconds_left: Some(12),
        bytes_left: 57,
        speed_limit: None,
        passes: 0,
        write_delay: Duration::ZERO,
        record_unrestored: false,
        obstacle: None,
    };

    #[test]
    fn the_idle_status_counts_clients() {
        let status = IdleStatus {
            verb: "serving",
            disk: "/srv/disk.img".to_owned(),
            size: 10 << 30,
            addresses: "[::]:10809".to_owned(),
        };
        let start = "serving /srv/disk.img (10 GiB) on [::]:10809, ";
        for (count, clients) in [(0, "no clients"), (1, "1 client"), (3, "3 clients")] {
            assert_eq!(status.describe(count, None), format!("{start}{clients}"));
        }
    }

    #[test]
    fn the_idle_status_of_a_proxy_shows_the_upstream() {
        let status = IdleStatus {
            verb: "proxying",
            disk: "192.0.2.1:7".to_owned(),
            size: 10 << 30,
            addresses: "[::]:10809".to_owned(),
        };
        let mut upstream = UpstreamState {
            disk_id: None,
            target: "192.0.2.2:7".to_owned(),
            connected: true,
            since: Duration::ZERO,
            last_error: None,
            unflushed_bytes: 0,
            reconnects: 0,
        };
        let text = "proxying 192.0.2.2:7 (10 GiB) on [::]:10809, 1 client";
        assert_eq!(status.describe(1, Some(&upstream)), text);
        upstream.connected = false;
        let lost = format!("{text}; the connection is lost");
        assert_eq!(status.describe(1, Some(&upstream)), lost);
        upstream.last_error = Some("no route to host".to_owned());
        assert_eq!(status.describe(1, Some(&upstream)), format!("{lost}: no route to host"));
        let lost = "relaying 3 clients to 192.0.2.2:7; the connection is lost: no route to host";
        assert_eq!(relay(3, &upstream), lost);
        upstream.connected = true;
        assert_eq!(relay(1, &upstream), "relaying 1 client to 192.0.2.2:7");
    }

    #[test]
    fn a_failed_flush_shows_its_time() {
        let text = "; a flush failed at 2023-11-14T22:13:20Z: data may be lost";
        assert_eq!(flush_failed(1_700_000_000), text);
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
}

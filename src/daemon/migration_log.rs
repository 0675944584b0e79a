//! A migration away from here, as the log, the daemon and the operator who waits hear of it.
//! Decides nothing about it.

use super::ProcessEvent;
use crate::disk::ownership::Id;
use crate::message_id;
use crate::migration::job::{News, Obstacle, Outcome, Progress};
use crate::migration::source::{MigrationStats, Observer};
use crate::server::ShutdownHandle;
use std::sync::mpsc::Sender;
use tracing::{error, info, warn};

/// What is heard of a migration until `mirror` can be answered.
pub(super) enum StartResult {
    Started,
    Ended(Outcome),
}

/// A migration, as the log names it. Each copy that it begins has an id of its own.
#[derive(Clone, Debug)]
pub(super) struct MigrationLog {
    pub(super) to: String,
    pub(super) image: String,
    pub(super) size: u64,
}

impl MigrationLog {
    /// News, once, where they come up.
    fn log(&self, id: Id, news: &News, line: &str) {
        let Self { to, image, size } = self;
        let kind = kind(news);
        match news {
            News::Started
            | News::Resumed
            | News::Restarted
            | News::GateClosed
            | News::HandingOverAgain => info!(
                message_id = kind, "flexnbd.migration" = %id, "flexnbd.destination" = to,
                "flexnbd.image" = image, "flexnbd.bytes_total" = size,
                "{line}"
            ),
            News::Obstructed(Obstacle::Acknowledgement(_)) | News::RecordFailed(_) => error!(
                message_id = kind, "flexnbd.migration" = %id, "flexnbd.destination" = to,
                "flexnbd.image" = image,
                "{line}"
            ),
            News::Obstructed(_) | News::Throttled(_) => warn!(
                message_id = kind, "flexnbd.migration" = %id, "flexnbd.destination" = to,
                "flexnbd.image" = image,
                "{line}"
            ),
        }
    }

    /// How far it is.
    pub(super) fn log_progress(&self, progress: &Progress, told: &str) {
        let Self { to, image, size } = self;
        info!(
            message_id = message_id::MIGRATION_PROGRESS,
            "flexnbd.migration" = %progress.id, "flexnbd.destination" = to,
            "flexnbd.image" = image, "flexnbd.bytes_total" = size,
            "flexnbd.bytes_left" = progress.bytes_left,
            "flexnbd.bytes_per_second" = progress.bytes_per_second,
            "migration to {to}: {told}"
        );
    }

    /// How it ended.
    pub(super) fn log_end(&self, id: Id, outcome: &Outcome, tally: &MigrationStats) {
        let Self { to, image, size } = self;
        match outcome {
            Outcome::Arrived { acknowledged } => {
                let how = match acknowledged {
                    true => "acknowledged",
                    false => "complete, as far as we know",
                };
                info!(
                    message_id = message_id::MIGRATION_DEPARTED,
                    "flexnbd.migration" = %id, "flexnbd.destination" = to,
                    "flexnbd.image" = image, "flexnbd.bytes_total" = size,
                    "flexnbd.bytes_sent" = tally.bytes_sent,
                    "migration to {to}: the disk is at its destination ({how}; clients waited for \
                     {} ms)", tally.pause.as_millis()
                );
            }
            Outcome::Broken => info!(
                message_id = message_id::MIGRATION_BROKEN_OFF,
                "flexnbd.migration" = %id, "flexnbd.destination" = to, "flexnbd.image" = image,
                "flexnbd.bytes_sent" = tally.bytes_sent,
                "migration to {to}: broken off; the disk stays here"
            ),
            Outcome::Failed(trouble) => warn!(
                message_id = message_id::MIGRATION_FAILED,
                "flexnbd.migration" = %id, "flexnbd.destination" = to, "flexnbd.image" = image,
                "migration to {to}: failed: {trouble}; the disk stays here"
            ),
        }
    }
}

fn kind(news: &News) -> Option<&'static str> {
    Some(match news {
        News::Started => message_id::MIGRATION_STARTED,
        News::Resumed | News::Restarted => message_id::MIGRATION_RESUMED,
        News::Obstructed(Obstacle::Trouble(_)) => message_id::MIGRATION_RETRYING,
        News::Obstructed(Obstacle::Acknowledgement(_)) => message_id::MIGRATION_IN_DOUBT,
        News::Obstructed(_) => message_id::MIGRATION_GATE_BUSY,
        News::Throttled(_) => message_id::MIGRATION_HELD_BACK,
        News::GateClosed => message_id::MIGRATION_GATE_CLOSED,
        News::RecordFailed(_) => message_id::MIGRATION_RECORD_FAILED,
        // It was told before that it is in doubt, and what comes of it will be.
        News::HandingOverAgain => return None,
    })
}

/// Tells the log, the operator who waits, and the daemon.
pub(super) struct Reporter {
    pub(super) passage: MigrationLog,
    pub(super) first: Sender<StartResult>,
    pub(super) exit: ShutdownHandle,
    pub(super) events: Sender<ProcessEvent>,
}

impl Observer for Reporter {
    fn news(&self, id: Id, news: &News) {
        if *news == News::Started {
            let _ = self.first.send(StartResult::Started);
        }
        let line = format!("migration to {}: {}", self.passage.to, told(news));
        self.passage.log(id, news, &line);
        // The process is ending already if nobody hears it.
        let _ = self.events.send(ProcessEvent::MigrationNews);
    }

    fn retire(&self) {
        self.exit.leave();
    }
}

fn told(news: &News) -> String {
    match news {
        News::Started => "started".to_owned(),
        News::Resumed => "resumed where it was".to_owned(),
        News::Restarted => "another process listens there, starting from the beginning".to_owned(),
        News::Obstructed(obstacle) => obstacle.to_string(),
        News::Throttled(hold) => format!(
            "clients write faster than the copy catches up; holding each write back for {} µs",
            hold.as_micros()
        ),
        News::GateClosed => "clients wait while the rest is sent".to_owned(),
        News::HandingOverAgain => "the disk has not arrived, handing over again".to_owned(),
        News::RecordFailed(why) => why.clone(),
    }
}

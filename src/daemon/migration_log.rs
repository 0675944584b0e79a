//! The journal entries of a migration to another host. Decides nothing.

use crate::disk::ownership::Id;
use crate::message_id;
use crate::migration::job::{News, Obstacle, Outcome, Progress};
use crate::migration::source::MigrationStats;
use tracing::{error, info, warn};

/// The fields that all entries of one migration share. The id is not among them: each copy that a
/// migration begins has another one.
#[derive(Clone, Debug)]
pub(super) struct MigrationLog {
    pub(super) to: String,
    pub(super) image: String,
    pub(super) size: u64,
}

impl MigrationLog {
    /// Logs a change of the migration.
    pub(super) fn log_news(&self, id: Id, news: &News) {
        let Self { to, image, size } = self;
        let kind = news_message_id(news);
        let line = format!("migration to {to}: {}", describe(news));
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

    /// Logs the progress, which `text` describes.
    pub(super) fn log_progress(&self, progress: &Progress, text: &str) {
        let Self { to, image, size } = self;
        info!(
            message_id = message_id::MIGRATION_PROGRESS,
            "flexnbd.migration" = %progress.id, "flexnbd.destination" = to,
            "flexnbd.image" = image, "flexnbd.bytes_total" = size,
            "flexnbd.bytes_left" = progress.bytes_left,
            "flexnbd.bytes_per_second" = progress.bytes_per_second,
            "migration to {to}: {text}"
        );
    }

    /// Logs the end.
    pub(super) fn log_end(&self, id: Id, outcome: &Outcome, stats: &MigrationStats) {
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
                    "flexnbd.bytes_sent" = stats.bytes_sent,
                    "migration to {to}: the disk is at its destination ({how}; clients waited for \
                     {} ms)", stats.pause.as_millis()
                );
            }
            Outcome::Broken => info!(
                message_id = message_id::MIGRATION_BROKEN_OFF,
                "flexnbd.migration" = %id, "flexnbd.destination" = to, "flexnbd.image" = image,
                "flexnbd.bytes_sent" = stats.bytes_sent,
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

fn news_message_id(news: &News) -> Option<&'static str> {
    Some(match news {
        News::Started => message_id::MIGRATION_STARTED,
        News::Resumed | News::Restarted => message_id::MIGRATION_RESUMED,
        News::Obstructed(Obstacle::Trouble(_)) => message_id::MIGRATION_RETRYING,
        News::Obstructed(Obstacle::Acknowledgement(_)) => message_id::MIGRATION_IN_DOUBT,
        News::Obstructed(_) => message_id::MIGRATION_GATE_BUSY,
        News::Throttled(_) => message_id::MIGRATION_HELD_BACK,
        News::GateClosed => message_id::MIGRATION_GATE_CLOSED,
        News::RecordFailed(_) => message_id::MIGRATION_RECORD_FAILED,
        // Follows an entry with MIGRATION_IN_DOUBT and precedes that of the verdict.
        News::HandingOverAgain => return None,
    })
}

fn describe(news: &News) -> String {
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

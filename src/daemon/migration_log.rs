//! The journal entries of a migration to another host. Decides nothing.

use crate::disk::ownership::Id;
use crate::message_id;
use crate::migration::job::{News, Obstacle, Outcome, Progress};
use crate::migration::source::MigrationStats;
use tracing::{Span, error, error_span, info, warn};

/// A migration, and the journal fields that all its entries share. The id is not among them,
/// because each copy of a migration has another one.
#[derive(Clone, Debug)]
pub(super) struct MigrationLog {
    /// The destination's address.
    pub(super) to: String,
    /// The image's path.
    pub(super) image: String,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Adds the shared fields to the entries logged inside.
    span: Span,
}

impl MigrationLog {
    pub(super) fn new(to: String, image: String, size: u64) -> Self {
        // A span of the highest level: any verbosity that shows one of its entries enables it.
        let span = error_span!(
            parent: None, "migration", "flexnbd.destination" = to, "flexnbd.image" = image
        );
        Self { to, image, size, span }
    }

    /// Logs a change of the migration.
    pub(super) fn log_news(&self, id: Id, news: &News) {
        let _entered = self.span.enter();
        let kind = news_message_id(news);
        let line = format!("migration to {}: {}", self.to, describe(news));
        match news {
            News::Started
            | News::Resumed
            | News::Restarted
            | News::GateClosed
            | News::HandingOverAgain => info!(
                message_id = kind, "flexnbd.migration" = %id,
                "flexnbd.bytes_total" = self.size,
                "{line}"
            ),
            News::Obstructed(Obstacle::Acknowledgement(_)) | News::RecordFailed(_) => {
                error!(message_id = kind, "flexnbd.migration" = %id, "{line}");
            }
            News::Obstructed(_) | News::Throttled(_) | News::RelayFailed(_) => {
                warn!(message_id = kind, "flexnbd.migration" = %id, "{line}");
            }
        }
    }

    /// Logs the progress, which `text` describes.
    pub(super) fn log_progress(&self, progress: &Progress, text: &str) {
        let _entered = self.span.enter();
        info!(
            message_id = message_id::MIGRATION_PROGRESS,
            "flexnbd.migration" = %progress.id,
            "flexnbd.bytes_total" = self.size,
            "flexnbd.bytes_left" = progress.bytes_left,
            "flexnbd.bytes_per_second" = progress.bytes_per_second,
            "migration to {}: {text}", self.to
        );
    }

    /// Logs the end.
    pub(super) fn log_end(&self, id: Id, outcome: &Outcome, stats: &MigrationStats) {
        let _entered = self.span.enter();
        let to = &self.to;
        match outcome {
            Outcome::Arrived { acknowledged } => {
                let how = match acknowledged {
                    true => "acknowledged",
                    false => "complete, as far as we know",
                };
                info!(
                    message_id = message_id::MIGRATION_DEPARTED,
                    "flexnbd.migration" = %id,
                    "flexnbd.bytes_total" = self.size,
                    "flexnbd.bytes_sent" = stats.bytes_sent,
                    "migration to {to}: the disk is at its destination ({how}; clients waited for \
                     {} ms)", stats.pause.as_millis()
                );
            }
            Outcome::Broken => info!(
                message_id = message_id::MIGRATION_BROKEN_OFF,
                "flexnbd.migration" = %id,
                "flexnbd.bytes_sent" = stats.bytes_sent,
                "migration to {to}: broken off; the disk stays here"
            ),
            Outcome::Failed(trouble) => warn!(
                message_id = message_id::MIGRATION_FAILED,
                "flexnbd.migration" = %id,
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
        News::RelayFailed(_) => message_id::RELAY_FAILED,
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
        News::RelayFailed(why) => format!(
            "the disk is there, but its clients cannot be passed on and are disconnected: {why}"
        ),
    }
}

//! The events of the process, and the types that other modules report them through.
//! Never decides the reaction to an event.

use super::migration_log::MigrationLog;
use crate::migration::destination::ArrivalResult;
use crate::migration::job::Outcome;
use crate::migration::source::MigrationHandle;
use crate::server::events::ServerEvents;
use crate::sync::lock;
use crate::upstream::UpstreamEvents;
use nix::sys::signal::Signal;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

/// An event of the process.
///
/// Senders ignore a closed channel: the event loop has ended then, and the process is about to.
#[derive(Clone, Debug)]
pub(super) enum ProcessEvent {
    Stop(Signal),
    MigrationStarted(MigrationLog, Arc<MigrationHandle>),
    /// The status of the migration has changed.
    MigrationChanged,
    MigrationEnded(Outcome),
    /// The process has received the disk, or cannot.
    ReceiveEnded(ArrivalResult),
    ClientsChanged,
    /// A flush of the disk has failed, for the first time.
    FlushFailed,
    /// The connection to the upstream has been made or lost.
    UpstreamChanged,
    /// An operator's command has been carried out.
    CommandEnded,
    /// The server cannot accept clients any more, for this reason.
    AcceptFailed(String),
    /// The watchdog checks that events are handled; the answer is the same number.
    HealthCheck(u64),
}

/// Sends the server's events to the event loop.
#[derive(Debug)]
pub(super) struct ServerEventSender(pub(super) Sender<ProcessEvent>);

impl ServerEvents for ServerEventSender {
    fn clients_changed(&self) {
        let _ = self.0.send(ProcessEvent::ClientsChanged);
    }

    fn accepting_failed(&self, why: &io::Error) {
        let _ = self.0.send(ProcessEvent::AcceptFailed(why.to_string()));
    }
}

/// Sends the upstream's events to the event loop.
#[derive(Debug)]
pub(super) struct UpstreamEventSender(pub(super) Sender<ProcessEvent>);

impl UpstreamEvents for UpstreamEventSender {
    fn changed(&self) {
        let _ = self.0.send(ProcessEvent::UpstreamChanged);
    }
}

/// Counts the commands that are being carried out.
#[derive(Debug)]
pub(super) struct ActiveCommands {
    events: Sender<ProcessEvent>,
    count: AtomicUsize,
    /// No further command begins. Locked while a command begins and while this is set, so that a
    /// command is either counted or refused.
    closed: Mutex<bool>,
}

impl ActiveCommands {
    pub(super) fn new(events: Sender<ProcessEvent>) -> Arc<Self> {
        Arc::new(Self { events, count: AtomicUsize::new(0), closed: Mutex::new(false) })
    }

    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Counts one more command, until the guard is dropped; `None` when commands are refused.
    pub(super) fn begin(&self) -> Option<ActiveCommand<'_>> {
        let closed = lock(&self.closed);
        (!*closed).then(|| {
            self.count.fetch_add(1, Ordering::AcqRel);
            ActiveCommand(self)
        })
    }

    /// Refuses further commands if none is being carried out and `also` returns true. Returns
    /// whether commands are refused now.
    pub(super) fn close_if_none(&self, also: impl FnOnce() -> bool) -> bool {
        let mut closed = lock(&self.closed);
        *closed = *closed || (self.count() == 0 && also());
        *closed
    }
}

/// Guard of a command that is being carried out.
#[derive(Debug)]
pub(super) struct ActiveCommand<'a>(&'a ActiveCommands);

impl Drop for ActiveCommand<'_> {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        let _ = self.0.events.send(ProcessEvent::CommandEnded);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_command_begins_after_closing() {
        let (events, received) = mpsc::channel();
        let commands = ActiveCommands::new(events);
        let command = commands.begin().unwrap();
        assert!(!commands.close_if_none(|| true), "a command is active");
        drop(command);
        assert!(matches!(received.try_recv(), Ok(ProcessEvent::CommandEnded)));
        assert!(!commands.close_if_none(|| false), "the other condition fails");
        drop(commands.begin().unwrap());
        assert!(commands.close_if_none(|| true));
        assert!(commands.begin().is_none());
        assert_eq!(commands.count(), 0);
    }
}

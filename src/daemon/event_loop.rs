//! The process while it runs: waits for one event after another, and closes the rooms in order.
//! Never opens anything.

use super::config::{ProcessEnd, ProcessRole};
use super::idle::Idle;
use super::operator::Service;
use super::status::StatusReporter;
use super::watchdog::Watchdog;
use super::{DISK_GRACE, GRACE, ProcessEvent, snapshot, tell};
use crate::control::Handle;
use crate::disk::Disk;
use crate::disk::ownership::Provenance;
use crate::message_id;
use crate::migration::destination::ArrivalResult;
use crate::migration::job::Outcome;
use crate::migration::source::MigrationHandle;
use crate::server::Grace;
use crate::systemd::{FdStore, ServiceManager};
use nix::sys::signal::Signal;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use tracing::info;

/// Time to spare, where the service manager is told how long something may take.
const SPARE: Duration = Duration::from_secs(5);
/// How long closing may take: an order that waits for a destination to greet us, the grace that
/// sessions have for the disk and once more for their clients, and what the service manager takes to
/// store them.
const CLOSING_LONGEST: Duration = Duration::from_secs(110);

/// Everything that is open while the process runs.
pub(super) struct Process {
    pub(super) service: Arc<Service>,
    pub(super) control: Option<Handle>,
    pub(super) notifier: ServiceManager,
    /// Where sessions are left for the next process.
    pub(super) store: FdStore,
    pub(super) disk: Arc<Disk>,
    /// The image's path, for people.
    pub(super) image: String,
    pub(super) idle: Idle,
    pub(super) beat: StatusReporter,
    /// Feeds the watchdog, if there is one.
    pub(super) pulse: Option<Watchdog>,
}

/// What happened while everything was being closed: a disk that arrived or left all the same.
pub(super) fn last_word(ending: ProcessEnd, arrivals: &Receiver<ProcessEvent>) -> ProcessEnd {
    let moved = |event| {
        matches!(
            event,
            ProcessEvent::Incoming(ArrivalResult::Arrived(_))
                | ProcessEvent::Migrated(Outcome::Arrived { .. })
        )
    };
    if arrivals.try_iter().any(moved) {
        info!("the disk has been moved, as it was about to be when the signal came");
        return ProcessEnd::Well;
    }
    ending
}

impl Process {
    /// Waits for the event that ends the process.
    pub(super) fn wait(
        &mut self,
        arrivals: &Receiver<ProcessEvent>,
        role: ProcessRole,
    ) -> ProcessEnd {
        loop {
            if self.has_idled() {
                info!(message_id = message_id::STOPPING, "stopping: there is nothing to do");
                return ProcessEnd::Well;
            }
            let now = Instant::now();
            self.beat.tell(now, self.service.server().clients());
            let due = [self.idle.due(self.is_busy()), self.beat.due(now)];
            // The channel cannot close: the thread that watches signals has its other end.
            match next(arrivals, due.into_iter().flatten().min()) {
                Some(ProcessEvent::Stop(signal)) => {
                    return self.interrupted(signal, role, arrivals);
                }
                Some(ProcessEvent::Migrating(passage, desk)) => {
                    self.beat.begin(passage, desk, Instant::now());
                }
                Some(ProcessEvent::MigrationNews) => self.beat.stir(),
                Some(ProcessEvent::Migrated(outcome)) => {
                    self.service.vigil.migration_over();
                    self.beat.over(&outcome);
                    if let Some(ending) = migrated(&outcome) {
                        return ending;
                    }
                    self.idle.stir(Instant::now());
                }
                Some(ProcessEvent::Incoming(ArrivalResult::Arrived(title))) => {
                    self.arrived(title);
                    return ProcessEnd::Well;
                }
                Some(ProcessEvent::Incoming(ArrivalResult::Failed(why))) => {
                    return ProcessEnd::Badly(why);
                }
                Some(ProcessEvent::Clients) => {
                    self.idle.stir(Instant::now());
                    self.beat.stir();
                }
                Some(ProcessEvent::NotAccepting(why)) => {
                    return ProcessEnd::Badly(format!("no longer accepting clients: {why}"));
                }
                Some(ProcessEvent::Asked(number)) => self.answer(number),
                Some(ProcessEvent::Obeyed) | None => {}
            }
        }
    }

    /// Whether there has been nothing to do for so long that the process ends; nobody is let in
    /// any more then.
    fn has_idled(&mut self) -> bool {
        let now = Instant::now();
        if self.idle.due(self.is_busy()).is_none_or(|due| now < due) {
            return false;
        }
        if self.service.close_if_idle() {
            return true;
        }
        // Somebody is just coming in.
        self.idle.stir(now);
        false
    }

    /// Whether there is a client, a migration or an order.
    fn is_busy(&self) -> bool {
        let migrates = || self.service.desk().is_some_and(|desk| desk.outcome().is_none());
        self.service.server().clients() > 0 || self.service.orders.count() > 0 || migrates()
    }

    /// The watchdog has asked whether events are heard.
    fn answer(&self, number: u64) {
        if let Some(pulse) = &self.pulse {
            pulse.answer(number);
        }
    }

    fn arrived(&self, title: Provenance) {
        let migration = match title {
            Provenance::Arrived(id) => Some(id.to_string()),
            _ => None,
        };
        info!(
            message_id = message_id::ARRIVED,
            "flexnbd.migration" = migration,
            "flexnbd.image" = self.image,
            "flexnbd.bytes_total" = self.disk.size(),
            "the disk has arrived"
        );
        tell(self.notifier.status("the disk has arrived"));
    }

    fn interrupted(
        &mut self,
        signal: Signal,
        role: ProcessRole,
        arrivals: &Receiver<ProcessEvent>,
    ) -> ProcessEnd {
        info!(message_id = message_id::STOPPING, "stopping: received {signal}");
        tell(self.notifier.stopping());
        tell(self.notifier.status("stopping"));
        if let ProcessRole::Listen { .. } = role {
            return ProcessEnd::Badly(format!(
                "received {signal} before the disk has arrived; what is here is incomplete"
            ));
        }
        // Before looking: a migration that is not found now ends before it begins.
        self.service.vigil.interrupt();
        match self.service.desk().filter(|desk| desk.outcome().is_none()) {
            None => ProcessEnd::Well,
            Some(desk) => self.abandon(&desk, signal, arrivals),
        }
    }

    /// Breaks a migration off and waits until everything is as it was before it; or, if it is too
    /// late for that, until the disk has left. Not for ever: the record tells the next process.
    fn abandon(
        &mut self,
        desk: &MigrationHandle,
        signal: Signal,
        arrivals: &Receiver<ProcessEvent>,
    ) -> ProcessEnd {
        tell(self.notifier.status("stopping: breaking the migration off, or finishing it"));
        tell(self.notifier.extend_timeout(GRACE + SPARE));
        desk.request_break();
        let deadline = Instant::now() + GRACE;
        loop {
            match arrivals.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(ProcessEvent::Migrated(outcome)) => {
                    self.service.vigil.migration_over();
                    let interrupted = format!("received {signal} while the disk was being moved");
                    self.beat.over(&outcome);
                    return migrated(&outcome).unwrap_or(ProcessEnd::Badly(interrupted));
                }
                Ok(ProcessEvent::Asked(number)) => self.answer(number),
                Ok(_) => {}
                Err(_) => {
                    return ProcessEnd::Badly(format!(
                        "received {signal} while the disk was being handed over; its record tells \
                         whether it has left"
                    ));
                }
            }
        }
    }

    /// Closes the rooms in order. Sessions are left to the next process if there may be one that
    /// `goes_on` with them: not while a disk is being received, since its sessions are the arrival,
    /// and not after a flush has failed, since the next process would not know of it.
    pub(super) fn close(self, ending: &ProcessEnd, goes_on: bool) {
        tell(self.notifier.stopping());
        tell(self.notifier.extend_timeout(CLOSING_LONGEST));
        if let ProcessEnd::Badly(why) = ending {
            tell(self.notifier.status(why));
        }
        if let Some(pulse) = &self.pulse {
            pulse.close();
        }
        self.service.vigil.interrupt();
        self.service.vigil.stop();
        drop(self.control);
        let mut server = self.service.server();
        let grace = Grace { clients: GRACE, disk: DISK_GRACE };
        match self.store.room() {
            room if goes_on && room > 0 => {
                snapshot::put_in(&self.store, &server.pack_up(room, grace));
            }
            _ => server.stop(grace),
        }
    }
}

/// The next event; none at that time, if there is one.
fn next(arrivals: &Receiver<ProcessEvent>, at: Option<Instant>) -> Option<ProcessEvent> {
    match at {
        None => arrivals.recv().ok(),
        Some(at) => arrivals.recv_timeout(at.saturating_duration_since(Instant::now())).ok(),
    }
}

/// How the process ends after a migration; it goes on if the disk stayed.
fn migrated(outcome: &Outcome) -> Option<ProcessEnd> {
    matches!(outcome, Outcome::Arrived { .. }).then_some(ProcessEnd::Well)
}

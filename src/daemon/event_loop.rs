//! The process while it runs: handles one event after another, then closes the modules in order.
//! Never opens anything.

use super::events::ProcessEvent;
use super::idle::Idle;
use super::operator::Service;
use super::proxying;
use super::relaying::ActiveRelay;
use super::snapshot::{self, LeftSessions};
use super::status_reporter::{Reported, StatusReporter};
use super::tls::ExpiryWatch;
use super::watchdog::Watchdog;
use crate::control::Handle;
use crate::disk::Disk;
use crate::disk::ownership::Provenance;
use crate::message_id;
use crate::migration::destination::ArrivalResult;
use crate::migration::job::Outcome;
use crate::migration::source::MigrationHandle;
use crate::server::{Grace, StoredSessions};
use crate::systemd::{FdStore, ServiceManager, log_unsent};
use nix::sys::signal::Signal;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant, SystemTime};
use tracing::info;

/// Time for sessions to answer the requests that they have received, when the server stops.
const GRACE: Duration = Duration::from_secs(10);
/// The same for sessions that wait for the disk, such as for a FLUSH of much dirty data.
const DISK_GRACE: Duration = Duration::from_secs(60);
/// Added to a time limit when it is announced to the service manager.
const MARGIN: Duration = Duration::from_secs(5);
/// Time for closing: a command that waits for a destination's handshake, [`DISK_GRACE`], another
/// [`GRACE`] for the clients, and the time in which the service manager stores the sessions.
const CLOSING_MAX: Duration = Duration::from_secs(110);

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProcessEnd {
    /// In an orderly way.
    Well,
    /// With an error, for this reason.
    Badly(String),
}

/// Everything that is open while the process runs.
pub(super) struct Process {
    pub(super) service: Arc<Service>,
    /// The threads that report events hold the sending ends.
    pub(super) events: Receiver<ProcessEvent>,
    pub(super) control: Option<Handle>,
    pub(super) notifier: ServiceManager,
    /// Keeps sessions for the next process.
    pub(super) store: FdStore,
    pub(super) disk: Arc<Disk>,
    /// The image's path or the upstream's address, for messages.
    pub(super) name: String,
    pub(super) idle: Idle,
    pub(super) expiry: ExpiryWatch,
    pub(super) status: StatusReporter,
    /// `None` if the service manager has no watchdog.
    pub(super) watchdog: Option<Watchdog>,
}

impl Process {
    /// Handles events until one ends the process, and closes everything.
    pub(super) fn run(mut self) -> ProcessEnd {
        let end = self.handle_events();
        self.close(&end);
        self.end_after_close(end)
    }

    fn handle_events(&mut self) -> ProcessEnd {
        loop {
            if self.close_if_idle() {
                info!(message_id = message_id::STOPPING, "stopping: there is nothing to do");
                return ProcessEnd::Well;
            }
            let now = Instant::now();
            let clients = self.service.server().client_count();
            let relay = self.service.relay();
            if let Some(relay) = relay.as_ref().filter(|relay| self.is_relay_over(relay, clients)) {
                relay.log_end(clients);
                return ProcessEnd::Well;
            }
            self.report_status(now, clients, relay.is_some());
            self.expiry.warn_if_due(&self.service.tls, now);
            let deadlines = [
                self.idle.deadline(self.is_busy()),
                self.status.deadline(now),
                relay.and_then(|relay| relay.deadline),
                self.expiry.deadline(&self.service.tls),
            ];
            if let Some(event) = self.next_event(deadlines.into_iter().flatten().min())
                && let Some(end) = self.handle(event)
            {
                return end;
            }
        }
    }

    fn report_status(&mut self, now: Instant, clients: usize, relays: bool) {
        let upstream = self.service.upstream();
        let flush_failed_at = self.service.flush_failure().and_then(|failure| failure.since());
        self.status.report_if_due(now, &Reported { clients, upstream, relays, flush_failed_at });
    }

    /// The next event; `None` at the deadline.
    fn next_event(&self, deadline: Option<Instant>) -> Option<ProcessEvent> {
        // The channel cannot close: the thread that waits for signals holds a sending end.
        match deadline {
            None => self.events.recv().ok(),
            Some(deadline) => {
                let timeout = deadline.saturating_duration_since(Instant::now());
                self.events.recv_timeout(timeout).ok()
            }
        }
    }

    /// Handles one event. Returns how the process ends, if the event ends it.
    fn handle(&mut self, event: ProcessEvent) -> Option<ProcessEnd> {
        match event {
            ProcessEvent::Stop(signal) => return Some(self.stop(signal)),
            ProcessEvent::MigrationStarted(log, migration) => {
                self.status.migration_started(log, migration, Instant::now());
            }
            ProcessEvent::MigrationChanged => self.status.mark_changed(),
            ProcessEvent::MigrationEnded(outcome) => {
                let end = self.migration_ended(&outcome);
                self.idle.restart(Instant::now());
                return end;
            }
            ProcessEvent::ReceiveEnded(ArrivalResult::Arrived(provenance)) => {
                self.report_arrival(provenance);
                return Some(ProcessEnd::Well);
            }
            ProcessEvent::ReceiveEnded(ArrivalResult::Failed(why)) => {
                return Some(ProcessEnd::Badly(why));
            }
            ProcessEvent::ClientsChanged => {
                self.idle.restart(Instant::now());
                self.status.mark_changed();
            }
            ProcessEvent::FlushFailed => self.note_flush_failure(),
            ProcessEvent::UpstreamChanged => self.status.mark_changed(),
            ProcessEvent::AcceptFailed(why) => {
                return Some(ProcessEnd::Badly(format!("no longer accepting clients: {why}")));
            }
            ProcessEvent::HealthCheck(number) => self.answer_health_check(number),
            // The loop checks the idle deadline after every event.
            ProcessEvent::CommandEnded => {}
        }
        None
    }

    /// Whether the process has been idle up to its deadline. If so, it accepts neither clients nor
    /// commands from now on.
    fn close_if_idle(&mut self) -> bool {
        let now = Instant::now();
        if self.idle.deadline(self.is_busy()).is_none_or(|deadline| now < deadline) {
            return false;
        }
        if self.service.close_if_idle() {
            return true;
        }
        // A client or a command has just arrived.
        self.idle.restart(now);
        false
    }

    /// Whether there is a client, a migration or a command.
    fn is_busy(&self) -> bool {
        self.service.server().client_count() > 0
            || self.service.commands.count() > 0
            || self.service.running_migration().is_some()
    }

    fn answer_health_check(&self, number: u64) {
        if let Some(watchdog) = &self.watchdog {
            watchdog.answer(number);
        }
    }

    /// Whether the clients of the disk that has left have gone, or their time is over.
    fn is_relay_over(&self, relay: &ActiveRelay, clients: usize) -> bool {
        let has_ended = self.service.running_migration().is_none();
        has_ended && (clients == 0 || relay.is_late(Instant::now()))
    }

    /// Wakes the waiting operators, and updates the status. The process ends if the disk has left without
    /// its clients, and continues otherwise.
    fn migration_ended(&mut self, outcome: &Outcome) -> Option<ProcessEnd> {
        self.service.waiters.migration_ended();
        self.status.migration_ended(outcome);
        self.note_flush_failure();
        let has_left = matches!(outcome, Outcome::Arrived { .. }) && self.service.relay().is_none();
        has_left.then_some(ProcessEnd::Well)
    }

    fn note_flush_failure(&mut self) {
        let now = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        self.service.note_flush_failure(now);
        self.status.mark_changed();
    }

    fn report_arrival(&self, provenance: Provenance) {
        let migration = match provenance {
            Provenance::Arrived(id) => Some(id.to_string()),
            _ => None,
        };
        info!(
            message_id = message_id::ARRIVED,
            "flexnbd.migration" = migration,
            "flexnbd.image" = self.name,
            "flexnbd.bytes_total" = self.disk.size(),
            "the disk has arrived"
        );
        log_unsent(self.notifier.status("the disk has arrived"));
    }

    /// Stops the process because of a signal, after abandoning a migration.
    fn stop(&mut self, signal: Signal) -> ProcessEnd {
        info!(message_id = message_id::STOPPING, "stopping: received {signal}");
        log_unsent(self.notifier.stopping());
        log_unsent(self.notifier.status("stopping"));
        if self.service.is_receiving() {
            return ProcessEnd::Badly(format!(
                "received {signal} before the disk has arrived; what is here is incomplete"
            ));
        }
        // Set before the search for a migration: one that registers later finds this flag, and ends
        // before it begins.
        self.service.waiters.interrupt();
        match self.service.running_migration() {
            None => ProcessEnd::Well,
            Some(migration) => self.abandon(&migration, signal),
        }
    }

    /// Abandons a migration, and waits until its effects are undone or, if the handover has been
    /// sent, until the disk has left. The wait is limited: the next process reads the state from
    /// the record.
    fn abandon(&mut self, migration: &MigrationHandle, signal: Signal) -> ProcessEnd {
        let status = "stopping: breaking the migration off, or finishing it";
        log_unsent(self.notifier.status(status));
        log_unsent(self.notifier.extend_timeout(GRACE + MARGIN));
        migration.request_break();
        let deadline = Instant::now() + GRACE;
        loop {
            match self.next_event(Some(deadline)) {
                Some(ProcessEvent::MigrationEnded(outcome)) => {
                    self.migration_ended(&outcome);
                    if matches!(outcome, Outcome::Arrived { .. }) {
                        return ProcessEnd::Well;
                    }
                    let why = format!("received {signal} while the disk was being moved");
                    return ProcessEnd::Badly(why);
                }
                Some(ProcessEvent::HealthCheck(number)) => self.answer_health_check(number),
                Some(_) => {}
                None => {
                    return ProcessEnd::Badly(format!(
                        "received {signal} while the disk was being handed over; its record tells \
                         whether it has left"
                    ));
                }
            }
        }
    }

    /// Closes the modules in order: control socket, server, upstream, sessions.
    ///
    /// Sessions are stored for the next process, except while a disk is received, since its
    /// sessions are the migration, after a failed flush, because a snapshot does not hold that
    /// failure, and after the time of a relay.
    fn close(&mut self, end: &ProcessEnd) {
        let relay = self.service.relay();
        let stores_sessions = !self.service.is_receiving()
            && self.disk.all_flushes_succeeded()
            && !relay.is_some_and(|relay| relay.is_late(Instant::now()));
        log_unsent(self.notifier.stopping());
        log_unsent(self.notifier.extend_timeout(CLOSING_MAX));
        if let ProcessEnd::Badly(why) = end {
            log_unsent(self.notifier.status(why));
        }
        if let Some(watchdog) = &self.watchdog {
            watchdog.close();
        }
        self.service.waiters.interrupt();
        self.service.waiters.stop();
        drop(self.control.take());
        let deadline = Instant::now() + DISK_GRACE;
        let sessions = self.end_sessions(stores_sessions);
        // One of the last requests may have been the first failure.
        self.note_flush_failure();
        if let Some(failure) = self.service.flush_failure() {
            failure.wait_until_recorded(deadline);
        }
        let sessions = match self.service.upstream() {
            Some(upstream) => proxying::settle(&upstream, &self.disk, sessions, deadline),
            None => sessions,
        };
        let relay = self.service.relay().map(|relay| relay.note(Instant::now()));
        snapshot::save(&self.store, &LeftSessions { sessions, relay });
    }

    /// Ends all sessions; with `stores`, suspends as many as the next process can get.
    fn end_sessions(&self, stores: bool) -> StoredSessions {
        let mut server = self.service.server();
        let grace = Grace { clients: GRACE, disk: DISK_GRACE };
        match self.store.capacity() {
            room if stores && room > 0 => server.suspend(room, grace),
            _ => {
                server.stop(grace);
                StoredSessions::default()
            }
        }
    }

    /// The end of the process: success if the disk has arrived or left during [`Process::close`].
    fn end_after_close(&self, end: ProcessEnd) -> ProcessEnd {
        let has_moved = |event| {
            matches!(
                event,
                ProcessEvent::ReceiveEnded(ArrivalResult::Arrived(_))
                    | ProcessEvent::MigrationEnded(Outcome::Arrived { .. })
            )
        };
        if self.events.try_iter().any(has_moved) {
            info!("the disk has been moved, as it was about to be when the signal came");
            return ProcessEnd::Well;
        }
        end
    }
}

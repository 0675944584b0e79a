//! The operator's commands to a running process, and the replies.
//! The threads of the control socket call it; it never waits for a client.

use super::config::{Admission, RereadConfig};
use super::events::ActiveCommands;
use super::flush_failure::FlushFailure;
use super::outgoing::{self, MigrationContext, MigrationDestination, PreparedMigration};
use super::proxying;
use super::relaying::{ActiveRelay, PlannedRelay, RelayPlan, RelaySlot};
use super::tls::ProcessTls;
use crate::control::command::Mirror;
use crate::control::status::{
    DISK_ID, FLUSH_FAILED, OWNERSHIP, PAYLOAD_BYTES, PAYLOAD_BYTES_MAX, SANDBOX,
};
use crate::control::{Command, Credentials, Operator, Reply, Status};
use crate::disk::ownership::Record;
use crate::disk::record_store::RecordStore;
use crate::ids::DiskId;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::migration::job::{OfferedTerms, Outcome};
use crate::migration::source::MigrationHandle;
use crate::server::Server;
use crate::sync::{self, lock};
use crate::systemd::{ServiceManager, log_unsent};
use crate::upstream::UpstreamHandle;
use nix::sys::signal::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;
use tracing::{info, warn};

/// The reply about a disk that is no longer here.
const MOVED_AWAY: &str = "the disk has moved away";

/// The state that commands read and change.
pub(super) struct Service {
    /// Bytes of the disk.
    pub(super) size: u64,
    pub(super) server: Mutex<Server>,
    pub(super) reread: Option<RereadConfig>,
    pub(super) role: DiskRole,
    pub(super) tls: ProcessTls,
    pub(super) waiters: MigrationWaiters,
    pub(super) commands: Arc<ActiveCommands>,
    pub(super) notifier: ServiceManager,
    /// What confines the process, as a word.
    pub(super) sandbox: &'static str,
}

/// The role of the process for the disk.
pub(super) enum DiskRole {
    /// It serves a disk that is ours, and can move it away.
    Serving(OutgoingMigrations),
    /// It receives the disk; this is the store of its record.
    Receiving(RecordStore),
    /// It passes on the disk of this upstream.
    Proxying(UpstreamHandle),
    /// It passes requests on to the disk, which an earlier process has moved away.
    Relaying(ActiveRelay),
}

/// Operators who wait for the end of a migration (`mirror --wait`), at most until the process
/// stops.
#[derive(Debug, Default)]
pub(super) struct MigrationWaiters {
    is_stopping: Mutex<bool>,
    changed: Condvar,
    /// The process is about to stop, and abandons its migration.
    is_interrupted: Arc<AtomicBool>,
}

impl MigrationWaiters {
    pub(super) fn migration_ended(&self) {
        // A waiter holds the lock from checking for a result until it sleeps, so it cannot miss
        // this.
        let _guard = lock(&self.is_stopping);
        self.changed.notify_all();
    }

    /// Records that the process is about to stop: a migration abandoned from now on was not ended
    /// by an operator.
    pub(super) fn interrupt(&self) {
        self.is_interrupted.store(true, Ordering::Release);
    }

    pub(super) fn stop(&self) {
        *lock(&self.is_stopping) = true;
        self.changed.notify_all();
    }

    fn is_interrupted(&self) -> bool {
        self.is_interrupted.load(Ordering::Acquire)
    }

    /// Waits until `result` returns a value; `None` if the process stops before.
    fn wait<T>(&self, result: impl Fn() -> Option<T>) -> Option<T> {
        let mut is_stopping = lock(&self.is_stopping);
        loop {
            let found = result();
            if found.is_some() || *is_stopping {
                return found;
            }
            is_stopping = sync::wait(&self.changed, is_stopping);
        }
    }
}

/// The migrations to other hosts, one at a time.
pub(super) struct OutgoingMigrations {
    context: MigrationContext,
    /// Each migration has a handle of its own on the same record.
    record_store: RecordStore,
    flush_failure: Arc<FlushFailure>,
    /// The last migration, which may have ended.
    last: Mutex<Option<Arc<MigrationHandle>>>,
    /// Locked while a migration starts; a second one is refused at once.
    starting: Mutex<()>,
    /// Set once clients are passed on to the destination.
    relay: RelaySlot,
}

impl OutgoingMigrations {
    pub(super) fn new(
        context: MigrationContext,
        record_store: RecordStore,
        flush_failure: Arc<FlushFailure>,
    ) -> Self {
        Self {
            context,
            record_store,
            flush_failure,
            last: Mutex::default(),
            starting: Mutex::default(),
            relay: RelaySlot::default(),
        }
    }

    /// The name of the image's record, if the last migration does not determine it. A served disk
    /// has the record of its provenance, unless a migration could not restore it.
    fn record_name(&self, migration: Option<&MigrationHandle>) -> &'static str {
        if outgoing::record_unrestored(migration) {
            return peek_name(&self.record_store);
        }
        match self.flush_failure.since() {
            // Or not, if it could not be written.
            Some(_) => peek_name(&self.record_store),
            None => name_of(self.context.provenance.record().as_ref()),
        }
    }
}

impl Service {
    pub(super) fn server(&self) -> MutexGuard<'_, Server> {
        lock(&self.server)
    }

    pub(super) fn is_receiving(&self) -> bool {
        matches!(self.role, DiskRole::Receiving(_))
    }

    /// The upstream whose disk the process passes on.
    pub(super) fn upstream(&self) -> Option<UpstreamHandle> {
        match &self.role {
            DiskRole::Proxying(upstream) => Some(upstream.clone()),
            _ => self.relay().map(|relay| relay.upstream),
        }
    }

    /// The relay, if the disk has left and its clients have stayed.
    pub(super) fn relay(&self) -> Option<ActiveRelay> {
        match &self.role {
            DiskRole::Serving(migrations) => lock(&migrations.relay).clone(),
            DiskRole::Relaying(relay) => Some(relay.clone()),
            DiskRole::Receiving(_) | DiskRole::Proxying(_) => None,
        }
    }

    /// The last migration, if there was one; it may have ended.
    fn last_migration(&self) -> Option<Arc<MigrationHandle>> {
        match &self.role {
            DiskRole::Serving(migrations) => lock(&migrations.last).clone(),
            DiskRole::Receiving(_) | DiskRole::Proxying(_) | DiskRole::Relaying(_) => None,
        }
    }

    /// The migration that has not ended yet, if there is one.
    pub(super) fn running_migration(&self) -> Option<Arc<MigrationHandle>> {
        self.last_migration().filter(|migration| migration.outcome().is_none())
    }

    /// The id of the disk, if it is known.
    fn disk_id(&self) -> Option<DiskId> {
        match &self.role {
            DiskRole::Serving(migrations) => migrations.context.disk_id.get(),
            DiskRole::Receiving(_) => None,
            DiskRole::Proxying(upstream) => upstream.disk_id(),
            DiskRole::Relaying(relay) => relay.upstream.disk_id(),
        }
    }

    /// Whether a flush of the image has failed, in this process or an earlier one.
    pub(super) fn flush_failure(&self) -> Option<&Arc<FlushFailure>> {
        match &self.role {
            DiskRole::Serving(migrations) => Some(&migrations.flush_failure),
            DiskRole::Receiving(_) | DiskRole::Proxying(_) | DiskRole::Relaying(_) => None,
        }
    }

    /// Notes a failed flush, if there was one and the disk is here. Records it unless a migration runs,
    /// which writes records: to be called again when it has ended.
    pub(super) fn note_flush_failure(&self, now: u64) {
        let DiskRole::Serving(migrations) = &self.role else { return };
        let disk = &migrations.context.disk;
        let outcome = self.last_migration().map(|migration| migration.outcome());
        let has_left = matches!(outcome, Some(Some(Outcome::Arrived { .. })));
        if disk.read_only() || disk.all_flushes_succeeded() || has_left || self.relay().is_some() {
            return;
        }
        migrations.flush_failure.failed(now);
        if self.running_migration().is_none() {
            migrations.flush_failure.record(&migrations.record_store);
        }
    }

    /// Accepts neither clients nor commands any more, if there are none. Returns whether that is
    /// so.
    pub(super) fn close_if_idle(&self) -> bool {
        let acceptor = self.server().acceptor_handle();
        self.commands.close_if_none(|| acceptor.close_if_empty())
    }

    fn status(&self) -> Status {
        let mut status = self.status_of_disk();
        status.extra.push((SANDBOX.to_owned(), self.sandbox.to_owned()));
        status
    }

    fn status_of_disk(&self) -> Status {
        let migration = self.last_migration();
        let migration = migration.as_deref();
        let relay = self.relay();
        let (mut status, payloads) = {
            let server = self.server();
            let payloads = server.payloads();
            let payloads =
                [(PAYLOAD_BYTES, payloads.used()), (PAYLOAD_BYTES_MAX, payloads.limit())];
            let status = Status {
                pid: std::process::id(),
                size: self.size,
                clients_allowed: server.is_accepting(),
                num_clients: server.client_count() as u64,
                has_control: matches!(self.role, DiskRole::Serving(_)) && relay.is_none(),
                ..Status::default()
            };
            (status, payloads)
        };
        self.describe_role(migration, relay, &mut status);
        let payloads = payloads.map(|(key, bytes)| (key.to_owned(), bytes.to_string()));
        status.extra.extend(payloads);
        let failed_at = self.flush_failure().and_then(|failure| failure.since());
        status.extra.extend(failed_at.map(|since| (FLUSH_FAILED.to_owned(), since.to_string())));
        status
    }

    /// Adds what the role of the disk has to say.
    fn describe_role(
        &self,
        migration: Option<&MigrationHandle>,
        relay: Option<ActiveRelay>,
        status: &mut Status,
    ) {
        let disk_id = self.disk_id().map(|id| (DISK_ID.to_owned(), id.to_string()));
        let record = match &self.role {
            DiskRole::Serving(outgoing) => outgoing::describe(migration, status)
                .unwrap_or_else(|| outgoing.record_name(migration)),
            DiskRole::Receiving(record_store) => peek_name(record_store),
            DiskRole::Relaying(_) => "departed",
            DiskRole::Proxying(upstream) => {
                status.extra.extend(disk_id);
                return proxying::describe(&upstream.state(), status);
            }
        };
        status.extra.push((OWNERSHIP.to_owned(), record.to_owned()));
        status.extra.extend(disk_id);
        let running = migration.filter(|migration| migration.outcome().is_none());
        outgoing::describe_obstacle(running, status);
        if let Some(relay) = relay {
            relay.describe(Instant::now(), status);
        }
    }

    fn set_acl(&self, entries: &[String]) -> Reply {
        match self.server().set_acl(entries) {
            Ok(()) => Reply::success("updated"),
            Err(bad) => Reply::refused(format!("bad spec: {}", bad.0)),
        }
    }

    fn reload(&self) -> Reply {
        let Some(RereadConfig(reread)) = &self.reread else {
            return Reply::refused("started without --config, so there is nothing to reload");
        };
        log_unsent(self.notifier.reloading());
        let reread = reread().and_then(|config| {
            // Before anything changes, because it can fail.
            self.tls.reload(&config).map_err(|error| error.to_string())?;
            Ok(config.admission)
        });
        let reply = match reread {
            Ok(Admission { acl, limits, .. }) => {
                let server = self.server();
                server.set_admission(acl, limits);
                server.set_tls(self.tls.server());
                Reply::success("reloaded")
            }
            Err(why) => Reply::refused(why),
        };
        log_unsent(self.notifier.ready());
        reply
    }

    /// Reloads the configuration, as the command `reload` does, because of a signal. A thread of
    /// its own does so, because reading the file may block while other signals arrive.
    pub(super) fn reload_in_thread(self: &Arc<Self>, signal: Signal) {
        let service = Arc::clone(self);
        let reload = move || {
            let Some(_active) = service.commands.begin() else { return };
            let reply = service.reload();
            let succeeded = reply.is_success();
            let kind = if succeeded { message_id::RELOADED } else { message_id::RELOAD_FAILED };
            if succeeded {
                info!(message_id = kind, "received {signal}: {}", reply.text());
            } else {
                warn!(message_id = kind, "received {signal}, but cannot reload: {}", reply.text());
            }
        };
        let thread = thread::Builder::new().name("reload".into());
        let started = check_thread_headroom().and_then(|()| thread.spawn(reload));
        if let Err(error) = started {
            warn!("received {signal}, but cannot start a thread to reload: {error}; try again");
        }
    }

    fn mirror(&self, command: &Mirror) -> Result<Arc<MigrationHandle>, Reply> {
        let outgoing = match &self.role {
            DiskRole::Serving(outgoing) => outgoing,
            DiskRole::Receiving(_) => {
                let why = "the disk has not arrived here, so it cannot be moved away";
                return Err(Reply::refused(why));
            }
            DiskRole::Relaying(_) => return Err(Reply::refused(MOVED_AWAY)),
            DiskRole::Proxying(upstream) => {
                let at = upstream.state().target;
                let why = format!("this is a proxy; have the server at {at} move the disk");
                return Err(Reply::refused(why));
            }
        };
        let running = || Err(Reply::refused("mirror already running"));
        let Ok(_starting) = outgoing.starting.try_lock() else { return running() };
        if self.running_migration().is_some() {
            return running();
        }
        let last_outcome = self.last_migration().and_then(|migration| migration.outcome());
        check_not_moved(last_outcome.as_ref())?;
        if let Some(why) = outgoing.flush_failure.refusal() {
            return Err(Reply::refused(why));
        }
        let size = outgoing.context.disk.size();
        let record_store = outgoing::check(&outgoing.record_store, size, command)?;
        let shutdown = self.server().shutdown_handle();
        let tls =
            self.tls.for_migration(command).map_err(|error| Reply::refused(error.to_string()))?;
        let relay = RelayPlan::of(command, outgoing.context.relay, tls.relay).map(|plan| {
            let (flags, block_min) = self.server().offered();
            PlannedRelay {
                plan,
                offered: OfferedTerms { flags, block_min: block_min.into() },
                slot: Arc::clone(&outgoing.relay),
                is_interrupted: Arc::clone(&self.waiters.is_interrupted),
            }
        });
        let destination = MigrationDestination { command, tls: tls.destination };
        let prepared =
            PreparedMigration::new(&outgoing.context, record_store, shutdown, relay, &destination)?;
        let handle = Arc::clone(&prepared.handle);
        // The event loop sets `is_interrupted` and then looks for a migration. So either it finds
        // this migration, or this thread sees the flag.
        *lock(&outgoing.last) = Some(Arc::clone(&handle));
        if self.waiters.is_interrupted() {
            handle.request_break();
        }
        prepared.start()?.wait()?;
        Ok(handle)
    }

    fn mirror_and_wait(&self, command: &Mirror) -> Reply {
        let migration = match self.mirror(command) {
            Ok(migration) => migration,
            Err(reply) => return reply,
        };
        let account = self.waiters.wait(|| migration.result());
        // If the stopping process breaks a migration off, the reply must not claim that a `break`
        // did.
        let by_operator =
            |(outcome, _): &_| *outcome != Outcome::Broken || !self.waiters.is_interrupted();
        match account.filter(by_operator) {
            Some((outcome, stats)) => {
                let relayed = self.relay().map(|_| self.server().client_count() as u64);
                outgoing::end_reply(&outcome, &stats, relayed)
            }
            None => Reply::refused("the server was stopped before the migration was over"),
        }
    }
}

/// The name of the record in the store.
fn peek_name(record_store: &RecordStore) -> &'static str {
    record_store.peek().map_or("unknown", |record| name_of(record.as_ref()))
}

fn name_of(record: Option<&Record>) -> &'static str {
    record.map_or("none", Record::name)
}

/// Checks that the last migration has not moved the disk away.
fn check_not_moved(last: Option<&Outcome>) -> Result<(), Reply> {
    match last {
        Some(Outcome::Arrived { .. }) => Err(Reply::refused(MOVED_AWAY)),
        _ => Ok(()),
    }
}

impl Operator for Service {
    fn execute(&self, command: Command, _from: Credentials) -> Reply {
        let Some(_active) = self.commands.begin() else {
            return Reply::refused("the server is stopping");
        };
        match command {
            Command::Status => Reply::success(self.status().to_string()),
            Command::Acl { entries } => self.set_acl(&entries),
            Command::Reload => self.reload(),
            Command::Break => outgoing::break_off(self.running_migration().as_deref()),
            Command::MirrorMaxBps(limit) => {
                outgoing::set_speed(self.running_migration().as_deref(), limit)
            }
            Command::Mirror(mirror) => match self.mirror(&mirror) {
                Ok(_) => Reply::success("Mirror started"),
                Err(reply) => reply,
            },
            Command::MirrorWait(mirror) => self.mirror_and_wait(&mirror),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::{ArrivalAction, RelayRequest};
    use crate::daemon::config::RelayDefault;
    use crate::daemon::disk_identity::ServedDiskId;
    use crate::daemon::events::ProcessEvent;
    use crate::disk::ownership::Provenance;
    use crate::disk::{Access, Disk, FileBackend};
    use crate::net::{Address, Listener};
    use crate::server::ServerConfig;
    use std::io::ErrorKind;
    use std::iter;
    use std::net::TcpListener;
    use std::sync::mpsc;
    use std::time::Duration;

    /// The service of a process that serves a disk of 4096 bytes.
    fn service(directory: &tempfile::TempDir) -> (Service, mpsc::Receiver<ProcessEvent>) {
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 4096]).unwrap();
        let image = FileBackend::open(&path, Access { read_only: false }).unwrap();
        let record_store = RecordStore::of(&image).unwrap();
        let disk = Arc::new(Disk::new(Box::new(image), false));
        let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
        let server = Server::start(ServerConfig::allow_all(vec![listener], &disk)).unwrap();
        let (sender, events) = mpsc::channel();
        let context = MigrationContext {
            disk,
            disk_id: ServedDiskId::default(),
            image: path,
            provenance: Provenance::Native,
            relay: RelayDefault::No,
            events: sender.clone(),
        };
        let service = Service {
            size: 4096,
            server: Mutex::new(server),
            reread: None,
            role: DiskRole::Serving(OutgoingMigrations::new(
                context,
                record_store,
                FlushFailure::new("image".to_owned(), Provenance::Native, None),
            )),
            tls: ProcessTls::none(),
            waiters: MigrationWaiters::default(),
            commands: ActiveCommands::new(sender),
            notifier: ServiceManager::silent(),
            sandbox: "off",
        };
        (service, events)
    }

    #[test]
    fn mirror_while_stopping_does_not_connect() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (service, events) = service(&directory);
        service.waiters.interrupt();
        let destination = TcpListener::bind("127.0.0.1:0").unwrap();
        destination.set_nonblocking(true).unwrap();
        let to = destination.local_addr().unwrap();
        let mirror = Mirror {
            to,
            action: ArrivalAction::Exit,
            bind: None,
            max_bps: None,
            no_record: true,
            relay: RelayRequest::No,
            tls: Box::default(),
        };
        let operator = Credentials { pid: 1, uid: None };
        assert!(!service.execute(Command::Mirror(mirror), operator).is_success());
        assert_eq!(destination.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(service.last_migration().unwrap().outcome(), Some(Outcome::Broken));
        let mut events = iter::from_fn(|| events.recv_timeout(Duration::from_secs(20)).ok());
        let end = events.find(|event| matches!(event, ProcessEvent::MigrationEnded(_)));
        assert!(matches!(end, Some(ProcessEvent::MigrationEnded(Outcome::Broken))));
    }

    #[test]
    fn moved_disk_is_not_moved_again() {
        assert!(check_not_moved(None).is_ok());
        assert!(check_not_moved(Some(&Outcome::Broken)).is_ok());
        assert!(check_not_moved(Some(&Outcome::Arrived { acknowledged: true })).is_err());
        assert!(check_not_moved(Some(&Outcome::Arrived { acknowledged: false })).is_err());
    }

    /// Starts a waiter, calls `wake` once the waiter has checked for a result, and returns the
    /// waiter's result.
    fn wait_until(
        result: impl Fn() -> Option<u8> + Send,
        wake: impl FnOnce(&MigrationWaiters),
    ) -> Option<u8> {
        let waiters = MigrationWaiters::default();
        let (checked, has_checked) = mpsc::channel();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                waiters.wait(move || {
                    let _ = checked.send(());
                    result()
                })
            });
            has_checked.recv().unwrap();
            wake(&waiters);
            waiter.join().unwrap()
        })
    }

    #[test]
    fn the_end_of_a_migration_wakes_its_waiter() {
        let result = Mutex::new(None);
        let found = wait_until(
            || *lock(&result),
            |waiters| {
                *lock(&result) = Some(1);
                waiters.migration_ended();
            },
        );
        assert_eq!(found, Some(1));
    }

    #[test]
    fn waiting_ends_when_the_process_stops() {
        assert_eq!(wait_until(|| None, MigrationWaiters::stop), None);
        let waiters = MigrationWaiters::default();
        waiters.stop();
        assert_eq!(waiters.wait(|| None::<u8>), None);
        assert_eq!(waiters.wait(|| Some(1)), Some(1), "a result that exists is returned");
    }
}

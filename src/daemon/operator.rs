//! What operators may order of a running process, and what they are told.
//! Called from the control socket's threads; never waits for a client.

use super::config::{Admission, RereadConfig};
use super::events::ActiveCommands;
use super::migrations::{self, MigrationContext};
use super::{claim, tell};
use crate::control::command::Mirror;
use crate::control::status::OWNERSHIP;
use crate::control::{Command, Credentials, Operator, Reply, Status};
use crate::disk::record_store::RecordStore;
use crate::memory_reserve::check_thread_headroom;
use crate::message_id;
use crate::migration::job::Outcome;
use crate::migration::source::MigrationHandle;
use crate::server::Server;
use crate::sync::{self, lock};
use crate::systemd::ServiceManager;
use nix::sys::signal::Signal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use tracing::{info, warn};

/// What orders are about.
pub(super) struct Service {
    pub(super) size: u64,
    pub(super) server: Mutex<Server>,
    pub(super) reread: Option<RereadConfig>,
    /// Present when the disk is ours and can be moved away.
    pub(super) departures: Option<OutgoingMigrations>,
    /// The name of the image's record while no migration changes it.
    pub(super) ownership: Box<dyn Fn() -> &'static str + Send + Sync>,
    pub(super) vigil: MigrationWaiters,
    pub(super) orders: Arc<ActiveCommands>,
    pub(super) notifier: ServiceManager,
}

/// Lets operators wait for the end of a migration, but not beyond that of the process.
#[derive(Debug, Default)]
pub(super) struct MigrationWaiters {
    is_stopping: Mutex<bool>,
    changed: Condvar,
    /// The process is about to stop: what is broken off from now on, nobody has ordered so.
    is_interrupted: AtomicBool,
}

impl MigrationWaiters {
    /// A migration is over.
    pub(super) fn migration_over(&self) {
        // Whoever waits holds the lock from looking until it sleeps, so that it misses nothing.
        let _held = lock(&self.is_stopping);
        self.changed.notify_all();
    }

    /// The process is going to stop, and whatever goes on is broken off for that.
    pub(super) fn interrupt(&self) {
        self.is_interrupted.store(true, Ordering::Release);
    }

    /// The process is stopping: nobody may wait any longer.
    pub(super) fn stop(&self) {
        *lock(&self.is_stopping) = true;
        self.changed.notify_all();
    }

    fn is_interrupted(&self) -> bool {
        self.is_interrupted.load(Ordering::Acquire)
    }

    /// Waits until there is `news`; none when the process stops without any.
    fn wait<T>(&self, news: impl Fn() -> Option<T>) -> Option<T> {
        let mut is_stopping = lock(&self.is_stopping);
        loop {
            let found = news();
            if found.is_some() || *is_stopping {
                return found;
            }
            is_stopping = sync::wait(&self.changed, is_stopping);
        }
    }
}

/// The migration away from here, if there is one.
pub(super) struct OutgoingMigrations {
    pub(super) ground: MigrationContext,
    /// The ledger of the image; each migration has another one of the same.
    pub(super) ledger: RecordStore,
    pub(super) desk: Mutex<Option<Arc<MigrationHandle>>>,
    /// Held while a migration is being begun, so that a second one is turned away at once.
    pub(super) beginning: Mutex<()>,
}

impl Service {
    pub(super) fn server(&self) -> MutexGuard<'_, Server> {
        lock(&self.server)
    }

    /// The migration that was begun last, over or not.
    pub(super) fn desk(&self) -> Option<Arc<MigrationHandle>> {
        self.departures.as_ref().and_then(|departures| lock(&departures.desk).clone())
    }

    /// Lets neither clients nor orders in any more, if there are none.
    pub(super) fn close_if_idle(&self) -> bool {
        let door = self.server().door();
        self.orders.close_if_none(|| door.close_if_empty())
    }

    fn status(&self) -> Status {
        let desk = self.desk();
        let mut status = {
            let server = self.server();
            Status {
                pid: std::process::id(),
                size: self.size,
                clients_allowed: server.accepts(),
                num_clients: server.clients() as u64,
                has_control: self.departures.is_some(),
                ..Status::default()
            }
        };
        let record = migrations::describe(desk.as_ref(), &mut status);
        let record = record.unwrap_or_else(|| match &self.departures {
            Some(moving) if migrations::owes_record(desk.as_ref()) => claim::seen(&moving.ledger),
            _ => (self.ownership)(),
        });
        status.extra.push((OWNERSHIP.to_owned(), record.to_owned()));
        migrations::describe_obstacle(desk.as_ref(), &mut status);
        status
    }

    fn set_acl(&self, entries: &[String]) -> Reply {
        match self.server().set_acl(entries) {
            Ok(()) => Reply::success("updated"),
            Err(bad) => Reply::refused(format!("bad spec: {}", bad.0)),
        }
    }

    fn reload(&self) -> Reply {
        let Some(RereadConfig(read)) = &self.reread else {
            return Reply::refused("started without --config, so there is nothing to reload");
        };
        tell(self.notifier.reloading());
        let reply = match read() {
            Ok(Admission { acl, clients_max }) => {
                self.server().readmit(acl, clients_max);
                Reply::success("reloaded")
            }
            Err(why) => Reply::refused(why),
        };
        tell(self.notifier.ready());
        reply
    }

    /// Reads the configuration again, as the order `reload` does, because of a signal. In a thread of
    /// its own: the file may be on a file system that does not answer, and other signals may come.
    pub(super) fn reload_aside(self: &Arc<Self>, signal: Signal) {
        let service = Arc::clone(self);
        let reload = move || {
            let Some(_obeying) = service.orders.begin() else { return };
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

    fn mirror(&self, order: &Mirror) -> Result<Arc<MigrationHandle>, Reply> {
        let Some(departures) = &self.departures else {
            let why = "the disk has not arrived here, so it cannot be moved away";
            return Err(Reply::refused(why));
        };
        let running = || Err(Reply::refused("mirror already running"));
        let Ok(_beginning) = departures.beginning.try_lock() else { return running() };
        if self.desk().is_some_and(|desk| desk.outcome().is_none()) {
            return running();
        }
        may_begin(self.desk().and_then(|desk| desk.outcome()).as_ref())?;
        let ledger = migrations::ready(&departures.ledger, departures.ground.disk.size(), order)?;
        let exit = self.server().exit();
        let (prepared, desk) = migrations::prepare(&departures.ground, ledger, exit, order)?;
        // The thread that stops the process says so, and then looks for a migration: either it
        // finds this one, or this one ends before it begins.
        *lock(&departures.desk) = Some(Arc::clone(&desk));
        if self.vigil.is_interrupted() {
            desk.request_break();
        }
        prepared.start()?.wait()?;
        Ok(desk)
    }

    fn mirror_and_wait(&self, order: &Mirror) -> Reply {
        let desk = match self.mirror(order) {
            Ok(desk) => desk,
            Err(reply) => return reply,
        };
        let account = self.vigil.wait(|| desk.result());
        // A process that stops breaks its migration off, which nobody has ordered.
        let is_ordered =
            |(outcome, _): &_| *outcome != Outcome::Broken || !self.vigil.is_interrupted();
        match account.filter(is_ordered) {
            Some((outcome, tally)) => migrations::account(&outcome, &tally),
            None => Reply::refused("the server was stopped before the migration was over"),
        }
    }
}

/// Whether the disk may be moved, after a migration that ended like this.
fn may_begin(last: Option<&Outcome>) -> Result<(), Reply> {
    match last {
        Some(Outcome::Arrived { .. }) => Err(Reply::refused("the disk has moved away")),
        _ => Ok(()),
    }
}

impl Operator for Service {
    fn obey(&self, command: Command, _from: Credentials) -> Reply {
        let Some(_obeying) = self.orders.begin() else {
            return Reply::refused("the server is stopping");
        };
        match command {
            Command::Status => Reply::success(self.status().to_string()),
            Command::Acl { entries } => self.set_acl(&entries),
            Command::Reload => self.reload(),
            Command::Break => migrations::break_off(self.desk().as_ref()),
            Command::MirrorMaxBps(limit) => migrations::set_speed(self.desk().as_ref(), limit),
            Command::Mirror(order) => match self.mirror(&order) {
                Ok(_) => Reply::success("Mirror started"),
                Err(reply) => reply,
            },
            Command::MirrorWait(order) => self.mirror_and_wait(&order),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::ArrivalAction;
    use crate::daemon::ProcessEvent;
    use crate::disk::ownership::Provenance;
    use crate::disk::{Access, Disk, FileBackend};
    use crate::net::{Address, Listener};
    use crate::server::Opening;
    use std::io::ErrorKind;
    use std::iter;
    use std::net::TcpListener;
    use std::sync::mpsc;
    use std::time::Duration;

    /// A process that serves a disk of its own.
    fn service(directory: &tempfile::TempDir) -> (Service, mpsc::Receiver<ProcessEvent>) {
        let path = directory.path().join("image");
        std::fs::write(&path, [0; 4096]).unwrap();
        let image = FileBackend::open(&path, Access { read_only: false }).unwrap();
        let ledger = RecordStore::of(&image).unwrap();
        let disk = Arc::new(Disk::new(Box::new(image), false));
        let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
        let server = Server::start(Opening::to_anybody(vec![listener], &disk)).unwrap();
        let (events, heard) = mpsc::channel();
        let ground = MigrationContext {
            disk,
            image: path,
            title: Provenance::Native,
            events: events.clone(),
        };
        let (desk, beginning) = (Mutex::new(None), Mutex::new(()));
        let service = Service {
            size: 4096,
            server: Mutex::new(server),
            reread: None,
            departures: Some(OutgoingMigrations { ground, ledger, desk, beginning }),
            ownership: Box::new(|| "none"),
            vigil: MigrationWaiters::default(),
            orders: ActiveCommands::new(events),
            notifier: ServiceManager::silent(),
        };
        (service, heard)
    }

    #[test]
    fn a_mirror_ordered_while_stopping_connects_nowhere() {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let (service, heard) = service(&directory);
        service.vigil.interrupt();
        let far = TcpListener::bind("127.0.0.1:0").unwrap();
        far.set_nonblocking(true).unwrap();
        let to = far.local_addr().unwrap();
        let order =
            Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps: None, no_record: true };
        let operator = Credentials { pid: 1, uid: None };
        assert!(!service.obey(Command::Mirror(order), operator).is_success());
        assert_eq!(far.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(service.desk().unwrap().outcome(), Some(Outcome::Broken));
        let mut events = iter::from_fn(|| heard.recv_timeout(Duration::from_secs(20)).ok());
        let ends = events.find(|event| matches!(event, ProcessEvent::Migrated(_)));
        assert!(matches!(ends, Some(ProcessEvent::Migrated(Outcome::Broken))));
    }

    #[test]
    fn a_disk_that_has_moved_is_not_moved_again() {
        assert!(may_begin(None).is_ok());
        assert!(may_begin(Some(&Outcome::Broken)).is_ok());
        assert!(may_begin(Some(&Outcome::Arrived { acknowledged: true })).is_err());
        assert!(may_begin(Some(&Outcome::Arrived { acknowledged: false })).is_err());
    }

    /// Whoever waits looks once and sleeps, then `happens`; what came of the waiting.
    fn waiting(
        news: impl Fn() -> Option<u8> + Send,
        happens: impl FnOnce(&MigrationWaiters),
    ) -> Option<u8> {
        let vigil = MigrationWaiters::default();
        let (looked, seen) = mpsc::channel();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                vigil.wait(move || {
                    let _ = looked.send(());
                    news()
                })
            });
            seen.recv().unwrap();
            happens(&vigil);
            waiter.join().unwrap()
        })
    }

    #[test]
    fn whoever_waits_for_a_migration_hears_of_its_end() {
        let over = Mutex::new(None);
        let news = || *lock(&over);
        let found = waiting(news, |vigil| {
            *lock(&over) = Some(1);
            vigil.migration_over();
        });
        assert_eq!(found, Some(1));
    }

    #[test]
    fn nobody_waits_beyond_the_end_of_the_process() {
        assert_eq!(waiting(|| None, MigrationWaiters::stop), None);
        let vigil = MigrationWaiters::default();
        vigil.stop();
        assert_eq!(vigil.wait(|| None::<u8>), None);
        assert_eq!(vigil.wait(|| Some(1)), Some(1), "an end that is known is told all the same");
    }
}

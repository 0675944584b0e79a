//! One process that serves or receives a disk: opens the rooms, waits for events, closes them in
//! order. The only one who knows all rooms. Never talks to a client and never parses a command
//! line.
//!
//! ```text
//! plan ─▶ sockets, image, title ─▶ server, control ─▶ ready ─▶ one Event after another ─▶ stop
//! ```

mod claim;
mod config;
mod degraded;
mod event_loop;
mod events;
mod idle;
mod migration_log;
mod migrations;
mod operator;
mod peer_query;
mod policy;
pub mod signals;
mod snapshot;
mod status;
mod watchdog;
mod wording;

pub use config::{
    Admission, Config, ProcessEnd, ProcessRole, RecordPolicy, RereadConfig, StartError,
};
pub use peer_query::PeerQuery;

use crate::control::{ControlSocket, Handle, Operator};
use crate::disk::ownership::ForListen;
use crate::disk::record_store::RecordStore;
use crate::disk::{Access, Disk, FileBackend};
use crate::message_id;
use crate::migration::arrival::{Admits, Arrival};
use crate::migration::destination::{ArrivalResult, Destination};
use crate::migration::job::Outcome;
use crate::migration::source::MigrationHandle;
use crate::migration::wire::Token;
use crate::net::Listener;
use crate::server::events::ServerEvents;
use crate::server::policy::ExportPolicy;
use crate::server::{Opening, STALL_LIMIT, Server, SessionSettings, StoredSessions, Style};
use crate::sync::lock;
use crate::systemd::{FdStore, InheritedSockets, ServiceManager, sockets};
use crate::words::counted;
use degraded::{DegradedResult, EarlyStart, ServerPurpose};
use event_loop::Process;
use events::{ActiveCommands, ServerEventSender};
use idle::Idle;
use migration_log::MigrationLog;
use migrations::MigrationContext;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use operator::{MigrationWaiters, OutgoingMigrations, Service};
use peer_query::{QueryResult, StartupQuery};
use policy::{ReceivingPolicy, ServingPolicy};
use signals::{SignalAction, Signals};
use status::StatusReporter;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};
use watchdog::Watchdog;
use wording::IdleStatus;

/// How long sessions may take to answer what they have received when the server stops.
const GRACE: Duration = Duration::from_secs(10);
/// The same for those whose answer the disk takes longer for, such as a FLUSH of much dirty data.
const DISK_GRACE: Duration = Duration::from_secs(60);

/// What the process has to react to.
#[derive(Clone, Debug)]
enum ProcessEvent {
    /// Somebody wants the process to end.
    Stop(Signal),
    /// A migration away from here has begun.
    Migrating(MigrationLog, Arc<MigrationHandle>),
    /// There is something to tell of it.
    MigrationNews,
    /// A migration away from here is over.
    Migrated(Outcome),
    /// What has become of the incoming disk.
    Incoming(ArrivalResult),
    /// A client has come or gone.
    Clients,
    /// An order has been obeyed.
    Obeyed,
    /// Nobody can be let in any more, for this reason.
    NotAccepting(String),
    /// The watchdog wants to know whether events are heard.
    Asked(u64),
}

/// Does what the plan says until a signal, or the disk's moving, ends it. `reread` is how to learn
/// the admission anew, if it came from a configuration file.
///
/// # Errors
/// Before it began, when it cannot.
pub fn run(plan: Config, mut reread: Option<RereadConfig>) -> Result<ProcessEnd, StartError> {
    let (role, image, control) = (plan.role, Some(plan.image.clone()), plan.control.clone());
    let (doorstep, mut luggage) = EarlyStart::enter(ServerPurpose { role, image, control })?;
    raise_descriptor_limit();
    give_freed_memory_back();
    let mut answered = None;
    let (mut house, arrivals) = loop {
        match begin(&plan, &mut reread, &mut luggage, (&doorstep, answered)) {
            Ok(Some(began)) => break began,
            Ok(None) => return Ok(ProcessEnd::Well),
            Err(refusal) => {
                // Sessions of the last process end now, not with the refusing.
                luggage = StoredSessions::default();
                match doorstep.refuse(refusal)? {
                    DegradedResult::Ended(ending) => return Ok(ending),
                    DegradedResult::Answered(answer) => answered = Some(answer),
                }
            }
        }
    };
    drop(doorstep);
    let ending = house.wait(&arrivals, plan.role);
    let goes_on = plan.role == ProcessRole::Serve && house.disk.all_flushes_succeeded();
    house.close(&ending, goes_on);
    Ok(event_loop::last_word(ending, &arrivals))
}

/// For a process that has no plan, for this reason: lets clients and operators know of it, if the
/// process was started for one that waits. `control` is where a control socket should have been.
/// None if nobody waits.
#[must_use]
pub fn refuse(role: ProcessRole, control: Option<PathBuf>, reason: &str) -> Option<ProcessEnd> {
    // What else is wrong matters less.
    let (doorstep, _) = EarlyStart::enter(ServerPurpose { role, image: None, control }).ok()?;
    match doorstep.refuse(StartError::Configuration(reason.to_owned())).ok()? {
        DegradedResult::Ended(ending) => Some(ending),
        // Nothing was asked.
        DegradedResult::Answered(_) => None,
    }
}

/// Opens everything, and is ready; none if there is nothing to be done.
fn begin(
    plan: &Config,
    reread: &mut Option<RereadConfig>,
    luggage: &mut StoredSessions,
    (doorstep, answered): (&EarlyStart, Option<QueryResult>),
) -> Result<Option<(Process, Receiver<ProcessEvent>)>, StartError> {
    let notifier = doorstep.notifier.clone();
    let inherited = doorstep.sockets()?;
    let (events, arrivals) = mpsc::channel();
    let (disk, ledger, is_new) = open(plan)?;
    if let ProcessRole::Listen { records, .. } = plan.role
        && is_new
    {
        claim::to_come(&ledger, disk.size(), records)?;
    }
    let for_status = ledger.reopen().map_err(StartError::Record)?;
    let (policy, departures) = match plan.role {
        ProcessRole::Serve => to_serve(plan, ledger, &disk, &events, &doorstep.asker(answered))?,
        ProcessRole::Listen { overwrite, records } => {
            match to_listen(plan, (ledger, records), &disk, overwrite, &events)? {
                Some(policy) => (policy, None),
                None => {
                    // Who ends without having been ready has failed for the service manager, however
                    // well it ends; and what follows an arrival is to follow.
                    tell(notifier.ready());
                    return Ok(None);
                }
            }
        }
    };
    let (listeners, control) = sockets(plan, inherited)?;
    let places = addresses(&listeners);
    let doing = if departures.is_some() { "serving" } else { "receiving" };
    let (image, size) = (plan.image.display().to_string(), disk.size());
    let server_events = Arc::new(ServerEventSender(events.clone()));
    let server = start(plan, &disk, policy, listeners, std::mem::take(luggage), server_events)?;
    let ownership = claim::told(for_status, departures.as_ref().map(|moving| moving.ground.title));
    let server = Mutex::new(server);
    let vigil = MigrationWaiters::default();
    let orders = ActiveCommands::new(events.clone());
    let service = Arc::new(Service {
        size,
        server,
        reread: reread.take(),
        departures,
        ownership,
        vigil,
        orders,
        notifier: notifier.clone(),
    });
    let opened = answer_operators(control, &service).and_then(|control| {
        let pulse = watch_over(&disk, &service, &events, &notifier)?;
        watch_signals(doorstep.signals.clone(), events, &service)?;
        Ok((control, pulse))
    });
    // Whoever refuses clients now has to have the sockets for himself.
    let (control, pulse) = opened.inspect_err(|_| service.server().stop(Duration::ZERO))?;
    tell(notifier.ready());
    info!(
        message_id = message_id::READY,
        "flexnbd.image" = image,
        "flexnbd.bytes_total" = size,
        "{doing} {image} ({size} bytes) on {places}"
    );
    let store = FdStore::from_env(&notifier);
    let standing = IdleStatus { doing, image: image.clone(), size, places };
    let mut beat = StatusReporter::new(notifier.clone(), standing);
    beat.stir();
    let idle = Idle::new(plan.idle_exit, Instant::now());
    let house = Process { service, control, notifier, store, disk, image, idle, beat, pulse };
    Ok(Some((house, arrivals)))
}

fn to_serve(
    plan: &Config,
    ledger: RecordStore,
    disk: &Arc<Disk>,
    events: &Sender<ProcessEvent>,
    asker: &StartupQuery<'_>,
) -> Result<(Arc<dyn ExportPolicy>, Option<OutgoingMigrations>), StartError> {
    let title = claim::to_serve(plan, &ledger, disk.size(), asker)?;
    let ground = MigrationContext {
        disk: Arc::clone(disk),
        image: plan.image.clone(),
        title,
        events: events.clone(),
    };
    let departures =
        OutgoingMigrations { ground, ledger, desk: Mutex::new(None), beginning: Mutex::new(()) };
    Ok((Arc::new(ServingPolicy(title)), Some(departures)))
}

/// Whoever answers for the incoming disk; none if it has arrived already.
fn to_listen(
    plan: &Config,
    (ledger, records): (RecordStore, RecordPolicy),
    disk: &Arc<Disk>,
    overwrite: bool,
    events: &Sender<ProcessEvent>,
) -> Result<Option<Arc<dyn ExportPolicy>>, StartError> {
    let holds = match claim::to_listen(plan, &ledger, overwrite)? {
        ForListen::Accept { incomplete_copy } => incomplete_copy,
        _ => {
            // Not what was asked for, though it is no failure either: to be seen by default.
            warn!("{}: the disk has arrived already; not listening", plan.image.display());
            return Ok(None);
        }
    };
    let token = migrations::random()
        .map(Token)
        .map_err(|error| StartError::System("draw random numbers", io::Error::other(error)))?;
    let events = Mutex::new(events.clone());
    let told = Box::new(move |fate| {
        // The process is ending already if nobody hears it.
        let _ = lock(&events).send(ProcessEvent::Incoming(fate));
    });
    let ledger = claim::with_room(ledger, records).map_err(StartError::Unrecorded)?;
    let disk = Arc::clone(disk);
    let admits = match (plan.oldstyle, plan.plain) {
        (true, _) => Admits::OldStyle,
        (false, true) => Admits::PlainWriter,
        (false, false) => Admits::Sources,
    };
    let arrival = Arrival::new(token, holds, admits);
    let destination = Destination::new(disk, Some(ledger), arrival, told);
    Ok(Some(Arc::new(ReceivingPolicy(destination))))
}

/// The disk, the ledger of its image, and whether the image has just been made.
fn open(plan: &Config) -> Result<(Arc<Disk>, RecordStore, bool), StartError> {
    claim::to_create(plan)?;
    let access = Access { read_only: plan.read_only };
    let image = match plan.create {
        Some(size) => FileBackend::create(&plan.image, size, access),
        None => FileBackend::open(&plan.image, access),
    };
    let image = image
        .map_err(|error| StartError::Image(error, plan.config.clone()))?
        .with_holes(plan.holes);
    let (tail, is_new) = (image.unserved_tail(), image.is_new());
    if tail > 0 {
        warn!(
            "{}: not serving its last {}, which do not fill a sector of 512",
            plan.image.display(),
            counted(tail, "byte")
        );
    }
    let ledger = claim::ledger(plan, &image)?;
    Ok((Arc::new(Disk::new(Box::new(image), plan.read_only)), ledger, is_new))
}

/// The sockets to serve on and the control socket: those we were handed, else those of the plan.
///
/// The control socket comes last: whoever sees it knows that clients can connect.
fn sockets(
    plan: &Config,
    inherited: InheritedSockets,
) -> Result<(Vec<Listener>, Option<ControlSocket>), StartError> {
    for name in &inherited.unfamiliar {
        warn!("a socket named '{name}' was handed over; taking it for one to serve on");
    }
    let listeners = listeners(plan, inherited.nbd)?;
    let control = match (inherited.control, &plan.control) {
        (Some(socket), given) => {
            if let Some(path) = given
                && !is_at(&socket, path)
            {
                warn!("not opening {}: the control socket handed over wins", path.display());
            }
            Some(ControlSocket::from_listener(socket))
        }
        (None, Some(path)) => Some(ControlSocket::bind(path).map_err(StartError::Control)?),
        (None, None) => None,
    };
    Ok((listeners, control))
}

fn listeners(
    plan: &Config,
    inherited: Vec<sockets::InheritedListener>,
) -> Result<Vec<Listener>, StartError> {
    if inherited.is_empty() {
        let address = plan.address.as_ref().ok_or(StartError::NoAddress)?;
        return Ok(vec![Listener::bind(address).map_err(StartError::Listen)?]);
    }
    let listeners = inherited.into_iter().map(|listener| {
        let descriptor: OwnedFd = match listener {
            sockets::InheritedListener::Tcp(listener) => listener.into(),
            sockets::InheritedListener::Unix(listener) => listener.into(),
        };
        Listener::inherited(descriptor).map_err(|error| StartError::Inherited(error.to_string()))
    });
    let listeners: Vec<_> = listeners.collect::<Result<_, _>>()?;
    if let Some(address) = &plan.address
        && !listeners.iter().any(|listener| listener.is_at(address))
    {
        warn!("not listening on {address}: the sockets handed over by the service manager win");
    }
    Ok(listeners)
}

/// Whether that is where the socket is.
fn is_at(socket: &UnixListener, path: &Path) -> bool {
    let here = socket.local_addr().ok();
    let here = here.as_ref().and_then(|address| address.as_pathname());
    here.is_some() && here == std::path::absolute(path).ok().as_deref()
}

fn start(
    plan: &Config,
    disk: &Arc<Disk>,
    policy: Arc<dyn ExportPolicy>,
    listeners: Vec<Listener>,
    luggage: StoredSessions,
    server_events: Arc<dyn ServerEvents>,
) -> Result<Server, StartError> {
    let luggage = if plan.role == ProcessRole::Serve { luggage } else { StoredSessions::default() };
    let settings = SessionSettings {
        style: if plan.oldstyle { Style::Oldstyle } else { Style::Newstyle },
        stall_limit: plan.killswitch.then_some(STALL_LIMIT),
        ..SessionSettings::default()
    };
    let Admission { acl, clients_max } = plan.admission.clone();
    let opening = Opening {
        listeners,
        disk: Arc::clone(disk),
        policy,
        name: &plan.export,
        acl,
        clients_max,
        settings,
        luggage,
        events: server_events,
    };
    Server::start(opening).map_err(|error| StartError::System("start serving", error))
}

fn answer_operators(
    socket: Option<ControlSocket>,
    service: &Arc<Service>,
) -> Result<Option<Handle>, StartError> {
    let Some(socket) = socket else { return Ok(None) };
    let operator: Arc<dyn Operator> = Arc::clone(service) as _;
    let started = socket.start(operator);
    started.map(Some).map_err(|error| StartError::System("answer on the control socket", error))
}

/// Feeds the watchdog, if there is one.
fn watch_over(
    disk: &Arc<Disk>,
    service: &Service,
    events: &Sender<ProcessEvent>,
    notifier: &ServiceManager,
) -> Result<Option<Watchdog>, StartError> {
    let Some(interval) = notifier.watchdog_interval() else { return Ok(None) };
    let notifier = notifier.clone();
    let everybody = (Arc::clone(disk), service.server().door(), events.clone());
    let pulse = Watchdog::of(everybody, interval, Box::new(move || tell(notifier.watchdog())));
    pulse.map(Some).map_err(|error| StartError::System("start a thread", error))
}

/// The addresses listened on, for people.
fn addresses(listeners: &[Listener]) -> String {
    let told = listeners.iter().filter_map(|listener| listener.local_address().ok());
    told.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
}

fn watch_signals(
    signals: Signals,
    events: Sender<ProcessEvent>,
    service: &Arc<Service>,
) -> Result<(), StartError> {
    let service = Arc::clone(service);
    let watch = move || {
        while let Ok(signal) = signals.set.wait() {
            match signals.meaning(signal, service.reread.is_some()) {
                SignalAction::Stop if events.send(ProcessEvent::Stop(signal)).is_err() => return,
                SignalAction::Stop => {}
                SignalAction::Reload => service.reload_aside(signal),
                SignalAction::Nothing => {
                    warn!("received {signal}, which has no meaning here; going on");
                }
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(drop).map_err(|error| StartError::System("start a thread", error))
}

/// Every client takes two descriptors, and the usual limit is 1024.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        warn!("cannot raise the limit of {soft} file descriptors: {error}");
    }
}

/// Session buffers are large, and live only while their session is busy. Left to itself glibc
/// takes the first one that is freed as a hint to keep such memory, in every thread's arena.
fn give_freed_memory_back() {
    #[cfg(target_env = "gnu")]
    {
        use nix::libc::{M_MMAP_THRESHOLD, mallopt};
        /// What glibc begins with, in bytes; setting it keeps it from growing.
        const THRESHOLD: i32 = 128 << 10;
        // SAFETY: takes two integers and touches nothing but the allocator's own settings, for
        // which it takes the allocator's lock.
        unsafe { mallopt(M_MMAP_THRESHOLD, THRESHOLD) };
    }
}

fn tell(told: io::Result<()>) {
    if let Err(error) = told {
        warn!("cannot notify the service manager: {error}");
    }
}

//! One process that serves or receives a disk: opens the rooms, waits for events, closes them in
//! order. The only one who knows all rooms. Never talks to a client and never parses a command
//! line.
//!
//! ```text
//! plan ─▶ sockets, image, title ─▶ server, control ─▶ ready ─▶ one Event after another ─▶ stop
//! ```

mod carry;
mod idle;
mod lookout;
mod moving;
mod operator;
mod plan;
mod reception;
mod refusing;
mod title;

pub use plan::{Admission, Ending, Plan, Refusal, Reread, Role};

use crate::control::{ControlSocket, Handle, Operator};
use crate::disk::ledger::Ledger;
use crate::disk::ownership::ForListen;
use crate::disk::{Access, Disk, FileImage};
use crate::migration::destination::{Destination, Fate};
use crate::migration::job::Outcome;
use crate::migration::source::Desk;
use crate::migration::wire::Token;
use crate::net::Listener;
use crate::server::reception::Reception;
use crate::server::watch::Watch;
use crate::server::{Luggage, Opening, STALL_LIMIT, Server, Settings, Style};
use crate::systemd::{Inherited, Notifier, Store, message_id, sockets};
use idle::Idle;
use lookout::{Lookout, Orders};
use moving::Ground;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use operator::{Departures, Service, Vigil};
use reception::{Receiving, Serving};
use refusing::Doorstep;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long sessions may take to answer what they have received when the server stops.
const GRACE: Duration = Duration::from_secs(10);

/// What the process has to react to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    /// Somebody wants the process to end.
    Stop(Signal),
    /// A migration away from here is over.
    Migrated(Outcome),
    /// What has become of the incoming disk.
    Incoming(Fate),
    /// A client has come or gone.
    Clients,
    /// An order has been obeyed.
    Obeyed,
    /// Nobody can be let in any more, for this reason.
    NotAccepting(String),
}

/// Everything that is open while the process runs.
struct House {
    service: Arc<Service>,
    control: Option<Handle>,
    notifier: Notifier,
    /// Where sessions are left for the next process.
    store: Store,
    disk: Arc<Disk>,
}

/// Does what the plan says until a signal, or the disk's moving, ends it. `reread` is how to learn
/// the admission anew, if it came from a configuration file.
///
/// # Errors
/// Before it began, when it cannot.
pub fn run(plan: Plan, reread: Option<Reread>) -> Result<Ending, Refusal> {
    let (doorstep, inherited, luggage) = Doorstep::enter(plan.role, plan.control.clone())?;
    raise_descriptor_limit();
    give_freed_memory_back();
    match begin(&plan, reread, (inherited, luggage), &doorstep) {
        Err(refusal) => doorstep.refuse(refusal),
        Ok(None) => Ok(Ending::Well),
        Ok(Some((house, arrivals))) => {
            drop(doorstep);
            let idle = Idle::new(plan.idle_exit, Instant::now());
            let ending = house.wait(&arrivals, plan.role, idle);
            let goes_on = plan.role == Role::Serve && house.disk.is_flawless();
            house.close(goes_on);
            Ok(last_word(ending, &arrivals))
        }
    }
}

/// For a process that has no plan, for this reason: lets clients and operators know of it, if the
/// process was started for one that waits. `control` is where a control socket should have been.
/// None if nobody waits.
#[must_use]
pub fn refuse(role: Role, control: Option<PathBuf>, reason: &str) -> Option<Ending> {
    // What else is wrong matters less.
    let (doorstep, ..) = Doorstep::enter(role, control).ok()?;
    doorstep.refuse(Refusal::Configuration(reason.to_owned())).ok()
}

/// Opens everything, and is ready; none if there is nothing to be done.
fn begin(
    plan: &Plan,
    reread: Option<Reread>,
    (inherited, luggage): (Inherited, Luggage),
    doorstep: &Doorstep,
) -> Result<Option<(House, Receiver<Event>)>, Refusal> {
    let notifier = doorstep.notifier.clone();
    let (events, arrivals) = mpsc::channel();
    let disk = open(plan)?;
    let ledger = title::ledger(plan)?;
    let (reception, departures) = match plan.role {
        Role::Serve => to_serve(plan, &ledger, &disk, (&events, &notifier))?,
        Role::Listen { overwrite } => match to_listen(plan, ledger, &disk, overwrite, &events)? {
            Some(reception) => (reception, None),
            None => {
                // Who ends without having been ready has failed for the service manager, however
                // well it ends; and what follows an arrival is to follow.
                tell(notifier.ready());
                return Ok(None);
            }
        },
    };
    let (listeners, control) = sockets(plan, inherited)?;
    let told = addresses(&listeners);
    let doing = if departures.is_some() { "serving" } else { "receiving" };
    info!("{doing} {} ({} bytes) on {told}", plan.image.display(), disk.size());
    let watch = Arc::new(Lookout(events.clone()));
    let server = start(plan, &disk, reception, listeners, luggage, watch)?;
    let size = disk.size();
    let ownership = title::told(plan, departures.as_ref().map(|moving| moving.ground.title));
    let server = Mutex::new(server);
    let vigil = Vigil::default();
    let orders = Orders::new(events.clone());
    let service = Arc::new(Service { size, server, reread, departures, ownership, vigil, orders });
    let opened = answer_operators(control, &service)
        .and_then(|control| watch_signals(doorstep.signals, events).map(|()| control));
    // Whoever refuses clients now has to have the sockets for himself.
    let control = opened.inspect_err(|_| service.server().stop(Duration::ZERO))?;
    tell(notifier.ready());
    tell(notifier.status(&format!("{doing} on {told}")));
    let store = Store::from_env(&notifier);
    Ok(Some((House { service, control, notifier, store, disk }, arrivals)))
}

/// What happened while everything was being closed: a disk that arrived or left all the same.
fn last_word(ending: Ending, arrivals: &Receiver<Event>) -> Ending {
    let moved = |event| {
        matches!(event, Event::Incoming(Fate::Arrived) | Event::Migrated(Outcome::Arrived { .. }))
    };
    if arrivals.try_iter().any(moved) {
        info!("the disk has been moved, as it was about to be when the signal came");
        return Ending::Well;
    }
    ending
}

impl House {
    /// Waits for the event that ends the process.
    fn wait(&self, arrivals: &Receiver<Event>, role: Role, mut idle: Idle) -> Ending {
        loop {
            let due = idle.due(self.is_busy());
            if due.is_some_and(|due| due <= Instant::now()) {
                if self.service.close_if_idle() {
                    info!(message_id = message_id::STOPPING, "stopping: there is nothing to do");
                    return Ending::Well;
                }
                // Somebody is just coming in.
                idle.stir(Instant::now());
                continue;
            }
            // The channel cannot close: the thread that watches signals has its other end.
            match next(arrivals, due) {
                Some(Event::Stop(signal)) => return self.interrupted(signal, role, arrivals),
                Some(Event::Migrated(outcome)) => {
                    self.service.vigil.migration_over();
                    if let Some(ending) = migrated(&outcome) {
                        return ending;
                    }
                    idle.stir(Instant::now());
                    tell(self.notifier.status("serving; the last migration did not happen"));
                }
                Some(Event::Incoming(Fate::Arrived)) => {
                    info!("the disk has arrived");
                    return Ending::Well;
                }
                Some(Event::Incoming(Fate::Failed(why))) => return Ending::Badly(why),
                Some(Event::Clients) => idle.stir(Instant::now()),
                Some(Event::NotAccepting(why)) => {
                    return Ending::Badly(format!("no longer accepting clients: {why}"));
                }
                Some(Event::Obeyed) | None => {}
            }
        }
    }

    /// Whether there is a client, a migration or an order.
    fn is_busy(&self) -> bool {
        let migrates = || self.service.desk().is_some_and(|desk| desk.outcome().is_none());
        self.service.server().clients() > 0 || self.service.orders.count() > 0 || migrates()
    }

    fn interrupted(&self, signal: Signal, role: Role, arrivals: &Receiver<Event>) -> Ending {
        info!("stopping: received {signal}");
        if let Role::Listen { .. } = role {
            return Ending::Badly(format!(
                "received {signal} before the disk has arrived; what is here is incomplete"
            ));
        }
        match self.service.desk().filter(|desk| desk.outcome().is_none()) {
            None => Ending::Well,
            Some(desk) => self.abandon(&desk, signal, arrivals),
        }
    }

    /// Breaks a migration off and waits until everything is as it was before it; or, if it is too
    /// late for that, until the disk has left. Not for ever: the record tells the next process.
    fn abandon(&self, desk: &Desk, signal: Signal, arrivals: &Receiver<Event>) -> Ending {
        desk.abandon();
        let deadline = Instant::now() + GRACE;
        loop {
            match arrivals.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Migrated(outcome)) => {
                    self.service.vigil.migration_over();
                    let interrupted = format!("received {signal} while the disk was being moved");
                    return migrated(&outcome).unwrap_or(Ending::Badly(interrupted));
                }
                Ok(_) => {}
                Err(_) => {
                    return Ending::Badly(format!(
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
    fn close(self, goes_on: bool) {
        tell(self.notifier.stopping());
        self.service.vigil.stop();
        drop(self.control);
        let mut server = self.service.server();
        match self.store.room() {
            room if goes_on && room > 0 => {
                carry::put_in(&self.store, &server.pack_up(room, GRACE));
            }
            _ => server.stop(GRACE),
        }
    }
}

/// The next event; none at that time, if there is one.
fn next(arrivals: &Receiver<Event>, at: Option<Instant>) -> Option<Event> {
    match at {
        None => arrivals.recv().ok(),
        Some(at) => arrivals.recv_timeout(at.saturating_duration_since(Instant::now())).ok(),
    }
}

/// How the process ends after a migration; it goes on if the disk stayed.
fn migrated(outcome: &Outcome) -> Option<Ending> {
    match outcome {
        Outcome::Arrived { acknowledged } => {
            let how = if *acknowledged { "acknowledged" } else { "complete, as far as we know" };
            info!("migration over: the disk is at its destination ({how})");
            Some(Ending::Well)
        }
        Outcome::Broken => {
            info!("migration broken off as ordered; the disk stays here");
            None
        }
        Outcome::Failed(trouble) => {
            warn!("migration failed: {trouble}; the disk stays here");
            None
        }
    }
}

fn to_serve(
    plan: &Plan,
    ledger: &Ledger,
    disk: &Arc<Disk>,
    (events, notifier): (&Sender<Event>, &Notifier),
) -> Result<(Arc<dyn Reception>, Option<Departures>), Refusal> {
    let title = title::to_serve(plan, ledger, disk.size())?;
    let ground = Ground {
        disk: Arc::clone(disk),
        image: plan.image.clone(),
        title,
        events: events.clone(),
        notifier: notifier.clone(),
    };
    let for_ledger = plan.clone();
    let departures = Departures {
        ground,
        ledger: Box::new(move || title::usable(title::ledger(&for_ledger))),
        desk: Mutex::new(None),
        beginning: Mutex::new(()),
    };
    Ok((Arc::new(Serving(title)), Some(departures)))
}

/// Whoever answers for the incoming disk; none if it has arrived already.
fn to_listen(
    plan: &Plan,
    ledger: Ledger,
    disk: &Arc<Disk>,
    overwrite: bool,
    events: &Sender<Event>,
) -> Result<Option<Arc<dyn Reception>>, Refusal> {
    let holds = match title::to_listen(plan, &ledger, overwrite)? {
        ForListen::Accept { holds } => holds,
        _ => {
            // Not what was asked for, though it is no failure either: to be seen by default.
            warn!("{}: the disk has arrived already; not listening", plan.image.display());
            return Ok(None);
        }
    };
    let token = moving::random()
        .map(Token)
        .map_err(|error| Refusal::System("draw random numbers", io::Error::other(error)))?;
    let events = Mutex::new(events.clone());
    let told = Box::new(move |fate| {
        // The process is ending already if nobody hears it.
        let _ = lock(&events).send(Event::Incoming(fate));
    });
    let ledger = title::usable(Ok(ledger));
    let disk = Arc::clone(disk);
    let destination = Destination::new(disk, ledger, plan.oldstyle, (token, holds), told);
    Ok(Some(Arc::new(Receiving(destination))))
}

fn open(plan: &Plan) -> Result<Arc<Disk>, Refusal> {
    title::to_create(plan)?;
    let access = Access { read_only: plan.read_only };
    let image = match plan.create {
        Some(size) => FileImage::create(&plan.image, size, access),
        None => FileImage::open(&plan.image, access),
    };
    let image = image.map_err(Refusal::Image)?;
    let tail = image.unserved_tail();
    if tail > 0 {
        warn!(
            "{}: the last {tail} bytes are not served, since they do not fill a sector of 512",
            plan.image.display()
        );
    }
    Ok(Arc::new(Disk::new(Box::new(image), plan.read_only)))
}

/// The sockets to serve on and the control socket: those we were handed, else those of the plan.
///
/// The control socket comes last: whoever sees it knows that clients can connect.
fn sockets(
    plan: &Plan,
    inherited: Inherited,
) -> Result<(Vec<Listener>, Option<ControlSocket>), Refusal> {
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
        (None, Some(path)) => Some(ControlSocket::bind(path).map_err(Refusal::Control)?),
        (None, None) => None,
    };
    Ok((listeners, control))
}

fn listeners(plan: &Plan, inherited: Vec<sockets::Listener>) -> Result<Vec<Listener>, Refusal> {
    if inherited.is_empty() {
        let address = plan.address.as_ref().ok_or(Refusal::NoAddress)?;
        return Ok(vec![Listener::bind(address).map_err(Refusal::Listen)?]);
    }
    let listeners = inherited.into_iter().map(|listener| {
        let descriptor: OwnedFd = match listener {
            sockets::Listener::Tcp(listener) => listener.into(),
            sockets::Listener::Unix(listener) => listener.into(),
        };
        Listener::inherited(descriptor).map_err(|error| Refusal::Inherited(error.to_string()))
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
    plan: &Plan,
    disk: &Arc<Disk>,
    reception: Arc<dyn Reception>,
    listeners: Vec<Listener>,
    luggage: Luggage,
    watch: Arc<dyn Watch>,
) -> Result<Server, Refusal> {
    let luggage = if plan.role == Role::Serve { luggage } else { Luggage::default() };
    let settings = Settings {
        style: if plan.oldstyle { Style::Oldstyle } else { Style::Newstyle },
        stall_limit: plan.killswitch.then_some(STALL_LIMIT),
        ..Settings::default()
    };
    let Admission { acl, clients_max } = plan.admission.clone();
    let opening = Opening {
        listeners,
        disk: Arc::clone(disk),
        reception,
        name: &plan.export,
        acl,
        clients_max,
        settings,
        luggage,
        watch,
    };
    Server::start(opening).map_err(|error| Refusal::System("start serving", error))
}

fn answer_operators(
    socket: Option<ControlSocket>,
    service: &Arc<Service>,
) -> Result<Option<Handle>, Refusal> {
    let Some(socket) = socket else { return Ok(None) };
    let operator: Arc<dyn Operator> = Arc::clone(service) as _;
    let started = socket.start(operator);
    started.map(Some).map_err(|error| Refusal::System("answer on the control socket", error))
}

/// The addresses listened on, for people.
fn addresses(listeners: &[Listener]) -> String {
    let told = listeners.iter().filter_map(|listener| listener.local_address().ok());
    told.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
}

/// Blocks the signals that end the process, so that they can be waited for.
fn block_signals() -> Result<SigSet, Refusal> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM] {
        signals.add(signal);
    }
    let blocked = signals.thread_block();
    blocked.map_err(|errno| Refusal::System("block signals", errno.into()))?;
    Ok(signals)
}

fn watch_signals(signals: SigSet, events: Sender<Event>) -> Result<(), Refusal> {
    let watch = move || {
        while let Ok(signal) = signals.wait() {
            if events.send(Event::Stop(signal)).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into()).spawn(watch);
    thread.map(drop).map_err(|error| Refusal::System("start a thread", error))
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

/// A panic elsewhere leaves nothing half done under these locks, so that it does not count.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

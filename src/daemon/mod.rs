//! One process that serves or receives a disk: opens the rooms, waits for events, closes them in
//! order. The only one who knows all rooms. Never talks to a client and never parses a command
//! line.
//!
//! ```text
//! plan ─▶ sockets, image, title ─▶ server, control ─▶ ready ─▶ one Event after another ─▶ stop
//! ```

mod asking;
mod beat;
mod carry;
mod house;
mod idle;
mod lookout;
mod moving;
mod operator;
mod plan;
mod pulse;
mod reception;
mod refusing;
mod report;
pub mod signals;
mod title;
mod wording;

pub use asking::Inquiry;
pub use plan::{Admission, Ending, Plan, Records, Refusal, Reread, Role};

use crate::control::{ControlSocket, Handle, Operator};
use crate::disk::ledger::Ledger;
use crate::disk::ownership::ForListen;
use crate::disk::{Access, Disk, FileImage};
use crate::migration::arrival::Admits;
use crate::migration::destination::{Destination, Fate};
use crate::migration::job::Outcome;
use crate::migration::source::Desk;
use crate::migration::wire::Token;
use crate::net::Listener;
use crate::server::reception::Reception;
use crate::server::watch::Watch;
use crate::server::{Luggage, Opening, STALL_LIMIT, Server, Settings, Style};
use crate::systemd::{Inherited, Notifier, Store, message_id, sockets};
use crate::words::counted;
use asking::{Answered, Asker};
use beat::Beat;
use house::House;
use idle::Idle;
use lookout::{Lookout, Orders};
use moving::Ground;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use operator::{Departures, Service, Vigil};
use pulse::Pulse;
use reception::{Receiving, Serving};
use refusing::{Doorstep, Purpose, Stayed};
use report::Passage;
use signals::{Meaning, Signals};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};
use wording::Standing;

/// How long sessions may take to answer what they have received when the server stops.
const GRACE: Duration = Duration::from_secs(10);
/// The same for those whose answer the disk takes longer for, such as a FLUSH of much dirty data.
const DISK_GRACE: Duration = Duration::from_secs(60);

/// What the process has to react to.
#[derive(Clone, Debug)]
enum Event {
    /// Somebody wants the process to end.
    Stop(Signal),
    /// A migration away from here has begun.
    Migrating(Passage, Arc<Desk>),
    /// There is something to tell of it.
    MigrationNews,
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
    /// The watchdog wants to know whether events are heard.
    Asked(u64),
}

/// Does what the plan says until a signal, or the disk's moving, ends it. `reread` is how to learn
/// the admission anew, if it came from a configuration file.
///
/// # Errors
/// Before it began, when it cannot.
pub fn run(plan: Plan, mut reread: Option<Reread>) -> Result<Ending, Refusal> {
    let (role, image, control) = (plan.role, Some(plan.image.clone()), plan.control.clone());
    let (doorstep, mut luggage) = Doorstep::enter(Purpose { role, image, control })?;
    raise_descriptor_limit();
    give_freed_memory_back();
    let mut answered = None;
    let (mut house, arrivals) = loop {
        match begin(&plan, &mut reread, &mut luggage, (&doorstep, answered)) {
            Ok(Some(began)) => break began,
            Ok(None) => return Ok(Ending::Well),
            Err(refusal) => {
                // Sessions of the last process end now, not with the refusing.
                luggage = Luggage::default();
                match doorstep.refuse(refusal)? {
                    Stayed::Ended(ending) => return Ok(ending),
                    Stayed::Answered(answer) => answered = Some(answer),
                }
            }
        }
    };
    drop(doorstep);
    let ending = house.wait(&arrivals, plan.role);
    let goes_on = plan.role == Role::Serve && house.disk.is_flawless();
    house.close(&ending, goes_on);
    Ok(house::last_word(ending, &arrivals))
}

/// For a process that has no plan, for this reason: lets clients and operators know of it, if the
/// process was started for one that waits. `control` is where a control socket should have been.
/// None if nobody waits.
#[must_use]
pub fn refuse(role: Role, control: Option<PathBuf>, reason: &str) -> Option<Ending> {
    // What else is wrong matters less.
    let (doorstep, _) = Doorstep::enter(Purpose { role, image: None, control }).ok()?;
    match doorstep.refuse(Refusal::Configuration(reason.to_owned())).ok()? {
        Stayed::Ended(ending) => Some(ending),
        // Nothing was asked.
        Stayed::Answered(_) => None,
    }
}

/// Opens everything, and is ready; none if there is nothing to be done.
fn begin(
    plan: &Plan,
    reread: &mut Option<Reread>,
    luggage: &mut Luggage,
    (doorstep, answered): (&Doorstep, Option<Answered>),
) -> Result<Option<(House, Receiver<Event>)>, Refusal> {
    let notifier = doorstep.notifier.clone();
    let inherited = doorstep.sockets()?;
    let (events, arrivals) = mpsc::channel();
    let (disk, ledger, is_new) = open(plan)?;
    if let Role::Listen { records, .. } = plan.role
        && is_new
    {
        title::to_come(&ledger, disk.size(), records)?;
    }
    let for_status = ledger.again().map_err(Refusal::Record)?;
    let (reception, departures) = match plan.role {
        Role::Serve => to_serve(plan, ledger, &disk, &events, &doorstep.asker(answered))?,
        Role::Listen { overwrite, records } => {
            match to_listen(plan, (ledger, records), &disk, overwrite, &events)? {
                Some(reception) => (reception, None),
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
    let watch = Arc::new(Lookout(events.clone()));
    let server = start(plan, &disk, reception, listeners, std::mem::take(luggage), watch)?;
    let ownership = title::told(for_status, departures.as_ref().map(|moving| moving.ground.title));
    let server = Mutex::new(server);
    let vigil = Vigil::default();
    let orders = Orders::new(events.clone());
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
    let store = Store::from_env(&notifier);
    let standing = Standing { doing, image: image.clone(), size, places };
    let mut beat = Beat::new(notifier.clone(), standing);
    beat.stir();
    let idle = Idle::new(plan.idle_exit, Instant::now());
    let house = House { service, control, notifier, store, disk, image, idle, beat, pulse };
    Ok(Some((house, arrivals)))
}

fn to_serve(
    plan: &Plan,
    ledger: Ledger,
    disk: &Arc<Disk>,
    events: &Sender<Event>,
    asker: &Asker<'_>,
) -> Result<(Arc<dyn Reception>, Option<Departures>), Refusal> {
    let title = title::to_serve(plan, &ledger, disk.size(), asker)?;
    let ground =
        Ground { disk: Arc::clone(disk), image: plan.image.clone(), title, events: events.clone() };
    let departures =
        Departures { ground, ledger, desk: Mutex::new(None), beginning: Mutex::new(()) };
    Ok((Arc::new(Serving(title)), Some(departures)))
}

/// Whoever answers for the incoming disk; none if it has arrived already.
fn to_listen(
    plan: &Plan,
    (ledger, records): (Ledger, Records),
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
    let ledger = title::with_room(ledger, records).map_err(Refusal::Unrecorded)?;
    let disk = Arc::clone(disk);
    let admits = match (plan.oldstyle, plan.plain) {
        (true, _) => Admits::OldStyle,
        (false, true) => Admits::PlainWriter,
        (false, false) => Admits::Sources,
    };
    let destination = Destination::new(disk, Some(ledger), admits, (token, holds), told);
    Ok(Some(Arc::new(Receiving(destination))))
}

/// The disk, the ledger of its image, and whether the image has just been made.
fn open(plan: &Plan) -> Result<(Arc<Disk>, Ledger, bool), Refusal> {
    title::to_create(plan)?;
    let access = Access { read_only: plan.read_only };
    let image = match plan.create {
        Some(size) => FileImage::create(&plan.image, size, access),
        None => FileImage::open(&plan.image, access),
    };
    let image =
        image.map_err(|error| Refusal::Image(error, plan.config.clone()))?.with_holes(plan.holes);
    let (tail, is_new) = (image.unserved_tail(), image.is_new());
    if tail > 0 {
        warn!(
            "{}: not serving its last {}, which do not fill a sector of 512",
            plan.image.display(),
            counted(tail, "byte")
        );
    }
    let ledger = title::ledger(plan, &image)?;
    Ok((Arc::new(Disk::new(Box::new(image), plan.read_only)), ledger, is_new))
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

/// Feeds the watchdog, if there is one.
fn watch_over(
    disk: &Arc<Disk>,
    service: &Service,
    events: &Sender<Event>,
    notifier: &Notifier,
) -> Result<Option<Pulse>, Refusal> {
    let Some(interval) = notifier.watchdog_interval() else { return Ok(None) };
    let notifier = notifier.clone();
    let everybody = (Arc::clone(disk), service.server().door(), events.clone());
    let pulse = Pulse::of(everybody, interval, Box::new(move || tell(notifier.watchdog())));
    pulse.map(Some).map_err(|error| Refusal::System("start a thread", error))
}

/// The addresses listened on, for people.
fn addresses(listeners: &[Listener]) -> String {
    let told = listeners.iter().filter_map(|listener| listener.local_address().ok());
    told.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
}

fn watch_signals(
    signals: Signals,
    events: Sender<Event>,
    service: &Arc<Service>,
) -> Result<(), Refusal> {
    let service = Arc::clone(service);
    let watch = move || {
        while let Ok(signal) = signals.set.wait() {
            match signals.meaning(signal, service.reread.is_some()) {
                Meaning::Stop if events.send(Event::Stop(signal)).is_err() => return,
                Meaning::Stop => {}
                Meaning::Reload => service.reload_aside(signal),
                Meaning::Nothing => warn!("received {signal}, which has no meaning here; going on"),
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

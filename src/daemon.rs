//! One process that serves a disk: opens the rooms, waits for events, closes them in order.
//! The only one who knows all rooms. Never talks to a client and never parses a command line.

use crate::control::reply::UNKNOWN_COMMAND;
use crate::control::{Command, ControlSocket, Credentials, Handle, Operator, Reply, Status};
use crate::disk::{Access, Disk, FileImage, OpenError};
use crate::net::{Address, BindError, Listener};
use crate::server::acl::Acl;
use crate::server::{STALL_LIMIT, Server, Settings, Style};
use crate::systemd::{Inherited, Notifier, sockets};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;
use tracing::{info, warn};

/// How long sessions may take to answer what they have received when the server stops.
const GRACE: Duration = Duration::from_secs(10);

/// Everything that was decided before serving begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServePlan {
    /// Where to listen; not needed when sockets are inherited.
    pub address: Option<Address>,
    /// The image file or block device.
    pub image: PathBuf,
    /// Size in bytes to create the image with if it does not exist.
    pub create: Option<u64>,
    /// Refuse writing.
    pub read_only: bool,
    /// Name of the export; clients reach it under the empty name as well.
    pub export: String,
    /// Greet in old style.
    pub oldstyle: bool,
    /// Where to open a control socket; not needed when one is inherited.
    pub control: Option<PathBuf>,
    /// End clients that make no progress.
    pub killswitch: bool,
    /// Who may connect.
    pub admission: Admission,
}

/// Who may connect, as far as that can change while serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// From where.
    pub acl: Acl,
    /// How many at once.
    pub clients_max: usize,
}

/// Reads the configuration again; the error is for the operator.
pub struct Reread(pub Box<dyn Fn() -> Result<Admission, String> + Send + Sync>);

impl std::fmt::Debug for Reread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reread")
    }
}

/// Why serving did not begin. An operator has to change something first.
#[derive(Debug)]
pub enum Refusal {
    /// The image cannot be served.
    Image(OpenError),
    /// The address cannot be listened on.
    Listen(BindError),
    /// The control socket cannot be opened.
    Control(crate::control::BindError),
    /// Nobody said where to listen.
    NoAddress,
    /// A socket that was handed to us is not what it should be.
    Inherited(String),
    /// The system refused something that every process needs.
    System(&'static str, io::Error),
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(error) => error.fmt(f),
            Self::Listen(error) => error.fmt(f),
            Self::Control(error) => error.fmt(f),
            Self::NoAddress => f.write_str(
                "no address to listen on: give --addr and --port, or start it through a socket \
                 unit",
            ),
            Self::Inherited(what) => f.write_str(what),
            Self::System(doing, error) => write!(f, "cannot {doing}: {error}"),
        }
    }
}

impl std::error::Error for Refusal {}

/// What the process has to react to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// Somebody wants the process to end.
    Stop(Signal),
}

/// Serves until a signal ends it. `reread` is how to learn the admission anew, if it came from a
/// configuration file.
///
/// # Errors
/// Before serving began, when it cannot.
pub fn serve(plan: ServePlan, reread: Option<Reread>) -> Result<(), Refusal> {
    // Before any thread starts: the environment is read and changed, and threads inherit the mask.
    let inherited = Inherited::from_env().map_err(|error| Refusal::Inherited(error.to_string()))?;
    let notifier = Notifier::from_env();
    let (events, arrivals) = mpsc::channel();
    let signals = block_signals()?;
    raise_descriptor_limit();
    let disk = open(&plan)?;
    let (listeners, control) = sockets(&plan, inherited)?;
    let told = addresses(&listeners);
    info!("serving {} ({} bytes) on {told}", plan.image.display(), disk.size());
    let service = start(plan, reread, disk, listeners)?;
    let control = answer_operators(control, &service)?;
    watch_signals(signals, events)?;
    tell(notifier.ready());
    tell(notifier.status(&format!("Serving on {told}")));
    wait(&arrivals);
    tell(notifier.stopping());
    drop(control);
    service.server().stop(GRACE);
    Ok(())
}

/// Waits for the event that ends the process. The channel cannot close before that: the thread
/// that watches signals has its other end for good.
fn wait(arrivals: &Receiver<Event>) {
    if let Ok(Event::Stop(signal)) = arrivals.recv() {
        info!("stopping: received {signal}");
    }
}

fn open(plan: &ServePlan) -> Result<Arc<Disk>, Refusal> {
    let image = match plan.create {
        Some(size) => FileImage::create(&plan.image, size),
        None => FileImage::open(&plan.image, Access { read_only: plan.read_only }),
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
    plan: &ServePlan,
    inherited: Inherited,
) -> Result<(Vec<Listener>, Option<ControlSocket>), Refusal> {
    for name in &inherited.unfamiliar {
        warn!("a socket named '{name}' was handed over; taking it for one to serve on");
    }
    let listeners = listeners(plan, inherited.nbd)?;
    let control = match (inherited.control, &plan.control) {
        (Some(socket), given) => {
            if let Some(path) = given {
                warn!("not opening {}: the control socket handed over wins", path.display());
            }
            Some(ControlSocket::from_listener(socket))
        }
        (None, Some(path)) => Some(ControlSocket::bind(path).map_err(Refusal::Control)?),
        (None, None) => None,
    };
    Ok((listeners, control))
}

fn listeners(
    plan: &ServePlan,
    inherited: Vec<sockets::Listener>,
) -> Result<Vec<Listener>, Refusal> {
    if inherited.is_empty() {
        let address = plan.address.as_ref().ok_or(Refusal::NoAddress)?;
        return Ok(vec![Listener::bind(address).map_err(Refusal::Listen)?]);
    }
    if let Some(address) = &plan.address {
        warn!("not listening on {address}: the sockets handed over by the service manager win");
    }
    let listeners = inherited.into_iter().map(|listener| {
        let descriptor: OwnedFd = match listener {
            sockets::Listener::Tcp(listener) => listener.into(),
            sockets::Listener::Unix(listener) => listener.into(),
        };
        Listener::inherited(descriptor).map_err(|error| Refusal::Inherited(error.to_string()))
    });
    listeners.collect()
}

fn start(
    plan: ServePlan,
    reread: Option<Reread>,
    disk: Arc<Disk>,
    listeners: Vec<Listener>,
) -> Result<Arc<Service>, Refusal> {
    let settings = Settings {
        style: if plan.oldstyle { Style::Oldstyle } else { Style::Newstyle },
        stall_limit: plan.killswitch.then_some(STALL_LIMIT),
        ..Settings::default()
    };
    let size = disk.size();
    let Admission { acl, clients_max } = plan.admission;
    let server = Server::start(listeners, disk, &plan.export, acl, clients_max, settings)
        .map_err(|error| Refusal::System("start serving", error))?;
    Ok(Arc::new(Service { size, server: Mutex::new(server), reread }))
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

/// What orders from operators are about.
#[derive(Debug)]
struct Service {
    size: u64,
    server: Mutex<Server>,
    reread: Option<Reread>,
}

impl Service {
    fn server(&self) -> MutexGuard<'_, Server> {
        lock(&self.server)
    }

    fn status(&self) -> Status {
        let server = self.server();
        Status {
            pid: std::process::id(),
            size: self.size,
            clients_allowed: server.accepts(),
            num_clients: server.clients() as u64,
            has_control: true,
            ..Status::default()
        }
    }

    fn set_acl(&self, entries: &[String]) -> Reply {
        match self.server().set_acl(entries) {
            Ok(()) => Reply::success("updated"),
            Err(bad) => Reply::refused(format!("bad spec: {}", bad.0)),
        }
    }

    fn reload(&self) -> Reply {
        let Some(Reread(read)) = &self.reread else {
            return Reply::refused("started without --config, so there is nothing to reload");
        };
        match read() {
            Ok(Admission { acl, clients_max }) => {
                self.server().readmit(acl, clients_max);
                Reply::success("reloaded")
            }
            Err(why) => Reply::refused(why),
        }
    }
}

impl Operator for Service {
    fn obey(&self, command: Command, _from: Credentials) -> Reply {
        match command {
            Command::Status => Reply::success(self.status().to_string()),
            Command::Acl { entries } => self.set_acl(&entries),
            Command::Reload => self.reload(),
            Command::Break => Reply::refused("not mirroring"),
            Command::MirrorMaxBps(_) => Reply::refused("Not currently mirroring"),
            Command::Mirror(_) => Reply::new(UNKNOWN_COMMAND, "unknown command"),
        }
    }
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

fn tell(told: io::Result<()>) {
    if let Err(error) = told {
        warn!("cannot notify the service manager: {error}");
    }
}

/// A panic elsewhere leaves nothing half done under these locks, so that it does not count.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

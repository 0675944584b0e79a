//! The start of a process, in one order: inherited, certificates, role, sockets, server, control, watchdog,
//! ready.
//! Never handles an event.

use super::available_memory::payload_memory_default;
use super::config::{Admission, Config, ConfinementConfig, DiskConfig, RereadConfig};
use super::confinement::Confinement;
use super::degraded::{self, RefusalResult, ServerPurpose};
use super::event_loop::{Process, ProcessEnd};
use super::events::{ActiveCommands, ProcessEvent, ServerEventSender};
use super::handover_query::QueryResult;
use super::idle::Idle;
use super::inherited::Inherited;
use super::operator::{DiskRole, MigrationWaiters, Service};
use super::role::{Role, RoleInputs};
use super::signals::{SignalAction, Signals};
use super::snapshot::{self, LeftSessions};
use super::sockets::Sockets;
use super::start_error::StartError;
use super::status_reporter::{IdleStatus, StatusReporter};
use super::tls::{ExpiryWatch, ProcessTls};
use super::watchdog::{Watchdog, WatchedParts};
use crate::control::{ControlSocket, Handle, Operator};
use crate::disk::Disk;
use crate::message_id;
use crate::net::Listener;
use crate::server::{STALL_LIMIT, Server, ServerConfig, SessionSettings, StoredSessions, Style};
use crate::systemd::{FdStore, InheritedSockets, log_unsent};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Serves, receives or proxies a disk until a signal, or the disk's move, ends the process. `reread` reads
/// the configuration file again, if there is one.
///
/// # Errors
/// When the process cannot start, and no client waits to be refused.
pub fn run(config: Config, reread: Option<RereadConfig>) -> Result<ProcessEnd, StartError> {
    let image = match &config.disk {
        DiskConfig::Image(image) => Some(image),
        DiskConfig::Upstream(_) => None,
    };
    let purpose = ServerPurpose {
        receives: image.is_some_and(|image| image.receiving.is_some()),
        image: image.map(|image| image.path.clone()),
        control: config.control.clone(),
    };
    let (inherited, left) = Inherited::take()?;
    raise_descriptor_limit();
    fix_mmap_threshold();
    let confinement = Confinement::plan(&config);
    let mut startup = Startup { config, reread, inherited, confinement, left, answer: None };
    let process = loop {
        match startup.start() {
            Ok(Some(process)) => break process,
            Ok(None) => return Ok(ProcessEnd::Well),
            Err(error) => {
                let left = std::mem::take(&mut startup.left);
                if matches!(error, StartError::Interrupted(_)) {
                    // A start that a signal ends has not used them.
                    snapshot::save_again(&startup.inherited.notifier, &left);
                }
                // Ends the sessions of the last process now, before clients are refused.
                drop(left);
                match degraded::run(&startup.inherited, &purpose, &startup.confinement, error)? {
                    RefusalResult::Ended(end) => return Ok(end),
                    RefusalResult::Answered(answer) => startup.answer = Some(answer),
                }
            }
        }
    };
    // Closes the originals of the inherited sockets; the server has copies.
    drop(startup);
    Ok(process.run())
}

/// Refuses clients and operators that wait at inherited sockets, for a process whose configuration
/// cannot be used, for this reason. `receives`: it was to receive a disk. `control` is the path of the
/// configured control socket. Returns `None` at once if no client waits.
#[must_use]
pub fn refuse(
    receives: bool,
    control: Option<PathBuf>,
    confinement: &ConfinementConfig,
    reason: &str,
) -> Option<ProcessEnd> {
    let confinement = Confinement::refusing(confinement, control.as_deref());
    // The caller reports the invalid configuration, which matters more than an error here.
    let (inherited, _) = Inherited::take().ok()?;
    let purpose = ServerPurpose { receives, image: None, control };
    let error = StartError::Configuration(reason.to_owned());
    match degraded::run(&inherited, &purpose, &confinement, error).ok()? {
        RefusalResult::Ended(end) => Some(end),
        // No other host is asked about an invalid configuration.
        RefusalResult::Answered(_) => None,
    }
}

/// The sockets of a process, opened or not yet.
enum PlannedSockets {
    Open(Sockets),
    Inherited(InheritedSockets),
}

/// The input of a start. It outlives a failed start, so that another can follow.
struct Startup {
    config: Config,
    reread: Option<RereadConfig>,
    inherited: Inherited,
    /// Entered by the first start.
    confinement: Confinement,
    /// Sessions of the last process; the first start takes them.
    left: LeftSessions,
    /// The answer of another host, if a start failed for lack of it.
    answer: Option<QueryResult>,
}

impl Startup {
    /// Opens everything in order, and reports that the process is ready. `None` if the disk has
    /// arrived already.
    fn start(&mut self) -> Result<Option<Process>, StartError> {
        let sockets = self.plan_sockets()?;
        let tls = ProcessTls::load(&self.config).map_err(StartError::Tls)?;
        let (sender, events) = mpsc::channel();
        let inputs = RoleInputs {
            inherited: &self.inherited,
            tls: &tls,
            confinement: &self.confinement,
            answer: self.answer,
            session_count: self.left.sessions.streams.len(),
            relay: self.left.relay.as_ref(),
            events: &sender,
        };
        let Some(role) = Role::open(&self.config, &inputs)? else {
            // Without READY=1, systemd counts the service as failed, whatever its exit status, and
            // does not start the units that wait for the arrival.
            log_unsent(self.inherited.notifier.ready());
            return Ok(None);
        };
        let sockets = match sockets {
            PlannedSockets::Open(sockets) => sockets,
            PlannedSockets::Inherited(inherited) => self.open_sockets(inherited)?,
        };
        let addresses = sockets.addresses();
        let server = self.start_server(sockets.listeners, &role, &tls, &sender)?;
        let Role { verb, name, disk, disk_role, .. } = role;
        let notifier = self.inherited.notifier.clone();
        let service = Arc::new(Service {
            size: disk.size(),
            server: Mutex::new(server),
            reread: self.reread.take(),
            role: disk_role,
            tls,
            waiters: MigrationWaiters::default(),
            commands: ActiveCommands::new(sender.clone()),
            notifier: notifier.clone(),
            sandbox: self.confinement.word(),
        });
        // If one of the next steps fails, the server is stopped, so that its sockets are free for
        // refusing clients.
        let stop_server = |_: &StartError| {
            service.server().stop(Duration::ZERO);
            if let Some(upstream) = service.upstream() {
                upstream.close();
            }
        };
        let control = start_control(sockets.control, &service).inspect_err(stop_server)?;
        let watchdog = self.start_watchdog(&disk, &service, &sender).inspect_err(stop_server)?;
        let signals = self.inherited.signals.clone();
        start_signal_thread(signals, sender, &service).inspect_err(stop_server)?;
        let size = disk.size();
        log_unsent(notifier.ready());
        info!(
            message_id = message_id::READY,
            "flexnbd.image" = name,
            "flexnbd.bytes_total" = size,
            "{verb} {name} ({size} bytes) on {addresses}"
        );
        let store = FdStore::from_env(&notifier);
        let now = Instant::now();
        let (idle, expiry) = (Idle::new(self.config.idle_exit, now), ExpiryWatch::new(now));
        let status = IdleStatus { verb, disk: name.clone(), size, addresses };
        let status = StatusReporter::new(notifier.clone(), status);
        let process = Process {
            service,
            events,
            control,
            notifier,
            store,
            disk,
            name,
            idle,
            expiry,
            status,
            watchdog,
        };
        Ok(Some(process))
    }

    /// Opens the sockets before all else if the process will become another user, since root may bind to
    /// a port below 1024. Otherwise they are opened after the disk: clients connect when it can be served.
    fn plan_sockets(&self) -> Result<PlannedSockets, StartError> {
        let inherited = self.inherited.sockets()?;
        self.confinement.find_user()?;
        Ok(match self.confinement.will_switch_user() {
            true => PlannedSockets::Open(self.open_sockets(inherited)?),
            false => PlannedSockets::Inherited(inherited),
        })
    }

    /// Opens the sockets, and gives their files to the user that the process will become.
    fn open_sockets(&self, inherited: InheritedSockets) -> Result<Sockets, StartError> {
        let paths = Sockets::paths_to_make(&self.config, &inherited);
        let sockets = Sockets::open(&self.config, inherited)?;
        paths.into_iter().try_for_each(|path| self.confinement.give(path))?;
        Ok(sockets)
    }

    fn start_server(
        &mut self,
        listeners: Vec<Listener>,
        role: &Role,
        tls: &ProcessTls,
        events: &Sender<ProcessEvent>,
    ) -> Result<Server, StartError> {
        let config = &self.config;
        let sessions = std::mem::take(&mut self.left.sessions);
        let settings = SessionSettings {
            style: if config.oldstyle { Style::Oldstyle } else { Style::Newstyle },
            stall_limit: config.killswitch.then_some(STALL_LIMIT),
            ..SessionSettings::default()
        };
        let Admission { acl, limits, .. } = config.admission.clone();
        let server = ServerConfig {
            tls: tls.server(),
            listeners,
            disk: Arc::clone(&role.disk),
            policy: Arc::clone(&role.policy),
            export_name: &config.export,
            acl,
            limits,
            payload_memory: config.payload_memory.unwrap_or_else(|| {
                let unflushed = match &config.disk {
                    DiskConfig::Upstream(upstream) => upstream.options.unflushed_bytes_max,
                    DiskConfig::Image(_) => 0,
                };
                payload_memory_default(unflushed)
            }),
            when_full: config.when_full,
            settings,
            stored: match role.disk_role {
                DiskRole::Serving(_) | DiskRole::Proxying(_) | DiskRole::Relaying(_) => sessions,
                DiskRole::Receiving(_) => StoredSessions::default(),
            },
            turned_away: role.turned_away.clone(),
            events: Arc::new(ServerEventSender(events.clone())),
        };
        Server::start(server).map_err(|error| StartError::System("start serving", error))
    }

    fn start_watchdog(
        &self,
        disk: &Arc<Disk>,
        service: &Service,
        events: &Sender<ProcessEvent>,
    ) -> Result<Option<Watchdog>, StartError> {
        let notifier = self.inherited.notifier.clone();
        let Some(interval) = notifier.watchdog_interval() else { return Ok(None) };
        let parts = WatchedParts {
            acceptor: service.server().acceptor_handle(),
            events: events.clone(),
            // A lost upstream is no fault of the proxy, whose clients wait for it.
            disk: service.upstream().is_none().then(|| Arc::clone(disk)),
        };
        let feed = Box::new(move || log_unsent(notifier.watchdog()));
        Watchdog::start(parts, interval, feed).map(Some).map_err(no_thread)
    }
}

fn start_control(
    socket: Option<ControlSocket>,
    service: &Arc<Service>,
) -> Result<Option<Handle>, StartError> {
    let Some(socket) = socket else { return Ok(None) };
    let operator: Arc<dyn Operator> = Arc::clone(service) as _;
    let started = socket.start(operator);
    started.map(Some).map_err(|error| StartError::System("answer on the control socket", error))
}

fn start_signal_thread(
    signals: Signals,
    events: Sender<ProcessEvent>,
    service: &Arc<Service>,
) -> Result<(), StartError> {
    let service = Arc::clone(service);
    let handle_signals = move || {
        while let Ok(signal) = signals.set.wait() {
            match signals.action(signal, service.reread.is_some()) {
                SignalAction::Stop if events.send(ProcessEvent::Stop(signal)).is_err() => return,
                SignalAction::Stop => {}
                SignalAction::Reload => service.reload_in_thread(signal),
                SignalAction::Ignore => {
                    warn!("received {signal}, which has no meaning here; going on");
                }
            }
        }
    };
    let thread = thread::Builder::new().name("signals".into()).spawn(handle_signals);
    thread.map(drop).map_err(no_thread)
}

fn no_thread(error: io::Error) -> StartError {
    StartError::System("start a thread", error)
}

/// Raises the soft limit of descriptors, usually 1024, to the hard limit: a client takes two.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        warn!("cannot raise the limit of {soft} file descriptors: {error}");
    }
}

/// Makes glibc return large buffers to the kernel when they are freed.
///
/// Session buffers are large, and live only while their session is busy. After the first free(3) of
/// such a buffer glibc would raise its mmap threshold, and keep later ones in the arena of each
/// thread (mallopt(3), `M_MMAP_THRESHOLD`).
fn fix_mmap_threshold() {
    #[cfg(target_env = "gnu")]
    {
        use nix::libc::{M_MMAP_THRESHOLD, mallopt};
        /// The initial threshold of glibc, in bytes; setting it switches its adjustment off.
        const THRESHOLD: i32 = 128 << 10;
        // SAFETY: takes two integers, and changes only the allocator's own settings, under the
        // allocator's lock.
        unsafe { mallopt(M_MMAP_THRESHOLD, THRESHOLD) };
    }
}

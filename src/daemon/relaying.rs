//! Relaying: the disk has left, and this process passes its clients' requests on to the server that has it
//! now. Connects when the migration asks for it, and again in the next process after a restart.
//! Never serves a byte of the image.

use super::config::{RelayDefault, UpstreamConfig};
use super::events::{ProcessEvent, UpstreamEventSender};
use super::proxying;
use super::start_error::{OwnershipDenial, StartError};
use super::tls::RelayTls;
use crate::control::Status;
use crate::control::command::{Mirror, RelayOptions, RelayRequest};
use crate::control::status::{RELAY_SECONDS_LEFT, RELAYING_TO};
use crate::disk::Backend;
use crate::disk::ownership::{Id, OwnershipRefusal, Record, RemoteAddress};
use crate::disk::record_store::read_tombstone;
use crate::human::counted;
use crate::message_id;
use crate::migration::job::OfferedTerms;
use crate::migration::link::Route;
use crate::migration::relay::{RelayConnector, RelayError};
use crate::migration::source::ask;
use crate::migration::wire::{Answer, Has, Question};
use crate::net::tls::{TlsFile, TlsFiles, TlsMode, TlsTarget};
use crate::net::{Remote, resolve_within};
use crate::server::ShutdownHandle;
use crate::sync::lock;
use crate::upstream::{self, UpstreamError, UpstreamHandle, UpstreamOptions, UpstreamTarget};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tracing::info;

/// Longest time to find the address of the server, while clients wait.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the disk is served now, and for how long clients stay here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RelayPlan {
    pub(super) target: UpstreamTarget,
    /// Local address of the connections.
    pub(super) bind: Option<IpAddr>,
    pub(super) duration_max: Option<Duration>,
    /// The certificates of the connections; the target says whether they are used.
    pub(super) tls: RelayTls,
    /// Whether the target is where the migration goes.
    pub(super) is_destination: bool,
}

impl RelayPlan {
    /// What `command` asks for, or else the configuration; `None` if clients do not stay.
    pub(super) fn of(command: &Mirror, default: RelayDefault, tls: RelayTls) -> Option<Self> {
        let (options, default) = match (&command.relay, default) {
            (RelayRequest::No, _) | (RelayRequest::AsConfigured, RelayDefault::No) => return None,
            (RelayRequest::AsConfigured, default) => (RelayOptions::default(), default),
            (RelayRequest::Yes(options), default) => (options.clone(), default),
        };
        let RelayOptions { seconds_max, to, export, .. } = options;
        let destination =
            Remote::Host { host: command.to.ip().to_string(), port: command.to.port() };
        let configured = match default {
            RelayDefault::No | RelayDefault::Unlimited => None,
            RelayDefault::AtMost(duration) => Some(duration),
        };
        Some(Self {
            is_destination: to.is_none(),
            target: UpstreamTarget {
                remote: to.unwrap_or(destination),
                export,
                tls: tls.target.clone(),
            },
            bind: command.bind,
            tls,
            duration_max: seconds_max.map(Duration::from_secs).or(configured),
        })
    }

    fn options(&self) -> UpstreamOptions {
        UpstreamOptions {
            bind: self.bind,
            tls: self.tls.client.clone(),
            ..UpstreamOptions::default()
        }
    }
}

/// A relay that has begun.
#[derive(Clone, Debug)]
pub(super) struct ActiveRelay {
    pub(super) upstream: UpstreamHandle,
    /// The migration that moved the disk.
    id: Id,
    plan: RelayPlan,
    /// When the clients that are left are disconnected.
    pub(super) deadline: Option<Instant>,
}

/// The relay of a process, once it has begun.
pub(super) type RelaySlot = Arc<Mutex<Option<ActiveRelay>>>;

impl ActiveRelay {
    fn new(upstream: UpstreamHandle, id: Id, plan: RelayPlan, now: Instant) -> Self {
        let deadline = plan.duration_max.and_then(|duration| now.checked_add(duration));
        Self { upstream, id, plan, deadline }
    }

    /// Whether the clients that are left have to be disconnected.
    pub(super) fn is_late(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| deadline <= now)
    }

    /// What the next process needs to go on.
    pub(super) fn note(&self, now: Instant) -> RelayNote {
        let (host, port, path) = match &self.plan.target.remote {
            Remote::Host { host, port } => (Some(host.clone()), Some(*port), None),
            Remote::Unix(path) => (None, None, path.to_str().map(str::to_owned)),
        };
        RelayNote {
            migration: self.id.0,
            host,
            port,
            path,
            export: self.plan.target.export.clone(),
            bind: self.plan.bind,
            seconds_left: self.deadline.map(|end| end.saturating_duration_since(now).as_secs()),
            tls: RelayTlsNote::of(&self.plan.tls),
        }
    }

    /// Adds the relay to the reply to `status`.
    pub(super) fn describe(&self, now: Instant, status: &mut Status) {
        status.extra.push((RELAYING_TO.to_owned(), self.plan.target.to_string()));
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(now).as_secs();
            status.extra.push((RELAY_SECONDS_LEFT.to_owned(), left.to_string()));
        }
        proxying::describe(&self.upstream.state(), status);
    }

    /// Logs that the relay begins, or goes on in this process.
    fn log_begin(&self, clients: usize) {
        let target = &self.plan.target;
        let limit = self
            .plan
            .duration_max
            .map_or_else(String::new, |limit| format!(", for at most {} s", limit.as_secs()));
        info!(
            message_id = message_id::RELAYING,
            "flexnbd.migration" = %self.id,
            "flexnbd.destination" = %target,
            "flexnbd.clients" = clients,
            "relaying {} to {target}{limit}", counted(clients, "client")
        );
    }

    /// Logs the end, with the number of clients that are left.
    pub(super) fn log_end(&self, clients: usize) {
        let target = &self.plan.target;
        let why = match clients {
            0 => "the last client has gone".to_owned(),
            count => format!("its time is over; disconnecting {}", counted(count, "client")),
        };
        info!(
            message_id = message_id::RELAY_ENDED,
            "flexnbd.migration" = %self.id,
            "flexnbd.destination" = %target,
            "flexnbd.clients" = clients,
            "stopped relaying to {target}: {why}"
        );
    }
}

/// A relay that a migration is to end with.
pub(super) struct PlannedRelay {
    pub(super) plan: RelayPlan,
    /// What clients were offered.
    pub(super) offered: OfferedTerms,
    pub(super) slot: RelaySlot,
    /// The process is about to stop.
    pub(super) is_interrupted: Arc<AtomicBool>,
}

impl PlannedRelay {
    /// What the destination of the migration has to offer. Elsewhere that is known when it is too late.
    pub(super) fn terms(&self) -> OfferedTerms {
        if self.plan.is_destination { self.offered } else { OfferedTerms::default() }
    }

    /// The connector of a migration of the image to this destination.
    pub(super) fn connector(self, migration: RelayedMigration) -> DestinationConnector {
        let Self { plan, slot, is_interrupted, .. } = self;
        DestinationConnector { plan, slot, is_interrupted, migration, connected: None }
    }
}

/// What a relay needs to know of its migration.
pub(super) struct RelayedMigration {
    /// The image's path, for messages.
    pub(super) image: String,
    pub(super) to: RemoteAddress,
    /// Clients were promised that the disk does not change.
    pub(super) read_only: bool,
    pub(super) shutdown: ShutdownHandle,
    pub(super) events: Sender<ProcessEvent>,
    /// A random number, which tells the server which connections are ours.
    pub(super) client: [u8; 16],
}

/// Connects to the disk at its destination for the migration's thread.
pub(super) struct DestinationConnector {
    plan: RelayPlan,
    slot: RelaySlot,
    is_interrupted: Arc<AtomicBool>,
    migration: RelayedMigration,
    /// The connection, until the relay begins.
    connected: Option<UpstreamHandle>,
}

impl RelayConnector for DestinationConnector {
    fn has_clients(&self) -> bool {
        self.migration.shutdown.client_count() > 0
    }

    fn connect(&mut self, proof: Option<&Question>) -> Result<Box<dyn Backend>, RelayError> {
        if self.is_interrupted.load(Ordering::Acquire) {
            return Err(RelayError::Unsuitable("the process is stopping".to_owned()));
        }
        if let Some(question) = proof {
            self.check_arrived(question)?;
        }
        let events = Arc::new(UpstreamEventSender(self.migration.events.clone()));
        let targets = vec![self.plan.target.clone()];
        let options =
            UpstreamOptions { client: Some(self.migration.client), ..self.plan.options() };
        let (backend, handle) =
            upstream::connect(targets, options, events).map_err(|error| match error {
                UpstreamError::Targets(_) => RelayError::NotYet(error.to_string()),
                UpstreamError::System(..) => RelayError::Unsuitable(error.to_string()),
            })?;
        if handle.read_only() && !self.migration.read_only {
            let why = format!("{} serves the disk read-only", self.plan.target);
            return Err(RelayError::Unsuitable(why));
        }
        self.connected = Some(handle);
        Ok(Box::new(backend))
    }

    fn begin(&mut self, id: Id) {
        let Some(upstream) = self.connected.take() else { return };
        let RelayedMigration { image, to, shutdown, .. } = &self.migration;
        let when = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
        let departed = OwnershipRefusal::Departed { id, when, to: to.clone() };
        shutdown.turn_away(&departed.explain(image));
        let relay = ActiveRelay::new(upstream, id, self.plan.clone(), Instant::now());
        relay.log_begin(shutdown.client_count());
        *lock(&self.slot) = Some(relay);
    }
}

impl DestinationConnector {
    /// Asks the server whether it has the disk: at a wrong address another disk of the same size would take
    /// the place of ours.
    fn check_arrived(&self, question: &Question) -> Result<(), RelayError> {
        let target = &self.plan.target;
        let not_yet = |why: String| RelayError::NotYet(format!("{target}: {why}"));
        let addresses = resolve_within(&target.remote, RESOLVE_TIMEOUT)
            .map_err(|error| not_yet(error.to_string()))?;
        let mut failure = not_yet("its name has no address".to_owned());
        let tls = match &self.plan.tls.client {
            Some(client) => client.get().for_remote(&target.tls, &target.remote),
            None => Ok(None),
        };
        let tls = tls.map_err(|error| RelayError::Unsuitable(error.to_string()))?;
        for to in addresses {
            match ask(&Route { to, bind: self.plan.bind, tls: tls.clone() }, question) {
                Ok(Some(Answer { has: Has::Arrived, .. })) => return Ok(()),
                Ok(_) => failure = not_yet("it does not have the disk".to_owned()),
                Err(trouble) => failure = not_yet(trouble.to_string()),
            }
        }
        Err(failure)
    }
}

/// The relay in the form in which one process leaves it to the next.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RelayNote {
    migration: [u8; 16],
    host: Option<String>,
    port: Option<u16>,
    path: Option<String>,
    export: String,
    bind: Option<IpAddr>,
    seconds_left: Option<u64>,
    /// Without TLS it is left out, as programs that know none expect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tls: Option<RelayTlsNote>,
}

/// The TLS of a relay, in the words of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RelayTlsNote {
    mode: String,
    hostname: Option<String>,
    cert: Option<String>,
    key: Option<String>,
    ca: Option<String>,
}

impl RelayTlsNote {
    fn of(tls: &RelayTls) -> Option<Self> {
        let RelayTls { target, files, .. } = tls;
        let text = |file: &Option<TlsFile>| file.as_ref().map(TlsFile::to_string);
        (target.mode != TlsMode::Off).then(|| Self {
            mode: target.mode.to_string(),
            hostname: target.hostname.clone(),
            cert: text(&files.cert),
            key: text(&files.key),
            ca: text(&files.ca),
        })
    }

    fn parse(&self) -> Option<RelayTls> {
        let file = |text: &Option<String>| text.as_deref().map(str::parse).transpose().ok();
        let files =
            TlsFiles { cert: file(&self.cert)?, key: file(&self.key)?, ca: file(&self.ca)? };
        let target = TlsTarget { mode: self.mode.parse().ok()?, hostname: self.hostname.clone() };
        Some(RelayTls { target, files, client: None })
    }
}

impl RelayNote {
    /// The relay of this migration, if the note is about it: how to connect, and when it ends.
    pub(super) fn resumed(&self, id: Id, read_only: bool, now: Instant) -> Option<ResumedRelay> {
        let plan = self.plan().filter(|_| id.0 == self.migration)?;
        let deadline = plan.duration_max.and_then(|left| now.checked_add(left));
        let targets = vec![plan.target.clone()];
        let tls = plan.tls.files.clone();
        let upstream = UpstreamConfig { targets, options: plan.options(), tls, read_only };
        Some(ResumedRelay { upstream, deadline, id, plan })
    }

    fn plan(&self) -> Option<RelayPlan> {
        let remote = match (&self.host, self.port, &self.path) {
            (Some(host), Some(port), None) => Remote::parse(host, Some(port)).ok()?,
            (None, None, Some(path)) => Remote::parse(path, None).ok()?,
            _ => return None,
        };
        // A note about TLS that makes no sense must not become a relay without.
        let tls = self.tls.as_ref().map(RelayTlsNote::parse);
        let tls = tls.unwrap_or_else(|| Some(RelayTls::default()))?;
        let target =
            UpstreamTarget { remote, export: self.export.clone(), tls: tls.target.clone() };
        Some(RelayPlan {
            target,
            tls,
            bind: self.bind,
            duration_max: self.seconds_left.map(Duration::from_secs),
            is_destination: false,
        })
    }
}

/// A relay that the last process has begun.
pub(super) struct ResumedRelay {
    pub(super) upstream: UpstreamConfig,
    pub(super) deadline: Option<Instant>,
    id: Id,
    plan: RelayPlan,
}

impl ResumedRelay {
    /// Goes on over this connection, for so many clients.
    pub(super) fn begin(self, upstream: UpstreamHandle, clients: usize) -> ActiveRelay {
        let Self { deadline, id, plan, .. } = self;
        let relay = ActiveRelay { upstream, id, plan, deadline };
        relay.log_begin(clients);
        relay
    }
}

/// The migration that moved the disk, and a sentence about that, if a start failed because of it.
pub(super) fn departure(image: &Path, error: &StartError) -> Option<(Id, String)> {
    match error {
        StartError::Ownership(OwnershipDenial { why, departure: Some((id, _)), .. }) => {
            Some((*id, why.clone()))
        }
        // It may have been deleted when its disk left.
        StartError::Image(..) => match read_tombstone(image) {
            Ok(Some(Record::Departed { id, to, .. })) => {
                let why = format!("{} has moved to {to} (migration {id})", image.display());
                Some((id, why))
            }
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
impl RelayNote {
    /// A note with every field of a host.
    pub(super) fn for_tests() -> Self {
        Self {
            migration: [7; 16],
            host: Some("192.0.2.2".to_owned()),
            port: Some(10809),
            path: None,
            export: "disk".to_owned(),
            bind: Some(IpAddr::from([192, 0, 2, 1])),
            seconds_left: Some(60),
            tls: Some(RelayTlsNote {
                mode: "require".to_owned(),
                hostname: Some("h".to_owned()),
                cert: Some("/c".to_owned()),
                key: Some("credential:k".to_owned()),
                ca: None,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::command::ArrivalAction;

    fn plan(relay: RelayRequest, default: RelayDefault) -> Option<RelayPlan> {
        let (to, bind) = ("192.0.2.2:10809".parse().unwrap(), Some([192, 0, 2, 1].into()));
        let (action, max_bps, tls) = (ArrivalAction::Exit, None, Box::default());
        let command = Mirror { to, action, bind, max_bps, no_record: false, relay, tls };
        RelayPlan::of(&command, default, RelayTls::default())
    }

    #[test]
    fn command_wins_over_the_configuration() {
        let yes = |seconds_max| {
            RelayRequest::Yes(RelayOptions { seconds_max, ..RelayOptions::default() })
        };
        let minute = RelayDefault::AtMost(Duration::from_secs(60));
        let (hour, unlimited) = (Some(Duration::from_secs(3600)), RelayDefault::Unlimited);
        for (request, default, expected) in [
            (RelayRequest::AsConfigured, RelayDefault::No, None),
            (RelayRequest::AsConfigured, unlimited, Some(None)),
            (RelayRequest::AsConfigured, minute, Some(Some(Duration::from_secs(60)))),
            (RelayRequest::No, minute, None),
            (yes(None), RelayDefault::No, Some(None)),
            (yes(None), minute, Some(Some(Duration::from_secs(60)))),
            (yes(Some(3600)), minute, Some(hour)),
            (yes(Some(3600)), RelayDefault::No, Some(hour)),
        ] {
            let text = format!("{request:?} {default:?}");
            let duration_max = plan(request, default).map(|plan| plan.duration_max);
            assert_eq!(duration_max, expected, "{text}");
        }
    }

    #[test]
    fn target_is_the_destination_unless_named() {
        let own = plan(RelayRequest::Yes(RelayOptions::default()), RelayDefault::No).unwrap();
        assert_eq!(
            (own.target.to_string().as_str(), own.is_destination),
            ("192.0.2.2:10809", true)
        );
        let options = RelayOptions {
            to: Some(Remote::Unix("/run/x".into())),
            export: "disk".to_owned(),
            ..RelayOptions::default()
        };
        let other = plan(RelayRequest::Yes(options), RelayDefault::No).unwrap();
        let name = other.target.to_string();
        assert_eq!((name.as_str(), other.is_destination), ("/run/x (disk)", false));
    }

    #[test]
    fn note_is_resumed_for_its_migration_only() {
        let (note, now) = (RelayNote::for_tests(), Instant::now());
        assert!(note.resumed(Id([8; 16]), false, now).is_none());
        let resumed = note.resumed(Id([7; 16]), true, now).unwrap();
        assert_eq!(resumed.deadline, Some(now + Duration::from_secs(60)));
        assert_eq!(resumed.upstream.targets[0].to_string(), "192.0.2.2:10809 (disk)");
        assert_eq!(resumed.upstream.options.bind, Some([192, 0, 2, 1].into()));
        assert!(resumed.upstream.read_only);
        let tls = TlsTarget { mode: TlsMode::Require, hostname: Some("h".to_owned()) };
        assert_eq!((&resumed.upstream.targets[0].tls, resumed.upstream.has_tls()), (&tls, true));
        let key = resumed.upstream.tls.key.unwrap();
        assert_eq!(key.to_string(), "credential:k");
        let mut unclear = note.clone();
        unclear.tls.as_mut().unwrap().mode = "perhaps".to_owned();
        assert!(unclear.resumed(Id([7; 16]), true, now).is_none());
        for broken in [
            RelayNote { port: None, ..note.clone() },
            RelayNote { path: Some("/run/x".to_owned()), ..note.clone() },
            RelayNote { host: None, port: None, ..note },
        ] {
            assert!(broken.resumed(Id([7; 16]), false, now).is_none(), "{broken:?}");
        }
    }
}

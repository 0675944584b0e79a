//! What a process does with its disk: it serves an image, receives one, or passes on the disk of another
//! server, to which it may have moved its own. Opens the disk; never serves it.

use super::claim::{Claim, Ownership};
use super::config::{Config, DiskConfig, ImageConfig, UpstreamConfig};
use super::confinement::Confinement;
use super::disk_identity::ServedDiskId;
use super::events::ProcessEvent;
use super::export_policies::{ProxyPolicy, ReceivingPolicy, ServingPolicy};
use super::flush_failure::{FlushFailure, FlushFailureSender};
use super::handover_query::QueryResult;
use super::inherited::Inherited;
use super::operator::{DiskRole, OutgoingMigrations};
use super::outgoing::MigrationContext;
use super::proxying::{self, Persistence};
use super::random;
use super::reconnecting_clients::ReconnectingClients;
use super::relaying::{self, RelayNote};
use super::start_error::StartError;
use super::tls::ProcessTls;
use crate::disk::Disk;
use crate::migration::arrival::{Admits, Arrival};
use crate::migration::destination::Destination;
use crate::migration::wire::Token;
use crate::server::WhenFull;
use crate::server::export_policy::ExportPolicy;
use crate::sync::lock;
use crate::upstream::UpstreamOptions;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Instant;
use tracing::warn;

/// The disk of a process, and everything that depends on what the process does with it.
pub(super) struct Role {
    /// For people: `serving`, `receiving`, `proxying` or `relaying`.
    pub(super) verb: &'static str,
    /// The image's path or the upstream's address, for people.
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    pub(super) policy: Arc<dyn ExportPolicy>,
    pub(super) disk_role: DiskRole,
    /// Why no new clients are admitted, if none are.
    pub(super) turned_away: Option<String>,
}

/// What a role is opened with, besides the configuration.
pub(super) struct RoleInputs<'a> {
    pub(super) inherited: &'a Inherited,
    pub(super) tls: &'a ProcessTls,
    /// Entered when the image is open.
    pub(super) confinement: &'a Confinement,
    /// The answer of another host about the image.
    pub(super) answer: Option<QueryResult>,
    /// The number of clients of the last process, which wait for this one.
    pub(super) session_count: usize,
    /// How the last process relayed their requests, if it did.
    pub(super) relay: Option<&'a RelayNote>,
    pub(super) events: &'a Sender<ProcessEvent>,
}

impl Role {
    /// Opens the disk; `None` if the disk that was to be received has arrived already.
    pub(super) fn open(
        config: &Config,
        inputs: &RoleInputs<'_>,
    ) -> Result<Option<Self>, StartError> {
        match &config.disk {
            DiskConfig::Image(image) => {
                let query = inputs.inherited.startup_query(inputs.tls, inputs.answer);
                match Claim::acquire(image, &query, inputs.confinement) {
                    Ok(claim) => Self::of_image(image, config.oldstyle, claim, inputs.events),
                    Err(error) if image.receiving.is_none() => {
                        Self::of_relay(image, inputs, error).map(Some)
                    }
                    Err(error) => Err(error),
                }
            }
            DiskConfig::Upstream(upstream) => {
                // Connecting starts threads.
                inputs.confinement.switch_user()?;
                inputs.confinement.enter_without_image();
                Self::of_upstream(config, upstream, inputs).map(Some)
            }
        }
    }

    /// The role that follows from a claim.
    fn of_image(
        image: &ImageConfig,
        oldstyle: bool,
        claim: Claim,
        events: &Sender<ProcessEvent>,
    ) -> Result<Option<Self>, StartError> {
        let Claim { disk, record_store, ownership } = claim;
        let name = image.path.display().to_string();
        match ownership {
            Ownership::AlreadyArrived => {
                warn!("{name}: the disk has arrived already; not listening");
                Ok(None)
            }
            Ownership::Ours { provenance, flush_failed_at } => {
                let failure = FlushFailure::new(name.clone(), provenance, flush_failed_at);
                disk.observe_flushes(Arc::new(FlushFailureSender(events.clone())));
                let disk_id = ServedDiskId::of(&record_store, provenance, image.read_only);
                let context = MigrationContext {
                    disk: Arc::clone(&disk),
                    disk_id: disk_id.clone(),
                    image: image.path.clone(),
                    provenance,
                    relay: image.relay,
                    events: events.clone(),
                };
                Ok(Some(Self {
                    verb: "serving",
                    name,
                    disk,
                    policy: Arc::new(ServingPolicy {
                        provenance,
                        disk_id,
                        clients: ReconnectingClients::default(),
                    }),
                    disk_role: DiskRole::Serving(OutgoingMigrations::new(
                        context,
                        record_store,
                        failure,
                    )),
                    turned_away: None,
                }))
            }
            Ownership::Incoming { copy, status_store } => {
                let token = random::bytes().map(Token).map_err(|error| {
                    StartError::System("draw random numbers", io::Error::other(error))
                })?;
                let arrival = Arrival::new(token, copy, admits(image, oldstyle));
                let events = Mutex::new(events.clone());
                let report = Box::new(move |result| {
                    let _ = lock(&events).send(ProcessEvent::ReceiveEnded(result));
                });
                let destination =
                    Destination::new(Arc::clone(&disk), Some(record_store), arrival, report);
                Ok(Some(Self {
                    verb: "receiving",
                    name,
                    disk,
                    policy: Arc::new(ReceivingPolicy(destination)),
                    disk_role: DiskRole::Receiving(status_store),
                    turned_away: None,
                }))
            }
        }
    }

    /// Goes on relaying for the sessions of the last process, if it relayed the disk whose departure is the
    /// reason for the failed start. Otherwise returns that reason.
    fn of_relay(
        image: &ImageConfig,
        inputs: &RoleInputs<'_>,
        error: StartError,
    ) -> Result<Self, StartError> {
        let departure = relaying::departure(&image.path, &error);
        let note = inputs.relay.filter(|_| inputs.session_count > 0);
        let (Some((id, why)), Some(note)) = (departure, note) else { return Err(error) };
        let Some(relay) = note.resumed(id, image.read_only, Instant::now()) else {
            return Err(error);
        };
        let persistence = Persistence::Until(relay.deadline);
        let connected =
            proxying::connect(&relay.upstream, inputs.inherited, persistence, inputs.events);
        let (backend, upstream) = match connected {
            // The time of the relay is over.
            Err(StartError::Upstream(_)) => return Err(error),
            connected => connected?,
        };
        Ok(Self {
            verb: "relaying",
            name: image.path.display().to_string(),
            disk: Arc::new(Disk::new(Box::new(backend), image.read_only)),
            policy: Arc::new(ProxyPolicy {
                is_exclusive: false,
                upstream: upstream.clone(),
                clients: ReconnectingClients::default(),
            }),
            disk_role: DiskRole::Relaying(relay.begin(upstream, inputs.session_count)),
            turned_away: Some(why),
        })
    }

    fn of_upstream(
        config: &Config,
        upstream: &UpstreamConfig,
        inputs: &RoleInputs<'_>,
    ) -> Result<Self, StartError> {
        let persistence =
            if inputs.session_count > 0 { Persistence::Until(None) } else { Persistence::Once };
        let options = UpstreamOptions { tls: inputs.tls.upstream(), ..upstream.options.clone() };
        let upstream = &UpstreamConfig { options, ..upstream.clone() };
        let (backend, handle) =
            proxying::connect(upstream, inputs.inherited, persistence, inputs.events)?;
        let read_only = upstream.read_only || handle.read_only();
        Ok(Self {
            verb: "proxying",
            name: handle.state().target,
            disk: Arc::new(Disk::new(Box::new(backend), read_only)),
            policy: Arc::new(ProxyPolicy {
                is_exclusive: config.when_full == WhenFull::Wait,
                upstream: handle.clone(),
                clients: ReconnectingClients::default(),
            }),
            disk_role: DiskRole::Proxying(handle),
            turned_away: None,
        })
    }
}

fn admits(image: &ImageConfig, oldstyle: bool) -> Admits {
    let plain = image.receiving.is_some_and(|receiving| receiving.plain);
    match (oldstyle, plain) {
        (true, _) => Admits::OldStyle,
        (false, true) => Admits::PlainWriter,
        (false, false) => Admits::Sources,
    }
}

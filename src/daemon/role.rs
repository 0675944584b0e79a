//! What a process does with its disk: it serves an image, receives one, or passes on the disk of another
//! server. Opens the disk; never serves it.

use super::claim::{Claim, Ownership};
use super::config::{Config, DiskConfig, ImageConfig, UpstreamConfig};
use super::events::ProcessEvent;
use super::export_policies::{ProxyPolicy, ReceivingPolicy, ServingPolicy};
use super::handover_query::QueryResult;
use super::inherited::Inherited;
use super::operator::{DiskRole, OutgoingMigrations};
use super::outgoing::MigrationContext;
use super::proxying::{self, Persistence};
use super::random;
use super::reconnecting_clients::ReconnectingClients;
use super::start_error::StartError;
use crate::disk::Disk;
use crate::migration::arrival::{Admits, Arrival};
use crate::migration::destination::Destination;
use crate::migration::wire::Token;
use crate::server::WhenFull;
use crate::server::export_policy::ExportPolicy;
use crate::sync::lock;
use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use tracing::warn;

/// The disk of a process, and everything that depends on what the process does with it.
pub(super) struct Role {
    /// For people: `serving`, `receiving` or `proxying`.
    pub(super) verb: &'static str,
    /// The image's path or the upstream's address, for people.
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    pub(super) policy: Arc<dyn ExportPolicy>,
    pub(super) disk_role: DiskRole,
}

/// What a role is opened with, besides the configuration.
pub(super) struct RoleInputs<'a> {
    pub(super) inherited: &'a Inherited,
    /// The answer of another host about the image.
    pub(super) answer: Option<QueryResult>,
    /// Clients of the last process wait for this one.
    pub(super) has_sessions: bool,
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
                let query = inputs.inherited.startup_query(inputs.answer);
                let claim = Claim::acquire(image, &query)?;
                Self::of_image(image, config.oldstyle, claim, inputs.events)
            }
            DiskConfig::Upstream(upstream) => Self::of_upstream(config, upstream, inputs).map(Some),
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
            Ownership::Ours(provenance) => {
                let context = MigrationContext {
                    disk: Arc::clone(&disk),
                    image: image.path.clone(),
                    provenance,
                    events: events.clone(),
                };
                Ok(Some(Self {
                    verb: "serving",
                    name,
                    disk,
                    policy: Arc::new(ServingPolicy {
                        provenance,
                        clients: ReconnectingClients::default(),
                    }),
                    disk_role: DiskRole::Serving(OutgoingMigrations::new(context, record_store)),
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
                }))
            }
        }
    }

    fn of_upstream(
        config: &Config,
        upstream: &UpstreamConfig,
        inputs: &RoleInputs<'_>,
    ) -> Result<Self, StartError> {
        let persistence =
            if inputs.has_sessions { Persistence::UntilConnected } else { Persistence::Once };
        let (backend, handle) =
            proxying::connect(upstream, inputs.inherited, persistence, inputs.events)?;
        let read_only = upstream.read_only || handle.read_only();
        Ok(Self {
            verb: "proxying",
            name: handle.state().target,
            disk: Arc::new(Disk::new(Box::new(backend), read_only)),
            policy: Arc::new(ProxyPolicy {
                is_exclusive: config.when_full == WhenFull::Wait,
                clients: ReconnectingClients::default(),
            }),
            disk_role: DiskRole::Proxying(handle),
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

//! One process that serves, receives or proxies a disk: [`run`] starts the modules in order, handles their
//! events one after another, and closes them in order.
//! The only module that knows all others. Never talks to a client, and never parses a command line.
//!
//! ```text
//! run ─▶ inherited ─▶ startup ─▶ event_loop ─▶ end
//!                      │   ▲
//!             it fails │   │ another host has answered
//!                      ▼   │
//!                    degraded ─▶ end
//! ```
//!
//! `startup` reads `certificates → role → sockets → server → control → watchdog → ready`: a role is an image (`claim`),
//! an upstream (`proxying`), or the upstream that an image has moved to (`relaying`). `degraded` refuses
//! clients while the disk cannot be served. `confinement` restricts the process on the way, before any
//! thread starts.

pub mod available_memory;
mod claim;
mod config;
mod confinement;
mod degraded;
mod disk_identity;
mod event_loop;
mod events;
mod export_policies;
mod flush_failure;
mod handover_query;
mod idle;
mod inherited;
mod migration_log;
mod operator;
mod outgoing;
mod proxying;
mod random;
mod reconnecting_clients;
mod relaying;
mod role;

pub mod signals;
mod snapshot;
mod sockets;
mod start_error;
mod startup;
mod status_reporter;
mod tls;
mod watchdog;

pub use config::{
    Admission, Config, ConfinementConfig, DiskConfig, ImageConfig, ReceivingConfig, RecordPolicy,
    RelayDefault, ReloadedConfig, RereadConfig, ServerTlsConfig, UpstreamConfig,
};
pub use event_loop::ProcessEnd;
pub use start_error::StartError;
pub use startup::{refuse, run};

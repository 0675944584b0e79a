//! The installed package on hosts that run real systemd, with real clients.
//! Never touches the machine that runs the tests: hosts and clients live in their own namespaces.
//!
//! Needs root and the packages that `tests/run` installs. `FLEXNBD_LAB_RESTARTS` is the number of
//! restarts under load, `FLEXNBD_LAB_CUTS` the number of power cuts at random moments.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "lab/connect.rs"]
mod connect;
#[path = "lab/host.rs"]
mod host;
#[path = "lab/package.rs"]
mod package;
#[path = "lab/session.rs"]
mod session;
#[path = "lab/third_party.rs"]
mod third_party;
#[path = "lab/verifier.rs"]
mod verifier;

#[path = "lab/block_device.rs"]
mod block_device;
#[path = "lab/crash.rs"]
mod crash;
#[path = "lab/deb.rs"]
mod deb;
#[path = "lab/demand.rs"]
mod demand;
#[path = "lab/hardening.rs"]
mod hardening;
#[path = "lab/interrupted.rs"]
mod interrupted;
#[path = "lab/journal.rs"]
mod journal;
#[path = "lab/migration.rs"]
mod migration;
#[path = "lab/misconfigured.rs"]
mod misconfigured;
#[path = "lab/power_cuts.rs"]
mod power_cuts;
#[path = "lab/proxy.rs"]
mod proxy;
#[path = "lab/relay.rs"]
mod relay;
#[path = "lab/restart.rs"]
mod restart;

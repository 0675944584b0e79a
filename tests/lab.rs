//! At home under systemd: what the installed package does on real hosts, with real clients.
//! Never touches the machine that it runs on: hosts and clients live in sessions of their own.
//!
//! Needs root and what `tests/run` installs. `FLEXNBD_LAB_RESTARTS` is how often the service is
//! restarted under load, `FLEXNBD_LAB_CUTS` how often power fails at a moment left to chance.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "lab/host.rs"]
mod host;
#[path = "lab/knock.rs"]
mod knock;
#[path = "lab/others.rs"]
mod others;
#[path = "lab/package.rs"]
mod package;
#[path = "lab/session.rs"]
mod session;
#[path = "lab/steady.rs"]
mod steady;

#[path = "lab/beyond.rs"]
mod beyond;
#[path = "lab/crash.rs"]
mod crash;
#[path = "lab/cuts.rs"]
mod cuts;
#[path = "lab/deb.rs"]
mod deb;
#[path = "lab/demand.rs"]
mod demand;
#[path = "lab/halfway.rs"]
mod halfway;
#[path = "lab/hardening.rs"]
mod hardening;
#[path = "lab/journal.rs"]
mod journal;
#[path = "lab/misconfigured.rs"]
mod misconfigured;
#[path = "lab/moving.rs"]
mod moving;
#[path = "lab/restart.rs"]
mod restart;

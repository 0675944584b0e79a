//! Peers that break the migration protocol, one test for each way: destinations against our `mirror`,
//! sources against our `listen`. Clients must not be affected, and no acknowledged write is lost.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "misbehaving_peers/fake_destination.rs"]
mod fake_destination;

#[path = "misbehaving_peers/destinations.rs"]
mod destinations;
#[path = "misbehaving_peers/sources.rs"]
mod sources;

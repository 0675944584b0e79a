//! Peers that violate the migration protocol: destinations against our `mirror`, sources against
//! our `listen`. Sessions of clients must not be affected, and no acknowledged write may be lost.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "misbehaving_peers/fake_destination.rs"]
mod fake_destination;

#[path = "misbehaving_peers/destinations.rs"]
mod destinations;
#[path = "misbehaving_peers/sources.rs"]
mod sources;

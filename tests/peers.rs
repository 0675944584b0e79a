//! Rude peers, one for each way to misbehave: destinations that our source meets, and sources that
//! our destination meets. Whatever they do, clients do not notice, and nothing is lost.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "migration/rude.rs"]
mod rude;

#[path = "migration/destinations.rs"]
mod destinations;
#[path = "migration/sources.rs"]
mod sources;

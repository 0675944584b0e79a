//! Deterministic simulation of session engines on one disk, in one thread: no socket, no file, no clock
//! but the one that the schedule sets. Clients with every form of replies, a disk that completes operations
//! in any order, late and with errors, a gate that closes, throttled writes, snapshots, and lost peers.
//!
//! A schedule depends on its seed alone. A failure prints the seed:
//!
//! ```text
//! FLEXNBD_SEED=1234 cargo test --lib session::simulation_tests::schedules
//! FLEXNBD_SCHEDULES=100000 cargo test --release --lib session::simulation_tests -- --nocapture
//! ```

use crate::disk::mutation::{self, Mutation};
use world::Coverage;

mod client;
mod disk;
mod model;
mod world;

/// Number of schedules, unless `FLEXNBD_SCHEDULES` is set.
const SCHEDULES: u64 = 1_000;
/// Number of schedules within which every mutation must be found.
const MUTANT_SCHEDULES: u64 = 5_000;

fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

impl Coverage {
    fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.suspended += other.suspended;
        self.closed += other.closed;
        self.lost += other.lost;
        self.ended += other.ended;
        self.throttled += other.throttled;
        self.deepest = self.deepest.max(other.deepest);
        self.most_bytes = self.most_bytes.max(other.most_bytes);
    }
}

#[test]
fn schedules_keep_the_promises_of_a_session() {
    if let Some(seed) = env_number("FLEXNBD_SEED") {
        let coverage = world::run(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {coverage:?}");
        return;
    }
    let count = env_number("FLEXNBD_SCHEDULES").unwrap_or(SCHEDULES);
    let mut all = Coverage::default();
    for seed in 0..count {
        let coverage = world::run(seed).unwrap_or_else(|why| panic!("FLEXNBD_SEED={seed}: {why}"));
        all.add(coverage);
    }
    println!("{count} schedules: {all:?}");
    let reached = [all.answered, all.suspended, all.closed, all.lost, all.ended, all.throttled];
    assert!(reached.iter().all(|count| *count > 0), "not every event is reached: {all:?}");
}

/// Asserts that some schedule fails for this reason with the mutation, and none without it.
fn assert_caught(mutation: Mutation, reason: &str) {
    let is_large = mutation == Mutation::AnswerLongEarly;
    let step = if is_large { world::LARGE_EVERY } else { 1 };
    let found = (0..MUTANT_SCHEDULES).map(|nth| nth * step).find_map(|seed| {
        mutation::set(Some(mutation));
        let outcome = world::run(seed);
        mutation::set(None);
        let why = outcome.err()?;
        (why.contains(reason) && world::run(seed).is_ok()).then_some((seed, why))
    });
    let Some((seed, why)) = found else { panic!("{mutation:?} is not found") };
    println!("{mutation:?}: seed {seed}: {why}");
}

macro_rules! mutations {
    ($($name:ident: $mutation:ident breaks $reason:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            assert_caught(Mutation::$mutation, $reason);
        })*
    };
}

mutations! {
    forgetting_a_dirty_mark_is_caught: ForgetMark breaks "not marked dirty",
    answering_an_unverified_flush_is_caught: SkipVerification breaks "is not durable",
    starting_an_overlapping_change_is_caught: StartOverlapping breaks "starts beside",
    missing_the_opening_of_the_gate_is_caught: MissGate breaks "not answered",
    answering_a_long_write_early_is_caught: AnswerLongEarly breaks "",
    dropping_a_loaded_read_is_caught: DropLoadedRead breaks "not answered",
    suspending_with_operations_in_flight_is_caught: SuspendBusy breaks "",
    missing_a_notification_is_caught: MissNotification breaks "not answered",
    an_empty_flush_is_caught: EmptyFlush breaks "is not durable",
    dropping_durability_is_caught: DropDurability breaks "is not durable",
}

//! Deterministic simulation of a migration: source, destination, two writing clients and a faulty
//! network, in one thread. Runs the real decisions (`migration::machine`, `plan`, `arrival`,
//! `disk::ownership`, `disk::dirty`) against modelled images and a modelled network; uses no socket,
//! file, thread or clock.
//!
//! A schedule depends on its seed alone. Every turn, and the end of the schedule, is checked against
//! the five promises of flexnbd-migration(7), here invariants 1 to 5. A failure prints the seed:
//!
//! ```text
//! FLEXNBD_SEED=1234 cargo test --test simulation schedules -- --nocapture
//! FLEXNBD_SCHEDULES=100000 cargo test --release --test simulation
//! ```

mod client;
mod destination;
mod image;
mod network;
mod source;
mod transitions;
mod world;

use harness::env_number;
use std::collections::BTreeSet;
use world::World;

/// Number of schedules, unless `FLEXNBD_SCHEDULES` is set.
const SCHEDULES: u64 = 6_000;

/// Number of schedules within which every mutation must break its invariant.
const MUTANT_SCHEDULES: u64 = 20_000;

/// A mistake that an engineer could make, built into the model. The simulation must detect it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// The correct model.
    None,
    /// A client's write is marked dirty before its bytes are written.
    MarkBeforeWrite,
    /// The copier reads the bytes before it takes the dirty mark.
    ReadBeforeMark,
    /// The copier looks up the content of a range before it clears the dirty marks in it.
    ClearMarkAfterRead,
    /// HANDOVER is sent although the freeze has expired and the gate is open.
    HandoverAfterFreeze,
    /// HANDOVER is sent without the durable record *departing*.
    HandoverBeforeDeparting,
    /// HANDOVER is sent while the record *departing* is written but not durable.
    DepartingNotDurable,
    /// The image is deleted when HANDOVER is sent instead of when it is acknowledged.
    UnlinkBeforeAcknowledgement,
    /// The source exits without the record *departed*.
    ExitBeforeRecord,
    /// The destination acknowledges before its data is durable.
    AcknowledgeBeforeDurable,
    /// The destination acknowledges before its record is durable.
    AcknowledgeBeforeRecord,
    /// The destination records *ours* before its data is durable.
    RecordBeforeDurable,
    /// The destination answers a second connection without retiring the first.
    KeepEarlierConnection,
    /// The destination answers a second connection while writes of the first are in flight.
    KeepEarlierWrites,
    /// A restarted source serves a departing disk if the destination is unreachable.
    ServeOnUnreachable,
    /// A source in doubt opens the gate.
    ServeInDoubt,
    /// A restarted source takes the answer "no copy here" for "the disk has not arrived".
    NoCopyMeansNotArrived,
    /// The source takes a new destination process for the one that has the copy.
    ResumeAcrossTokens,
    /// A restarted destination serves an incomplete copy.
    ServeIncomplete,
    /// A source that relays opens the gate on its own image.
    RelayFromOwnImage,
    /// A restarted process acts on a record that may not be durable.
    TrustUnsyncedRecord,
}

fn run(seed: u64, mutation: Mutation) -> Result<(), String> {
    World::new(seed, mutation).run()
}

#[test]
fn schedules_keep_the_five_invariants() {
    if let Some(seed) = env_number("FLEXNBD_SEED") {
        let mut world = World::new(seed, Mutation::None);
        world.verbose = true;
        world.run().unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        assert_listed(&world.unlisted.take());
        return;
    }
    let count = env_number("FLEXNBD_SCHEDULES").unwrap_or(SCHEDULES);
    let mut unlisted = BTreeSet::new();
    let mut coverage = world::Coverage::default();
    for seed in 0..count {
        let mut world = World::new(seed, Mutation::None);
        if let Err(broken) = world.run() {
            panic!("FLEXNBD_SEED={seed}: {broken}");
        }
        coverage.add(&world.coverage);
        unlisted.extend(world.unlisted.take());
    }
    println!("{count} schedules: {coverage:?}");
    assert_listed(&unlisted);
    assert!(coverage.is_complete(), "the schedules do not cover every event: {coverage:?}");
}

/// Fails for transitions outside the tables. The unit tests of machine and arrival explore all that
/// are possible: a row is missing because the code changed (tests/README.md tells how to accept it)
/// or because an exploration no longer reaches it.
fn assert_listed(unlisted: &BTreeSet<String>) {
    let rows: Vec<&str> = unlisted.iter().map(String::as_str).collect();
    assert!(rows.is_empty(), "not in the tables of transitions:\n{}", rows.join("\n"));
}

/// Asserts that some schedule breaks the invariant with the mutation, and none without it.
fn assert_caught(mutation: Mutation, invariant: u8) {
    let count = env_number("FLEXNBD_SCHEDULES").unwrap_or(MUTANT_SCHEDULES).max(MUTANT_SCHEDULES);
    let broken = format!("({invariant})");
    let found = (0..count).find_map(|seed| {
        let why = run(seed, mutation).err()?;
        let is_cause = why.starts_with(&broken) && run(seed, Mutation::None).is_ok();
        is_cause.then_some((seed, why))
    });
    assert!(
        found.is_some(),
        "{mutation:?} never breaks invariant {invariant} in {count} schedules"
    );
    if let Some((seed, why)) = found {
        println!("{mutation:?}: seed {seed}: {why}");
    }
}

macro_rules! mutations {
    ($($name:ident: $mutation:ident breaks $invariant:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            assert_caught(Mutation::$mutation, $invariant);
        })*
    };
}

mutations! {
    marking_dirty_before_writing_is_caught: MarkBeforeWrite breaks 1,
    reading_before_taking_dirty_marks_is_caught: ReadBeforeMark breaks 1,
    clearing_dirty_marks_after_reading_is_caught: ClearMarkAfterRead breaks 1,
    a_handover_after_the_freeze_expired_is_caught: HandoverAfterFreeze breaks 2,
    a_handover_without_a_departing_record_is_caught: HandoverBeforeDeparting breaks 2,
    a_departing_record_that_is_not_durable_is_caught: DepartingNotDurable breaks 2,
    deleting_before_the_acknowledgement_is_caught: UnlinkBeforeAcknowledgement breaks 3,
    exiting_before_the_departed_record_is_caught: ExitBeforeRecord breaks 3,
    acknowledging_before_the_data_is_durable_is_caught: AcknowledgeBeforeDurable breaks 4,
    acknowledging_before_the_record_is_durable_is_caught: AcknowledgeBeforeRecord breaks 4,
    recording_before_the_data_is_durable_is_caught: RecordBeforeDurable breaks 1,
    leaving_an_earlier_connection_open_is_caught: KeepEarlierConnection breaks 2,
    leaving_earlier_writes_in_flight_is_caught: KeepEarlierWrites breaks 1,
    serving_while_the_destination_is_unreachable_is_caught: ServeOnUnreachable breaks 2,
    serving_in_doubt_is_caught: ServeInDoubt breaks 2,
    taking_no_copy_for_not_arrived_is_caught: NoCopyMeansNotArrived breaks 2,
    resuming_with_another_destination_process_is_caught: ResumeAcrossTokens breaks 1,
    serving_an_incomplete_copy_is_caught: ServeIncomplete breaks 2,
    relaying_from_the_own_image_is_caught: RelayFromOwnImage breaks 2,
    trusting_a_nondurable_record_is_caught: TrustUnsyncedRecord breaks 3,
}

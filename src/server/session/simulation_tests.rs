//! Deterministic simulation of session engines on one disk, in one thread: no socket, no file, no clock
//! but the one that the schedule sets.
//!
//! A schedule is a sequence of random events. Clients of every dialect send valid and invalid requests,
//! disconnect, close their side in the middle of a request, or are lost. The disk completes operations
//! in any order, late, with errors, or loses completions. The policy refuses requests, records changes
//! and decides about handovers. The gate closes, opens or is retired; writes are delayed; sessions are
//! saved and restored, requested to finish, or ended.
//!
//! Every step is checked: each request is answered exactly once, with the bytes, the error and the form
//! that the specification demands; nothing is executed or answered after the end of a session; changes
//! that overlap are executed one after another; nothing changes while the gate is closed or before the
//! record; memory stays within its limits. At the end of a schedule every request is answered, every
//! change was marked dirty, and everything acknowledged as durable is durable.
//!
//! A schedule depends on its seed alone. A failure prints the seed:
//!
//! ```text
//! FLEXNBD_SEED=1234 cargo test --lib session::simulation_tests::schedules
//! ```
//!
//! 250,000 schedules take a minute on one processor core of a virtual machine:
//!
//! ```text
//! FLEXNBD_SCHEDULES=250000 cargo test --release --lib session::simulation_tests::schedules -- --nocapture
//! ```
//!
//! The mutations are mistakes that an engineer could make (`disk/mutation`). A test for each asserts that
//! schedules fail with it, and for the right reason.

use crate::disk::mutation::{self, Mutation};
use crate::schedules;
use coverage::Coverage;
use theme::Theme;

mod client;
mod coverage;
mod disk;
mod model;
mod policy;
mod request;
mod session;
mod theme;
mod world;

/// Number of schedules, unless `FLEXNBD_SCHEDULES` is set.
const SCHEDULES: u64 = 1_000;
/// Number of seeds within which every mutation must be found. Most are found within 200, and
/// [`Mutation::SkipVerification`] in one of 1,000 schedules of its theme.
const MUTANT_SEEDS: u64 = 50_000;

#[test]
fn schedules_keep_the_promises_of_a_session() {
    if let Some(all) = schedules::run_all(SCHEDULES, world::run, Coverage::add) {
        assert!(all.missing().is_none(), "{:?} is not reached", all.missing());
    }
}

/// Asserts that some schedule of a theme fails for this reason with the mutation, and not without it.
fn assert_caught(mutation: Mutation, reason: &str, theme: Theme) {
    let (step, first) = theme.seeds();
    let seeds = (0..MUTANT_SEEDS / step).map(|nth| nth * step + first);
    schedules::assert_caught(&mutation, reason, seeds, |seed, is_mutant| {
        mutation::set(is_mutant.then_some(mutation));
        let outcome = world::run(seed);
        mutation::set(None);
        outcome
    });
}

macro_rules! mutations {
    ($($name:ident: $mutation:ident breaks $reason:literal in $theme:ident,)*) => {
        $(#[test]
        fn $name() {
            assert_caught(Mutation::$mutation, $reason, Theme::$theme);
        })*
    };
}

mutations! {
    forgetting_a_dirty_mark_is_caught: ForgetMark breaks "not marked dirty" in Any,
    forgetting_the_mark_of_a_part_is_caught: ForgetPart breaks "not marked dirty" in Any,
    staying_inside_between_parts_is_caught: StayInside breaks "gate is closing" in Zeroing,
    keeping_a_visit_is_caught: KeepVisit breaks "closing the gate does not end" in Any,
    exceeding_the_operations_in_flight_is_caught: ExceedOperations breaks "the session holds" in Large,
    exceeding_the_bytes_in_flight_is_caught: ExceedBytes breaks "the session holds" in Large,
    losing_a_completion_is_caught: LoseCompletion breaks "not answered" in Any,
    answering_before_the_flush_is_caught: AnswerBeforeFlush breaks "is not durable" in Any,
    answering_an_unverified_flush_is_caught: SkipVerification breaks "is not durable" in Flushes,
    starting_an_overlapping_change_is_caught: StartOverlapping breaks "starts beside" in Any,
    passing_the_changes_of_an_ended_session_is_caught: ReleaseChanges breaks "beside" in Any,
    closing_the_gate_before_lost_operations_is_caught: ReleaseAbandoned breaks "drained" in Losses,
    trusting_a_lost_flush_is_caught: ForgetLostFlush breaks "failed flush" in Losses,
    writing_beside_a_change_in_flight_is_caught: WriteBeside breaks "executed beside" in Any,
    missing_the_opening_of_the_gate_is_caught: MissGate breaks "not answered" in Any,
    missing_the_end_of_the_disk_is_caught: SkipDiskCheck breaks "busy for ever" in Retired,
    answering_a_long_write_early_is_caught: AnswerLongEarly breaks "" in Large,
    dropping_the_extents_of_an_answer_is_caught: DropExtents breaks "is incomplete" in Any,
    answering_twice_is_caught: AnswerTwice breaks "cookie of no request" in Any,
    misplacing_loaded_bytes_is_caught: MisplaceLoad breaks "reads as" in Large,
    overfilling_the_send_buffer_is_caught: OverfillTx breaks "bytes of replies" in Large,
    keeping_a_rejected_payload_is_caught: KeepPayload breaks "BadMagic" in Any,
    dropping_a_loaded_read_is_caught: DropLoadedRead breaks "not answered" in Any,
    dropping_an_arriving_payload_is_caught: DropPayload breaks "" in Any,
    forgetting_the_start_of_a_piece_is_caught: ForgetArrived breaks "" in Any,
    suspending_with_operations_in_flight_is_caught: SuspendBusy breaks "" in Any,
    missing_a_notification_is_caught: MissNotification breaks "not answered" in Any,
    changing_bytes_before_the_record_is_caught: SkipRecord breaks "before the record" in Any,
    working_after_the_end_is_caught: LeaveLate breaks "it works after" in Any,
    finishing_without_replies_is_caught: FinishEarly breaks "without replies" in Any,
    disconnecting_with_operations_in_flight_is_caught: DisconnectEarly breaks "disconnect" in Any,
    handing_over_with_operations_in_flight_is_caught: HandOverEarly breaks "a handover" in Any,
    hiding_a_failure_from_the_policy_is_caught: HideFailure breaks "does not know" in Any,
    answering_after_a_disconnect_is_caught: AnswerDisconnected breaks "" in Any,
    an_empty_flush_is_caught: EmptyFlush breaks "is not durable" in Any,
    dropping_durability_is_caught: DropDurability breaks "is not durable" in Any,
}

//! Deterministic simulation of the upstream machine, in one thread: no socket, no clock.
//!
//! A schedule is a sequence of random events. Several sessions submit operations of every kind; changes
//! of the same bytes never at once, since the disk orders them. A scripted server receives our bytes over
//! one to four connections, executes requests in any order, and replies late, in every dialect and
//! division. Each side receives the bytes in fragments. Connections are cut at any byte, server processes
//! are killed, hosts lose power and with it everything that was not flushed, or a part of it. Requests that
//! the server has received then may be executed, or not, or later beside those of the next connections (in
//! order of arrival where changes overlap). The disk moves to another server, which has other limits and
//! another dialect; the old one answers that it is shutting down. Addresses refuse connections, or have
//! another disk. Servers fail requests, flushes and replays, or break the protocol. Sessions end.
//!
//! Every step is checked: each operation completes exactly once, with the error that the server returned
//! or with the right bytes (each cell is a linearizable register); what a FLUSH or FUA has acknowledged
//! is durable on the current server and stays so; overlapping changes are never in flight together, and
//! neither are equal cookies, although clients choose them; a request is sent again with its cookie; a
//! replay consists of the last acknowledged changes and comes before everything else; the memory stays
//! within its bound; the server receives nothing that the first one did not offer. At the end of a
//! schedule, without further faults, everything completes.
//!
//! A schedule depends on its seed alone. A failure prints the seed:
//!
//! ```text
//! FLEXNBD_SEED=1234 cargo test --lib upstream::simulation_tests::schedules
//! ```
//!
//! 400,000 schedules take a minute on one processor core of a virtual machine:
//!
//! ```text
//! FLEXNBD_SCHEDULES=400000 cargo test --release --lib upstream::simulation_tests::schedules -- --nocapture
//! ```
//!
//! The mutations are mistakes that an engineer could make (`mutation`). A test for each asserts that
//! schedules fail with it, and for the right reason.

use super::mutation::{self, UpstreamMutation};
use crate::schedules;
use coverage::UpstreamCoverage;
use theme::UpstreamTheme;

mod cells;
mod clients;
mod coverage;
mod image;
mod replying;
mod scene;
mod server;
mod theme;
mod world;

/// Number of schedules, unless `FLEXNBD_SCHEDULES` is set.
const SCHEDULES: u64 = 4_000;
/// Number of seeds within which every mutation must be found.
const MUTANT_SEEDS: u64 = 50_000;

#[test]
fn schedules_keep_the_promises_of_an_upstream() {
    if let Some(all) = schedules::run_all(SCHEDULES, world::run, UpstreamCoverage::add) {
        assert!(all.missing().is_none(), "{:?} is not reached", all.missing());
    }
}

/// Asserts that some schedule of a theme fails for this reason with the mutation, and not without it.
fn assert_caught(mutation: UpstreamMutation, reason: &str, theme: UpstreamTheme) {
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
            assert_caught(UpstreamMutation::$mutation, $reason, UpstreamTheme::$theme);
        })*
    };
}

mutations! {
    skipping_the_replay_is_caught: SkipReplay breaks "reads as" in Any,
    losing_flushed_data_without_a_replay_is_caught: SkipReplay breaks "is not durable" in Any,
    changing_bytes_beside_the_replay_is_caught: ResendBesideReplay breaks "during the replay" in Any,
    replaying_the_first_part_of_a_segment_is_caught: ReplayFirstPart breaks "reads as" in Any,
    ignoring_a_failed_replay_is_caught: IgnoreReplayError breaks "reads as" in Errors,
    reading_before_resent_changes_is_caught: ResendInOrder breaks "reads as" in Any,
    continuing_a_request_after_a_loss_is_caught: KeepProgress breaks "" in Any,
    forgetting_acknowledged_changes_is_caught: ForgetAcknowledged breaks "is not durable" in Any,
    stamping_a_flush_at_its_reply_is_caught: StampFlushLate breaks "is not durable" in Any,
    stamping_our_flush_at_its_reply_is_caught: StampOwnFlushLate breaks "" in Scarce,
    keeping_changes_under_a_durable_one_is_caught: KeepUnderDurable breaks "the replay of cell" in Any,
    keeping_trimmed_changes_is_caught: KeepTrimmed breaks "the replay of cell" in Any,
    misplacing_the_rest_of_a_segment_is_caught: MisplaceRest breaks "the replay of cell" in Any,
    ignoring_a_failed_flush_is_caught: IgnoreFlushError breaks "is not durable" in Flushes,
    completing_beside_our_flush_is_caught: CompleteBesideFlush breaks "is not durable" in Flushes,
    waiting_for_a_lost_flush_is_caught: ForgetOwnFlush breaks "not completed" in Any,
    keeping_held_changes_is_caught: KeepHeld breaks "not completed" in Any,
    ignoring_the_memory_bound_is_caught: IgnoreBound breaks "bytes are used" in Any,
    keeping_spare_buffers_is_caught: KeepSpares breaks "bytes are used" in Any,
    cancelling_executing_operations_is_caught: CancelConnected breaks "overlapping changes" in Any,
    forgetting_cancelled_changes_is_caught: ForgetCancelled breaks "reads as" in Endings,
    using_unpromised_commands_is_caught: UseUnpromised breaks "does not offer" in Any,
    resending_a_fast_zeroing_is_caught: StayFast breaks "reads as" in Any,
    reusing_a_cookie_in_flight_is_caught: ReuseCookie breaks "has a cookie in flight" in Any,
    renaming_a_resent_request_is_caught: RenameResent breaks "another cookie" in Any,
    forgetting_the_cookie_of_a_lost_request_is_caught: ForgetCookie breaks "another cookie" in Any,
    accepting_a_reply_over_another_connection_is_caught: AcceptAnyCookie breaks "" in Misbehaving,
    accepting_a_reply_without_content_is_caught: AcceptIncomplete breaks "reads as" in Misbehaving,
    passing_a_shutdown_to_clients_is_caught: PassShutdown breaks "ESHUTDOWN" in Any,
    hiding_an_earlier_failure_is_caught: ForgetError breaks "reads as" in Errors,
    forgetting_the_id_of_the_disk_is_caught: ForgetDiskId breaks "another disk is taken" in Any,
    keeping_the_buffer_of_a_lost_read_is_caught: KeepBuffer breaks "ENOMEM" in Large,
}

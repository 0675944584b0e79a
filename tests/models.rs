//! Explores the orders in which threads can execute shared code: see `tests/models/src/lib.rs`.
//! loom itself reads `LOOM_LOCATION` and `LOOM_MAX_PREEMPTIONS`.

use models::disk::{dirty_models, flush_models, gate_models, overlap_models};
use models::server::{sessions_models, stop_models};

/// A test for each model of a module.
macro_rules! models {
    ($($name:ident, $module:ident: $($model:ident)+;)+) => {
        $(mod $name {
            $(#[test]
            fn $model() {
                super::$module::$model();
            })+
        })+
    };
}

models! {
    dirty, dirty_models:
        change_is_never_missed
        mark_stays_in_the_summary
        second_mark_stays_in_the_summary
        forgotten_mark_is_copied
        mark_is_taken_once;
    flush, flush_models:
        failure_is_reported_to_every_blocking_flush
        failure_is_reported_to_every_notified_flush
        failure_is_reported_to_three_flushes;
    gate, gate_models:
        closer_is_alone
        closer_is_alone_without_waiting
        last_visit_wakes_the_closer
        expired_closing_opens_once
        new_expiry_wakes_a_waiting_visitor
        failed_closing_wakes_waiting_visitors
        opening_notifies_a_session
        retiring_refuses_all_that_wait
        nudge_is_never_missed
        visit_ends_between_two_turns;
    overlap, overlap_models:
        overlapping_changes_exclude_each_other
        all_waiting_changes_are_woken
        plain_write_follows_an_earlier_change;
    sessions, sessions_models:
        stop_reaches_every_session
        no_session_after_the_table_is_closed
        new_list_reaches_every_session
        displaced_session_ends;
    stop, stop_models:
        stop_request_and_completion_both_arrive
        stronger_request_stays;
}

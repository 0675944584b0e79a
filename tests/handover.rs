//! Migrations with killed processes and a failing link: afterwards exactly one host owns the disk,
//! and its image holds every acknowledged write. The kills are random; a failure names their seed.
//!
//! `FLEXNBD_KILLS` is the number of schedules with kills, `FLEXNBD_SEED` their first seed, and
//! `FLEXNBD_CUT_SECONDS` how long the link stays cut.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "handover/killed_migration.rs"]
mod killed_migration;
#[path = "handover/link_failures.rs"]
mod link_failures;
#[path = "handover/veth.rs"]
mod veth;

use harness::env_number;
use killed_migration::KilledMigration;
use std::sync::atomic::{AtomicU64, Ordering};

/// The default of `FLEXNBD_KILLS`.
const SCHEDULES: u64 = 20;
/// Schedules that run concurrently. More than there are CPUs, since a schedule mostly waits for
/// rate limits and timeouts.
const CONCURRENT: u64 = 4;

#[test]
fn kills_lose_no_write_and_leave_one_owner() {
    let first = env_number("FLEXNBD_SEED").unwrap_or(1);
    let count = env_number("FLEXNBD_KILLS").unwrap_or(SCHEDULES);
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..CONCURRENT {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count {
                        return;
                    }
                    KilledMigration::new(seed).run();
                }
            });
        }
    });
}

//! A disk moves while processes are killed and the link is cut: who owns it afterwards, and what
//! is in it. Each schedule is made from a seed, which every failure names.
//!
//! `FLEXNBD_KILLS` is how many schedules with kills there are, `FLEXNBD_SEED` where their seeds
//! begin, and `FLEXNBD_CUT_SECONDS` how long the link stays cut.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "migration/cuts.rs"]
mod cuts;
#[path = "migration/lives.rs"]
mod lives;

use harness::env_number;
use lives::Life;
use std::sync::atomic::{AtomicU64, Ordering};

/// Schedules, unless the environment says otherwise.
const KILLS: u64 = 20;
/// Schedules under way at once: mostly they wait for each other's seconds to pass.
const AT_ONCE: u64 = 4;

#[test]
fn whoever_is_killed_whenever_no_write_is_lost_and_nobody_owns_the_disk_twice() {
    let first = env_number("FLEXNBD_SEED").unwrap_or(1);
    let count = env_number("FLEXNBD_KILLS").unwrap_or(KILLS);
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count {
                        return;
                    }
                    Life::new(seed).run();
                }
            });
        }
    });
}

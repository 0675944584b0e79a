//! Real processes move a disk while they are killed, stopped and cut off, and while the medium of
//! their records fails: nothing that a client saw acknowledged is lost, and never do both hosts
//! serve the disk.
//!
//! Each schedule is made from a seed, which every failure names. `FLEXNBD_SEED=N` runs that one,
//! `FLEXNBD_SCHEDULES=N` so many, beginning with `FLEXNBD_SEED` or 1.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "schedules/faults.rs"]
mod faults;
#[path = "schedules/medium.rs"]
mod medium;
#[path = "schedules/operator.rs"]
mod operator;
#[path = "schedules/plan.rs"]
mod plan;
#[path = "schedules/schedule.rs"]
mod schedule;
#[path = "schedules/side.rs"]
mod side;

use harness::{env_number, require_tool};
use plan::Plan;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Schedules, unless the environment says otherwise.
const SCHEDULES: u64 = 24;
/// Schedules under way at once: mostly they wait.
const AT_ONCE: u64 = 8;

/// Carries it out, and takes a panic of the fixture for a failure like any other.
fn passes(seed: u64) -> bool {
    let (plan, began) = (Plan::new(seed), Instant::now());
    let lived = std::panic::catch_unwind(|| schedule::carry_out(&plan));
    let failure = lived.unwrap_or_else(|_| Err(format!("seed {seed}: the test itself fails")));
    match &failure {
        Ok(()) => println!("seed {seed} passes after {:?}", began.elapsed()),
        Err(why) => println!("seed {seed} fails after {:?}\n{why}\n", began.elapsed()),
    }
    failure.is_ok()
}

#[test]
fn no_schedule_loses_writes_or_has_two_servers() {
    if !require_tool("cc") {
        return;
    }
    let seed = env_number("FLEXNBD_SEED");
    let count =
        env_number("FLEXNBD_SCHEDULES").unwrap_or(if seed.is_some() { 1 } else { SCHEDULES });
    let first = seed.unwrap_or(1);
    let next = AtomicU64::new(first);
    let failed = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(count) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= first + count {
                        return;
                    }
                    if !passes(seed) {
                        failed.lock().unwrap().push(seed);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "{} of {count} schedules fail: seeds {failed:?}", failed.len());
}

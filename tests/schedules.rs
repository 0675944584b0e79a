//! Migrations between real processes under injected faults: processes are killed and stopped,
//! the network is cut, system calls on records and image fail or stall. No acknowledged write is
//! lost, and the two hosts never serve the disk at the same time.
//!
//! A seed determines a schedule, and every failure names its seed. `FLEXNBD_SEED=N` runs schedule N
//! alone; `FLEXNBD_SCHEDULES=N` runs N schedules, starting at seed `FLEXNBD_SEED` or 1.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "schedules/execution.rs"]
mod execution;
#[path = "schedules/faults.rs"]
mod faults;
#[path = "schedules/operator.rs"]
mod operator;
#[path = "schedules/plan.rs"]
mod plan;
#[path = "schedules/storage.rs"]
mod storage;
#[path = "schedules/supervised_host.rs"]
mod supervised_host;

use harness::{env_number, require_tool};
use plan::Plan;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// The default number of schedules.
const SCHEDULES: u64 = 24;
/// Schedules that run concurrently; they mostly wait.
const CONCURRENCY: u64 = 8;

/// Runs the schedule of a seed and prints its result. A panic of the fixture is a failure as well.
fn passes(seed: u64) -> bool {
    let (plan, began) = (Plan::new(seed), Instant::now());
    let result = std::panic::catch_unwind(|| execution::execute(&plan));
    let result = result.unwrap_or_else(|_| Err(format!("seed {seed}: the test itself panicked")));
    match &result {
        Ok(()) => println!("seed {seed} passes after {:?}", began.elapsed()),
        Err(why) => println!("seed {seed} fails after {:?}\n{why}\n", began.elapsed()),
    }
    result.is_ok()
}

#[test]
fn no_schedule_loses_a_write_or_serves_twice() {
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
        for _ in 0..CONCURRENCY.min(count) {
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

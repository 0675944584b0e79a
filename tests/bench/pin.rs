//! Keeps the server and the client on CPUs of their own.
//! Started processes and threads inherit the place of whoever starts them; nothing is done later.

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::Once;

static COMPLAINT: Once = Once::new();

/// Moves this thread to one CPU. Where that is not possible, says so once and goes on: the figures
/// can then be compared with each other all the same.
pub(super) fn to(cpu: usize) {
    let mut set = CpuSet::new();
    let outcome = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = outcome {
        COMPLAINT.call_once(|| {
            println!("# cannot run on CPU {cpu} alone ({error}): server and client share CPUs");
        });
    }
}

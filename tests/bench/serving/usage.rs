//! Processor time and memory of a server's processes, from proc(5).

use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::fs;
use std::time::Duration;

/// A process and its descendants.
fn tree(root: Pid) -> Vec<Pid> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
            found.extend(pids.map(Pid::from_raw));
        }
    }
    found
}

/// User and system time of the process, its descendants and their exited children, in seconds. The
/// kernel counts that of exited children in clock ticks of usually 10 ms.
pub(crate) fn cpu_seconds(root: Pid) -> f64 {
    let ticks_per_sec = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let own = |pid| Some(Duration::from(clock_getcpuclockid(pid).ok()?.now().ok()?));
    let exited = |pid| exited_ticks(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?);
    let seconds = |pid| {
        own(pid).unwrap_or_default().as_secs_f64() + exited(pid).unwrap_or(0) as f64 / ticks_per_sec
    };
    tree(root).into_iter().map(seconds).sum()
}

/// Fields 16 and 17 of `/proc/PID/stat`. Field 2, the name, may contain spaces and parentheses.
fn exited_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(13);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// A figure of a process in `/proc`: the file and the key of its line.
type Figure = (&'static str, &'static str);
pub(crate) const RSS_PEAK: Figure = ("status", "VmHWM:");
pub(crate) const RSS: Figure = ("smaps_rollup", "Rss:");
/// The proportional set size: memory that processes share is divided among them.
pub(crate) const PSS: Figure = ("smaps_rollup", "Pss:");

/// The sum over the process and its descendants, in KiB.
pub(crate) fn memory_kib(root: Pid, (file, key): Figure) -> u64 {
    let value = |pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    tree(root).into_iter().filter_map(value).sum()
}

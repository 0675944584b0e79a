//! What a server's processes use, as `/proc` tells (proc(5)).
//! Never asks the processes themselves.

use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};
use std::fs;
use std::time::Duration;

/// A process and everything it started, by process id.
pub(super) fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next).copied() {
        next += 1;
        let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
        for thread in threads {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    found
}

/// User and system time that they and their ended children have used, in seconds: exact for those
/// that live, in hundredths of a second for those that have ended.
pub(super) fn cpu_seconds(root: u32) -> f64 {
    let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
    let of = |pid: u32| {
        own_seconds(pid).unwrap_or(0.0) + ended_ticks(pid).unwrap_or(0) as f64 / per_second
    };
    tree(root).into_iter().map(of).sum()
}

fn own_seconds(pid: u32) -> Option<f64> {
    // It fits: the kernel counts processes in 22 bits.
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32)).ok()?;
    Some(Duration::from(clock.now().ok()?).as_secs_f64())
}

fn ended_ticks(pid: u32) -> Option<u64> {
    ended_ticks_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Pure: fields 16 and 17 of the text, counted behind the name, which may hold anything.
fn ended_ticks_in(stat: &str) -> Option<u64> {
    let behind_name = stat.rsplit_once(')')?.1;
    let fields: Vec<&str> = behind_name.split_whitespace().skip(13).take(2).collect();
    let ticks: Option<u64> = fields.iter().map(|field| field.parse::<u64>().ok()).sum();
    ticks.filter(|_| fields.len() == 2)
}

/// The most memory that each of them had resident at any time, added up, in KiB.
pub(super) fn rss_peak_kib(root: u32) -> u64 {
    let peak = |pid| kib_in(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM:");
    tree(root).into_iter().filter_map(peak).sum()
}

/// Memory in use, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Resident; what several processes share counts in each.
    pub(super) rss_kib: u64,
    /// Resident; what several processes share is divided among them.
    pub(super) pss_kib: u64,
}

/// The memory that they have resident now.
pub(super) fn memory(root: u32) -> Memory {
    let mut sum = Memory::default();
    for pid in tree(root) {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        sum.rss_kib += kib_in(&text, "Rss:").unwrap_or(0);
        sum.pss_kib += kib_in(&text, "Pss:").unwrap_or(0);
    }
    sum
}

/// Pure: the number behind `key` at the beginning of a line.
fn kib_in(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_name_with_spaces_and_brackets_does_not_shift_the_fields() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 0";
        assert_eq!(ended_ticks_in(stat), Some(7));
        assert_eq!(ended_ticks_in("7 (a) S 1"), None);
        assert_eq!(ended_ticks_in("nonsense"), None);
    }

    #[test]
    fn time_that_a_live_process_uses_is_seen() {
        let before = cpu_seconds(std::process::id());
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut sum = 0_u64;
        while cpu_seconds(std::process::id()) <= before && Instant::now() < deadline {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(cpu_seconds(std::process::id()) > before);
    }

    #[test]
    fn keys_are_found_whole() {
        let text = "Rss:   12 kB\nPss_Anon: 5 kB\nPss:  8 kB\n";
        assert_eq!((kib_in(text, "Rss:"), kib_in(text, "Pss:")), (Some(12), Some(8)));
        assert_eq!(kib_in(text, "VmHWM:"), None);
    }

    #[test]
    fn this_process_is_seen_with_its_child() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pids = tree(std::process::id());
        let _ = child.kill();
        let _ = child.wait();
        assert!(pids.contains(&child.id()), "{} in {pids:?}", child.id());
        let memory = memory(std::process::id());
        assert!(memory.rss_kib >= memory.pss_kib && memory.pss_kib > 0);
        assert!(rss_peak_kib(std::process::id()) > 0);
    }
}

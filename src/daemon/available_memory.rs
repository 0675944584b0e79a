//! How much memory the process may use, for the default of `--payload-memory`. Asked once, when it starts.

use crate::small_file;
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::sysinfo::sysinfo;
use std::path::{Path, PathBuf};

/// The largest default of `--payload-memory`, in bytes.
pub const PAYLOAD_MEMORY_DEFAULT_MAX: u64 = 1 << 30;
/// The smallest default, in bytes.
pub const PAYLOAD_MEMORY_DEFAULT_MIN: u64 = 16 << 20;
/// The default is this part of the memory that the process may use.
pub const PAYLOAD_MEMORY_DIVISOR: u64 = 4;

/// Longest file of the control groups that is read, in bytes.
const LENGTH_MAX: u64 = 64 << 10;

/// The default of `--payload-memory` in bytes, besides this many bytes that the process needs otherwise.
pub(super) fn payload_memory_default(reserved: u64) -> u64 {
    let host = sysinfo().map_or(u64::MAX, |info| info.ram_total());
    let address_space = getrlimit(Resource::RLIMIT_AS).map_or(u64::MAX, |(limit, _)| limit);
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let limits =
        limit_files(&groups).into_iter().filter_map(|path| read(&path)?.trim().parse().ok());
    part_of(limits.fold(host.min(address_space), u64::min), reserved)
}

fn part_of(available: u64, reserved: u64) -> u64 {
    (available.saturating_sub(reserved) / PAYLOAD_MEMORY_DIVISOR)
        .clamp(PAYLOAD_MEMORY_DEFAULT_MIN, PAYLOAD_MEMORY_DEFAULT_MAX)
}

/// The files with the limits of a process that is in these control groups, those of version 2
/// (cgroups(7), `/proc/PID/cgroup`).
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let ancestors = group.into_iter().flat_map(|group| Path::new(group).ancestors());
    ancestors.map(|group| Path::new("/sys/fs/cgroup").join(group).join("memory.max")).collect()
}

fn read(path: &Path) -> Option<String> {
    String::from_utf8(small_file::read(path, LENGTH_MAX).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_a_part_within_its_bounds() {
        assert_eq!(part_of(2 << 30, 0), 512 << 20);
        assert_eq!(part_of(2 << 30, 1 << 30), 256 << 20);
        assert_eq!(part_of(u64::MAX, 0), PAYLOAD_MEMORY_DEFAULT_MAX);
        assert_eq!(part_of(1 << 20, 1 << 30), PAYLOAD_MEMORY_DEFAULT_MIN);
        let here = payload_memory_default(0);
        assert!((PAYLOAD_MEMORY_DEFAULT_MIN..=PAYLOAD_MEMORY_DEFAULT_MAX).contains(&here));
        assert_eq!(payload_memory_default(u64::MAX), PAYLOAD_MEMORY_DEFAULT_MIN);
    }

    #[test]
    fn every_ancestor_limits_a_control_group() {
        let groups = "1:name=systemd:/x\n0::/system.slice/flexnbd.slice/flexnbd@a.service\n";
        let root = Path::new("/sys/fs/cgroup");
        let expected = [
            "system.slice/flexnbd.slice/flexnbd@a.service/memory.max",
            "system.slice/flexnbd.slice/memory.max",
            "system.slice/memory.max",
            "memory.max",
        ];
        assert_eq!(limit_files(groups), expected.map(|path| root.join(path)));
        assert_eq!(limit_files("0::/\n"), [root.join("memory.max")]);
        assert!(limit_files("4:memory:/x\n").is_empty());
    }
}

//! What machine this is, and how busy, as `/proc` tells (proc(5)).
//! Never measures anything itself.

use std::fs;

/// With more load than this before we begin, others are using this machine.
pub(super) const LOAD_OF_OTHERS: f64 = 0.5;

/// What the file says, without white space around it; nothing if it cannot be read.
pub(super) fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// The mean number of tasks that ran or wanted to, in the last minute.
pub(super) fn load_average() -> f64 {
    let text = read("/proc/loadavg");
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// What the processor calls itself.
pub(super) fn processor() -> String {
    let about = read("/proc/cpuinfo");
    let line = about.lines().find(|line| line.starts_with("model name")).unwrap_or_default();
    line.split_once(':').map_or("unknown", |(_, name)| name).trim().to_owned()
}

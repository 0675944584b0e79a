//! For tests of what depends on the environment and on inherited descriptors, both of which belong
//! to a whole process: runs a single test of this program in a process of its own.

use std::process::{Command, Output, Stdio};

/// What a child's words begin with, to be told apart from those of the test harness.
const MARK: &str = "\u{2}child: ";

/// Runs the ignored test `name`, a full path, once more configuration has been added.
pub(super) fn running(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    for variable in ["LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "NOTIFY_SOCKET"] {
        command.env_remove(variable);
    }
    command.env_remove("WATCHDOG_USEC").env_remove("WATCHDOG_PID").env_remove("JOURNAL_STREAM");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// In the child: tells the parent.
pub(super) fn say(words: &str) {
    println!("\n{MARK}{words}");
}

/// In the parent: what the child said, one entry for each `say`.
pub(super) fn said(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "the child failed: {output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| line.strip_prefix(MARK)).map(str::to_owned).collect()
}

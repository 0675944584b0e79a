//! Runs a single test in a process of its own: for tests that need their own environment and inherited
//! descriptors.

use std::process::{Command, Output, Stdio};

/// Prefix of a child's output, which separates it from that of the test harness.
const MARK: &str = "\u{2}child: ";

/// The command that runs the ignored test `name`, a full path.
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

/// In the child: writes a line for the parent.
pub(super) fn say(text: &str) {
    println!("\n{MARK}{text}");
}

/// In the parent: the lines of the child, one for each [`say`].
pub(super) fn output_of(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "the child failed: {output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| line.strip_prefix(MARK)).map(str::to_owned).collect()
}

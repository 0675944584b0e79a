//! The command line as operators use it: every mode against real servers, the exit status and
//! message of every error, signals, the log, the control socket.
//!
//! Never uses the library: tests check a process's output, exit status and leftover files.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a helper that cannot continue fails its test"
)]

#[path = "cli/addresses.rs"]
mod addresses;
#[path = "cli/control.rs"]
mod control;
#[path = "cli/log.rs"]
mod log;
#[path = "cli/sandbox.rs"]
mod sandbox;
#[path = "cli/serve_refused.rs"]
mod serve_refused;
#[path = "cli/stream.rs"]
mod stream;
#[path = "cli/transfer.rs"]
mod transfer;
#[path = "cli/transfer_refused.rs"]
mod transfer_refused;
#[path = "cli/unprivileged.rs"]
mod unprivileged;
#[path = "cli/usage.rs"]
mod usage;

use harness::{Program, Server, require_root};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// The user id of `nobody`.
const NOBODY: &str = "65534";

/// The options by which a client reaches this server.
fn flags_of(server: &Server) -> String {
    server.endpoint().flags()
}

/// `flexnbd read` from the server that these options name.
fn read(server: &str, from: u64, size: u64) -> Program {
    Program::flexnbd(&format!("read {server} --from {from} --size {size}"))
}

/// `flexnbd write` to the server that these options name.
fn write(server: &str, from: u64, data: &[u8]) -> Program {
    let size = data.len();
    Program::flexnbd(&format!("write {server} --from {from} --size {size}")).input(data)
}

/// flexnbd as user `nobody`, who has no privileges, from a copy that this user can execute.
/// `None`, with a skip line, unless the test runs as root.
fn as_nobody(dir: &Path) -> Option<Program> {
    if !require_root("the permissions of another user") {
        return None;
    }
    let copy = dir.join("flexnbd");
    // Copied by another process. If this process wrote the file, children that other threads fork at
    // that moment would inherit the descriptor, and exec would fail with ETXTBSY.
    Program::new("cp").args([env!("CARGO_BIN_EXE_flexnbd")]).args([&copy]).run().succeeded();
    permit(&copy, 0o755);
    permit(dir, 0o755);
    let setpriv = Program::new("setpriv").words("--clear-groups");
    Some(setpriv.args(["--reuid", NOBODY, "--regid", NOBODY]).args([copy]))
}

fn permit(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

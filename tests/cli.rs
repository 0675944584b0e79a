//! The command line as operators meet it: every mode against real servers, every mistake with its
//! exit status and its words, signals, the log, the control socket.
//!
//! Never looks inside the library: what a process prints, how it ends and what it leaves behind is
//! all that counts.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "cli/log.rs"]
mod log;
#[path = "cli/operate.rs"]
mod operate;
#[path = "cli/ordinary_user.rs"]
mod ordinary_user;
#[path = "cli/places.rs"]
mod places;
#[path = "cli/serve_refused.rs"]
mod serve_refused;
#[path = "cli/stream.rs"]
mod stream;
#[path = "cli/transfer.rs"]
mod transfer;
#[path = "cli/transfer_refused.rs"]
mod transfer_refused;
#[path = "cli/usage.rs"]
mod usage;

use harness::{Program, Server, require_root};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

/// The user that owns nothing.
const NOBODY: &str = "65534";

/// Where a server of ours is, in the client's words.
fn flags_of(server: &Server) -> String {
    server.endpoint().flags()
}

fn read(place: &str, from: u64, size: u64) -> Program {
    Program::flexnbd(&format!("read {place} --from {from} --size {size}"))
}

fn write(place: &str, from: u64, data: &[u8]) -> Program {
    let size = data.len();
    Program::flexnbd(&format!("write {place} --from {from} --size {size}")).input(data)
}

/// Our program as a user to whom permissions apply, from a copy that this user can reach. `None`,
/// and a visible skip, when we may not become another user.
fn as_nobody(dir: &Path) -> Option<Program> {
    if !require_root("what another user may not do") {
        return None;
    }
    let copy = dir.join("flexnbd");
    // By another process: what this one writes stays open in whatever its other threads start at
    // that moment, and is too busy to be run.
    Program::new("cp").args([env!("CARGO_BIN_EXE_flexnbd")]).args([&copy]).run().succeeded();
    permit(&copy, 0o755);
    permit(dir, 0o755);
    let setpriv = Program::new("setpriv").words("--clear-groups");
    Some(setpriv.args(["--reuid", NOBODY, "--regid", NOBODY]).args([copy]))
}

fn permit(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

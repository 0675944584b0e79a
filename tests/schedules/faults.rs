//! Fault injection into the system calls of a running server; see `faults.c`.

use crate::plan::{Call, Fault};
use harness::{TempDir, compile, temp_dir};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A minimum duration of `fsync(2)` for schedules that react to the record *departing*. It exists
/// only from its creation until the record is durable and the handover is done; the delay makes
/// that long enough to be seen by polling.
const SLOW_SYNC: Fault = Fault { call: Call::Sync, errno: 0, delay_ms: 40, bytes_allowed_max: 0 };

/// The fault rules of one host's processes.
pub(crate) struct Faults {
    rules: PathBuf,
    /// A rule that every set ends with.
    always: Option<Fault>,
}

impl Faults {
    /// Creates the rules file `NAME.rules` in `directory`, without faults.
    pub(crate) fn new(directory: &Path, name: &str, has_slow_sync: bool) -> Faults {
        let rules = directory.join(format!("{name}.rules"));
        let faults = Faults { rules, always: has_slow_sync.then_some(SLOW_SYNC) };
        faults.set(&[]);
        faults
    }

    /// Replaces the faults. The file is renamed into place, so that no reader sees half of it.
    pub(crate) fn set(&self, faults: &[Fault]) {
        let lines: String = faults.iter().chain(&self.always).map(line).collect();
        let new = self.rules.with_extension("new");
        std::fs::write(&new, lines).unwrap();
        std::fs::rename(&new, &self.rules).unwrap();
    }

    /// The command that executes its arguments under these rules.
    pub(crate) fn wrapper(&self, has_io_uring: bool) -> [String; 3] {
        let ring = if has_io_uring { "ring" } else { "no-ring" };
        [program().display().to_string(), self.rules.display().to_string(), ring.to_owned()]
    }
}

fn line(fault: &Fault) -> String {
    let Fault { call, errno, delay_ms, bytes_allowed_max } = fault;
    let call = match call {
        Call::SetXattr => "setxattr",
        Call::GetXattr => "getxattr",
        Call::CreateOrRename => "create",
        Call::WriteRecord => "write",
        Call::Sync => "sync",
        Call::Fallocate => "fallocate",
    };
    format!("{call} {errno} {delay_ms} {bytes_allowed_max}\n")
}

/// The path of the compiled `faults.c`; compiles it once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let compiled = PROGRAM.get_or_init(|| {
        let directory = temp_dir();
        let program = compile(directory.path(), "tests/schedules/faults.c", &[]);
        (directory, program)
    });
    &compiled.1
}

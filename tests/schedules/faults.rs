//! Makes system calls of a server fail, or wait, while it runs; see `faults.c`.

use crate::plan::{Call, Fault};
use harness::{TempDir, compile, temp_dir};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// How long `fsync(2)` takes at least where a record is looked out for that lasts for a moment
/// only: it is there from when it is set until it is durable and what follows is done.
const SLOWLY: Fault = Fault { call: Call::Sync, errno: 0, delay_ms: 40, fits_bytes: 0 };

/// The calls of one host's processes.
pub(crate) struct Faults {
    rules: PathBuf,
    always: Option<Fault>,
}

impl Faults {
    /// Faults that are ordered by a file in that directory; none yet.
    pub(crate) fn new(directory: &Path, name: &str, syncs_slowly: bool) -> Faults {
        let rules = directory.join(format!("{name}.rules"));
        let faults = Faults { rules, always: syncs_slowly.then_some(SLOWLY) };
        faults.set(&[]);
        faults
    }

    /// From now on these, and no others.
    pub(crate) fn set(&self, faults: &[Fault]) {
        let lines: String = faults.iter().chain(&self.always).map(line).collect();
        let new = self.rules.with_extension("new");
        std::fs::write(&new, lines).unwrap();
        std::fs::rename(&new, &self.rules).unwrap();
    }

    /// What executes its arguments so that they have these faults.
    pub(crate) fn wrapper(&self, has_io_uring: bool) -> [String; 3] {
        let ring = if has_io_uring { "ring" } else { "no-ring" };
        [program().display().to_string(), self.rules.display().to_string(), ring.to_owned()]
    }
}

fn line(fault: &Fault) -> String {
    let Fault { call, errno, delay_ms, fits_bytes } = fault;
    let call = match call {
        Call::Set => "set",
        Call::Get => "get",
        Call::Name => "name",
        Call::Write => "write",
        Call::Sync => "sync",
        Call::Zero => "zero",
    };
    // Without a length a call is longer than anything that fits.
    format!("{call} {errno} {delay_ms} {fits_bytes}\n")
}

/// The program, compiled once.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let compiled = PROGRAM.get_or_init(|| {
        let directory = temp_dir();
        let program = compile(directory.path(), "tests/schedules/faults.c", &[]);
        (directory, program)
    });
    &compiled.1
}

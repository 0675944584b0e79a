//! What the integration tests share: a server of our own with its lifetime, images, tools, resources.
//! Never uses the library under test, and never ends a process that it has not started itself.

#![allow(
    dead_code,
    unused_imports,
    reason = "every test binary compiles this file and uses a part of it"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a fixture that cannot go on fails the test that asked for it"
)]

pub(crate) mod raw;
pub(crate) mod server;
pub(crate) mod session;

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub(crate) use server::{Builder, Resources, Server, free_port};
pub(crate) use tempfile::TempDir;

/// Has the programs that are started from now on heed `SIGHUP` and `SIGINT`, even if the tests
/// themselves were started by `nohup`, or in the background.
pub(crate) fn heed_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for number in [Signal::SIGHUP, Signal::SIGINT] {
        // SAFETY: the default action runs no code of ours.
        unsafe { signal(number, SigHandler::SigDfl) }.unwrap();
    }
}

/// How long anything may take that normally takes milliseconds. Long, because test machines are
/// slow; a passing test never waits for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// Pause between two looks at something that cannot wake us (another process's `/proc` entry).
const LOOK_AGAIN: Duration = Duration::from_millis(10);

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// A directory that disappears with the test.
pub(crate) fn temp_dir() -> TempDir {
    tempfile::Builder::new().prefix("flexnbd-test-").tempdir().unwrap()
}

/// A sparse file of `size` bytes that reads as zero.
pub(crate) fn sparse_image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(size).unwrap();
    path
}

/// Puts `data` at `offset` of an existing file, behind the server's back or before it starts.
pub(crate) fn write_at(path: &Path, offset: u64, data: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(data, offset).unwrap();
}

/// What the file itself holds.
pub(crate) fn read_at(path: &Path, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    File::open(path).unwrap().read_exact_at(&mut data, offset).unwrap();
    data
}

/// `length` bytes without a pattern and, in practice, without a zero block; the same for the same
/// seed (an xorshift generator).
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut data = Vec::with_capacity(length + 8);
    while data.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(length);
    data
}

/// Looks until `done` says so, or fails with what it was waiting for.
#[track_caller]
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    assert!(comes_true(DEADLINE, &mut done), "waited {DEADLINE:?} in vain for {what}");
}

/// Whether `done` says so within `patience`.
pub(crate) fn comes_true(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Says on the real stderr, past the harness that hides what passing tests print, that (a part of)
/// a test was not run.
pub(crate) fn skip(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIP {what}: {why}");
}

/// Whether the program `name` is installed. When it is not: fails under `CI`, says so elsewhere,
/// and the caller returns.
pub(crate) fn require_tool(name: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()));
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{name} is not installed, and CI must not skip");
        skip(&format!("what needs {name}"), "it is not installed");
    }
    found
}

/// Compiles a C program of ours, or with `-shared` among `flags` a library; its place.
#[track_caller]
pub(crate) fn compile(dir: &Path, source: &str, flags: &[&str]) -> PathBuf {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join(source).display().to_string();
    let made = dir.join("compiled");
    let to = made.display().to_string();
    run("cc", &[&["-O1", "-o", &to, &from], flags].concat());
    made
}

/// The library of `conformance/failing_fsync.c`, to be loaded into a server.
#[track_caller]
pub(crate) fn failing_fsync(dir: &Path) -> PathBuf {
    compile(dir, "tests/conformance/failing_fsync.c", &["-shared", "-fPIC", "-ldl"])
}

/// Runs a program to its end and returns what it printed; fails with its stderr when it fails.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap_or_else(|e| {
            panic!("{program} cannot be started: {e}");
        });
    assert!(
        output.status.success(),
        "{program} {arguments:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Numbers that look random and are the same for the same seed (splitmix64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

//! Requirements of tests: the program under test, installed tools, rights, compiled C sources.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The variable in which cargo names the program under test, for the processes that it starts.
const FLEXNBD: &str = "CARGO_BIN_EXE_flexnbd";

/// The program under test: the path that cargo sets in the environment, or, for a test binary
/// started by hand, the program of the same build.
pub fn flexnbd() -> PathBuf {
    let beside = || {
        let test = std::env::current_exe().unwrap();
        test.parent().unwrap().with_file_name("flexnbd")
    };
    std::env::var_os(FLEXNBD).map_or_else(beside, PathBuf::from)
}

/// A file or directory of the project, named from its root.
pub fn project_path(relative: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().join(relative)
}

/// Gives `SIGHUP` and `SIGINT` their default action in programs started from now on, even if the
/// tests themselves were started by `nohup`, or in the background.
pub fn restore_default_signals() {
    use nix::sys::signal::{SigHandler, Signal, signal};
    for number in [Signal::SIGHUP, Signal::SIGINT] {
        // SAFETY: the default action runs no code of ours.
        unsafe { signal(number, SigHandler::SigDfl) }.unwrap();
    }
}

/// Prints that (a part of) a test was skipped. Writes to stderr directly, since the test runner
/// hides the output of passing tests.
pub fn skip(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIP {what}: {why}");
}

/// Whether the program `name` is installed. If not, fails where `CI` is set, and otherwise prints a
/// skip; the caller then returns.
pub fn require_tool(name: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()));
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{name} is not installed, and CI must not skip");
        skip(&format!("a test that needs {name}"), "it is not installed");
    }
    found
}

/// Whether all of these programs are installed; see [`require_tool`].
pub fn require_tools(names: &[&str]) -> bool {
    names.iter().filter(|name| !require_tool(name)).count() == 0
}

/// Whether this process is root, which `what` needs. If not, fails where `CI` is set, and otherwise
/// prints a skip; the caller then returns.
pub fn require_root(what: &str) -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        assert!(std::env::var_os("CI").is_none(), "{what} needs root, and CI must not skip");
        skip(what, "it needs root");
    }
    is_root
}

/// The number in an environment variable, for a test that can be repeated or scaled; `None` if it
/// is not set.
pub fn env_number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Compiles a C source of the project into `dir` and returns the path of the program, or of the
/// library if `flags` contain `-shared`.
#[track_caller]
pub fn compile(dir: &Path, source: &str, flags: &[&str]) -> PathBuf {
    let source = project_path(source).display().to_string();
    let compiled = dir.join("compiled");
    let output = compiled.display().to_string();
    run("cc", &[&["-O1", "-o", &output, &source], flags].concat());
    compiled
}

/// The library of `conformance/failing_fsync.c`, for `LD_PRELOAD` of a server.
#[track_caller]
pub fn failing_fsync(dir: &Path) -> PathBuf {
    compile(dir, "tests/conformance/failing_fsync.c", &["-shared", "-fPIC", "-ldl"])
}

/// Runs a program and returns its stdout. Fails with its stderr unless it succeeds.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
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

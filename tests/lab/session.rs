//! Runs a test inside a lab session: the test binary executes itself there for that one test.
//! At most two sessions run at once, and none outlives its test.
//!
//! Outside, [`in_lab`] checks the requirements, builds the packages, and waits for the session.
//! Inside, it runs the test, whose network namespace contains only its hosts.

use crate::package;
pub(crate) use harness::nested::report;
use harness::{nested, project_path, require_root, require_tools, skip};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Environment variable that is set inside a session.
const INSIDE: &str = "FLEXNBD_LAB_INSIDE";
/// Environment variable inside a session: the directory of the packages.
const PACKAGES: &str = "FLEXNBD_LAB_PACKAGES";
/// Sessions at once; more would only slow each other down.
const SESSIONS_MAX: usize = 2;
/// Time limit of a test, which normally takes less than a minute.
const LIMIT: Duration = Duration::from_secs(400);

/// The thread name of clients.
const CLIENT: &str = "client";

/// The programs that a lab and its clients consist of.
const TOOLS: [&str; 13] = [
    "dbus-daemon",
    "fio",
    "ip",
    "losetup",
    "mkfs.ext4",
    "nsenter",
    "python3",
    "qemu-io",
    "qemu-storage-daemon",
    "setpriv",
    "systemd-nspawn",
    "timeout",
    "unshare",
];

/// Runs `body` in a session of its own. `body` must be the closure of a test function that does
/// nothing else: its type name yields the name of the test.
#[track_caller]
pub(crate) fn in_lab<F: FnOnce()>(body: F) {
    if std::env::var_os(INSIDE).is_some() {
        silence_client_panics();
        return body();
    }
    let name = nested::test_name::<F>();
    if !requirements_met(name) {
        return;
    }
    let packages = package::directory();
    let _slot = Slot::acquire();
    nested::assert_passed(name, &run_session(name, &packages));
}

/// Spawns a client's thread. Its panics print nothing: the test decides whether they are failures.
pub(crate) fn spawn_client<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::Builder::new().name(CLIENT.to_owned()).spawn(work).unwrap()
}

fn silence_client_panics() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() != Some(CLIENT) {
            default_hook(panic);
        }
    }));
}

/// Inside a session: the directory of the packages.
pub(crate) fn packages() -> PathBuf {
    std::env::var_os(PACKAGES).expect("inside a session").into()
}

/// Runs `lab.sh` with these arguments until it exits.
#[track_caller]
pub(crate) fn lab(words: &[&str]) -> Output {
    let script = std::env::var_os("LAB").expect("inside a session");
    let mut command = Command::new(script);
    command.args(words).stdin(Stdio::null());
    command.output().unwrap()
}

/// Whether this machine can run a lab. If not: fails under `CI`, otherwise prints a skip line.
fn requirements_met(name: &str) -> bool {
    if !require_root(name) {
        return false;
    }
    if !std::path::Path::new("/dev/loop-control").exists() {
        assert!(std::env::var_os("CI").is_none(), "no loop devices; CI must not skip");
        skip(name, "there are no loop devices");
        return false;
    }
    require_tools(&TOOLS) & require_tools(&harness::package::TOOLS)
}

fn run_session(name: &str, packages: &Path) -> Output {
    let script = project_path("tests/lab/lab.sh");
    let limit = LIMIT.as_secs().to_string();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=20", &limit]).arg(script).arg("run");
    command.arg(std::env::current_exe().unwrap());
    command.args(nested::arguments(name));
    command.env(INSIDE, "1").env(PACKAGES, packages).stdin(Stdio::null());
    command.output().unwrap()
}

/// A slot for one of the [`SESSIONS_MAX`] sessions.
struct Slot;

static SLOTS_TAKEN: Mutex<usize> = Mutex::new(0);
static SLOT_RELEASED: Condvar = Condvar::new();

impl Slot {
    fn acquire() -> Slot {
        let taken = SLOTS_TAKEN.lock().unwrap();
        *SLOT_RELEASED.wait_while(taken, |taken| *taken >= SESSIONS_MAX).unwrap() += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *SLOTS_TAKEN.lock().unwrap() -= 1;
        SLOT_RELEASED.notify_one();
    }
}

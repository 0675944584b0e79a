//! Runs a test inside a lab session: the test binary starts itself again there, for that one test.
//! Never lets more than two sessions run at once, and never outlives its test.
//!
//! Outside, [`in_lab`] looks for what a lab needs, makes the packages, and waits for the session's
//! end. Inside, it runs the test, which sees no other network than that of its hosts.

use crate::package;
use harness::{project_path, require_root, require_tools, skip};
use std::any::type_name;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

/// Set inside a session.
const INSIDE: &str = "FLEXNBD_LAB_INSIDE";
/// The directory of the packages, for those inside.
const PACKAGES: &str = "FLEXNBD_LAB_PACKAGES";
/// Sessions at once: more only slow each other down.
const SESSIONS_MAX: usize = 2;
/// How long a test may take that normally takes less than a minute.
const LIMIT: Duration = Duration::from_secs(400);
/// What a line begins with that is to be seen although the test passes.
const NEWS: &str = "\u{2}news: ";

/// The name of clients' threads.
const CLIENT: &str = "client";

/// What a lab is made of, and the clients that are let loose in it.
const TOOLS: [&str; 16] = [
    "cargo-deb",
    "dbus-daemon",
    "dpkg-deb",
    "fio",
    "ip",
    "losetup",
    "mkfs.ext4",
    "nsenter",
    "python3",
    "qemu-io",
    "qemu-storage-daemon",
    "setpriv",
    "strip",
    "systemd-nspawn",
    "timeout",
    "unshare",
];

/// Runs `body` in a session of its own. It must be the closure of a test that does nothing else:
/// the name of the test is taken from it.
#[track_caller]
pub(crate) fn in_lab<F: FnOnce()>(body: F) {
    if std::env::var_os(INSIDE).is_some() {
        be_quiet_about_clients();
        return body();
    }
    let path = type_name::<F>();
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    let name = name.strip_suffix("::{{closure}}").expect("the body is a closure of the test");
    if !can_be_had(name) {
        return;
    }
    let packages = package::both();
    let _slot = Slot::take();
    let output = session(name, &packages);
    let text = String::from_utf8_lossy(&output.stdout);
    let text = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let passed = output.status.success() && text.contains("1 passed");
    assert!(passed, "{name} ended with {} and said:\n{text}", output.status);
    for line in text.lines().filter_map(|line| line.strip_prefix(NEWS)) {
        let _ = writeln!(std::io::stderr(), "{name}: {line}");
    }
}

/// The thread of a client, whose failure is for its test to report, if it is one.
pub(crate) fn client<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::Builder::new().name(CLIENT.to_owned()).spawn(work).unwrap()
}

fn be_quiet_about_clients() {
    let aloud = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name() != Some(CLIENT) {
            aloud(panic);
        }
    }));
}

/// Says something that is to be seen although the test passes.
pub(crate) fn tell(news: &str) {
    println!("\n{NEWS}{news}");
}

/// Inside: where the packages are.
pub(crate) fn packages() -> PathBuf {
    std::env::var_os(PACKAGES).expect("inside a session").into()
}

/// Runs `lab.sh` with these words to its end.
#[track_caller]
pub(crate) fn lab(words: &[&str]) -> Output {
    let script = std::env::var_os("LAB").expect("inside a session");
    let mut command = Command::new(script);
    command.args(words).stdin(Stdio::null());
    command.output().unwrap()
}

/// Whether there can be a lab here. When not: fails under `CI`, says so elsewhere.
fn can_be_had(name: &str) -> bool {
    if !require_root(name) {
        return false;
    }
    if !std::path::Path::new("/dev/loop-control").exists() {
        assert!(std::env::var_os("CI").is_none(), "no loop devices, and CI must not skip");
        skip(name, "there are no loop devices");
        return false;
    }
    require_tools(&TOOLS)
}

fn session(name: &str, packages: &OsStr) -> Output {
    let script = project_path("tests/lab/lab.sh");
    let limit = LIMIT.as_secs().to_string();
    let mut command = Command::new("timeout");
    command.args(["--kill-after=20", &limit]).arg(script).arg("run");
    command.arg(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]);
    command.env(INSIDE, "1").env(PACKAGES, packages).stdin(Stdio::null());
    command.output().unwrap()
}

/// The right to run a session.
struct Slot;

static TAKEN: Mutex<usize> = Mutex::new(0);
static GIVEN_BACK: Condvar = Condvar::new();

impl Slot {
    fn take() -> Slot {
        let taken = TAKEN.lock().unwrap();
        *GIVEN_BACK.wait_while(taken, |taken| *taken >= SESSIONS_MAX).unwrap() += 1;
        Slot
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap() -= 1;
        GIVEN_BACK.notify_one();
    }
}

//! Runs a test inside a virtual machine: the test binary executes itself there for that one test.
//! One machine runs at a time, since each emulates two processors.
//!
//! Outside, [`with_kernel`] and [`on_host`] check the requirements, make the disk, and wait for the
//! machine, which `vm.sh` boots. Inside, they run the test.

use harness::{
    TempDir, nested, package, project_path, require_root, require_tools, run, skip, temp_dir,
};
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Environment variable that is set inside a machine.
const INSIDE: &str = "FLEXNBD_VM_INSIDE";
/// Time limit of a machine in seconds; a test normally takes less than a minute.
const LIMIT_SECS: &str = "400";
/// The packages inside a machine of [`on_host`].
const PACKAGES: &str = "/job/packages";

/// The programs of which a machine is made.
const TOOLS: [&str; 9] = [
    "busybox",
    "cpio",
    "depmod",
    "mke2fs",
    "mmdebstrap",
    "qemu-system-x86_64",
    "strip",
    "timeout",
    "zstd",
];

/// The programs of this machine that tests use in a machine of [`with_kernel`].
const PROGRAMS: [&str; 16] = [
    "blkdiscard",
    "blockdev",
    "btrfs",
    "cp",
    "debugfs",
    "dmsetup",
    "e2fsck",
    "fio",
    "fstrim",
    "losetup",
    "mkfs.btrfs",
    "mkfs.ext4",
    "mkfs.xfs",
    "nbd-client",
    "nice",
    "xfs_repair",
];

/// The kernel modules that are loaded in a machine of [`with_kernel`].
const MODULES: &str = "nbd xfs btrfs sch_netem loop dm_log_writes tls gcm ctr aesni_intel";

/// Runs `body` as root in a machine that has a kernel, a file system in memory, and [`PROGRAMS`].
/// `body` must be the closure of a test function that does nothing else: its type name yields the
/// name of the test.
#[track_caller]
pub(crate) fn with_kernel<F: FnOnce()>(body: F) {
    with_modules(MODULES, body);
}

/// The same with these kernel modules instead of [`MODULES`].
#[track_caller]
pub(crate) fn with_modules<F: FnOnce()>(modules: &str, body: F) {
    if is_inside() {
        return body();
    }
    let name = nested::test_name::<F>();
    if !require_tools(&PROGRAMS) || !requirements_met(name) {
        return;
    }
    let mut command = vm("run");
    command.args(["-s", LIMIT_SECS, "-k", modules, "-p", &PROGRAMS.join(" ")]);
    run_machine(command, name, &[]);
}

/// Runs `body` as root on a Debian that has booted with systemd; see [`with_kernel`]. When the body
/// reboots the host it is run again from its beginning.
#[track_caller]
pub(crate) fn on_host<F: FnOnce()>(body: F) {
    if is_inside() {
        return body();
    }
    let name = nested::test_name::<F>();
    if !require_tools(&package::TOOLS) || !requirements_met(name) {
        return;
    }
    let packages = package::build(env!("CARGO_PKG_VERSION"));
    let mut command = vm("host");
    command.args(["-s", LIMIT_SECS]);
    let files = [package::CURRENT, package::NEXT].map(|name| packages.join(name));
    run_machine(command, name, &files);
}

/// Inside a machine of [`on_host`]: the file of a package.
pub(crate) fn package_file(name: &str) -> PathBuf {
    Path::new(PACKAGES).join(name)
}

fn is_inside() -> bool {
    env::var_os(INSIDE).is_some()
}

fn vm(word: &str) -> Command {
    let mut command = Command::new(project_path("tests/vm/vm.sh"));
    command.arg(word).env("VM_DIR", directory()).stdin(Stdio::null());
    command
}

/// The directory of kernel and disk, in that of cargo's builds, which keeps them between runs.
fn directory() -> PathBuf {
    harness::flexnbd().ancestors().nth(2).unwrap().join("vm")
}

/// Whether this computer can run machines. If not: fails under `CI`, otherwise prints a skip line.
fn requirements_met(name: &str) -> bool {
    static PREPARED: OnceLock<Result<(), String>> = OnceLock::new();
    if !require_root(name) || !require_tools(&TOOLS) {
        return false;
    }
    let prepared = PREPARED.get_or_init(|| {
        let output = vm("prepare").output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        if output.status.success() { Ok(()) } else { Err(message.trim().to_owned()) }
    });
    if let Err(why) = prepared {
        assert!(env::var_os("CI").is_none(), "{why}; CI must not skip");
        skip(name, why);
    }
    prepared.is_ok()
}

/// Runs the test `name` in the machine that `command` boots, which also gets these packages.
#[track_caller]
fn run_machine(mut command: Command, name: &str, packages: &[PathBuf]) {
    static MACHINE: Mutex<()> = Mutex::new(());
    let job = job(name, packages);
    command.arg(job.path().join("script"));
    for file in ["test", "flexnbd", "packages"] {
        command.arg(job.path().join(file));
    }
    let output = {
        let _one_at_a_time = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        command.output().unwrap()
    };
    nested::assert_passed(name, &output);
}

/// The files of a machine: the script, the test binary, the program under test, and packages.
fn job(name: &str, packages: &[PathBuf]) -> TempDir {
    let job = temp_dir();
    let place = |name: &str| job.path().join(name).display().to_string();
    for (program, to) in [(env::current_exe().unwrap(), "test"), (harness::flexnbd(), "flexnbd")] {
        run("strip", &["-o", &place(to), &program.display().to_string()]);
    }
    fs::create_dir(place("packages")).unwrap();
    for package in packages {
        let to = Path::new(&place("packages")).join(package.file_name().unwrap());
        fs::copy(package, to).unwrap();
    }
    let arguments = nested::arguments(name).join(" ");
    let script = format!(
        "export {INSIDE}=1 CARGO_BIN_EXE_flexnbd=/job/flexnbd RUST_BACKTRACE=1\n\
         exec /job/test {arguments}\n"
    );
    fs::write(place("script"), script).unwrap();
    job
}

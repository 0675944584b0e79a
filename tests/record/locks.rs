//! Locks: QEMU's programs and ours keep each other off an image, and readers share it.

use crate::{SIZE, image};
use harness::host::Host;
use harness::{
    Builder, Endpoint, Server, compile, poll_until, require_tool, sparse_image, temp_dir,
};
use nix::libc;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

fn qemu(program: &str, words: &[&str], image: &Path) -> Output {
    Command::new(program).args(words).arg(image).output().unwrap()
}

fn have_qemu() -> bool {
    ["qemu-img", "qemu-io", "qemu-nbd"].iter().all(|name| require_tool(name))
}

#[test]
fn qemu_does_not_change_an_image_that_is_served() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let held_off = |program: &str, words: &[&str]| {
        let output = qemu(program, words, &host.image);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains("lock"), "{program} {words:?}: {told}");
    };
    let image = host.image.display().to_string();
    let resize = || {
        let words = ["resize", "-f", "raw", host.image.to_str().unwrap(), "8M"];
        Command::new("qemu-img").args(words).output().unwrap()
    };
    for modes in [&[][..], &["--read-only"]] {
        let serving = host.mode("serve").args(modes).start();
        held_off("qemu-io", &["-f", "raw", "-c", "write -P 7 0 4k"]);
        assert!(!resize().status.success());
        assert_eq!(std::fs::metadata(&host.image).unwrap().len(), SIZE);
        // It would serve for ever, were it not held off.
        let socket = dir.path().join("qemu.sock").display().to_string();
        held_off("timeout", &["20", "qemu-nbd", "-f", "raw", "-t", "-k", &socket]);
        let copy = |force: &[&str]| {
            let words = [&["convert", "-f", "raw", "-O", "raw"], force, &[&image]].concat();
            qemu("qemu-img", &words, &dir.path().join("copy.img")).status.success()
        };
        assert_eq!(copy(&[]), !modes.is_empty(), "readers share with readers only");
        assert!(copy(&["-U"]));
        drop(serving);
    }
    assert!(resize().status.success());
}

#[test]
fn an_image_that_qemu_uses_is_refused_with_its_name() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let holding = QemuIo::open(&host.image, false);
    let pid = holding.child.id();
    for modes in [&[][..], &["--read-only"]] {
        let told = refused(&host, "serve", modes);
        assert!(told.contains("in use") && told.contains("qemu-io"), "{told}");
        assert!(told.contains(&format!("process {pid}")), "{told}");
    }
    refused(&host, "listen", &[]);
    let adopt = Command::new(env!("CARGO_BIN_EXE_flexnbd"))
        .args(["adopt", "--force", "--file"])
        .arg(&host.image)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&adopt.stderr).into_owned();
    assert!(adopt.status.code() == Some(78) && told.contains("qemu-io"), "{told}");
    drop(holding);
    drop(host.serve());
}

#[test]
fn readers_of_qemu_and_ours_share_an_image() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let holding = QemuIo::open(&host.image, true);
    let reading = || Builder::serve(&host.image).args(["--read-only"]).start();
    let _two: [Server; 2] = [reading(), reading()];
    let told = refused(&host, "serve", &[]);
    assert!(told.contains("qemu-io") || told.contains("flexnbd"), "{told}");
    drop(holding);
}

#[test]
fn the_process_that_serves_an_image_is_named() {
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    sparse_image(dir.path(), "a.img", SIZE);
    let serving = host.serve();
    let told = refused(&Host::new(dir.path(), "a"), "serve", &[]);
    assert!(told.contains(&format!("process {} (flexnbd)", serving.pid())), "{told}");
}

#[test]
fn an_image_that_cannot_be_locked_is_refused_with_a_remedy() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let library = compile(dir.path(), "tests/record/failing_lock.c", &["-shared", "-fPIC"]);
    let host = host.env("LD_PRELOAD", library.to_str().unwrap());
    for (kind, named) in [("flock", "(flock(2))"), ("fcntl", "(F_OFD_SETLK of fcntl(2))")] {
        for errno in [libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP] {
            let failing = host.clone().env("FAILING_LOCK", kind);
            let failing = failing.env("FAILING_ERRNO", &errno.to_string());
            for mode in ["serve", "listen"] {
                let told = refused(&failing, mode, &[]);
                assert!(told.contains(&format!("cannot be locked {named}: ")), "{told}");
                assert!(told.contains("local_lock=all"), "{told}");
            }
        }
    }
}

/// The kernel keeps a lock until the last descriptor is closed.
#[test]
fn a_killed_server_leaves_no_lock() {
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    for _ in 0..3 {
        let mut serving = host.serve();
        serving.signal(nix::sys::signal::Signal::SIGKILL);
        serving.wait_for_end();
    }
    drop(host.serve());
}

#[track_caller]
fn refused(host: &Host, mode: &str, words: &[&str]) -> String {
    let mut refused = host.mode(mode).args(words).at(Endpoint::Tcp(host.address)).spawn();
    let status = refused.wait_for_end();
    assert_eq!(status.code(), Some(78), "{}", refused.stderr());
    refused.stderr()
}

/// A qemu-io that has an image open until it is dropped.
struct QemuIo {
    child: Child,
    _stdin: ChildStdin,
}

impl QemuIo {
    fn open(image: &Path, read_only: bool) -> QemuIo {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "raw"]).args(read_only.then_some("-r")).arg(image);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        writeln!(stdin, "length").unwrap();
        let stdout = child.stdout.take().unwrap();
        let answered = std::thread::spawn(move || {
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
            lines.any(|line| line.is_ok_and(|line| line.contains("4 MiB")))
        });
        assert!(poll_until(harness::TIMEOUT, || answered.is_finished()));
        assert!(answered.join().unwrap(), "qemu-io does not open the image");
        QemuIo { child, _stdin: stdin }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

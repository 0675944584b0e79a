//! Image locks: QEMU and flexnbd exclude each other from an image, and readers share it.

use crate::{SIZE, assert_refused, assert_serve_refused, image};
use harness::host::Host;
use harness::{Builder, Server, compile, poll_until, require_tool, sparse_image, temp_dir};
use nix::libc;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Output, Stdio};

fn run_qemu(program: &str, arguments: &[&str], image: &Path) -> Output {
    Command::new(program).args(arguments).arg(image).output().unwrap()
}

fn have_qemu() -> bool {
    ["qemu-img", "qemu-io", "qemu-nbd"].iter().all(|name| require_tool(name))
}

#[test]
fn qemu_cannot_change_a_served_image() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let assert_locked_out = |program: &str, arguments: &[&str]| {
        let output = run_qemu(program, arguments, &host.image);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        let is_locked_out = !output.status.success() && message.contains("lock");
        assert!(is_locked_out, "{program} {arguments:?}: {message}");
    };
    let image = host.image.display().to_string();
    let resize = || {
        let arguments = ["resize", "-f", "raw", host.image.to_str().unwrap(), "8M"];
        Command::new("qemu-img").args(arguments).output().unwrap()
    };
    for flags in [&[][..], &["--read-only"]] {
        let server = host.mode("serve").args(flags).start();
        assert_locked_out("qemu-io", &["-f", "raw", "-c", "write -P 7 0 4k"]);
        assert!(!resize().status.success());
        assert_eq!(std::fs::metadata(&host.image).unwrap().len(), SIZE);
        // qemu-nbd would run forever if it got the lock.
        let socket = dir.path().join("qemu.sock").display().to_string();
        assert_locked_out("timeout", &["20", "qemu-nbd", "-f", "raw", "-t", "-k", &socket]);
        let copy = |force: &[&str]| {
            let arguments = [&["convert", "-f", "raw", "-O", "raw"], force, &[&image]].concat();
            run_qemu("qemu-img", &arguments, &dir.path().join("copy.img")).status.success()
        };
        assert_eq!(copy(&[]), !flags.is_empty(), "readers share with readers only");
        assert!(copy(&["-U"]));
        drop(server);
    }
    assert!(resize().status.success());
}

#[test]
fn refusals_name_the_qemu_process() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let qemu_io = QemuIo::open(&host.image, false);
    let pid = qemu_io.child.id();
    for flags in [&[][..], &["--read-only"]] {
        let message = assert_refused(&host, "serve", flags);
        assert!(message.contains("in use") && message.contains("qemu-io"), "{message}");
        assert!(message.contains(&format!("process {pid}")), "{message}");
    }
    assert_refused(&host, "listen", &[]);
    let adopt = Command::new(env!("CARGO_BIN_EXE_flexnbd"))
        .args(["adopt", "--force", "--file"])
        .arg(&host.image)
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&adopt.stderr).into_owned();
    assert!(adopt.status.code() == Some(78) && message.contains("qemu-io"), "{message}");
    drop(qemu_io);
    drop(host.serve());
}

#[test]
fn qemu_and_flexnbd_readers_share_an_image() {
    if !have_qemu() {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let qemu_io = QemuIo::open(&host.image, true);
    let reader = || Builder::serve(&host.image).args(["--read-only"]).start();
    let _readers: [Server; 2] = [reader(), reader()];
    let message = assert_serve_refused(&host);
    assert!(message.contains("qemu-io") || message.contains("flexnbd"), "{message}");
    drop(qemu_io);
}

#[test]
fn refusals_name_the_serving_process() {
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    sparse_image(dir.path(), "a.img", SIZE);
    let server = host.serve();
    let message = assert_serve_refused(&Host::new(dir.path(), "a"));
    assert!(message.contains(&format!("process {} (flexnbd)", server.pid())), "{message}");
}

#[test]
fn lock_errors_refuse_the_image_with_a_remedy() {
    if !require_tool("cc") {
        return;
    }
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    let library = compile(dir.path(), "tests/record/failing_lock.c", &["-shared", "-fPIC"]);
    let host = host.env("LD_PRELOAD", library.to_str().unwrap());
    for (kind, call) in [("flock", "(flock(2))"), ("fcntl", "(F_OFD_SETLK of fcntl(2))")] {
        for errno in [libc::ENOLCK, libc::ENOSYS, libc::EOPNOTSUPP] {
            let failing = host.clone().env("FAILING_LOCK", kind);
            let failing = failing.env("FAILING_ERRNO", &errno.to_string());
            for mode in ["serve", "listen"] {
                let message = assert_refused(&failing, mode, &[]);
                assert!(message.contains(&format!("cannot be locked {call}: ")), "{message}");
                assert!(message.contains("local_lock=all"), "{message}");
            }
        }
    }
}

/// The kernel keeps a lock until the last descriptor of the open file is closed.
#[test]
fn a_killed_server_leaves_no_lock() {
    let dir = temp_dir();
    let host = Host::new(dir.path(), "a");
    image(&host, b"precious");
    for _ in 0..3 {
        let mut server = host.serve();
        server.signal(nix::sys::signal::Signal::SIGKILL);
        server.wait_for_end();
    }
    drop(host.serve());
}

/// A qemu-io process with an open image; killed when dropped.
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
        let printed_length = std::thread::spawn(move || {
            let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stdout));
            lines.any(|line| line.is_ok_and(|line| line.contains("4 MiB")))
        });
        assert!(poll_until(harness::TIMEOUT, || printed_length.is_finished()));
        assert!(printed_length.join().unwrap(), "qemu-io does not open the image");
        QemuIo { child, _stdin: stdin }
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! Third-party clients: fio, libnbd, and QEMU, which reconnects by itself.
//! Checks what each program reports about its requests, besides its exit status.

use harness::fio::Fio;
use harness::{Endpoint, TIMEOUT, TempDir, poll_until, project_path, temp_dir, wait_until};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// fio: random writes over four connections, 32 in flight on each, continuously read back and
/// verified. Uses the first 128 MiB of the disk.
#[track_caller]
pub(crate) fn start_fio(target: &Endpoint) -> Fio {
    let words = "--ioengine=nbd --bsrange=4k-64k --bs_unaligned=0 --size=16m --offset_increment=32m \
         --numjobs=4 --iodepth=32";
    let uri = format!("--uri={}", target.uri());
    let fio = Fio::start(words.split_whitespace().chain([uri.as_str()]));
    wait_until("fio to connect", || fio.log().matches("connected to NBD server").count() == 4);
    fio
}

/// qemu-storage-daemon between a client and the server: it reconnects after a connection loss and
/// resends unanswered requests, so the client behind it must see no error.
pub(crate) struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    #[track_caller]
    pub(crate) fn between(target: &Endpoint) -> Qemu {
        let dir = temp_dir();
        let socket = dir.path().join("nbd.sock");
        let server = match target {
            Endpoint::Tcp(address) => format!(
                "server.type=inet,server.host={},server.port={}",
                address.ip(),
                address.port()
            ),
            Endpoint::Unix(path) => format!("server.type=unix,server.path={}", path.display()),
        };
        let mut command = Command::new("qemu-storage-daemon");
        command.arg("--blockdev");
        command.arg(format!("driver=nbd,node-name=disk,reconnect-delay=60,{server}"));
        command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", socket.display()));
        command.args(["--export", "type=nbd,id=disk,node-name=disk,name=,writable=on"]);
        let child = command.stdin(Stdio::null()).spawn().unwrap();
        let mut qemu = Qemu { child, dir };
        let up = poll_until(TIMEOUT, || {
            assert!(qemu.child.try_wait().unwrap().is_none(), "qemu-storage-daemon exited");
            std::os::unix::net::UnixStream::connect(&socket).is_ok()
        });
        assert!(up, "qemu-storage-daemon does not accept connections");
        qemu
    }

    /// The unix socket where it serves the disk.
    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::Unix(self.dir.path().join("nbd.sock"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        kill_and_reap(&mut self.child);
    }
}

/// The libnbd client `libnbd.py`: keeps 32 requests in flight and verifies every read.
pub(crate) struct Libnbd {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Libnbd {
    /// Uses the disk from `offset` on, in bytes.
    #[track_caller]
    pub(crate) fn start(target: &Endpoint, offset: u64) -> Libnbd {
        let script = project_path("tests/lab/libnbd.py");
        // Debian's Python, which has its packages; PATH may name another.
        let mut command = Command::new("nice");
        command.arg("/usr/bin/python3").arg(script).arg(target.uri()).arg(offset.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        let mut libnbd = Libnbd { child, stdin, stdout };
        assert_eq!(libnbd.line(), "connected");
        libnbd
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Stops the client; fails if it exits with an error. Returns its summary line.
    #[track_caller]
    pub(crate) fn stop(mut self) -> String {
        let _ = self.stdin.take().unwrap().write_all(b"stop\n");
        let line = self.line();
        let status = self.child.wait().unwrap();
        assert!(status.success() && line.starts_with("libnbd: "), "{status}, {line:?}");
        line
    }
}

impl Drop for Libnbd {
    fn drop(&mut self) {
        kill_and_reap(&mut self.child);
    }
}

fn kill_and_reap(child: &mut Child) {
    if let Ok(None) = child.try_wait() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

//! The systems that migrate a disk. The time excludes starting and stopping their servers.

use super::Error;
use super::disks::{self, Pair};
use super::machine::version;
use super::nbd::{Address, Export};
use super::process::{PATIENCE, Process, find, free_port, wait_until};
use super::rates::Run;
use flexnbd::control::command::{ArrivalAction, Mirror};
use flexnbd::control::{Command as Order, Summary, ask_and_wait};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MIGRATION_TIME_MAX: Duration = Duration::from_secs(600);
/// Time limit for both sides to exit after the migration.
const EXIT_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) version: String,
    method: Method,
    programs: Vec<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// `serve` and `listen`.
    Flexnbd,
    /// nbdcopy between two nbdkits: offline, nothing may write meanwhile.
    Nbdcopy { flush: bool },
    /// qemu-storage-daemon to qemu-nbd.
    Qemu,
}

/// Those of `names` that are installed, and other builds of flexnbd; prints which are missing.
pub(super) fn installed(
    names: &[String],
    also: &[(String, PathBuf)],
) -> Result<Vec<System>, Error> {
    let mut systems = Vec::new();
    for name in names {
        let (method, programs): (_, &[&str]) = match name.as_str() {
            "flexnbd" => (Method::Flexnbd, &[env!("CARGO_BIN_EXE_flexnbd")]),
            "nbdcopy" => (Method::Nbdcopy { flush: false }, &["nbdcopy", "nbdkit"]),
            "nbdcopy-flush" => (Method::Nbdcopy { flush: true }, &["nbdcopy", "nbdkit"]),
            "qemu" => (Method::Qemu, &["qemu-storage-daemon", "qemu-nbd"]),
            _ => return Err(format!("unknown system {name}").into()),
        };
        let found: Result<Vec<PathBuf>, &str> =
            programs.iter().map(|program| find(program).ok_or(*program)).collect();
        match found {
            Ok(programs) => systems.push(System::new(name, method, programs)),
            Err(missing) => println!("# skipped {name}: {missing} is not installed"),
        }
    }
    let builds = also.iter();
    systems
        .extend(builds.map(|(name, path)| System::new(name, Method::Flexnbd, vec![path.clone()])));
    if systems.is_empty() { Err("there is no system to measure".into()) } else { Ok(systems) }
}

impl System {
    fn new(name: &str, method: Method, programs: Vec<PathBuf>) -> Self {
        Self { name: name.to_owned(), version: version(&programs[0]), method, programs }
    }

    /// The program, if it is a build of flexnbd.
    pub(super) fn flexnbd(&self) -> Option<&Path> {
        (self.method == Method::Flexnbd).then_some(&self.programs[0])
    }

    pub(super) fn migrate(&self, pair: &Pair, network: &Network) -> Result<Run, Error> {
        let allocated_before = disks::allocated(&pair.source)?;
        let before = network.bytes();
        let program = &self.programs[0];
        let (elapsed, bytes_sent) = match self.method {
            Method::Flexnbd => {
                let moved = Sides::start(program, pair)?.migrate(None)?;
                (moved.elapsed, Some(moved.summary.bytes_sent))
            }
            Method::Qemu => (mirror(program, &self.programs[1], pair)?, None),
            Method::Nbdcopy { flush } => (copy(program, &self.programs[1], flush, pair)?, None),
        };
        let wire_bytes = network.bytes().zip(before).map(|(after, before)| after - before);
        Ok(Run {
            seconds: elapsed.as_secs_f64(),
            // The network does not count the unix sockets of nbdcopy.
            wire_bytes: wire_bytes.filter(|_| !matches!(self.method, Method::Nbdcopy { .. })),
            bytes_sent,
            allocated_before,
            allocated_after: disks::allocated(&pair.destination)?,
            same: disks::same(&pair.source, &pair.destination)?,
        })
    }
}

fn copy(nbdcopy: &Path, nbdkit: &Path, flush: bool, pair: &Pair) -> Result<Duration, Error> {
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(nbdcopy);
    command.arg("--destination-is-zero").args(flush.then_some("--flush"));
    let mut servers = Vec::new();
    for (name, image) in [("source", &pair.source), ("destination", &pair.destination)] {
        let socket = folder.path().join(name);
        let mut server = Command::new(nbdkit);
        server.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&socket);
        let mut server = Process::start(server.arg("file").arg(image), Stdio::null())?;
        wait_until(PATIENCE, || server.check().map(|()| socket.exists()))?;
        servers.push(server);
        command.arg(Export { address: Address::Unix(socket), name: "" }.uri());
    }
    let start = Instant::now();
    let end = Process::start(&mut command, Stdio::null())?.wait_for_success(MIGRATION_TIME_MAX)?;
    Ok(end - start)
}

/// A source with the disk and a destination without, both running.
#[derive(Debug)]
pub(super) struct Sides {
    source: Process,
    destination: Process,
    /// The address of the disk at the source.
    pub(super) address: SocketAddr,
    to: SocketAddr,
    control: PathBuf,
    /// Removed after the sides have exited.
    _folder: TempDir,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlexnbdMoved {
    pub(super) summary: Summary,
    pub(super) ordered: Instant,
    /// From the order until both sides have exited.
    pub(super) elapsed: Duration,
}

impl Sides {
    pub(super) fn start(program: &Path, pair: &Pair) -> Result<Self, Error> {
        let folder = tempfile::tempdir()?;
        let (address, to) = (free_port()?, free_port()?);
        let control = folder.path().join("source.sock");
        let side = |mode: &str, image: &Path, at: SocketAddr| {
            let mut command = Command::new(program);
            command.args([mode, "--quiet", "--addr", &at.ip().to_string()]);
            command.args(["--port", &at.port().to_string(), "--file"]).arg(image);
            // For records that cannot be kept with the image.
            command.env("STATE_DIRECTORY", folder.path());
            command
        };
        let mut serve = side("serve", &pair.source, address);
        serve.arg("--sock").arg(&control);
        let source = Process::start(serve, Stdio::null())?;
        let destination = Process::start(side("listen", &pair.destination, to), Stdio::null())?;
        // The control socket exists before the source listens.
        wait_for_listener(address)?;
        wait_for_listener(to)?;
        Ok(Self { source, destination, address, to, control, _folder: folder })
    }

    /// Migrates the disk at no more than `max_bps` bytes per second.
    pub(super) fn migrate(mut self, max_bps: Option<u64>) -> Result<FlexnbdMoved, Error> {
        let (to, control) = (self.to, self.control.clone());
        let ordered = Instant::now();
        let (sender, answer) = mpsc::channel();
        // In a thread, because `ask_and_wait` has no time limit.
        thread::spawn(move || {
            let mirror =
                Mirror { to, action: ArrivalAction::Exit, bind: None, max_bps, no_record: false };
            let _ = sender.send(ask_and_wait(&control, &Order::MirrorWait(mirror)));
        });
        let reply = answer.recv_timeout(MIGRATION_TIME_MAX)??;
        if !reply.is_success() {
            return Err(format!("the source answers: {}", reply.text()).into());
        }
        let summary = Summary::from_line(reply.text()).map_err(|error| error.to_string())?;
        let source = self.source.wait_for_success(EXIT_TIME_MAX)?;
        let destination = self.destination.wait_for_success(EXIT_TIME_MAX)?;
        Ok(FlexnbdMoved { summary, ordered, elapsed: source.max(destination) - ordered })
    }
}

/// qemu-storage-daemon mirrors the disk to qemu-nbd. The time ends when the job is ready, which is
/// when QEMU could switch over.
fn mirror(daemon: &Path, nbd: &Path, pair: &Pair) -> Result<Duration, Error> {
    let folder = tempfile::tempdir()?;
    let to = free_port()?;
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let mut command = Command::new(nbd);
    command.args(["--format=raw", "--persistent", "--shared=0", "--cache=writeback"]);
    command.args(["--discard=unmap", "--detect-zeroes=unmap", "--aio=threads"]);
    command.args(["--bind", &host, "--port", &port]).arg(&pair.destination);
    let _destination = Process::start(command, Stdio::null())?;
    let socket = folder.path().join("qmp");
    let mut command = Command::new(daemon);
    command.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", value(&socket))]);
    command.args(["--monitor", "chardev=c", "--blockdev"]);
    let image = value(&pair.source);
    command.arg(format!("driver=file,node-name=file,filename={image},discard=unmap"));
    command.args(["--blockdev", "driver=raw,node-name=source,file=file"]);
    let _source = Process::start(command, Stdio::null())?;
    wait_for_listener(to)?;
    let mut monitor = Monitor::connect(&socket)?;
    let is_return = |line: &Value| line.get("return").is_some();
    monitor.execute("qmp_capabilities", &json!({}), is_return)?;
    let start = Instant::now();
    let server = json!({ "type": "inet", "host": host, "port": port });
    let node = json!({ "driver": "nbd", "node-name": "target", "server": server, "export": "" });
    monitor.execute("blockdev-add", &node, is_return)?;
    let job = json!({ "job-id": "move", "device": "source", "target": "target", "sync": "full" });
    // The event may precede the return.
    monitor.execute("blockdev-mirror", &job, |line| line["event"] == "BLOCK_JOB_READY")?;
    Ok(start.elapsed())
}

/// A path as an option value, in which QEMU expects double commas.
fn value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A QMP connection: one JSON value per line.
#[derive(Debug)]
struct Monitor {
    stream: BufReader<UnixStream>,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Self, Error> {
        wait_until(PATIENCE, || Ok(UnixStream::connect(path).is_ok()))?;
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(MIGRATION_TIME_MAX))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Executes a command and reads lines until one ends it; fails if the command or a job fails.
    fn execute(
        &mut self,
        name: &str,
        arguments: &Value,
        ends: impl Fn(&Value) -> bool,
    ) -> Result<(), Error> {
        writeln!(self.stream.get_mut(), "{}", json!({ "execute": name, "arguments": arguments }))?;
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            // Fails at the end of the stream, too.
            let line: Value = serde_json::from_str(&line)?;
            let failures = ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_ERROR", "BLOCK_JOB_CANCELLED"];
            if line.get("error").is_some() || failures.iter().any(|event| line["event"] == *event) {
                return Err(format!("qemu-storage-daemon: {name} failed: {line}").into());
            }
            if ends(&line) {
                return Ok(());
            }
        }
    }
}

/// A network namespace of the benchmark's own, whose loopback counts only bytes of the migration.
#[derive(Debug)]
pub(super) struct Network {
    /// Why the namespace is not the benchmark's own, if so.
    pub(super) why_shared: Option<String>,
}

impl Network {
    /// Moves this thread, and threads and processes that it starts, into a new network namespace.
    /// Without root it stays in its own.
    pub(super) fn new() -> Self {
        let enter = || -> Result<(), Error> {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("cannot make a network namespace ({error})"))?;
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            if up.success() { Ok(()) } else { Err("`ip link set lo up` failed".into()) }
        };
        Self { why_shared: enter().err().map(|error| error.to_string()) }
    }

    /// All bytes sent over loopback, headers of IP and TCP included, if only this benchmark sends.
    pub(super) fn bytes(&self) -> Option<u64> {
        if self.why_shared.is_some() {
            return None;
        }
        let devices = fs::read_to_string("/proc/thread-self/net/dev").ok()?;
        let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
        // The ninth number is that of bytes sent.
        line.split_whitespace().nth(8)?.parse().ok()
    }
}

/// Waits for a listener without connecting: a destination may take the first client for its source.
fn wait_for_listener(address: SocketAddr) -> Result<(), Error> {
    let port = format!(":{:04X}", address.port());
    let is_listening = || {
        let sockets = fs::read_to_string("/proc/thread-self/net/tcp")?;
        Ok(sockets.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // 0A is TCP_LISTEN.
            matches!(fields[..], [_, local, _, "0A", ..] if local.ends_with(&port))
        }))
    };
    if wait_until(PATIENCE, is_listening)? {
        Ok(())
    } else {
        Err(format!("nothing listens at {address}").into())
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::disks::Kind;
    use super::*;

    #[test]
    fn every_installed_system_moves_the_disk() {
        let names = ["flexnbd", "nbdcopy", "nbdcopy-flush", "qemu"].map(str::to_owned);
        let directory = tempfile::tempdir().unwrap();
        for system in installed(&names, &[]).unwrap() {
            let pair = Pair::new(directory.path(), Kind::Sparse25, 8 << 20).unwrap();
            let run = system.migrate(&pair, &Network::new()).unwrap();
            assert!(run.same, "{}", system.name);
            for bytes in [run.wire_bytes, run.bytes_sent].into_iter().flatten() {
                assert!(bytes >= 2 << 20, "{}: {run:?}", system.name);
            }
        }
    }
}

//! The systems that migrate a disk. The time excludes starting and stopping their servers.

use super::disks::{Pair, allocated};
use super::rates::Run;
use crate::machine::version;
use crate::nbd::Export;
use crate::process::{FLEXNBD, Installed, Process, installed};
use crate::report::Error;
use flexnbd::control::command::{ArrivalAction, Mirror};
use flexnbd::control::{Command as Order, Summary, ask, ask_within};
use flexnbd::net::Address;
use harness::free_port;
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const MIGRATION_TIME_MAX: Duration = Duration::from_secs(600);
/// Time limit for both sides to exit after the migration.
const EXIT_TIME_MAX: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(crate) struct System {
    pub(crate) name: String,
    pub(crate) version: String,
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

const SYSTEMS: [(&str, Method, &[&str]); 4] = [
    ("flexnbd", Method::Flexnbd, &[FLEXNBD]),
    ("nbdcopy", Method::Nbdcopy { flush: false }, &["nbdcopy", "nbdkit"]),
    ("nbdcopy-flush", Method::Nbdcopy { flush: true }, &["nbdcopy", "nbdkit"]),
    ("qemu", Method::Qemu, &["qemu-storage-daemon", "qemu-nbd"]),
];

/// The systems with these names, if they are installed, and other builds of flexnbd.
pub(crate) fn systems(names: &[String], also: &[(String, PathBuf)]) -> Result<Vec<System>, Error> {
    let system = |Installed { name, kind: method, programs }: Installed<Method>| System {
        name,
        version: version(&programs[0]),
        method,
        programs,
    };
    Ok(installed(names, also, &SYSTEMS)?.into_iter().map(system).collect())
}

impl System {
    /// The program, if it is a build of flexnbd.
    pub(crate) fn flexnbd(&self) -> Option<&Path> {
        (self.method == Method::Flexnbd).then_some(&self.programs[0])
    }

    pub(crate) fn migrate(&self, pair: &Pair, network: &Network) -> Result<Run, Error> {
        let allocated_before = allocated(&pair.source)?;
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
            allocated_after: allocated(&pair.destination)?,
            same: pair.has_equal_contents()?,
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
        server.wait_until(|| socket.exists())?;
        servers.push(server);
        command.arg(Export { address: Address::Unix(socket), name: "", tls: None }.uri());
    }
    let start = Instant::now();
    let end = Process::start(&mut command, Stdio::null())?.wait_for_success(MIGRATION_TIME_MAX)?;
    Ok(end - start)
}

/// A source with the disk and a destination without, both running.
#[derive(Debug)]
pub(crate) struct Sides {
    source: Side,
    destination: Side,
    /// Removed after the sides have exited.
    _folder: TempDir,
}

#[derive(Debug)]
struct Side {
    process: Process,
    address: SocketAddr,
    control: PathBuf,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct FlexnbdMoved {
    pub(crate) summary: Summary,
    pub(crate) ordered: Instant,
    /// From the order until both sides have exited.
    pub(crate) elapsed: Duration,
}

impl Side {
    /// Starts `serve` or `listen`, and waits until it replies on its control socket; it listens by
    /// then. Never connects to it: a destination may take the first client for its source.
    fn start(program: &Path, mode: &str, image: &Path, folder: &Path) -> Result<Self, Error> {
        let (address, control) = (free_address(), folder.join(mode));
        let mut command = Command::new(program);
        command.args([mode, "--quiet", "--addr", &address.ip().to_string()]);
        command.args(["--port", &address.port().to_string(), "--file"]).arg(image);
        command.arg("--sock").arg(&control);
        // For records that cannot be kept with the image.
        command.env("STATE_DIRECTORY", folder);
        let mut process = Process::start(&mut command, Stdio::null())?;
        process.wait_until(|| ask(&control, &Order::Status).is_ok())?;
        Ok(Self { process, address, control })
    }
}

impl Sides {
    pub(crate) fn start(program: &Path, pair: &Pair) -> Result<Self, Error> {
        let folder = tempfile::tempdir()?;
        let source = Side::start(program, "serve", &pair.source, folder.path())?;
        let destination = Side::start(program, "listen", &pair.destination, folder.path())?;
        Ok(Self { source, destination, _folder: folder })
    }

    /// The address of the disk at the source.
    pub(crate) fn address(&self) -> SocketAddr {
        self.source.address
    }

    /// Migrates the disk at no more than `max_bps` bytes per second.
    pub(crate) fn migrate(mut self, max_bps: Option<u64>) -> Result<FlexnbdMoved, Error> {
        let (to, action) = (self.destination.address, ArrivalAction::Exit);
        let mirror = Mirror {
            to,
            action,
            bind: None,
            max_bps,
            no_record: false,
            relay: flexnbd::control::command::RelayRequest::AsConfigured,
            tls: Box::default(),
        };
        let ordered = Instant::now();
        let order = Order::MirrorWait(mirror);
        let reply = ask_within(&self.source.control, &order, MIGRATION_TIME_MAX)?;
        if !reply.is_success() {
            return Err(format!("the source answers: {}", reply.text()).into());
        }
        let summary = Summary::from_line(reply.text()).map_err(|error| error.to_string())?;
        let source = self.source.process.wait_for_success(EXIT_TIME_MAX)?;
        let destination = self.destination.process.wait_for_success(EXIT_TIME_MAX)?;
        Ok(FlexnbdMoved { summary, ordered, elapsed: source.max(destination) - ordered })
    }
}

fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_port()).into()
}

/// qemu-storage-daemon mirrors the disk to qemu-nbd. The time ends when the job is ready, which is
/// when QEMU could switch over.
fn mirror(daemon: &Path, nbd: &Path, pair: &Pair) -> Result<Duration, Error> {
    let folder = tempfile::tempdir()?;
    let to = free_address();
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let mut command = Command::new(nbd);
    command.args(["--format=raw", "--persistent", "--shared=0", "--cache=writeback"]);
    command.args(["--discard=unmap", "--detect-zeroes=unmap", "--aio=threads"]);
    // It writes the file after it listens.
    let pid_file = folder.path().join("pid");
    command.args(["--bind", &host, "--port", &port, "--pid-file"]).arg(&pid_file);
    let mut destination = Process::start(command.arg(&pair.destination), Stdio::null())?;
    destination.wait_until(|| pid_file.exists())?;
    let socket = folder.path().join("qmp");
    let mut command = Command::new(daemon);
    command.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", value(&socket))]);
    command.args(["--monitor", "chardev=c", "--blockdev"]);
    let image = value(&pair.source);
    command.arg(format!("driver=file,node-name=file,filename={image},discard=unmap"));
    command.args(["--blockdev", "driver=raw,node-name=source,file=file"]);
    let mut source = Process::start(&mut command, Stdio::null())?;
    source.wait_until(|| UnixStream::connect(&socket).is_ok())?;
    let monitor = UnixStream::connect(&socket)?;
    monitor.set_read_timeout(Some(MIGRATION_TIME_MAX))?;
    let mut monitor = BufReader::new(monitor);
    let is_return = |line: &Value| line.get("return").is_some();
    execute(&mut monitor, "qmp_capabilities", &json!({}), is_return)?;
    let start = Instant::now();
    let server = json!({ "type": "inet", "host": host, "port": port });
    let node = json!({ "driver": "nbd", "node-name": "target", "server": server, "export": "" });
    execute(&mut monitor, "blockdev-add", &node, is_return)?;
    let job = json!({ "job-id": "move", "device": "source", "target": "target", "sync": "full" });
    // The event may precede the return.
    execute(&mut monitor, "blockdev-mirror", &job, |line| line["event"] == "BLOCK_JOB_READY")?;
    Ok(start.elapsed())
}

/// A path as an option value, in which QEMU expects double commas.
fn value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// Executes a QMP command, one JSON value per line, and reads lines until one ends it. Fails if the
/// command or a job fails.
fn execute(
    monitor: &mut BufReader<UnixStream>,
    name: &str,
    arguments: &Value,
    ends: impl Fn(&Value) -> bool,
) -> Result<(), Error> {
    writeln!(monitor.get_mut(), "{}", json!({ "execute": name, "arguments": arguments }))?;
    loop {
        let mut line = String::new();
        monitor.read_line(&mut line)?;
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

/// A network namespace of the benchmark's own, whose loopback counts only bytes of the migration.
#[derive(Debug)]
pub(crate) struct Network {
    /// Why the namespace is not the benchmark's own, if so.
    pub(crate) why_shared: Option<String>,
}

impl Network {
    /// Moves this thread, and threads and processes that it starts, into a new network namespace.
    /// Without root it stays in its own.
    pub(crate) fn new() -> Self {
        let enter = || -> Result<(), Error> {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| format!("cannot make a network namespace ({error})"))?;
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            if up.success() { Ok(()) } else { Err("`ip link set lo up` failed".into()) }
        };
        Self { why_shared: enter().err().map(|error| error.to_string()) }
    }

    /// All bytes sent over loopback, headers of IP and TCP included, if only this benchmark sends.
    pub(crate) fn bytes(&self) -> Option<u64> {
        if self.why_shared.is_some() {
            return None;
        }
        let devices = fs::read_to_string("/proc/thread-self/net/dev").ok()?;
        let line = devices.lines().find_map(|line| line.trim_start().strip_prefix("lo:"))?;
        // The ninth number is that of bytes sent.
        line.split_whitespace().nth(8)?.parse().ok()
    }
}

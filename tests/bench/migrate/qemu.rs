//! QEMU's migration of a disk: qemu-storage-daemon mirrors it to qemu-nbd. The time ends when the job
//! is ready, which is when QEMU could switch over.

use super::Error;
use super::disks::Pair;
use super::network::wait_for_listener;
use super::process::{PATIENCE, Process, free_port, wait_until};
use super::systems::MIGRATION_TIME_MAX;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

pub(super) fn migrate(daemon: &Path, nbd: &Path, pair: &Pair) -> Result<Duration, Error> {
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

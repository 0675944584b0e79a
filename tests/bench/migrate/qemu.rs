//! QEMU's way: qemu-storage-daemon copies a disk into qemu-nbd and keeps the copy up to date.
//! The time ends when its job is ready, which is when the disk could be handed over.

use super::Trouble;
use super::disks::Pair;
use super::network::wait_for_listener;
use super::process::Process;
use super::running::free_port;
use super::servers::{Kind, Server};
use super::session::Address;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

/// How long QEMU may stay silent.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long until its monitor is there.
const START_TIME_MAX: Duration = Duration::from_secs(20);
/// How long to wait before looking again: a monitor tells nobody that it is there.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Moves the disk; how long it took.
///
/// # Errors
/// When QEMU cannot be started or its job fails.
pub(super) fn migrate(daemon: &Path, nbd: &Path, pair: &Pair) -> Result<Duration, Trouble> {
    let folder = tempfile::tempdir()?;
    let to = free_port()?;
    let kind = Kind::QemuNbdThreads;
    let program = Server { name: "qemu-nbd".into(), kind, program: nbd.into() };
    let mut command = program.command(&pair.destination, &Address::Tcp(to), folder.path());
    command.arg("--detect-zeroes=unmap");
    let _destination = Process::start(command, "qemu-nbd", folder.path())?;
    let socket = folder.path().join("qmp");
    let mut command = Command::new(daemon);
    command.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", path(&socket))]);
    command.args(["--monitor", "chardev=c"]);
    let file = format!("driver=file,node-name=file,filename={},discard=unmap", path(&pair.source));
    command.args(["--blockdev", &file, "--blockdev", "driver=raw,node-name=source,file=file"]);
    let _source = Process::start(command, "qemu-storage-daemon", folder.path())?;
    wait_for_listener(to)?;
    let mut monitor = Monitor::connect(&socket)?;
    let began = Instant::now();
    mirror(&mut monitor, to)?;
    Ok(began.elapsed())
}

/// QEMU takes a comma in a value when it is doubled.
fn path(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

fn mirror(monitor: &mut Monitor, to: SocketAddr) -> Result<(), Trouble> {
    let (host, port) = (to.ip().to_string(), to.port().to_string());
    let server = json!({ "type": "inet", "host": host, "port": port });
    let node = json!({ "driver": "nbd", "node-name": "target", "server": server, "export": "" });
    monitor.order("blockdev-add", &node)?;
    let job = json!({ "job-id": "move", "device": "source", "target": "target", "sync": "full" });
    monitor.order("blockdev-mirror", &job)?;
    monitor.wait_until_ready()
}

/// QEMU's control socket: one JSON value a line.
#[derive(Debug)]
struct Monitor {
    stream: BufReader<UnixStream>,
    /// An event that came before the answer to an order.
    ready: bool,
}

impl Monitor {
    fn connect(path: &Path) -> Result<Self, Trouble> {
        let deadline = Instant::now() + START_TIME_MAX;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => {
                    return Err(format!("no monitor of qemu-storage-daemon: {error}").into());
                }
                Err(_) => thread::sleep(LOOK_AGAIN),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { stream: BufReader::new(stream), ready: false };
        monitor.next()?;
        monitor.order("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    fn order(&mut self, name: &str, arguments: &Value) -> Result<(), Trouble> {
        let order = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{order}")?;
        loop {
            let said = self.next()?;
            if let Some(error) = said.get("error") {
                return Err(format!("qemu-storage-daemon refuses {name}: {error}").into());
            }
            if said.get("return").is_some() {
                return Ok(());
            }
        }
    }

    fn wait_until_ready(&mut self) -> Result<(), Trouble> {
        while !self.ready {
            self.next()?;
        }
        Ok(())
    }

    /// What it says next. An event that means failure is an error.
    fn next(&mut self) -> Result<Value, Trouble> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err("qemu-storage-daemon closed its monitor".into());
        }
        let said: Value = serde_json::from_str(&line)?;
        match said.get("event").and_then(Value::as_str) {
            Some("BLOCK_JOB_READY") => self.ready = true,
            Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_ERROR" | "BLOCK_JOB_CANCELLED") => {
                return Err(format!("qemu-storage-daemon gave up: {said}").into());
            }
            _ => {}
        }
        Ok(said)
    }
}

#[cfg(test)]
#[allow(unused)] // See migrate.rs.
mod tests {
    use super::*;

    fn monitor(said: &str) -> Monitor {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said.as_bytes()).unwrap();
        Monitor { stream: BufReader::new(ours), ready: false }
    }

    #[test]
    fn a_job_that_is_ready_before_its_order_is_answered_is_ready() {
        let said = "{\"event\":\"BLOCK_JOB_READY\"}\n{\"return\":{}}\n";
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said.as_bytes()).unwrap();
        let mut monitor = Monitor { stream: BufReader::new(ours), ready: false };
        monitor.order("blockdev-mirror", &json!({})).unwrap();
        drop(theirs);
        monitor.wait_until_ready().unwrap();
    }

    #[test]
    fn a_job_that_fails_is_never_ready() {
        for said in ["{\"event\":\"BLOCK_JOB_ERROR\"}\n", "nonsense\n", ""] {
            assert!(monitor(said).wait_until_ready().is_err(), "{said}");
        }
    }
}

//! A throw-away host with real systemd: boots, runs commands as its operator, loses power, reboots.
//! Every wait has a deadline; a failing test prints the host's journal.

use crate::package;
use crate::session::lab;
use harness::{Endpoint, TIMEOUT, poll_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::thread;
use std::time::Duration;

/// The port of NBD.
pub(crate) const PORT: u16 = 10809;
/// The image of a host, on a file system that loses unsynced data in a power cut.
pub(crate) const IMAGE: &str = "/srv/disk.img";
/// The unit that serves the instance `disk`.
pub(crate) const DISK: &str = "flexnbd@disk.service";
/// The unit that receives the instance `disk` in a migration.
pub(crate) const LISTEN: &str = "flexnbd-listen@disk.service";
/// The socket units that start [`DISK`].
pub(crate) const SOCKETS: [&str; 2] = ["flexnbd@disk.socket", "flexnbd-control@disk.socket"];
/// Pause between two polls of a host: each starts several processes.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The number of journal lines to print when a test fails.
const JOURNAL_LINES: &str = "200";

/// A host, which exists until the end of the session.
pub(crate) struct Host {
    pub(crate) name: &'static str,
    /// The N of 10.99.0.N and fd99::N.
    number: u8,
}

/// The exit status and output of a command.
#[derive(Debug)]
pub(crate) struct CommandOutput {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// One entry of the journal.
pub(crate) type Entry = Map<String, Value>;

impl Host {
    /// Boots a host without the package.
    #[track_caller]
    pub(crate) fn up(name: &'static str) -> Host {
        stdout_of(lab(&["up", name]));
        let address = stdout_of(lab(&["ip", name]));
        let number = address.trim().rsplit_once('.').unwrap().1.parse().unwrap();
        Host { name, number }
    }

    /// Boots a host and installs the package.
    #[track_caller]
    pub(crate) fn installed(name: &'static str) -> Host {
        let host = Host::up(name);
        host.install(&package::current());
        host
    }

    /// Installs or upgrades the package with dpkg; returns dpkg's output.
    #[track_caller]
    pub(crate) fn install(&self, deb: &Path) -> String {
        self.copy_in(deb, "/root/flexnbd.deb");
        self.ok("dpkg --install /root/flexnbd.deb 2>&1")
    }

    /// Boots the host again after [`Host::down`] or [`Host::cut`].
    #[track_caller]
    pub(crate) fn boot(&self) {
        stdout_of(lab(&["up", self.name]));
    }

    /// Shuts the host down in order.
    #[track_caller]
    pub(crate) fn down(&self) {
        stdout_of(lab(&["down", self.name]));
    }

    #[track_caller]
    pub(crate) fn reboot(&self) {
        stdout_of(lab(&["reboot", self.name]));
    }

    /// Cuts the power: see `lab.sh`. The disk is readable at once, the rest after [`Host::boot`].
    #[track_caller]
    pub(crate) fn cut(&self) {
        stdout_of(lab(&["cut", self.name]));
    }

    /// Runs a line of shell on the host.
    #[track_caller]
    pub(crate) fn sh(&self, line: &str) -> CommandOutput {
        command_output(&lab(&["sh", self.name, "bash", "-c", line]))
    }

    /// Runs a line of shell that must succeed; returns its stdout.
    #[track_caller]
    pub(crate) fn ok(&self, line: &str) -> String {
        let output = self.sh(line);
        assert_eq!(output.code, 0, "{}: {line}: {output}", self.name);
        output.out
    }

    #[track_caller]
    pub(crate) fn systemctl(&self, words: &str) {
        self.ok(&format!("systemctl {words}"));
    }

    /// One property of a unit.
    #[track_caller]
    pub(crate) fn show(&self, unit: &str, property: &str) -> String {
        self.ok(&format!("systemctl show --property={property} --value '{unit}'")).trim().to_owned()
    }

    /// `active`, `inactive`, `failed`, `activating` …
    #[track_caller]
    pub(crate) fn state(&self, unit: &str) -> String {
        self.show(unit, "ActiveState")
    }

    /// The output of `systemctl status` for a unit.
    #[track_caller]
    pub(crate) fn status(&self, unit: &str) -> String {
        // The output includes journal lines, which journald may not have written yet.
        self.sh(&format!("journalctl --sync; systemctl status --no-pager --full '{unit}'")).out
    }

    /// The main process id of the service in the host's pid namespace; 0 if it does not run.
    #[track_caller]
    pub(crate) fn pid(&self, unit: &str) -> u32 {
        self.show(unit, "MainPID").parse().unwrap()
    }

    /// The service's main process in the session's pid namespace.
    #[track_caller]
    pub(crate) fn process(&self, unit: &str) -> Pid {
        let inside = self.pid(unit).to_string();
        let here = format!("/{}/payload/", self.name);
        let is_it = |pid: &i32| {
            let file = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
            let (Ok(group), Ok(status)) = (file("cgroup"), file("status")) else { return false };
            let ids = status.lines().find(|line| line.starts_with("NSpid:")).unwrap_or_default();
            group.contains(&here) && ids.split_whitespace().last() == Some(&inside)
        };
        let names = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name());
        let mut pids = names.filter_map(|name| name.to_str()?.parse().ok());
        Pid::from_raw(pids.find(is_it).unwrap_or_else(|| panic!("{unit} has no process")))
    }

    #[track_caller]
    pub(crate) fn wait_for_state(&self, unit: &str, state: &str) {
        self.wait_for(&format!("{unit} to be {state}"), || self.state(unit) == state);
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, what: &str, mut done: impl FnMut() -> bool) {
        let look = || {
            let done = done();
            if !done {
                thread::sleep(POLL_INTERVAL);
            }
            done
        };
        assert!(poll_until(TIMEOUT, look), "{}: timed out waiting for {what}", self.name);
    }

    /// Writes `/etc/flexnbd/INSTANCE.conf` and reloads systemd, which runs the generator.
    #[track_caller]
    pub(crate) fn configure(&self, instance: &str, text: &str) {
        self.write(&format!("/etc/flexnbd/{instance}.conf"), text);
        self.systemctl("daemon-reload");
    }

    /// Configures the instance `disk` with a new image of `size` bytes, served at [`PORT`] on every
    /// address.
    #[track_caller]
    pub(crate) fn configure_disk(&self, size: u64) {
        self.make_image(IMAGE, size);
        self.configure("disk", &format!("FILE={IMAGE}\nADDR=::\nPORT={PORT}\n"));
    }

    /// Creates a sparse image that the user flexnbd owns.
    #[track_caller]
    pub(crate) fn make_image(&self, path: &str, size: u64) {
        self.ok(&format!("truncate -s {size} {path} && chown flexnbd: {path} && sync -f {path}"));
    }

    /// The path of a host's file in the test's mount namespace.
    #[track_caller]
    pub(crate) fn path(&self, path: &str) -> PathBuf {
        let root = stdout_of(lab(&["root", self.name]));
        Path::new(root.trim()).join(path.trim_start_matches('/'))
    }

    #[track_caller]
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    #[track_caller]
    pub(crate) fn copy_in(&self, file: &Path, to: &str) {
        std::fs::copy(file, self.path(to)).unwrap();
    }

    /// The NBD server at the host's IPv4 address.
    pub(crate) fn nbd(&self) -> Endpoint {
        Endpoint::Tcp(SocketAddr::new(self.ip4(), PORT))
    }

    /// The NBD server at the host's IPv6 address.
    pub(crate) fn nbd6(&self) -> Endpoint {
        let ip = IpAddr::from([
            0xfd99,
            0,
            0,
            0,
            0,
            0,
            0,
            u16::from_str_radix(&self.number.to_string(), 16).unwrap(),
        ]);
        Endpoint::Tcp(SocketAddr::new(ip, PORT))
    }

    pub(crate) fn ip4(&self) -> IpAddr {
        IpAddr::from([10, 99, 0, self.number])
    }

    /// The keys and values of `flexnbd status` for an instance; empty if it fails.
    #[track_caller]
    pub(crate) fn disk_status(&self, instance: &str) -> BTreeMap<String, String> {
        let text = self.sh(&format!("flexnbd status --instance {instance}")).out;
        let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    /// The journal entries that match the arguments of journalctl, oldest first.
    #[track_caller]
    pub(crate) fn journal(&self, matching: &str) -> Vec<Entry> {
        let words = ["journal", self.name, "--output=json", "--all"];
        let output = lab(&[&words[..], &matching.split_whitespace().collect::<Vec<_>>()].concat());
        let text = stdout_of(output);
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits until the unit has logged a message that contains `part`.
    #[track_caller]
    pub(crate) fn wait_for_message(&self, unit: &str, part: &str) -> Entry {
        let mut found = None;
        self.wait_for(&format!("{unit} to log {part:?}"), || {
            let entries = self.journal(&format!("--unit={unit}"));
            found = entries.into_iter().rev().find(|entry| field(entry, "MESSAGE").contains(part));
            found.is_some()
        });
        found.unwrap()
    }
}

/// A process that SIGSTOP has stopped.
pub(crate) struct Frozen {
    pid: Pid,
}

impl Frozen {
    /// Stops a process.
    pub(crate) fn freeze(pid: Pid) -> Frozen {
        kill(pid, Signal::SIGSTOP).unwrap();
        Frozen { pid }
    }

    /// Continues the process if it still exists.
    pub(crate) fn thaw(self) {
        let _ = kill(self.pid, Signal::SIGCONT);
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let units = "'flexnbd*' --all --no-pager --full --lines=0";
        let status = self.sh(&format!("systemctl list-sockets --all; systemctl status {units}"));
        let journal = command_output(&lab(&["journal", self.name, "--lines", JOURNAL_LINES]));
        eprintln!("-- {}:\n{}\n{}", self.name, status.out, journal.out);
    }
}

impl std::fmt::Display for CommandOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "status {}\n{}{}", self.code, self.out, self.err)
    }
}

/// The text of a field; empty if the entry does not have it.
pub(crate) fn field<'a>(entry: &'a Entry, name: &str) -> &'a str {
    entry.get(name).and_then(Value::as_str).unwrap_or_default()
}

fn command_output(output: &Output) -> CommandOutput {
    CommandOutput {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[track_caller]
fn stdout_of(output: Output) -> String {
    let output = command_output(&output);
    assert_eq!(output.code, 0, "lab.sh: {output}");
    output.out
}

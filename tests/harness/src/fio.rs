//! fio in the background, which verifies what it has written until it is stopped.

use crate::{TempDir, temp_dir, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs::{File, read_to_string};
use std::process::{Child, Command, Stdio};

/// Verifies each write after 512 further ones, and runs until it is stopped.
const WORDS: &str = "--name=verify --rw=randwrite --verify=crc32c --verify_backlog=512 \
    --verify_fatal=1 --verify_state_save=0 --group_reporting --time_based --runtime=3600 \
    --output-format=json";

/// A running fio. Dropping it kills it.
pub struct Fio {
    child: Child,
    dir: TempDir,
}

impl Fio {
    /// Starts fio, with arguments that say where it writes and how. It uses all available CPU time;
    /// the server and our clients have priority.
    #[track_caller]
    pub fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Fio {
        let dir = temp_dir();
        let file = |name: &str| File::create(dir.path().join(name)).unwrap();
        let mut command = Command::new("nice");
        command.arg("fio").args(WORDS.split_whitespace()).args(arguments).current_dir(dir.path());
        command.stdin(Stdio::null()).stdout(file("report")).stderr(file("log"));
        Fio { child: command.spawn().unwrap(), dir }
    }

    /// What it has printed so far.
    pub fn log(&self) -> String {
        let text = |name: &str| read_to_string(self.dir.path().join(name)).unwrap();
        text("log") + &text("report")
    }

    /// Fails if it has ended.
    #[track_caller]
    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("fio exited with {status}: {}", self.log());
        }
    }

    /// Stops fio; fails if it reports an error. Returns a line with the number of requests and the
    /// highest latency.
    #[track_caller]
    pub fn stop(mut self) -> String {
        self.assert_running();
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT).unwrap();
        wait_until("fio to end", || self.child.try_wait().unwrap().is_some());
        let log = self.log();
        let report = &log[log.find('{').unwrap_or_else(|| panic!("no report: {log}"))..];
        let report: serde_json::Value = serde_json::from_str(report).unwrap();
        let job = &report["jobs"][0];
        assert_eq!(job["error"], 0, "{log}");
        assert!(!log.contains("verify: bad"), "{log}");
        let (wrote, read) = (&job["write"]["total_ios"], &job["read"]["total_ios"]);
        assert!(read.as_u64().unwrap() > 0, "fio verified nothing: {log}");
        let slowest = job["write"]["clat_ns"]["max"].as_f64().unwrap_or(0.0) / 1e6;
        format!("fio: {wrote} writes, {read} verified, the slowest {slowest:.0} ms")
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

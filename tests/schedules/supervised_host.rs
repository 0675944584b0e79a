//! One host of a schedule: its image, and its process under a simple service manager, which
//! restarts it. Does not depend on the actions of the schedule.

use crate::faults::Faults;
use crate::plan::Plan;
use crate::storage::Storage;
use harness::clients::Role;
use harness::host::Host;
use harness::{Program, Server};
use nix::sys::signal::Signal;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// The exit status of a process that refuses its image (EX_CONFIG).
const EXIT_CONFIG: i32 = 78;
/// The delay before a service manager restarts a crashed process.
const RESTART_DELAY_AFTER_CRASH: Duration = Duration::from_millis(100);
/// The delay before an operator restarts a process that exited with 1, 2 or [`EXIT_CONFIG`].
const RESTART_DELAY_AFTER_ERROR: Duration = Duration::from_millis(400);

/// The command that the host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Serve,
    /// `listen`; the execution changes it to `Serve` once the disk has arrived.
    Listen,
    /// No command: the disk has moved away.
    Off,
}

/// One host and its process.
pub(crate) struct SupervisedHost {
    pub(crate) host: Host,
    pub(crate) mode: Mode,
    pub(crate) faults: Faults,
    server: Option<Server>,
    restart_at: Instant,
    frozen: bool,
    storage: Storage,
}

impl SupervisedHost {
    /// The host that has `role` in the first migration; no process runs yet.
    pub(crate) fn new(plan: &Plan, role: Role, size: u64) -> SupervisedHost {
        let config = plan.host_config(role);
        let storage = Storage::new(config.storage, size);
        let (directory, name) = (storage.directory(), if role == Role::Source { "a" } else { "b" });
        let faults = Faults::new(directory, name, plan.triggers_on_departing());
        let wrapper = faults.wrapper(config.has_io_uring);
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        let mut host = Host::new(directory, name)
            .through(&wrapper)
            .env("FLEXNBD_MS_REQUEST_LIMIT_SECS", &plan.request_timeout_secs.to_string());
        host.image = storage.image_directory().join("disk.img");
        let supervised = SupervisedHost {
            host,
            mode: Mode::Off,
            faults,
            server: None,
            restart_at: Instant::now(),
            frozen: false,
            storage,
        };
        if !config.has_state_directory {
            // A file at this path prevents the directory, even for root.
            std::fs::write(supervised.host.state_directory(), "").unwrap();
        }
        supervised
    }

    /// Fills the file system of the image if the plan has a full one.
    pub(crate) fn fill(&self) {
        self.storage.fill(&self.host.image);
    }

    /// Ends all faults: of system calls, free space and state directory, and of a frozen process.
    pub(crate) fn repair(&mut self) {
        self.faults.set(&[]);
        self.storage.free_space();
        if self.host.state_directory().is_file() {
            std::fs::remove_file(self.host.state_directory()).unwrap();
        }
        self.freeze(false);
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.server.as_mut().is_some_and(Server::is_running)
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        drop(self.server.take());
        self.frozen = false;
        self.restart_at = Instant::now() + RESTART_DELAY_AFTER_CRASH;
    }

    /// Stops the process with the signal of its unit. A `listen` ended by SIGTERM would count as
    /// complete.
    pub(crate) fn terminate(&mut self) {
        let signal = if self.mode == Mode::Listen { Signal::SIGQUIT } else { Signal::SIGTERM };
        self.signal(signal);
    }

    /// Stops the process with SIGSTOP, or continues it.
    pub(crate) fn freeze(&mut self, frozen: bool) {
        if self.frozen != frozen {
            self.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
            self.frozen = frozen;
        }
    }

    fn signal(&mut self, signal: Signal) {
        if self.is_running()
            && let Some(server) = &self.server
        {
            server.signal(signal);
        }
    }

    /// Starts the process if none runs and its restart is due. Returns exit status and stderr of
    /// a process that has ended.
    pub(crate) fn supervise(&mut self) -> Option<(ExitStatus, String)> {
        let Some(server) = &mut self.server else {
            self.start();
            return None;
        };
        let status = server.exit_status()?;
        server.wait_for_end();
        let output = server.stderr();
        self.server = None;
        self.frozen = false;
        let gave_up = matches!(status.code(), Some(1 | 2 | EXIT_CONFIG));
        self.restart_at = Instant::now()
            + if gave_up { RESTART_DELAY_AFTER_ERROR } else { RESTART_DELAY_AFTER_CRASH };
        Some((status, output))
    }

    fn start(&mut self) {
        let mode = match self.mode {
            Mode::Serve => "serve",
            Mode::Listen => "listen",
            Mode::Off => return,
        };
        if Instant::now() >= self.restart_at {
            self.server = Some(self.host.mode(mode).spawn());
        }
    }

    /// Stops the process with SIGTERM; returns its exit status and stderr.
    pub(crate) fn stop(&mut self) -> Option<(ExitStatus, String)> {
        self.mode = Mode::Off;
        let mut server = self.server.take()?;
        let status = server.stop();
        Some((status, server.stderr()))
    }

    /// Whether a process serves a disk of which a flush has failed.
    pub(crate) fn has_failed_flush(&mut self) -> bool {
        self.mode == Mode::Serve
            && self.is_running()
            && self.host.record() == "ours"
            && !self.host.status_of("flush_failed").is_empty()
    }

    /// Stops the server, adopts its disk, and starts it again. Returns what `adopt` prints.
    pub(crate) fn adopt(&mut self) -> String {
        self.stop();
        self.mode = Mode::Serve;
        let state = format!("STATE_DIRECTORY={}", self.host.state_directory().display());
        let adopt = Program::new("env").args([state.as_ref(), harness::flexnbd().as_os_str()]);
        adopt.words("adopt --file").args([&self.host.image]).ok()
    }

    /// The stderr of the running process so far.
    pub(crate) fn output(&self) -> String {
        self.server.as_ref().map(Server::stderr).unwrap_or_default()
    }

    /// Fails unless a new `serve` refuses the image; the error has its stderr.
    pub(crate) fn refuses_to_serve(&self) -> Result<(), String> {
        let mut server = self.host.mode("serve").spawn();
        if server.starts_listening() {
            return Err(format!("it serves again: {}", server.stderr()));
        }
        let code = server.wait_for_end().code();
        if code == Some(EXIT_CONFIG) {
            return Ok(());
        }
        Err(format!("it ended with {code:?}: {}", server.stderr()))
    }
}

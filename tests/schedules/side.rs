//! One host of a schedule: its image, and a service manager's hands on its process.
//! Never knows what the schedule is about.

use crate::faults::Faults;
use crate::medium::Ground;
use crate::plan::Plan;
use harness::Server;
use harness::clients::Role;
use harness::host::Host;
use nix::sys::signal::Signal;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

/// Exit status of a process that refuses its image.
pub(crate) const REFUSED: i32 = 78;
/// How soon a service manager starts a process again that has crashed.
const AGAIN: Duration = Duration::from_millis(100);
/// How soon an operator starts one that has given up.
const LATER: Duration = Duration::from_millis(400);

/// What runs on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Serve,
    /// `listen`, then `serve` once the disk has arrived.
    Listen,
    /// Nothing: the disk is gone.
    Nothing,
}

/// One host.
pub(crate) struct Side {
    pub(crate) host: Host,
    pub(crate) mode: Mode,
    pub(crate) faults: Faults,
    server: Option<Server>,
    again: Instant,
    frozen: bool,
    ground: Ground,
}

impl Side {
    /// The host of this role when the disk moves for the first time; nothing runs yet.
    pub(crate) fn new(plan: &Plan, role: Role, size: u64) -> Side {
        let setting = plan.setting(role);
        let ground = Ground::new(setting.medium, size);
        let (directory, name) = (ground.beside(), if role == Role::Source { "a" } else { "b" });
        let faults = Faults::new(directory, name, plan.waits_for_departing());
        let wrapper = faults.wrapper(setting.has_io_uring);
        let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
        let mut host = Host::new(directory, name)
            .through(&wrapper)
            .env("FLEXNBD_MS_REQUEST_LIMIT_SECS", &plan.patience.to_string());
        host.image = ground.path().join("disk.img");
        let side = Side {
            host,
            mode: Mode::Nothing,
            faults,
            server: None,
            again: Instant::now(),
            frozen: false,
            ground,
        };
        if !setting.has_state_directory {
            // Nobody can make a directory there, not even root.
            std::fs::write(side.host.state_directory(), "").unwrap();
        }
        side
    }

    /// Takes all free space from beside the image, where that belongs to the schedule.
    pub(crate) fn fill(&self) {
        self.ground.fill(&self.host.image);
    }

    /// Whatever was wrong with it is put right.
    pub(crate) fn heal(&mut self) {
        self.faults.set(&[]);
        self.ground.relieve();
        if self.host.state_directory().is_file() {
            std::fs::remove_file(self.host.state_directory()).unwrap();
        }
        self.freeze(false);
    }

    pub(crate) fn runs(&mut self) -> bool {
        self.server.as_mut().is_some_and(Server::is_running)
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        drop(self.server.take());
        self.frozen = false;
        self.again = Instant::now() + AGAIN;
    }

    /// Asks for the end as the units do. A `listen` that dies of SIGTERM would count as arrived.
    pub(crate) fn terminate(&mut self) {
        let signal = if self.mode == Mode::Listen { Signal::SIGQUIT } else { Signal::SIGTERM };
        self.signal(signal);
    }

    pub(crate) fn freeze(&mut self, frozen: bool) {
        if self.frozen != frozen {
            self.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
            self.frozen = frozen;
        }
    }

    fn signal(&mut self, signal: Signal) {
        if self.runs()
            && let Some(server) = &self.server
        {
            server.signal(signal);
        }
    }

    /// Starts what is to run, if its time has come, and tells how it ended, if it has.
    pub(crate) fn look_after(&mut self) -> Option<(ExitStatus, String)> {
        let Some(server) = &mut self.server else {
            self.start();
            return None;
        };
        let status = server.exit_status()?;
        server.wait_for_end();
        let said = server.stderr();
        self.server = None;
        self.frozen = false;
        let gave_up = matches!(status.code(), Some(1 | 2 | REFUSED));
        self.again = Instant::now() + if gave_up { LATER } else { AGAIN };
        Some((status, said))
    }

    fn start(&mut self) {
        let mode = match self.mode {
            Mode::Serve => "serve",
            Mode::Listen => "listen",
            Mode::Nothing => return,
        };
        if Instant::now() >= self.again {
            self.server = Some(self.host.mode(mode).spawn());
        }
    }

    /// Ends the process gently; how it ended and what it said.
    pub(crate) fn stop(&mut self) -> Option<(ExitStatus, String)> {
        self.mode = Mode::Nothing;
        let mut server = self.server.take()?;
        let status = server.stop();
        Some((status, server.stderr()))
    }

    /// What the process says so far.
    pub(crate) fn said(&self) -> String {
        self.server.as_ref().map(Server::stderr).unwrap_or_default()
    }

    /// Whether another `serve` would refuse the image; what it says if not.
    pub(crate) fn refuses_to_serve(&self) -> Result<(), String> {
        let mut server = self.host.mode("serve").spawn();
        if server.starts_listening() {
            return Err(format!("it serves again: {}", server.stderr()));
        }
        let code = server.wait_for_end().code();
        if code == Some(REFUSED) {
            return Ok(());
        }
        Err(format!("it ended with {code:?}: {}", server.stderr()))
    }
}

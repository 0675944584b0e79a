//! A simulated operator, who starts the migration whenever none runs.
//! Waits at most [`harness::TIMEOUT`] for a stopped process.

use harness::host::{Host, MIRROR_STARTED};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The interval between two queries of the source's status.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The speed limit of the copy, which then takes a little more than half a second.
const COPY_BYTES_PER_SEC: &str = "8000000";

/// The operator's thread. Drop ends it.
pub(crate) struct Operator {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    paused: AtomicBool,
    abort_migration: AtomicBool,
    log: Mutex<Vec<String>>,
}

impl Operator {
    /// Starts the operator, paused, of a disk that moves from `source` to the address `to`.
    pub(crate) fn start(source: &Host, to: SocketAddr, unlink: bool) -> Operator {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(true),
            abort_migration: AtomicBool::new(false),
            log: Mutex::default(),
        });
        let (source, for_thread) = (source.clone(), Arc::clone(&shared));
        let thread = thread::spawn(move || for_thread.run(&source, to, unlink));
        Operator { shared, thread: Some(thread) }
    }

    pub(crate) fn set_paused(&mut self, paused: bool) {
        self.shared.paused.store(paused, SeqCst);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.shared.paused.load(SeqCst)
    }

    /// Aborts the running migration; the operator then starts it again.
    pub(crate) fn abort_migration(&self) {
        self.shared.abort_migration.store(true, SeqCst);
    }

    /// Returns the commands and replies since the last call.
    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.log.lock().unwrap())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self, source: &Host, to: SocketAddr, unlink: bool) {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        let action = if unlink { "unlink" } else { "exit" };
        let mut last = String::new();
        while !self.stop.load(SeqCst) {
            if self.abort_migration.swap(false, SeqCst) {
                let reply = source.try_command(&["break"]);
                self.log.lock().unwrap().push(format!("break: {reply:?}"));
            }
            if !self.paused.load(SeqCst) && source.status_of("is_mirroring") == "false" {
                let reply = source.try_command(&[
                    "mirror",
                    &ip,
                    &port,
                    action,
                    "0.0.0.0",
                    COPY_BYTES_PER_SEC,
                ]);
                let reply = reply.unwrap_or_else(|| "no reply".to_owned());
                if reply != last || reply == MIRROR_STARTED {
                    self.log.lock().unwrap().push(format!("mirror: {reply}"));
                    last = reply;
                }
            }
            thread::sleep(POLL_INTERVAL);
        }
    }
}

//! An operator who orders the migration until it is under way, again and again.
//! Never waits for a process that is stopped longer than [`harness::TIMEOUT`].

use harness::host::{Host, MIRROR_STARTED};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Between two looks at the source.
const LOOK: Duration = Duration::from_millis(100);
/// Bytes per second of the copy: a good half second of it.
const SPEED: &str = "8000000";

/// An operator at work. Dropping it ends that.
pub(crate) struct Operator {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    stop: AtomicBool,
    paused: AtomicBool,
    call_off: AtomicBool,
    news: Mutex<Vec<String>>,
}

impl Operator {
    /// Of a disk that is served there and is to go there.
    pub(crate) fn of(source: &Host, to: SocketAddr, unlink: bool) -> Operator {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            paused: AtomicBool::new(true),
            call_off: AtomicBool::new(false),
            news: Mutex::default(),
        });
        let (source, for_thread) = (source.clone(), Arc::clone(&shared));
        let thread = thread::spawn(move || for_thread.work(&source, to, unlink));
        Operator { shared, thread: Some(thread) }
    }

    pub(crate) fn pause(&mut self, paused: bool) {
        self.shared.paused.store(paused, SeqCst);
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.shared.paused.load(SeqCst)
    }

    /// Has the migration broken off that is under way; it is ordered again afterwards.
    pub(crate) fn call_off(&self) {
        self.shared.call_off.store(true, SeqCst);
    }

    /// What there is to tell since the last time.
    pub(crate) fn news(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.news.lock().unwrap())
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
    fn work(&self, source: &Host, to: SocketAddr, unlink: bool) {
        let (ip, port) = (to.ip().to_string(), to.port().to_string());
        let action = if unlink { "unlink" } else { "exit" };
        let mut last = String::new();
        while !self.stop.load(SeqCst) {
            if self.call_off.swap(false, SeqCst) {
                let reply = source.try_command(&["break"]);
                self.news.lock().unwrap().push(format!("break: {reply:?}"));
            }
            if !self.paused.load(SeqCst) && source.status_of("is_mirroring") == "false" {
                let reply = source.try_command(&["mirror", &ip, &port, action, "0.0.0.0", SPEED]);
                let reply = reply.unwrap_or_else(|| "no answer".to_owned());
                if reply != last || reply == MIRROR_STARTED {
                    self.news.lock().unwrap().push(format!("mirror: {reply}"));
                    last = reply;
                }
            }
            thread::sleep(LOOK);
        }
    }
}

//! What `notify.rs` promises, to a service manager of the test's own.

use super::super::child;
use super::*;
use std::process::Command;

/// Long enough never to matter.
const LONG: Duration = Duration::from_secs(60);
/// Short, for waits that are meant to end in vain.
const SHORT: Duration = Duration::from_millis(20);

#[test]
#[ignore = "a part of other tests, which run it in a process of its own"]
fn a_child_that_says_everything() {
    let notifier = ServiceManager::from_env();
    assert!(notifier.is_connected());
    notifier.status("serving\nREADY=1").unwrap();
    notifier.ready().unwrap();
    notifier.reloading().unwrap();
    notifier.watchdog().unwrap();
    notifier.extend_timeout(Duration::from_millis(1500)).unwrap();
    notifier.extend_timeout(Duration::from_secs(86_400)).unwrap();
    notifier.errno(28).unwrap();
    notifier.errno(-1).unwrap();
    notifier.stopping().unwrap();
    notifier.barrier(LONG).unwrap();
    child::say(&format!("{:?}", notifier.watchdog_interval()));
}

#[test]
#[ignore = "a part of other tests, which run it in a process of its own"]
fn a_child_that_waits_in_vain() {
    let error = ServiceManager::from_env().barrier(SHORT).unwrap_err();
    child::say(&format!("{:?}", error.kind()));
}

/// Sends until a message is lost, then some more.
#[test]
#[ignore = "a part of other tests, which run it in a process of its own"]
fn a_child_that_is_not_read() {
    let notifier = ServiceManager::from_env();
    let lost = (0..).find_map(|_| notifier.ready().err()).unwrap();
    notifier.ready().unwrap();
    child::say(&format!("{lost} {}", notifier.barrier(LONG).unwrap_err()));
}

struct Manager {
    socket: UnixDatagram,
    directory: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(LONG)).unwrap();
        Self { socket, directory }
    }

    fn child(&self, name: &str) -> Command {
        let mut command = child::running(&format!("systemd::notify::tests::{name}"));
        command.env("NOTIFY_SOCKET", self.directory.path().join("notify"));
        command
    }

    /// A descriptor that came along is closed, as no room is given for it.
    fn hear(&self) -> String {
        let mut buffer = [0; 4096];
        let count = self.socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    }
}

#[test]
fn every_message_arrives_as_the_service_manager_expects_it() {
    let manager = Manager::new();
    let child = manager
        .child("a_child_that_says_everything")
        .env("WATCHDOG_USEC", "20000000")
        .spawn()
        .unwrap();
    assert_eq!(manager.hear(), "STATUS=serving READY=1\n");
    assert_eq!(manager.hear(), "READY=1\n");
    let reloading = manager.hear();
    let when = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim_end();
    assert!(when.parse::<u64>().is_ok_and(|when| when > 0), "{reloading}");
    assert_eq!(manager.hear(), "WATCHDOG=1\n");
    assert_eq!(manager.hear(), "EXTEND_TIMEOUT_USEC=1500000\n");
    assert_eq!(manager.hear(), format!("EXTEND_TIMEOUT_USEC={}\n", u32::MAX));
    assert_eq!(manager.hear(), "ERRNO=28\n");
    assert_eq!(manager.hear(), "STOPPING=1\n");
    assert_eq!(manager.hear(), "BARRIER=1\n");
    let said = child::said(&child.wait_with_output().unwrap());
    assert_eq!(said, ["Some(10s)"]);
}

#[test]
fn a_barrier_that_nobody_takes_down_ends_in_time() {
    let manager = Manager::new();
    let output = manager.child("a_child_that_waits_in_vain").output().unwrap();
    assert_eq!(child::said(&output), ["TimedOut"]);
}

#[test]
fn a_service_manager_that_does_not_read_keeps_nobody_waiting() {
    let manager = Manager::new();
    let output = manager.child("a_child_that_is_not_read").output().unwrap();
    let lost = "it does not read its messages";
    assert_eq!(child::said(&output), [format!("{lost} {lost}")]);
}

#[test]
fn without_a_service_manager_all_goes_well_and_nothing_is_said() {
    let notifier = ServiceManager::silent();
    assert!(!notifier.is_connected());
    assert_eq!(notifier.watchdog_interval(), None);
    notifier.ready().unwrap();
    notifier.status("serving").unwrap();
    notifier.barrier(Duration::ZERO).unwrap();
}

//! Tests of `notify.rs` with a socket in place of the service manager.

use super::super::child;
use super::*;
use std::process::Command;

/// A timeout that never expires in a test.
const LONG: Duration = Duration::from_secs(60);
/// A timeout that a test waits for.
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

    /// Receives a message. A descriptor with it is dropped, since there is no control buffer.
    fn receive(&self) -> String {
        let mut buffer = [0; 4096];
        let count = self.socket.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..count].to_vec()).unwrap()
    }
}

#[test]
fn messages_have_the_format_of_sd_notify() {
    let manager = Manager::new();
    let child = manager
        .child("a_child_that_says_everything")
        .env("WATCHDOG_USEC", "20000000")
        .spawn()
        .unwrap();
    assert_eq!(manager.receive(), "STATUS=serving READY=1\n");
    assert_eq!(manager.receive(), "READY=1\n");
    let reloading = manager.receive();
    let when = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap().trim_end();
    assert!(when.parse::<u64>().is_ok_and(|when| when > 0), "{reloading}");
    assert_eq!(manager.receive(), "WATCHDOG=1\n");
    assert_eq!(manager.receive(), "EXTEND_TIMEOUT_USEC=1500000\n");
    assert_eq!(manager.receive(), format!("EXTEND_TIMEOUT_USEC={}\n", u32::MAX));
    assert_eq!(manager.receive(), "ERRNO=28\n");
    assert_eq!(manager.receive(), "STOPPING=1\n");
    assert_eq!(manager.receive(), "BARRIER=1\n");
    let said = child::output_of(&child.wait_with_output().unwrap());
    assert_eq!(said, ["Some(10s)"]);
}

#[test]
fn a_barrier_without_confirmation_times_out() {
    let manager = Manager::new();
    let output = manager.child("a_child_that_waits_in_vain").output().unwrap();
    assert_eq!(child::output_of(&output), ["TimedOut"]);
}

#[test]
fn a_service_manager_that_does_not_read_delays_once() {
    let manager = Manager::new();
    let output = manager.child("a_child_that_is_not_read").output().unwrap();
    let lost = "it does not read its messages";
    assert_eq!(child::output_of(&output), [format!("{lost} {lost}")]);
}

#[test]
fn without_a_service_manager_every_message_succeeds() {
    let notifier = ServiceManager::silent();
    assert!(!notifier.is_connected());
    assert_eq!(notifier.watchdog_interval(), None);
    notifier.ready().unwrap();
    notifier.status("serving").unwrap();
    notifier.barrier(Duration::ZERO).unwrap();
}

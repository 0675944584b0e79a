//! Crashes: the service is back, sessions end cleanly, and what was acknowledged is there.
//! Never cuts the power; that is for `cuts.rs`.

use crate::host::{DISK, Host};
use crate::knock::Knocker;
use crate::others::Qemu;
use crate::session::{in_lab, tell};
use crate::steady::{Calamity, Steady, wait_for_answers};
use harness::session::{MODES, Mode};
use harness::{MIB, wait_until};
use nix::unistd::Pid;

const SIZE: u64 = 64 * MIB;
const PART: u64 = 8 * MIB;
const A_FEW: u64 = 200;

/// How the process comes to its end.
struct Death {
    signal: &'static str,
    /// How often it is sent.
    times: u32,
    /// What systemd says of it.
    result: &'static str,
}

/// Clients work; the process dies; they go on with what they know, and QEMU's client does not even
/// notice.
fn survives(host: &Host, death: &Death) {
    host.configure_disk(SIZE);
    host.systemctl(&format!("start {DISK}"));
    let part = |n: u64| n * PART..(n + 1) * PART;
    let clients: Vec<_> =
        (0..).zip(MODES).map(|(n, mode)| Steady::start(&host.nbd(), mode, part(n))).collect();
    let qemu = Qemu::between(&host.nbd());
    let behind = Steady::start(&qemu.endpoint(), Mode::Structured, part(3));
    let knocker = Knocker::start(&host.nbd());
    wait_for_answers(&clients, A_FEW);
    behind.wait_for_answers(A_FEW);
    let before = host.pid(DISK);
    for n in 0..death.times {
        if n > 0 {
            let process = host.process(DISK);
            host.wait_for("the signal to be taken", || !catches(process, death.signal));
        }
        host.systemctl(&format!("kill --kill-who=main --signal={} {DISK}", death.signal));
    }

    let memories: Vec<_> = clients.into_iter().map(|client| client.lost().memory).collect();
    host.wait_for("another process", || ![0, before].contains(&host.pid(DISK)));
    host.wait_for_state(DISK, "active");
    let resume = |(mode, mut memory): (Mode, crate::steady::Memory)| {
        memory.verify(&host.nbd(), Calamity::Death);
        Steady::resume(&host.nbd(), mode, memory)
    };
    let clients: Vec<_> = MODES.into_iter().zip(memories).map(resume).collect();
    wait_for_answers(&clients, A_FEW);
    clients.into_iter().for_each(|client| drop(client.stop()));
    behind.wait_for_answers(A_FEW);
    let stall = behind.stop().worst_stall;
    let served = knocker.served();
    wait_until("new connections", || knocker.served() > served + 5);
    let knocks = knocker.stop();
    assert_eq!(knocks.refused, 0, "the sockets outlive the process: {knocks:?}");
    assert_eq!(host.show(DISK, "NRestarts"), "1");
    host.wait_for_message(DISK, death.result);
    tell(&format!("{}: QEMU stood still for {stall:?}", death.signal));
}

/// Whether the process has a handler for the signal; it is asked for SIGSEGV only.
fn catches(process: Pid, signal: &str) -> bool {
    assert_eq!(signal, "SEGV");
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << (nix::libc::SIGSEGV - 1) != 0
}

#[test]
fn after_a_kill_the_service_is_back_and_nothing_acknowledged_is_lost() {
    in_lab(|| {
        survives(
            &Host::installed("a"),
            &Death { signal: "KILL", times: 1, result: "status=9/KILL" },
        );
    });
}

#[test]
fn after_a_segmentation_fault_the_service_is_back_and_nothing_acknowledged_is_lost() {
    in_lab(|| {
        let host = Host::installed("a");
        // Rust's handler, which looks for overflows of the stack, takes the first one, and then
        // leaves the signal to its default.
        survives(&host, &Death { signal: "SEGV", times: 2, result: "status=11/SEGV" });
    });
}

#[test]
fn a_process_that_hangs_is_replaced_by_the_watchdog() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.service.d/watchdog.conf",
            "[Service]\nWatchdogSec=2s\n",
        );
        survives(&host, &Death { signal: "STOP", times: 1, result: "Watchdog timeout (limit 2s)" });
    });
}

#[test]
fn a_watchdog_leaves_alone_whoever_works_or_waits() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.service.d/watchdog.conf",
            "[Service]\nWatchdogSec=1s\n",
        );
        host.configure_disk(SIZE);
        host.systemctl(&format!("start {DISK}"));
        let before = host.pid(DISK);
        let client = Steady::start(&host.nbd(), Mode::Structured, 0..SIZE);
        let since = std::time::Instant::now();
        // Three times what the watchdog allows for: at work, and then at rest.
        wait_until("a while", || since.elapsed().as_secs() > 3);
        client.stop();
        wait_until("a while", || since.elapsed().as_secs() > 6);
        assert_eq!(host.pid(DISK), before);
    });
}

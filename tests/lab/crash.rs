//! Process crashes: systemd restarts the service, sessions end cleanly, acknowledged writes remain.
//! Power cuts are tested in `power_cuts.rs`.

use crate::connect::Reconnector;
use crate::host::{DISK, Host};
use crate::session::{in_lab, report};
use crate::third_party::Qemu;
use crate::verifier::{Crash, Verifier, wait_for_replies};
use harness::session::{MODES, Mode};
use harness::{MIB, wait_until};
use nix::unistd::Pid;

const SIZE: u64 = 64 * MIB;
const PART: u64 = 8 * MIB;
const A_FEW: u64 = 200;

/// How the process is terminated.
struct Termination {
    signal: &'static str,
    /// The number of times the signal is sent.
    times: u32,
    /// Part of the message that systemd logs for it.
    result: &'static str,
}

/// Terminates the process under load. Clients verify their data and resume at the next process;
/// the client behind QEMU, which reconnects, sees no interruption.
fn assert_survives(host: &Host, termination: &Termination) {
    host.configure_disk(SIZE);
    host.systemctl(&format!("start {DISK}"));
    let part = |n: u64| n * PART..(n + 1) * PART;
    let clients: Vec<_> =
        (0..).zip(MODES).map(|(n, mode)| Verifier::start(&host.nbd(), mode, part(n))).collect();
    let qemu = Qemu::between(&host.nbd());
    let qemu_client = Verifier::start(&qemu.endpoint(), Mode::Structured, part(3));
    let reconnector = Reconnector::start(&host.nbd());
    wait_for_replies(&clients, A_FEW);
    qemu_client.wait_for_replies(A_FEW);
    let before = host.pid(DISK);
    for n in 0..termination.times {
        if n > 0 {
            let process = host.process(DISK);
            host.wait_for("the signal handler to be removed", || {
                !catches(process, termination.signal)
            });
        }
        host.systemctl(&format!("kill --kill-who=main --signal={} {DISK}", termination.signal));
    }

    let models: Vec<_> = clients.into_iter().map(|client| client.wait_for_loss().model).collect();
    host.wait_for("another process", || ![0, before].contains(&host.pid(DISK)));
    host.wait_for_state(DISK, "active");
    let resume = |(mode, mut model): (Mode, crate::verifier::Model)| {
        model.verify(&host.nbd(), Crash::Process);
        Verifier::resume(&host.nbd(), mode, model)
    };
    let clients: Vec<_> = MODES.into_iter().zip(models).map(resume).collect();
    wait_for_replies(&clients, A_FEW);
    clients.into_iter().for_each(|client| drop(client.stop()));
    qemu_client.wait_for_replies(A_FEW);
    let stall = qemu_client.stop().worst_stall;
    let served = reconnector.served();
    wait_until("new connections", || reconnector.served() > served + 5);
    let connections = reconnector.stop();
    assert_eq!(connections.refused, 0, "systemd keeps the sockets open: {connections:?}");
    assert_eq!(host.show(DISK, "NRestarts"), "1");
    host.wait_for_message(DISK, termination.result);
    report(&format!("{}: QEMU stalled for {stall:?}", termination.signal));
}

/// Whether the process has a handler for the signal, which must be SIGSEGV.
fn catches(process: Pid, signal: &str) -> bool {
    assert_eq!(signal, "SEGV");
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or("0");
    u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << (nix::libc::SIGSEGV - 1) != 0
}

#[test]
fn sigkill_loses_no_acknowledged_write() {
    in_lab(|| {
        assert_survives(
            &Host::installed("a"),
            &Termination { signal: "KILL", times: 1, result: "status=9/KILL" },
        );
    });
}

#[test]
fn a_segmentation_fault_loses_no_acknowledged_write() {
    in_lab(|| {
        let host = Host::installed("a");
        // Rust's handler, which detects stack overflows, consumes the first signal and then
        // restores the default action.
        assert_survives(&host, &Termination { signal: "SEGV", times: 2, result: "status=11/SEGV" });
    });
}

#[test]
fn the_watchdog_replaces_a_hanging_process() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.service.d/watchdog.conf",
            "[Service]\nWatchdogSec=2s\n",
        );
        assert_survives(
            &host,
            &Termination { signal: "STOP", times: 1, result: "Watchdog timeout (limit 2s)" },
        );
    });
}

#[test]
fn the_watchdog_spares_busy_and_idle_servers() {
    in_lab(|| {
        let host = Host::installed("a");
        host.write(
            "/etc/systemd/system/flexnbd@disk.service.d/watchdog.conf",
            "[Service]\nWatchdogSec=1s\n",
        );
        host.configure_disk(SIZE);
        host.systemctl(&format!("start {DISK}"));
        let before = host.pid(DISK);
        let client = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE);
        let since = std::time::Instant::now();
        // Three times the watchdog interval under load, then three times idle.
        wait_until("a while", || since.elapsed().as_secs() > 3);
        client.stop();
        wait_until("a while", || since.elapsed().as_secs() > 6);
        assert_eq!(host.pid(DISK), before);
    });
}

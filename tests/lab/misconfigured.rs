//! Configuration errors: the operator sees the reason at once in `systemctl status`, there is no
//! restart loop, the sockets stay up, and clients are served once the error is corrected.

use crate::connect::{Probe, probe};
use crate::host::{DISK, Host, IMAGE, SOCKETS};
use crate::session::{in_lab, lab, report};
use crate::verifier::Verifier;
use harness::MIB;
use harness::session::Mode;
use std::time::Instant;

const SIZE: u64 = 64 * MIB;
/// Connections to a server that cannot serve: more than systemd's start limit.
const ATTEMPTS: usize = 100;

/// A configuration error and the messages that name it.
struct Misconfiguration {
    /// Shell command that introduces the error into a valid setup; `$IMAGE` is the image.
    command: &'static str,
    messages: &'static [&'static str],
}

const UNKNOWN_KEY: Misconfiguration = Misconfiguration {
    command: "echo SIZE=1G >>/etc/flexnbd/disk.conf",
    messages: &["/etc/flexnbd/disk.conf, line 4: unknown key SIZE"],
};
const MISSING_IMAGE: Misconfiguration =
    Misconfiguration { command: "rm $IMAGE", messages: &["/srv/disk.img", "does not exist"] };
const WRONG_OWNER: Misconfiguration = Misconfiguration {
    command: "chown root:root $IMAGE && chmod 600 $IMAGE",
    messages: &["/srv/disk.img may not be read by user id"],
};

/// A host with a valid instance.
fn host() -> Host {
    let host = Host::installed("a");
    host.configure_disk(SIZE);
    host
}

/// A host with the error.
#[track_caller]
fn host_with(misconfiguration: &Misconfiguration) -> Host {
    let host = host();
    host.ok(&format!("IMAGE={IMAGE}; {}", misconfiguration.command));
    host.systemctl("daemon-reload");
    host
}

/// `systemctl start` fails, and the status contains `messages`.
#[track_caller]
fn assert_start_fails(host: &Host, messages: &[&str]) {
    let began = Instant::now();
    let start = host.sh(&format!("systemctl start {DISK}"));
    let status = host.status(DISK);
    let took = began.elapsed();
    assert_ne!(start.code, 0, "{status}");
    for part in messages {
        assert!(status.contains(part), "no {part:?} in: {status}");
    }
    report(&format!("status after {took:?}"));
    assert_eq!(host.show(DISK, "NRestarts"), "0", "no restart loop");
    assert!(["failed", "inactive"].contains(&host.state(DISK).as_str()), "{status}");
    assert_eq!(host.state(SOCKETS[0]), "active", "the socket stays up");
}

/// Connections start the service, which refuses them all; after `fix` clients are served.
#[track_caller]
fn assert_clients_refused_until_fixed(host: &Host, messages: &[&str], fix: &str) {
    host.systemctl(&format!("start {}", SOCKETS[0]));
    for n in 0..ATTEMPTS {
        assert_eq!(probe(&host.nbd()), Probe::Closed, "attempt {n}");
    }
    let status = host.status(DISK);
    assert_eq!(host.state(DISK), "active", "{status}");
    assert!(host.show(DISK, "StatusText").starts_with("refusing clients: "), "{status}");
    for part in messages {
        assert!(status.contains(part), "no {part:?} in: {status}");
    }
    assert_eq!(host.show(DISK, "NRestarts"), "0", "no restart loop");
    assert_eq!(host.state(SOCKETS[0]), "active", "the socket stays up");
    host.ok(&format!("IMAGE={IMAGE}; {fix}"));
    host.systemctl("daemon-reload");
    host.systemctl(&format!("restart {DISK}"));
    let client = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE);
    client.wait_for_replies(100);
    client.stop();
}

#[test]
fn a_start_with_an_unknown_key_fails() {
    in_lab(|| assert_start_fails(&host_with(&UNKNOWN_KEY), UNKNOWN_KEY.messages));
}

#[test]
fn a_start_with_a_missing_image_fails() {
    in_lab(|| assert_start_fails(&host_with(&MISSING_IMAGE), MISSING_IMAGE.messages));
}

#[test]
fn a_start_without_access_to_the_image_fails() {
    in_lab(|| assert_start_fails(&host_with(&WRONG_OWNER), WRONG_OWNER.messages));
}

#[test]
fn a_start_without_access_to_the_device_fails() {
    in_lab(|| {
        let host = host();
        let output = lab(&["block", "a", "64M"]);
        let device = String::from_utf8(output.stdout).unwrap();
        let device = device.trim();
        host.ok(&format!("chown root:root {device} && chmod 600 {device}"));
        host.configure("disk", &format!("FILE={device}\nADDR=::\nPORT=10809\n"));
        assert_start_fails(&host, &[&format!("{device} may not be read by user id")]);
    });
}

#[test]
fn a_start_with_an_occupied_port_fails() {
    in_lab(|| {
        let host = host();
        host.configure(
            "other",
            "FILE=/var/lib/flexnbd/other.img\nCREATE=1M\nADDR=::\nPORT=10809\n",
        );
        host.systemctl("start flexnbd@other.service");
        let began = Instant::now();
        let start = host.sh(&format!("systemctl start {DISK}"));
        let status = host.status(SOCKETS[0]);
        report(&format!("status after {:?}", began.elapsed()));
        assert_ne!(start.code, 0, "{status}");
        assert!(status.contains("Failed to listen on sockets"), "{status}");
        // systemd logs the reason from a short-lived process of its own, whose line `systemctl
        // status` sometimes misses. `systemctl start` points the operator to the journal.
        let journal = host.ok("journalctl --sync; journalctl --no-pager --boot --priority=err");
        let reason = "flexnbd@disk.socket: Failed to create listening socket ([::]:10809): \
                      Address already in use";
        assert!(journal.contains(reason), "{journal}");
        assert_eq!(host.state(DISK), "inactive", "{status}");
        assert_eq!(probe(&host.nbd()), Probe::Greeted, "the other instance serves");
        host.systemctl("stop flexnbd@other.service flexnbd@other.socket");
        host.systemctl(&format!("start {DISK}"));
        assert_eq!(host.disk_status("disk")["size"], SIZE.to_string());
    });
}

#[test]
fn a_start_without_a_configuration_fails() {
    in_lab(|| {
        let host = host();
        let start = host.sh("systemctl start flexnbd@nobody.service");
        let messages = format!("{start}{}", host.status("flexnbd@nobody.socket"));
        assert_ne!(start.code, 0, "{messages}");
        assert!(messages.contains("Assertion failed for flexnbd@nobody.socket"), "{messages}");
    });
}

#[test]
fn clients_are_refused_while_a_key_is_unknown() {
    in_lab(|| {
        let fix = "sed -i /SIZE/d /etc/flexnbd/disk.conf";
        assert_clients_refused_until_fixed(&host_with(&UNKNOWN_KEY), UNKNOWN_KEY.messages, fix);
    });
}

#[test]
fn clients_are_refused_while_the_image_is_missing() {
    in_lab(|| {
        let fix = "truncate -s 64M $IMAGE && chown flexnbd: $IMAGE";
        assert_clients_refused_until_fixed(&host_with(&MISSING_IMAGE), MISSING_IMAGE.messages, fix);
    });
}

#[test]
fn clients_are_refused_while_the_image_is_inaccessible() {
    in_lab(|| {
        assert_clients_refused_until_fixed(
            &host_with(&WRONG_OWNER),
            WRONG_OWNER.messages,
            "chown flexnbd: $IMAGE",
        );
    });
}

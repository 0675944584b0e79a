//! Migrations between two hosts with the units only, in both directions, followed by reboots.
//! Interrupted migrations are tested in `power_cuts.rs` and `interrupted.rs`.

use crate::connect::{Probe, Reconnector, probe};
use crate::host::{DISK, Host, IMAGE, LISTEN, PORT, SOCKETS, field};
use crate::journal;
use crate::session::{in_lab, report};
use crate::third_party::Qemu;
use crate::verifier::{Crash, Verifier};
use flexnbd::message_id as id;
use harness::image::{assert_as_sparse, assert_same, stamped_image};
use harness::session::Mode;
use harness::writers::{Writers, Written};
use harness::{Endpoint, MIB, run};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

const SIZE: u64 = 128 * MIB;
/// Pause between two batches of a writer, which lets the copy converge.
const PAUSE: Duration = Duration::from_millis(10);

/// Two hosts with the same configuration: `a` serves an image with data, `b` has an empty image.
pub(crate) fn two_hosts(size: u64, fill: impl Fn(&Path, u64)) -> (Host, Host) {
    let (a, b) = std::thread::scope(|scope| {
        let a = scope.spawn(|| Host::installed("a"));
        let b = scope.spawn(|| Host::installed("b"));
        (a.join().unwrap(), b.join().unwrap())
    });
    for host in [&a, &b] {
        host.configure_disk(size);
        host.systemctl(&format!("enable {DISK}"));
    }
    fill(&a.path(IMAGE), size);
    a.ok(&format!("chown flexnbd: {IMAGE}"));
    a.systemctl(&format!("start {DISK}"));
    (a, b)
}

/// Fills the second half of the disk, which gives the migration data to copy. Clients write in the
/// first half.
pub(crate) fn half_full(image: &Path, size: u64) {
    std::fs::File::create(image).unwrap().set_len(size).unwrap();
    harness::write_at(image, size / 2, &harness::noise((size / 2) as usize, 5));
    std::fs::File::open(image).unwrap().sync_all().unwrap();
}

/// Starts the receiving unit at `to` and the migration at `from`.
#[track_caller]
pub(crate) fn send(from: &Host, to: &Host, options: &str) {
    to.systemctl(&format!("start {LISTEN}"));
    let place = format!("--addr {} --port {PORT}", to.ip4());
    let output = from.ok(&format!("flexnbd mirror --instance disk {place} {options}"));
    assert_eq!(output.trim(), "Migration started");
}

/// Waits until `to` serves the disk and `from` has stopped its units.
#[track_caller]
pub(crate) fn wait_for_arrival(from: &Host, to: &Host) {
    to.wait_for_state(DISK, "active");
    to.wait_for_state(LISTEN, "inactive");
    from.wait_for_state(DISK, "inactive");
    for socket in SOCKETS {
        from.wait_for_state(socket, "inactive");
    }
    assert_eq!(ownership(to), "ours");
    assert_eq!(ownership(from), "departed");
    for host in [from, to] {
        assert_eq!(host.ok("systemctl --failed --no-legend"), "", "{}", host.name);
    }
}

/// The ownership in the disk's record, whether or not the disk is served.
#[track_caller]
pub(crate) fn ownership(host: &Host) -> String {
    let status = host.ok("flexnbd status --config /etc/flexnbd/disk.conf");
    let word = status.split_whitespace().find_map(|pair| pair.strip_prefix("ownership="));
    word.unwrap_or_else(|| panic!("no ownership in {status}")).to_owned()
}

/// Fails unless the host, which does not own its disk, refuses clients and stays up.
#[track_caller]
pub(crate) fn assert_refuses(host: &Host, times: usize) {
    for n in 0..times {
        assert_eq!(probe(&host.nbd()), Probe::Closed, "{}, attempt {n}", host.name);
    }
    assert_eq!(host.state(DISK), "active", "{} stays up", host.name);
    assert_eq!(host.show(DISK, "NRestarts"), "0", "{} is stable", host.name);
    assert!(host.show(DISK, "StatusText").starts_with("refusing clients: "));
    for socket in SOCKETS {
        assert_eq!(host.state(socket), "active", "{} of {}", socket, host.name);
    }
}

/// Migrates the disk under four writers, which continue after the writes of `before`.
fn migrate_under_load(from: &Host, to: &Host, before: Option<&Written>) -> Written {
    let how = (4, 1, PAUSE);
    let writers = match before {
        Some(before) => Writers::continue_after(before, from.nbd(), how),
        None => Writers::start(from.nbd(), SIZE, how),
    };
    writers.wait_for_writes(500);
    send(from, to, "");
    let reconnector = Reconnector::start(&to.nbd());
    writers.add_destination(to.nbd());
    wait_for_arrival(from, to);
    writers.wait_for_destination();
    let written = writers.stop();
    let connections = reconnector.stop();
    assert_eq!(connections.refused, 0, "the destination's sockets stay open: {connections:?}");
    assert!(connections.served > 0, "the destination serves: {connections:?}");
    written.assert_all_present(&to.path(IMAGE), to.name);
    assert_eq!(probe(&from.nbd()), Probe::Refused, "the source has closed its sockets");
    let lines = journal::own_entries(from);
    let departed = journal::event(&lines, id::MIGRATION_DEPARTED);
    let place = format!("{}:{PORT}", to.ip4());
    assert_eq!(field(departed, "FLEXNBD_DESTINATION"), place);
    report(&format!("{} writes during {} to {}", written.acknowledged, from.name, to.name));
    written
}

#[test]
fn a_disk_migrates_under_load_and_back() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, stamped_image);
        let written = migrate_under_load(&a, &b, None);
        migrate_under_load(&b, &a, Some(&written));
        assert_eq!((ownership(&a), ownership(&b)), ("ours".into(), "departed".into()));
    });
}

#[test]
fn a_virtual_machine_follows_its_disk_without_errors() {
    // A service address that moves with the disk.
    const ADDRESS: &str = "10.99.0.100";
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        a.ok(&format!("ip address add {ADDRESS}/32 dev host0"));
        run("ip", &["route", "add", ADDRESS, "via", &a.ip4().to_string()]);
        let qemu = Qemu::between(&Endpoint::Tcp((ADDRESS.parse::<IpAddr>().unwrap(), PORT).into()));
        let client = Verifier::start(&qemu.endpoint(), Mode::Structured, 0..SIZE / 2);
        client.wait_for_replies(200);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        a.ok(&format!("ip address delete {ADDRESS}/32 dev host0"));
        b.ok(&format!("ip address add {ADDRESS}/32 dev host0"));
        run("ip", &["route", "replace", ADDRESS, "via", &b.ip4().to_string()]);
        client.wait_for_replies(200);
        let summary = client.stop();
        report(&format!(
            "{} replies, the longest stall {:?}",
            summary.replies, summary.worst_stall
        ));
        summary.model.clone().verify(&b.nbd(), Crash::Process);
    });
}

/// Migrates the disk and restarts both hosts with `order`: the destination still serves, the source
/// refuses, and the disk can migrate back.
fn assert_restarts_keep_ownership(order: impl Fn(&Host, &Host)) {
    let (a, b) = two_hosts(SIZE, stamped_image);
    send(&a, &b, "");
    wait_for_arrival(&a, &b);
    assert_same(&a.path(IMAGE), &b.path(IMAGE));
    assert_as_sparse(&a.path(IMAGE), &b.path(IMAGE));
    order(&a, &b);
    assert_eq!(probe(&b.nbd()), Probe::Greeted);
    assert_refuses(&a, 20);
    assert_eq!(probe(&b.nbd()), Probe::Greeted);
    let refusing = a.wait_for_message(DISK, "refusing clients");
    let text = field(&refusing, "MESSAGE");
    assert!(text.contains(&b.ip4().to_string()), "{text}");
    // Back, to a host that refuses clients.
    send(&b, &a, "");
    wait_for_arrival(&b, &a);
}

#[test]
fn reboots_of_source_then_destination_keep_ownership() {
    in_lab(|| {
        assert_restarts_keep_ownership(|a, b| {
            a.reboot();
            b.reboot();
        });
    });
}

#[test]
fn reboots_of_destination_then_source_keep_ownership() {
    in_lab(|| {
        assert_restarts_keep_ownership(|a, b| {
            b.reboot();
            a.reboot();
        });
    });
}

#[test]
fn a_simultaneous_shutdown_keeps_ownership() {
    in_lab(|| {
        assert_restarts_keep_ownership(|a, b| {
            a.down();
            b.down();
            a.boot();
            b.boot();
        });
    });
}

//! Disks move between two hosts by units alone, there and back, and reboots change nothing.
//! Never interrupts a migration; that is for `cuts.rs` and `halfway.rs`.

use crate::host::{DISK, Host, IMAGE, LISTEN, PORT, SOCKETS, field};
use crate::journal;
use crate::knock::{Knocker, Turned, try_door};
use crate::others::Qemu;
use crate::session::{in_lab, tell};
use crate::steady::{Calamity, Steady};
use flexnbd::message_id as id;
use harness::image::{assert_as_sparse, assert_same, stamped_image};
use harness::session::Mode;
use harness::writers::{Writers, Written};
use harness::{Endpoint, MIB, run};
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

const SIZE: u64 = 128 * MIB;
/// Between two batches of a writer that the copy keeps up with.
const PAUSE: Duration = Duration::from_millis(10);

/// Two hosts with the same configuration: `a` serves and has data, `b` has an empty image.
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

/// Data in the second half of the disk, for there to be something to copy; the first is the
/// clients'.
pub(crate) fn half_full(image: &Path, size: u64) {
    std::fs::File::create(image).unwrap().set_len(size).unwrap();
    harness::write_at(image, size / 2, &harness::noise((size / 2) as usize, 5));
    std::fs::File::open(image).unwrap().sync_all().unwrap();
}

/// What an operator does: receive there, send from here.
#[track_caller]
pub(crate) fn send(from: &Host, to: &Host, options: &str) {
    to.systemctl(&format!("start {LISTEN}"));
    let place = format!("--addr {} --port {PORT}", to.ip4());
    let said = from.ok(&format!("flexnbd mirror --instance disk {place} {options}"));
    assert_eq!(said.trim(), "Migration started");
}

/// Waits until the disk is served there, and no longer here.
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

/// What the record of the disk says, whether or not it is served.
#[track_caller]
pub(crate) fn ownership(host: &Host) -> String {
    let status = host.ok("flexnbd status --config /etc/flexnbd/disk.conf");
    let word = status.split_whitespace().find_map(|pair| pair.strip_prefix("ownership="));
    word.unwrap_or_else(|| panic!("no ownership in {status}")).to_owned()
}

/// A host whose disk is elsewhere turns everybody away, and stands.
#[track_caller]
pub(crate) fn assert_refuses(host: &Host, times: usize) {
    for n in 0..times {
        assert_eq!(try_door(&host.nbd()), Turned::Away, "{}, attempt {n}", host.name);
    }
    assert_eq!(host.state(DISK), "active", "{} stays up", host.name);
    assert_eq!(host.show(DISK, "NRestarts"), "0", "{} is stable", host.name);
    assert!(host.show(DISK, "StatusText").starts_with("refusing clients: "));
    for socket in SOCKETS {
        assert_eq!(host.state(socket), "active", "{} of {}", socket, host.name);
    }
}

fn door(host: &Host) -> Endpoint {
    let Endpoint::Tcp(address) = host.nbd() else { panic!("a TCP address") };
    Endpoint::Tcp(address)
}

/// One migration under four writers, from whoever serves to the other, of a disk in which others
/// have written `before`.
fn moves(from: &Host, to: &Host, before: Option<&Written>) -> Written {
    let how = (4, 1, PAUSE);
    let writers = match before {
        Some(before) => Writers::continue_after(before, door(from), how),
        None => Writers::start(door(from), SIZE, how),
    };
    writers.wait_for_writes(500);
    send(from, to, "");
    let knocker = Knocker::start(&to.nbd());
    writers.add_destination(door(to));
    wait_for_arrival(from, to);
    writers.wait_for_destination();
    let written = writers.stop();
    let knocks = knocker.stop();
    assert_eq!(knocks.refused, 0, "from receiving to serving nobody is refused: {knocks:?}");
    assert!(knocks.served > 0, "the destination serves: {knocks:?}");
    written.assert_all_present(&to.path(IMAGE), to.name);
    assert_eq!(try_door(&from.nbd()), Turned::Refused, "nothing listens where the disk was");
    let lines = journal::written(from);
    let departed = journal::event(&lines, id::MIGRATION_DEPARTED);
    let place = format!("{}:{PORT}", to.ip4());
    assert_eq!(field(departed, "FLEXNBD_DESTINATION"), place, "where the disk went");
    tell(&format!("{} writes on the way from {} to {}", written.acknowledged, from.name, to.name));
    written
}

#[test]
fn a_disk_moves_under_load_by_units_alone_and_home_again() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, stamped_image);
        let written = moves(&a, &b, None);
        moves(&b, &a, Some(&written));
        assert_eq!((ownership(&a), ownership(&b)), ("ours".into(), "departed".into()));
    });
}

#[test]
fn a_virtual_machine_follows_its_disk_and_notices_nothing() {
    // An address that moves with the disk, as that of a service does.
    const ADDRESS: &str = "10.99.0.100";
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        a.ok(&format!("ip address add {ADDRESS}/32 dev host0"));
        run("ip", &["route", "add", ADDRESS, "via", &a.ip4().to_string()]);
        let qemu = Qemu::between(&Endpoint::Tcp((ADDRESS.parse::<IpAddr>().unwrap(), PORT).into()));
        let client = Steady::start(&qemu.endpoint(), Mode::Structured, 0..SIZE / 2);
        client.wait_for_answers(200);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        a.ok(&format!("ip address delete {ADDRESS}/32 dev host0"));
        b.ok(&format!("ip address add {ADDRESS}/32 dev host0"));
        run("ip", &["route", "replace", ADDRESS, "via", &b.ip4().to_string()]);
        client.wait_for_answers(200);
        let ended = client.stop();
        tell(&format!("{} answers, the worst stall {:?}", ended.answers, ended.worst_stall));
        ended.memory.clone().verify(&b.nbd(), Calamity::Death);
    });
}

/// After a migration both hosts start anew, in this order.
fn stays_where_it_went(order: impl Fn(&Host, &Host)) {
    let (a, b) = two_hosts(SIZE, stamped_image);
    send(&a, &b, "");
    wait_for_arrival(&a, &b);
    assert_same(&a.path(IMAGE), &b.path(IMAGE));
    assert_as_sparse(&a.path(IMAGE), &b.path(IMAGE));
    order(&a, &b);
    assert_eq!(try_door(&b.nbd()), Turned::In);
    assert_refuses(&a, 20);
    assert_eq!(try_door(&b.nbd()), Turned::In);
    let refusing = a.wait_for_message(DISK, "refusing clients");
    let text = field(&refusing, "MESSAGE");
    assert!(text.contains(&b.ip4().to_string()), "it says where the disk is: {text}");
    // And home again, from a host that refuses.
    send(&b, &a, "");
    wait_for_arrival(&b, &a);
}

#[test]
fn a_reboot_of_the_source_and_then_of_the_destination_brings_no_old_copy_back() {
    in_lab(|| {
        stays_where_it_went(|a, b| {
            a.reboot();
            b.reboot();
        });
    });
}

#[test]
fn a_reboot_of_the_destination_and_then_of_the_source_brings_no_old_copy_back() {
    in_lab(|| {
        stays_where_it_went(|a, b| {
            b.reboot();
            a.reboot();
        });
    });
}

#[test]
fn both_hosts_down_at_once_come_back_with_one_disk() {
    in_lab(|| {
        stays_where_it_went(|a, b| {
            a.down();
            b.down();
            a.boot();
            b.boot();
        });
    });
}

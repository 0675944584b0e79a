//! Fields and catalog entries in the journal, progress in `systemctl status`, and reloads.
//! Checks fields and message ids in preference to the text of a line.

use crate::connect::{Probe, probe};
use crate::host::{DISK, Entry, Host, LISTEN, PORT, field};
use crate::migration::{half_full, send, two_hosts, wait_for_arrival};
use crate::session::in_lab;
use crate::verifier::{Crash, Verifier};
use flexnbd::message_id as id;
use harness::MIB;
use harness::session::Mode;
use std::collections::BTreeSet;

const SIZE: u64 = 64 * MIB;

/// The journal entries that flexnbd processes have written, of any instance and either unit.
#[track_caller]
pub(crate) fn own_entries(host: &Host) -> Vec<Entry> {
    host.ok("journalctl --sync");
    host.journal("--unit=flexnbd* _COMM=flexnbd")
}

/// The latest entry with this message id.
#[track_caller]
pub(crate) fn event<'a>(entries: &'a [Entry], id: &str) -> &'a Entry {
    let found = entries.iter().rev().find(|entry| field(entry, "MESSAGE_ID") == id);
    found.unwrap_or_else(|| panic!("no event {id}"))
}

/// Fails unless each of the fields has a value.
#[track_caller]
fn assert_has_fields(entry: &Entry, names: &[&str]) {
    for name in names {
        assert!(!field(entry, name).is_empty(), "no {name} in {entry:#?}");
    }
}

/// Fails unless the catalog explains every message id, as `journalctl -x` shows it.
#[track_caller]
fn assert_explained(host: &Host, entries: &[Entry]) {
    let ids: BTreeSet<&str> = entries.iter().map(|entry| field(entry, "MESSAGE_ID")).collect();
    let ids: Vec<&str> = ids.into_iter().filter(|id| !id.is_empty()).collect();
    assert!(!ids.is_empty(), "no entry has a message id");
    for id in ids {
        let text = host.ok(&format!("journalctl --no-pager --catalog --lines=1 MESSAGE_ID={id}"));
        assert!(text.contains("Subject: "), "no catalog entry for {id}: {text}");
        assert!(text.lines().count() > 5, "the catalog entry of {id} is too short: {text}");
    }
}

#[test]
fn migrations_are_logged_with_fields_and_catalog_entries() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        let client = Verifier::start(&a.nbd(), Mode::Structured, 0..SIZE / 4);
        client.wait_for_replies(100);
        send(&a, &b, "");
        wait_for_arrival(&a, &b);
        client.wait_for_loss();
        let (at_a, at_b) = (own_entries(&a), own_entries(&b));
        for entry in at_a.iter().chain(&at_b) {
            assert_eq!(field(entry, "FLEXNBD_INSTANCE"), "disk", "{entry:#?}");
        }
        assert_has_fields(event(&at_a, id::READY), &["FLEXNBD_IMAGE"]);
        let started = event(&at_a, id::MIGRATION_STARTED);
        assert_has_fields(
            started,
            &["FLEXNBD_MIGRATION", "FLEXNBD_DESTINATION", "FLEXNBD_BYTES_TOTAL"],
        );
        assert_eq!(field(started, "FLEXNBD_DESTINATION"), format!("{}:{PORT}", b.ip4()));
        let departed = event(&at_a, id::MIGRATION_DEPARTED);
        assert_has_fields(departed, &["FLEXNBD_DESTINATION", "FLEXNBD_BYTES_SENT"]);
        let arrived = event(&at_b, id::ARRIVED);
        let migration = field(started, "FLEXNBD_MIGRATION");
        assert_eq!(field(departed, "FLEXNBD_MIGRATION"), migration);
        assert_eq!(field(arrived, "FLEXNBD_MIGRATION"), migration, "one id on both hosts");
        let client = at_a.iter().find(|entry| !field(entry, "FLEXNBD_CLIENT").is_empty());
        let client = client.expect("an entry about a client");
        assert!(field(client, "FLEXNBD_CLIENT").starts_with("10.99.0.1:"), "{client:#?}");
        assert_has_fields(client, &["FLEXNBD_SESSION"]);
        assert_explained(&a, &at_a);
        assert_explained(&b, &at_b);

        // Started again, the source refuses clients and logs where the disk went.
        a.systemctl("start flexnbd@disk.socket");
        assert_eq!(probe(&a.nbd()), Probe::Closed);
        let at_a = own_entries(&a);
        let refusing = event(&at_a, id::REFUSING_OWNERSHIP);
        assert!(field(refusing, "MESSAGE").contains(&b.ip4().to_string()), "{refusing:#?}");
        assert_has_fields(event(&at_a, id::CLIENTS_REFUSED), &["FLEXNBD_CLIENT"]);
        assert_explained(&a, &at_a);
    });
}

#[test]
fn systemctl_status_shows_migration_progress() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        send(&a, &b, "--max-speed 4M");
        let percent = || {
            let status = a.show(DISK, "StatusText");
            let number: u32 = status.split_once(" %")?.0.rsplit(' ').next()?.parse().ok()?;
            (number > 5).then_some((number, status))
        };
        let mut first = None;
        a.wait_for("progress", || {
            first = percent();
            first.is_some()
        });
        let (first, text) = first.unwrap();
        assert!(a.status(DISK).contains(&b.ip4().to_string()), "{text}");
        a.wait_for("more progress", || percent().is_some_and(|(now, _)| now > first));
        a.ok("flexnbd mirror-speed --instance disk --max-speed 0");
        wait_for_arrival(&a, &b);
    });
}

#[test]
fn a_reload_closes_sessions_no_longer_admitted() {
    in_lab(|| {
        let host = Host::installed("a");
        host.make_image(crate::host::IMAGE, SIZE);
        let acl =
            |entries: &str| format!("FILE=/srv/disk.img\nADDR=::\nPORT=10809\nACL={entries}\n");
        host.configure("disk", &acl("10.99.0.0/24 fd99::/64"));
        host.systemctl(&format!("start {DISK}"));
        let pid = host.pid(DISK);
        let ipv4 = Verifier::start(&host.nbd(), Mode::Structured, 0..SIZE / 2);
        let ipv6 = Verifier::start(&host.nbd6(), Mode::Extended, SIZE / 2..SIZE);

        host.write("/etc/flexnbd/disk.conf", &acl("fd99::/64"));
        host.systemctl(&format!("reload {DISK}"));
        assert_eq!(probe(&host.nbd()), Probe::Closed);
        let mut model = ipv4.wait_for_loss().model;
        ipv6.wait_for_replies(100);
        let entries = own_entries(&host);
        assert_has_fields(event(&entries, id::CLIENT_NOT_ADMITTED), &["FLEXNBD_CLIENT"]);
        event(&entries, id::RELOADED);

        // An invalid configuration changes nothing.
        host.write("/etc/flexnbd/disk.conf", &acl("10.99.0.0/24 nonsense"));
        assert_ne!(host.sh(&format!("systemctl reload {DISK}")).code, 0);
        assert_eq!(host.state(DISK), "active");
        assert_eq!(probe(&host.nbd()), Probe::Closed);
        event(&own_entries(&host), id::RELOAD_FAILED);

        host.write("/etc/flexnbd/disk.conf", &acl("10.99.0.0/24 fd99::/64"));
        host.systemctl(&format!("reload {DISK}"));
        model.verify(&host.nbd(), Crash::Process);
        let ipv4 = Verifier::resume(&host.nbd(), Mode::Simple, model);
        ipv4.wait_for_replies(100);
        ipv4.stop();
        ipv6.stop();
        assert_eq!(host.pid(DISK), pid, "the same process all the time");
        assert_explained(&host, &own_entries(&host));
    });
}

#[test]
fn a_listening_host_reports_its_status() {
    in_lab(|| {
        let (_a, b) = two_hosts(SIZE, half_full);
        b.systemctl(&format!("start {LISTEN}"));
        assert!(b.status(LISTEN).contains("Status: \""), "{}", b.status(LISTEN));
        assert_has_fields(
            event(&own_entries(&b), id::READY),
            &["FLEXNBD_IMAGE", "FLEXNBD_INSTANCE"],
        );
    });
}

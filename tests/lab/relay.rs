//! Migrations with the units only, at whose end the clients stay at the source: they never reconnect.

use crate::connect::{Probe, probe};
use crate::host::{DISK, LISTEN, PORT, SOCKETS, field};
use crate::migration::{half_full, ownership, send, two_hosts, wait_for_arrival};
use crate::package;
use crate::session::{in_lab, report};
use crate::verifier::{Verifier, wait_for_replies};
use flexnbd::message_id as id;
use harness::MIB;
use harness::session::MODES;

const SIZE: u64 = 128 * MIB;
/// The size of each client's part of the disk, in bytes.
const PART: u64 = 8 * MIB;
/// The number of replies to each client before the next disturbance.
const REPLIES: u64 = 50;

#[test]
fn clients_stay_through_a_migration_restarts_and_upgrades() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        let parts = MODES.into_iter().zip(0..);
        let clients: Vec<Verifier> = parts
            .map(|(mode, n)| Verifier::start(&a.nbd(), mode, n * PART..(n + 1) * PART))
            .collect();
        wait_for_replies(&clients, REPLIES);
        send(&a, &b, "--relay");
        let to = format!("{}:{PORT}", b.ip4());
        let status = format!("relaying 3 clients to {to}");
        a.wait_for("the status", || a.status(DISK).contains(&status));
        b.wait_for_state(DISK, "active");
        b.wait_for_state(LISTEN, "inactive");
        assert_eq!((ownership(&a), ownership(&b)), ("departed".into(), "ours".into()));
        let begun = a.wait_for_message(DISK, &status);
        assert_eq!(field(&begun, "MESSAGE_ID"), id::RELAYING);
        assert_eq!(field(&begun, "FLEXNBD_DESTINATION"), to);
        for socket in SOCKETS {
            assert_eq!(a.state(socket), "active");
        }
        assert_eq!(probe(&a.nbd()), Probe::Closed);
        wait_for_replies(&clients, REPLIES);
        for _ in 0..3 {
            let before = a.pid(DISK);
            a.systemctl(&format!("restart {DISK}"));
            assert_ne!(a.pid(DISK), before, "another process relays now");
            a.wait_for("the status", || a.status(DISK).contains(&status));
            wait_for_replies(&clients, REPLIES);
            b.systemctl(&format!("restart {DISK}"));
            wait_for_replies(&clients, REPLIES);
            b.systemctl(&format!("kill --signal=KILL {DISK}"));
            wait_for_replies(&clients, REPLIES);
        }
        let before = a.pid(DISK);
        a.install(&package::next());
        assert_ne!(a.pid(DISK), before, "another process relays now");
        wait_for_replies(&clients, REPLIES);
        let summaries: Vec<_> = clients.into_iter().map(Verifier::stop).collect();
        let stall = summaries.iter().map(|summary| summary.worst_stall).max().unwrap();
        report(&format!("relay: longest stall {stall:?}"));
        let ended = a.wait_for_message(DISK, "the last client has gone");
        assert_eq!(field(&ended, "MESSAGE_ID"), id::RELAY_ENDED);
        wait_for_arrival(&a, &b);
    });
}

//! A destination that is stopped during a migration refuses clients and never serves an incomplete
//! copy. Power cuts are tested in `power_cuts.rs`.

use crate::host::{DISK, LISTEN};
use crate::migration::{assert_refuses, half_full, ownership, send, two_hosts, wait_for_arrival};
use crate::session::in_lab;
use crate::verifier::Verifier;
use harness::MIB;
use harness::session::Mode;

const SIZE: u64 = 64 * MIB;
/// A speed limit at which a copy outlasts every step of a test.
const SLOW: &str = "--max-speed 1M";

#[test]
fn a_destination_stopped_midway_refuses_until_restarted() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        let client = Verifier::start(&a.nbd(), Mode::Structured, 0..SIZE / 4);
        send(&a, &b, SLOW);
        b.wait_for("the copy to begin", || ownership(&b) == "incoming");
        b.systemctl(&format!("stop {LISTEN}"));
        assert_ne!(b.state(DISK), "active", "the incomplete disk is not served");
        assert_refuses(&b, 100);
        client.wait_for_replies(100);
        assert_eq!(ownership(&b), "incoming");

        // The source retries by itself.
        b.systemctl(&format!("start {LISTEN}"));
        a.ok("flexnbd mirror-speed --instance disk --max-speed 0");
        wait_for_arrival(&a, &b);
        let mut model = client.wait_for_loss().model;
        model.verify(&b.nbd(), crate::verifier::Crash::Process);
    });
}

#[test]
fn a_destination_stopped_before_the_copy_serves_nothing() {
    in_lab(|| {
        let (_a, b) = two_hosts(SIZE, half_full);
        b.systemctl(&format!("start {LISTEN}"));
        b.systemctl(&format!("stop {LISTEN}"));
        assert_eq!(b.state(LISTEN), "failed", "no disk has arrived");
        assert_ne!(b.state(DISK), "active");
    });
}

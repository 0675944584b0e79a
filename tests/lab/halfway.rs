//! A destination that is stopped half-way: an incomplete copy is served to nobody, however hard
//! they knock. Never cuts the power; that is for `cuts.rs`.

use crate::host::{DISK, LISTEN};
use crate::moving::{assert_refuses, half_full, ownership, send, two_hosts, wait_for_arrival};
use crate::session::in_lab;
use crate::steady::Steady;
use harness::MIB;
use harness::session::Mode;

const SIZE: u64 = 64 * MIB;
/// Slow enough for whatever a test does meanwhile.
const SLOWLY: &str = "--max-speed 1M";

#[test]
fn a_destination_stopped_half_way_refuses_and_starting_over_works() {
    in_lab(|| {
        let (a, b) = two_hosts(SIZE, half_full);
        let client = Steady::start(&a.nbd(), Mode::Structured, 0..SIZE / 4);
        send(&a, &b, SLOWLY);
        b.wait_for("a copy that has begun", || ownership(&b) == "incoming");
        b.systemctl(&format!("stop {LISTEN}"));
        assert_ne!(b.state(DISK), "active", "no empty disk is served");
        assert_refuses(&b, 100);
        client.wait_for_answers(100);
        assert_eq!(ownership(&b), "incoming");

        // The source tries again by itself.
        b.systemctl(&format!("start {LISTEN}"));
        a.ok("flexnbd mirror-speed --instance disk --max-speed 0");
        wait_for_arrival(&a, &b);
        let mut memory = client.lost().memory;
        memory.verify(&b.nbd(), crate::steady::Calamity::Death);
    });
}

#[test]
fn a_destination_stopped_before_anything_came_serves_nothing() {
    in_lab(|| {
        let (_a, b) = two_hosts(SIZE, half_full);
        b.systemctl(&format!("start {LISTEN}"));
        b.systemctl(&format!("stop {LISTEN}"));
        assert_eq!(b.state(LISTEN), "failed", "nothing has arrived");
        assert_ne!(b.state(DISK), "active");
    });
}

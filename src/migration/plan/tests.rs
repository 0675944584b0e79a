//! The plan sends every byte, in requests within the limits that never overlap.

use super::*;
use crate::disk::dirty::BLOCK;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn caps() -> Caps {
    Caps { zeroes: true, block_min: 1, data_max: 32 * MIB }
}

fn plan(size: u64, limits: Limits, caps: Caps) -> CopyPlan {
    let mut plan = CopyPlan::new(size, limits);
    plan.restart(caps);
    plan
}

fn send(plan: &mut CopyPlan, cookie: u64, next: NextCopy) -> Range {
    let (range, payload) = match next {
        NextCopy::Write(range) => (range, range.length()),
        NextCopy::Zero(range) => (range, 0),
        other => panic!("{other:?} sends nothing"),
    };
    plan.sent(cookie, CopyRequest { range, payload });
    range
}

/// Examines and sends until the plan takes marks or idles; the whole disk is data.
fn send_all(plan: &mut CopyPlan) -> Vec<Range> {
    let mut sent = Vec::new();
    loop {
        match plan.next(u64::MAX) {
            NextCopy::Look(range) => plan.looked(range, Content::Data),
            next @ (NextCopy::Write(_) | NextCopy::Zero(_)) => {
                let cookie = sent.len() as u64;
                sent.push(send(plan, cookie, next));
            }
            NextCopy::Take { .. } | NextCopy::Idle => return sent,
        }
    }
}

#[test]
fn at_least_16_mib_are_in_flight_before_a_reply() {
    let mut plan = plan(100 * MIB, Limits::default(), caps());
    let sent = send_all(&mut plan);
    assert!(sent.iter().map(Range::length).sum::<u64>() >= 16 * MIB);
    assert!(sent.iter().all(|range| range.length() <= MIB));
    assert_eq!(plan.next(u64::MAX), NextCopy::Idle);
}

#[test]
fn window_and_request_limit_are_used_exactly() {
    let limits = Limits { window: 3 * MIB, requests: 2, ..Limits::default() };
    assert_eq!(send_all(&mut plan(100 * MIB, limits, caps())).len(), 2);
    let limits = Limits { window: 3 * MIB, requests: 9, ..Limits::default() };
    assert_eq!(send_all(&mut plan(100 * MIB, limits, caps())).len(), 3);
}

#[test]
fn write_zeroes_in_flight_are_bounded() {
    let limits = Limits { zeroes: 2, zero_max: MIB, ..Limits::default() };
    let mut plan = plan(8 * MIB, limits, caps());
    for cookie in 0..2 {
        plan.looked(Range::whole(8 * MIB).from(cookie * MIB).split(MIB).0, Content::Zeros);
        let next = plan.next(MIB);
        send(&mut plan, cookie, next);
    }
    plan.looked(Range::whole(8 * MIB).from(2 * MIB).split(MIB).0, Content::Zeros);
    assert_eq!(plan.next(MIB), NextCopy::Idle);
    plan.acknowledged(0);
    assert!(matches!(plan.next(MIB), NextCopy::Zero(_)));
}

#[test]
fn mark_is_widened_to_the_destinations_block() {
    let caps = Caps { block_min: BLOCK_MIN_MAX, ..caps() };
    let mut plan = plan(MIB, Limits::default(), caps);
    send_all(&mut plan);
    plan.acknowledged(0);
    let disk = Range::whole(MIB);
    plan.taken(Some(disk.from(BLOCK_MIN_MAX + BLOCK).split(BLOCK).0), 0);
    let whole = disk.from(BLOCK_MIN_MAX).split(BLOCK_MIN_MAX).0;
    assert_eq!(plan.next(u64::MAX), NextCopy::Look(whole));
}

#[test]
fn hole_is_sent_as_zeros_of_two_gibibytes() {
    let mut plan = plan(5 << 30, Limits::default(), caps());
    let NextCopy::Look(range) = plan.next(MIB) else { panic!("no range to examine") };
    plan.looked(range, Content::Zeros);
    let lengths: Vec<u64> = (0..3)
        .map(|cookie| {
            let next = plan.next(MIB);
            assert!(matches!(next, NextCopy::Zero(_)));
            send(&mut plan, cookie, next).length()
        })
        .collect();
    assert_eq!(lengths, [2 << 30, 2 << 30, 1 << 30]);
}

#[test]
fn without_write_zeroes_data_is_sent_unexamined() {
    let mut plan = plan(3 * MIB, Limits::default(), Caps { zeroes: false, ..caps() });
    assert!(matches!(plan.next(u64::MAX), NextCopy::Write(_)));
    assert_eq!(send_all(&mut plan).len(), 3);
}

#[test]
fn write_keeps_the_destinations_maximum_payload() {
    let mut plan = plan(3 * MIB, Limits::default(), Caps { data_max: 65536, ..caps() });
    assert!(send_all(&mut plan).iter().all(|range| range.length() == 65536));
}

#[test]
fn partly_zero_block_is_sent_as_data() {
    let mut plan = plan(64 * 1024, Limits::default(), Caps { block_min: 4096, ..caps() });
    let disk = Range::whole(64 * 1024);
    plan.looked(disk.until(1000), Content::Zeros);
    assert_eq!(plan.next(u64::MAX), NextCopy::Write(disk.until(4096)));
    send(&mut plan, 0, NextCopy::Write(disk.until(4096)));
    plan.looked(disk.from(4096).until(12_000), Content::Zeros);
    assert_eq!(plan.next(u64::MAX), NextCopy::Zero(disk.from(4096).until(8192)));
    send(&mut plan, 1, NextCopy::Zero(disk.from(4096).until(8192)));
    plan.looked(disk.from(8192).until(9000), Content::Data);
    assert_eq!(plan.next(u64::MAX), NextCopy::Write(disk.from(8192).until(12_288)));
}

#[test]
fn dirty_block_waits_for_its_request_in_flight() {
    let mut plan = plan(2 * MIB, Limits::default(), caps());
    let sent = send_all(&mut plan);
    plan.taken(Some(Range::whole(2 * MIB).until(BLOCK)), 0);
    assert!(!matches!(plan.next(u64::MAX), NextCopy::Look(_) | NextCopy::Write(_)));
    plan.acknowledged(1);
    assert!(!matches!(plan.next(u64::MAX), NextCopy::Look(_)), "request 1 was of another range");
    plan.acknowledged(0);
    assert_eq!(plan.next(u64::MAX), NextCopy::Look(sent[0].until(BLOCK)));
}

#[test]
fn number_of_waiting_marks_is_bounded() {
    let mut plan = plan(100 * MIB, Limits { window: 100 * MIB, ..Limits::default() }, caps());
    send_all(&mut plan);
    let disk = Range::whole(100 * MIB);
    for waiting in 0..WAITING_MAX as u64 {
        assert!(matches!(plan.next(u64::MAX), NextCopy::Take { .. }), "after {waiting} marks");
        plan.taken(Some(disk.from(2 * waiting * BLOCK).split(BLOCK).0), BLOCK);
    }
    assert_eq!(plan.next(u64::MAX), NextCopy::Idle);
}

#[test]
fn new_pass_waits_until_the_last_is_sent() {
    let mut plan = plan(4 * MIB, Limits::default(), caps());
    send_all(&mut plan);
    plan.taken(Some(Range::whole(4 * MIB).until(BLOCK)), BLOCK);
    assert!(matches!(plan.next(u64::MAX), NextCopy::Take { from: BLOCK, .. }));
    plan.taken(None, BLOCK);
    assert_eq!(plan.next(u64::MAX), NextCopy::Idle, "block 0 is in flight and dirty");
    plan.acknowledged(0);
    assert!(matches!(plan.next(u64::MAX), NextCopy::Look(_)));
}

#[test]
fn no_marks_are_taken_between_look_and_send() {
    let mut plan = plan(4 << 30, Limits::default(), caps());
    plan.looked(Range::whole(4 << 30), Content::Zeros);
    assert!(matches!(plan.next(u64::MAX), NextCopy::Zero(_)));
}

#[test]
fn resume_sends_only_unacknowledged_ranges() {
    let mut plan = plan(8 * MIB, Limits::default(), caps());
    let sent = send_all(&mut plan);
    for cookie in [0, 1, 4] {
        plan.acknowledged(cookie);
    }
    plan.resume();
    assert_eq!(plan.left(), 5 * MIB);
    let again = send_all(&mut plan);
    assert_eq!(again, [sent[2], sent[3], sent[5], sent[6], sent[7]]);
    plan.restart(caps());
    assert_eq!(plan.left(), 8 * MIB);
}

#[test]
fn reply_without_request_is_detected() {
    let mut plan = plan(MIB, Limits::default(), caps());
    send_all(&mut plan);
    assert!(plan.acknowledged(0).is_some());
    assert!(plan.acknowledged(0).is_none(), "answered twice");
}

#[test]
fn plan_is_done_with_an_empty_bitmap_only() {
    let mut plan = plan(MIB, Limits::default(), caps());
    send_all(&mut plan);
    assert!(!plan.taken(None, 0), "nothing was marked");
    assert!(!plan.is_done(), "a request is in flight");
    plan.acknowledged(0);
    assert!(!plan.is_done(), "a client may have written since");
    assert!(matches!(plan.next(u64::MAX), NextCopy::Take { from: 0, .. }));
    plan.taken(None, 0);
    assert!(plan.is_done());
    plan.gate_closed();
    assert!(!plan.is_done(), "clients may have written before the gate closed");
}

#[derive(Clone, Debug)]
enum Step {
    Advance,
    Acknowledge(usize),
    Write(u64, bool),
    LoseLink,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Advance),
        3 => (0usize..8).prop_map(Step::Acknowledge),
        2 => (0..BLOCKS, any::<bool>()).prop_map(|(block, zero)| Step::Write(block, zero)),
        1 => Just(Step::LoseLink),
    ];
    proptest::collection::vec(step, 0..200)
}

const BLOCKS: u64 = 12;

/// A disk, its marks, and a destination that executes requests when it acknowledges them.
struct World {
    plan: CopyPlan,
    disk: Vec<u32>,
    marks: Vec<bool>,
    copy: Vec<u32>,
    /// Requests in flight: cookie, range, stamps of its blocks.
    requests: Vec<(u64, Range, Vec<u32>)>,
    cookie: u64,
}

fn blocks(range: Range) -> std::ops::Range<usize> {
    (range.offset() / BLOCK) as usize..(range.end() / BLOCK) as usize
}

impl World {
    fn new() -> Self {
        let limits = Limits { data_max: 2 * BLOCK, window: 4 * BLOCK, ..Limits::default() };
        let plan = plan(BLOCKS * BLOCK, limits, caps());
        let disk = vec![1, 0, 0, 0, 2, 3, 4, 5, 0, 6, 0, 7];
        let n = BLOCKS as usize;
        Self { plan, disk, marks: vec![false; n], copy: vec![99; n], requests: vec![], cookie: 0 }
    }

    fn advance(&mut self) {
        match self.plan.next(u64::MAX) {
            NextCopy::Look(range) => self.look(range),
            NextCopy::Take { from, .. } => self.take(from),
            next @ (NextCopy::Write(_) | NextCopy::Zero(_)) => self.send(next),
            NextCopy::Idle => {}
        }
    }

    fn look(&mut self, range: Range) {
        let all = blocks(range);
        let zero = self.disk[all.start] == 0;
        let same = self.disk[all].iter().take_while(|stamp| (**stamp == 0) == zero).count() as u64;
        let content = if zero { Content::Zeros } else { Content::Data };
        self.plan.looked(range.split(same * BLOCK).0, content);
    }

    fn take(&mut self, from: u64) {
        let first = (from / BLOCK) as usize;
        let found = (first..BLOCKS as usize).find(|&block| self.marks[block]);
        let run = found.map(|block| {
            self.marks[block] = false;
            Range::whole(BLOCKS * BLOCK).from(block as u64 * BLOCK).split(BLOCK).0
        });
        let left = self.marks.iter().filter(|mark| **mark).count() as u64 * BLOCK;
        self.plan.taken(run, left);
    }

    fn send(&mut self, next: NextCopy) {
        let range = send(&mut self.plan, self.cookie, next);
        let overlap = |other: &Range| other.offset() < range.end() && range.offset() < other.end();
        assert!(!self.requests.iter().any(|(_, other, _)| overlap(other)), "two requests overlap");
        let zero = matches!(next, NextCopy::Zero(_));
        let stamps = self.disk[blocks(range)].iter().map(|&s| if zero { 0 } else { s }).collect();
        self.requests.push((self.cookie, range, stamps));
        self.cookie += 1;
    }

    fn acknowledge(&mut self, which: usize) {
        if which < self.requests.len() {
            let (cookie, range, stamps) = self.requests.swap_remove(which);
            self.copy[blocks(range)].copy_from_slice(&stamps);
            assert!(self.plan.acknowledged(cookie).is_some());
        }
    }

    fn write(&mut self, block: u64, zero: bool) {
        let stamp = if zero { 0 } else { 1000 + self.cookie as u32 * 16 + block as u32 };
        self.disk[block as usize] = stamp;
        self.marks[block as usize] = true;
    }
}

proptest! {
    #[test]
    fn copy_equals_the_disk_once_the_plan_is_done(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Advance => world.advance(),
                Step::Acknowledge(which) => world.acknowledge(which),
                Step::Write(block, zero) => world.write(block, zero),
                Step::LoseLink => {
                    world.requests.clear();
                    world.plan.resume();
                }
            }
        }
        world.plan.gate_closed();
        for _ in 0..1000 {
            if world.plan.is_done() {
                break;
            }
            world.advance();
            world.acknowledge(0);
        }
        prop_assert!(world.plan.is_done());
        prop_assert_eq!(world.plan.left(), 0);
        prop_assert_eq!(world.copy, world.disk);
    }
}

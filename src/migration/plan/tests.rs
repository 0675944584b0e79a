//! Every byte is sent, in requests that fit, and never two of them at once over the same byte.

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
        other => panic!("{other:?} is nothing to send"),
    };
    plan.sent(cookie, AcknowledgedRequest { range, payload });
    range
}

/// Looks and sends until the plan wants something else; the disk is all data.
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
fn sixteen_mebibytes_and_more_are_in_flight_before_the_first_reply() {
    let mut plan = plan(100 * MIB, Limits::default(), caps());
    let sent = send_all(&mut plan);
    assert!(sent.iter().map(Range::length).sum::<u64>() >= 16 * MIB);
    assert!(sent.iter().all(|range| range.length() <= MIB));
    assert_eq!(plan.next(u64::MAX), NextCopy::Idle);
}

#[test]
fn the_window_and_the_number_of_requests_are_kept_exactly() {
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
fn a_finer_mark_than_the_destination_s_block_is_widened() {
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
fn a_hole_goes_as_zeros_two_gibibytes_at_a_time() {
    let mut plan = plan(5 << 30, Limits::default(), caps());
    let NextCopy::Look(range) = plan.next(MIB) else { panic!("nothing to look at") };
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
fn a_destination_without_write_zeroes_is_sent_data_without_looking() {
    let mut plan = plan(3 * MIB, Limits::default(), Caps { zeroes: false, ..caps() });
    assert!(matches!(plan.next(u64::MAX), NextCopy::Write(_)));
    assert_eq!(send_all(&mut plan).len(), 3);
}

#[test]
fn the_destination_s_largest_payload_is_respected() {
    let mut plan = plan(3 * MIB, Limits::default(), Caps { data_max: 65536, ..caps() });
    assert!(send_all(&mut plan).iter().all(|range| range.length() == 65536));
}

#[test]
fn zeros_that_do_not_fill_the_destination_s_block_go_as_data() {
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
fn a_dirty_block_waits_for_the_older_copy_of_itself() {
    let mut plan = plan(2 * MIB, Limits::default(), caps());
    let sent = send_all(&mut plan);
    plan.taken(Some(Range::whole(2 * MIB).until(BLOCK)), 0);
    assert!(!matches!(plan.next(u64::MAX), NextCopy::Look(_) | NextCopy::Write(_)));
    plan.acknowledged(1);
    assert!(
        !matches!(plan.next(u64::MAX), NextCopy::Look(_)),
        "request 1 was about something else"
    );
    plan.acknowledged(0);
    assert_eq!(plan.next(u64::MAX), NextCopy::Look(sent[0].until(BLOCK)));
}

#[test]
fn marks_are_not_hoarded_while_requests_in_flight_hold_them_up() {
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
fn a_new_pass_waits_until_the_last_one_is_on_its_way() {
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
fn nothing_is_taken_between_the_look_and_the_sending() {
    let mut plan = plan(4 << 30, Limits::default(), caps());
    plan.looked(Range::whole(4 << 30), Content::Zeros);
    assert!(matches!(plan.next(u64::MAX), NextCopy::Zero(_)));
}

#[test]
fn after_a_lost_link_only_what_was_not_acknowledged_is_sent_again() {
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
fn a_reply_to_nothing_in_flight_is_noticed() {
    let mut plan = plan(MIB, Limits::default(), caps());
    send_all(&mut plan);
    assert!(plan.acknowledged(0).is_some());
    assert!(plan.acknowledged(0).is_none(), "answered twice");
}

#[test]
fn a_plan_is_done_only_once_the_bitmap_was_found_empty_after_the_last_reply() {
    let mut plan = plan(MIB, Limits::default(), caps());
    send_all(&mut plan);
    assert!(!plan.taken(None, 0), "nothing was marked");
    assert!(!plan.is_done(), "a request is in flight");
    plan.acknowledged(0);
    assert!(!plan.is_done(), "a mark may have been made since");
    assert!(matches!(plan.next(u64::MAX), NextCopy::Take { from: 0, .. }));
    plan.taken(None, 0);
    assert!(plan.is_done());
    plan.gate_closed();
    assert!(!plan.is_done(), "the last writers may have marked");
}

#[derive(Clone, Debug)]
enum Step {
    Go,
    Acknowledge(usize),
    Write(u64, bool),
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::Go),
        3 => (0usize..8).prop_map(Step::Acknowledge),
        2 => (0..BLOCKS, any::<bool>()).prop_map(|(block, zero)| Step::Write(block, zero)),
        1 => Just(Step::Lose),
    ];
    proptest::collection::vec(step, 0..200)
}

const BLOCKS: u64 = 12;

/// A disk, its marks and a destination that carries requests out when they are acknowledged.
struct World {
    plan: CopyPlan,
    disk: Vec<u32>,
    marks: Vec<bool>,
    copy: Vec<u32>,
    flying: Vec<(u64, Range, Vec<u32>)>,
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
        Self { plan, disk, marks: vec![false; n], copy: vec![99; n], flying: vec![], cookie: 0 }
    }

    fn go(&mut self) {
        match self.plan.next(u64::MAX) {
            NextCopy::Look(range) => self.look(range),
            NextCopy::Take { from, .. } => self.take(from),
            next @ (NextCopy::Write(_) | NextCopy::Zero(_)) => self.fly(next),
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

    fn fly(&mut self, next: NextCopy) {
        let range = send(&mut self.plan, self.cookie, next);
        let overlap = |other: &Range| other.offset() < range.end() && range.offset() < other.end();
        assert!(!self.flying.iter().any(|(_, other, _)| overlap(other)), "two at once");
        let zero = matches!(next, NextCopy::Zero(_));
        let stamps = self.disk[blocks(range)].iter().map(|&s| if zero { 0 } else { s }).collect();
        self.flying.push((self.cookie, range, stamps));
        self.cookie += 1;
    }

    fn acknowledge(&mut self, which: usize) {
        if which < self.flying.len() {
            let (cookie, range, stamps) = self.flying.swap_remove(which);
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
    fn whatever_happens_the_copy_is_equal_once_the_plan_is_done(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Go => world.go(),
                Step::Acknowledge(which) => world.acknowledge(which),
                Step::Write(block, zero) => world.write(block, zero),
                Step::Lose => {
                    world.flying.clear();
                    world.plan.resume();
                }
            }
        }
        world.plan.gate_closed();
        for _ in 0..1000 {
            if world.plan.is_done() {
                break;
            }
            world.go();
            world.acknowledge(0);
        }
        prop_assert!(world.plan.is_done());
        prop_assert_eq!(world.plan.left(), 0);
        prop_assert_eq!(world.copy, world.disk);
    }
}

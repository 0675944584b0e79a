//! Limits are kept over any second, rates are those of the link, and a chase always ends.

use super::*;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);

fn speed(limit: u64) -> Speed {
    Speed::new(NonZeroU64::new(limit))
}

/// Sends chunks as early as allowed until `end`; what went when.
fn send_until(speed: &mut Speed, mut now: Duration, end: Duration) -> Vec<(Duration, u64)> {
    let mut sent = Vec::new();
    while now < end {
        let bytes = speed.chunk().min(1 << 20);
        let ready = speed.ready_at(now, bytes);
        if ready > now {
            now = ready;
            continue;
        }
        speed.sent(now, bytes);
        sent.push((now, bytes));
    }
    sent
}

#[test]
fn without_a_limit_everything_goes_at_once() {
    let mut speed = speed(0);
    speed.sent(MS, 1 << 40);
    assert_eq!(speed.ready_at(MS, 1 << 40), MS);
    assert_eq!(speed.chunk(), u64::MAX);
}

#[test]
fn a_limit_is_used_nearly_in_full() {
    let mut speed = speed(10 << 20);
    let sent = send_until(&mut speed, SECOND, 11 * SECOND);
    let bytes: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
    assert!(bytes >= 98 * (1 << 20), "only {bytes} bytes in ten seconds");
}

#[test]
fn late_wake_ups_do_not_slow_a_limited_copy_down() {
    let mut speed = speed(10 << 20);
    let (mut now, mut bytes) = (SECOND, 0);
    while now < 11 * SECOND {
        let chunk = speed.chunk();
        let ready = speed.ready_at(now, chunk);
        if ready > now {
            now = ready + 2 * MS;
            continue;
        }
        speed.sent(now, chunk);
        bytes += chunk;
    }
    assert!(bytes >= 96 * (1 << 20), "only {bytes} bytes in ten seconds");
}

#[test]
fn a_lower_limit_counts_what_was_just_sent() {
    let mut speed = speed(1 << 20);
    send_until(&mut speed, SECOND, 2 * SECOND);
    speed.set_limit(NonZeroU64::new(64 << 10));
    assert!(speed.ready_at(2 * SECOND, speed.chunk()) >= 2 * SECOND + 900 * MS);
}

#[test]
fn a_limit_below_one_request_is_kept_on_average() {
    let mut speed = speed(1000);
    let sent = send_until(&mut speed, SECOND, 101 * SECOND);
    let bytes: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
    assert!(bytes > 0 && bytes <= 100 * 1000 + CHUNK_MIN, "{bytes} bytes in 100 seconds");
}

#[test]
fn the_rate_of_the_link_is_not_that_of_the_limit() {
    let mut meter = Meter::new(SECOND);
    let mut now = SECOND;
    for _ in 0..20 {
        meter.sent(now);
        meter.acknowledged(now + MS, 100_000, 100_000, false);
        now += 100 * MS;
    }
    assert_eq!(meter.link_rate().map(NonZeroU64::get), Some(100_000_000));
    let speed = meter.speed(now);
    assert!((900_000..1_300_000).contains(&speed), "{speed}");
}

#[test]
fn a_rate_is_forgotten_after_two_seconds_of_silence_but_not_that_of_the_link() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(SECOND + MS, 1000, 1000, false);
    assert!(meter.speed(SECOND + 2 * MS) > 0);
    assert_eq!(meter.speed(4 * SECOND), 0);
    assert_eq!(meter.seconds_left(4 * SECOND, 5), None);
    assert!(meter.link_rate().is_some());
}

#[test]
fn holes_count_for_the_time_left_but_not_for_the_speed() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(2 * SECOND, 0, 1 << 30, false);
    assert_eq!((meter.speed(2 * SECOND), meter.link_rate()), (0, None));
    assert_eq!(meter.seconds_left(2 * SECOND, 4 << 30), Some(4));
}

#[test]
fn the_gate_closes_when_the_rest_fits_a_quarter_of_the_pause_and_not_a_byte_earlier() {
    let mut chase = Convergence::new(100 * MS);
    let rate = NonZeroU64::new(1000);
    assert!(chase.may_close_gate(SECOND, 25, rate, None));
    assert!(!chase.may_close_gate(SECOND, 26, rate, None));
    assert!(!chase.may_close_gate(SECOND, 1, None, None), "nothing was measured");
    assert!(chase.may_close_gate(SECOND, 0, None, None));
}

#[test]
fn a_rest_that_fits_the_whole_pause_is_tried_to_be_made_smaller_for_a_second() {
    let mut chase = Convergence::new(100 * MS);
    let rate = NonZeroU64::new(1000);
    assert!(!chase.may_close_gate(SECOND, 101, rate, None));
    assert!(!chase.may_close_gate(2 * SECOND, 100, rate, None), "it has only just begun to fit");
    assert!(!chase.may_close_gate(3 * SECOND - MS, 100, rate, None));
    assert!(chase.may_close_gate(3 * SECOND, 100, rate, None));
    assert!(
        !chase.may_close_gate(3 * SECOND, 101, rate, None),
        "not a byte more, however long it takes"
    );
}

#[test]
fn under_a_limit_that_makes_a_pass_long_nothing_smaller_is_tried_for() {
    let (rate, left) = (NonZeroU64::new(1000), 100);
    let long =
        Convergence::new(100 * MS).may_close_gate(SECOND, left, rate, NonZeroU64::new(left - 1));
    let short =
        Convergence::new(100 * MS).may_close_gate(SECOND, left, rate, NonZeroU64::new(left));
    assert_eq!((long, short), (true, false));
}

#[test]
fn passes_that_shrink_hold_nobody_back() {
    let mut chase = Convergence::new(100 * MS);
    let mut left = 1 << 30;
    for second in 1..20 {
        chase.pass_ended(second * SECOND, left, None);
        left -= left / 4;
    }
    assert_eq!(chase.delay(), Duration::ZERO);
}

#[test]
fn passes_that_do_not_shrink_hold_writers_back_step_by_step_and_at_last_end() {
    let mut chase = Convergence::new(100 * MS);
    let mut delays = vec![chase.delay()];
    let mut second = 1;
    while !chase.may_close_gate(second * SECOND, 1 << 30, NonZeroU64::new(1), None) {
        chase.pass_ended(second * SECOND, 1 << 30, NonZeroU64::new(1));
        delays.push(chase.delay());
        second += 1;
        assert!(second < 100, "the chase does not end");
    }
    assert!(delays.is_sorted());
    assert_eq!(delays.last(), Some(&Duration::from_millis(32)));
    assert!(*delays.last().unwrap() <= crate::server::write_throttle::DELAY_MAX);
}

#[test]
fn long_passes_that_do_not_shrink_hold_writers_back_several_steps() {
    let mut chase = Convergence::new(100 * MS);
    chase.pass_ended(SECOND, 1 << 30, None);
    let mut held = vec![];
    for pass in 1..4 {
        chase.pass_ended((1 + 30 * pass) * SECOND, 1 << 30, None);
        held.push(chase.delay());
    }
    assert_eq!(held, [2 * MS, 32 * MS, 32 * MS]);
}

#[test]
fn a_first_pass_behind_which_all_is_dirty_holds_writers_back() {
    for (dirty, held) in [(1000, true), (751, true), (750, false), (0, false)] {
        let mut chase = Convergence::new(100 * MS);
        chase.began(SECOND);
        chase.first_pass_ended(30 * SECOND, dirty, 1000);
        assert_eq!(chase.delay() > Duration::ZERO, held, "{dirty}");
    }
    let mut chase = Convergence::new(100 * MS);
    chase.began(SECOND);
    chase.first_pass_ended(2 * SECOND - MS, 1000, 1000);
    assert_eq!(chase.delay(), Duration::ZERO, "too short to tell");
}

#[test]
fn small_requests_go_in_bursts_and_keep_the_limit() {
    let mut speed = speed(16 << 20);
    let (mut now, mut wakes, mut sent) = (SECOND, 0, 0);
    while now < 3 * SECOND {
        let ready = speed.ready_at(now, 4128);
        if ready > now {
            (now, wakes) = (ready, wakes + 1);
            continue;
        }
        speed.sent(now, 4128);
        sent += 4128;
    }
    assert!(wakes <= 2 * 65, "{wakes} waits");
    assert!((30 << 20..=32 << 20).contains(&sent), "{sent} bytes");
}

#[test]
fn a_restarted_meter_knows_only_what_follows() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(SECOND + MS, 1_000_000, 1_000_000, true);
    meter.restart(SECOND + MS);
    meter.sent(SECOND + MS);
    meter.skipped(SECOND + 11 * MS, true);
    assert_eq!(meter.link_rate(), None);
    meter.acknowledged(SECOND + 12 * MS, 4096, 4096, false);
    assert_eq!(meter.link_rate().map(NonZeroU64::get), Some(4_096_000));
}

#[test]
fn nobody_is_held_back_when_the_rest_fits_the_pause_already() {
    let rate = NonZeroU64::new(1000);
    for (left, held) in [(100, false), (101, true)] {
        let mut chase = Convergence::new(100 * MS);
        chase.pass_ended(SECOND, left, rate);
        chase.pass_ended(2 * SECOND, left, rate);
        assert_eq!(chase.delay() > Duration::ZERO, held, "{left} bytes");
    }
}

#[test]
fn short_passes_are_not_taken_for_a_trend() {
    let mut chase = Convergence::new(100 * MS);
    for turn in 0..900 {
        chase.pass_ended(SECOND + turn * MS, 1 << 30, None);
    }
    assert_eq!(chase.delay(), Duration::ZERO);
}

proptest! {
    #[test]
    fn no_second_carries_more_than_the_limit(
        limit in 2 * CHUNK_MIN..1 << 30,
        pauses in proptest::collection::vec(0u64..2_000_000, 0..10),
    ) {
        let mut speed = speed(limit);
        let mut now = SECOND;
        let mut sent = Vec::new();
        for pause in pauses {
            now += Duration::from_micros(pause);
            let end = now + 300 * MS;
            sent.extend(send_until(&mut speed, now, end));
            now = end;
        }
        for (first, &(start, _)) in sent.iter().enumerate() {
            let within = sent[first..].iter().take_while(|(at, _)| *at < start + SECOND);
            prop_assert!(within.map(|(_, bytes)| bytes).sum::<u64>() <= limit);
        }
    }

    #[test]
    fn an_answer_that_says_wait_is_true_when_the_time_has_come(
        limit in 1u64..1 << 24, bytes in 1u64..1 << 21, first in 1u64..1 << 21,
    ) {
        let mut speed = speed(limit);
        speed.sent(SECOND, first);
        let ready = speed.ready_at(SECOND, bytes);
        prop_assert!(speed.ready_at(ready, bytes) <= ready);
    }
}

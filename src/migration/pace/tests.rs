//! The speed limit holds over any second, rates are those of the link, and convergence ends.

use super::*;
use proptest::prelude::*;

const MS: Duration = Duration::from_millis(1);

fn speed(limit: u64) -> Speed {
    Speed::new(NonZeroU64::new(limit))
}

/// Sends chunks as early as allowed until `end`; returns their times and sizes.
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
fn without_a_limit_all_is_sent_at_once() {
    let mut speed = speed(0);
    speed.sent(MS, 1 << 40);
    assert_eq!(speed.ready_at(MS, 1 << 40), MS);
    assert_eq!(speed.chunk(), u64::MAX);
}

#[test]
fn limit_is_used_nearly_in_full() {
    let mut speed = speed(10 << 20);
    let sent = send_until(&mut speed, SECOND, 11 * SECOND);
    let bytes: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
    assert!(bytes >= 98 * (1 << 20), "only {bytes} bytes in ten seconds");
}

#[test]
fn late_wake_ups_do_not_slow_the_copy() {
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
fn lower_limit_counts_bytes_just_sent() {
    let mut speed = speed(1 << 20);
    send_until(&mut speed, SECOND, 2 * SECOND);
    speed.set_limit(NonZeroU64::new(64 << 10));
    assert!(speed.ready_at(2 * SECOND, speed.chunk()) >= 2 * SECOND + 900 * MS);
}

#[test]
fn limit_below_one_request_is_kept_on_average() {
    let mut speed = speed(1000);
    let sent = send_until(&mut speed, SECOND, 101 * SECOND);
    let bytes: u64 = sent.iter().map(|(_, bytes)| bytes).sum();
    assert!(bytes > 0 && bytes <= 100 * 1000 + CHUNK_MIN, "{bytes} bytes in 100 seconds");
}

#[test]
fn link_rate_exceeds_a_limited_speed() {
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
fn link_rate_outlasts_two_silent_seconds() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(SECOND + MS, 1000, 1000, false);
    assert!(meter.speed(SECOND + 2 * MS) > 0);
    assert_eq!(meter.speed(4 * SECOND), 0);
    assert_eq!(meter.seconds_left(4 * SECOND, 5), None);
    assert!(meter.link_rate().is_some());
}

#[test]
fn holes_count_for_time_left_not_speed() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(2 * SECOND, 0, 1 << 30, false);
    assert_eq!((meter.speed(2 * SECOND), meter.link_rate()), (0, None));
    assert_eq!(meter.seconds_left(2 * SECOND, 4 << 30), Some(4));
}

#[test]
fn gate_may_close_at_a_quarter_pause() {
    let mut convergence = Convergence::new(100 * MS);
    let rate = NonZeroU64::new(1000);
    assert!(convergence.may_close_gate(SECOND, 25, rate, None));
    assert!(!convergence.may_close_gate(SECOND, 26, rate, None));
    assert!(!convergence.may_close_gate(SECOND, 1, None, None), "the link's rate is unknown");
    assert!(convergence.may_close_gate(SECOND, 0, None, None));
}

#[test]
fn gate_may_close_at_the_whole_pause_after_a_second() {
    let mut convergence = Convergence::new(100 * MS);
    let rate = NonZeroU64::new(1000);
    assert!(!convergence.may_close_gate(SECOND, 101, rate, None));
    assert!(!convergence.may_close_gate(2 * SECOND, 100, rate, None), "it fits for the first time");
    assert!(!convergence.may_close_gate(3 * SECOND - MS, 100, rate, None));
    assert!(convergence.may_close_gate(3 * SECOND, 100, rate, None));
    assert!(!convergence.may_close_gate(3 * SECOND, 101, rate, None), "a byte too many");
}

#[test]
fn low_speed_limit_skips_the_short_pause() {
    let (rate, left) = (NonZeroU64::new(1000), 100);
    let long =
        Convergence::new(100 * MS).may_close_gate(SECOND, left, rate, NonZeroU64::new(left - 1));
    let short =
        Convergence::new(100 * MS).may_close_gate(SECOND, left, rate, NonZeroU64::new(left));
    assert_eq!((long, short), (true, false));
}

#[test]
fn shrinking_passes_do_not_throttle() {
    let mut convergence = Convergence::new(100 * MS);
    let mut left = 1 << 30;
    for second in 1..20 {
        convergence.pass_ended(second * SECOND, left, None);
        left -= left / 4;
    }
    assert_eq!(convergence.delay(), Duration::ZERO);
}

#[test]
fn stalled_passes_throttle_stepwise_then_close_the_gate() {
    let mut convergence = Convergence::new(100 * MS);
    let mut delays = vec![convergence.delay()];
    let mut second = 1;
    while !convergence.may_close_gate(second * SECOND, 1 << 30, NonZeroU64::new(1), None) {
        convergence.pass_ended(second * SECOND, 1 << 30, NonZeroU64::new(1));
        delays.push(convergence.delay());
        second += 1;
        assert!(second < 100, "it does not converge");
    }
    assert!(delays.is_sorted());
    assert_eq!(delays.last(), Some(&Duration::from_millis(32)));
    assert!(*delays.last().unwrap() <= crate::server::write_throttle::DELAY_MAX);
}

#[test]
fn long_stalled_pass_throttles_by_several_steps() {
    let mut convergence = Convergence::new(100 * MS);
    convergence.pass_ended(SECOND, 1 << 30, None);
    let mut delays = vec![];
    for pass in 1..4 {
        convergence.pass_ended((1 + 30 * pass) * SECOND, 1 << 30, None);
        delays.push(convergence.delay());
    }
    assert_eq!(delays, [2 * MS, 32 * MS, 32 * MS]);
}

#[test]
fn first_pass_throttles_if_nearly_all_is_dirty() {
    for (dirty, throttles) in [(1000, true), (751, true), (750, false), (0, false)] {
        let mut convergence = Convergence::new(100 * MS);
        convergence.began(SECOND);
        convergence.first_pass_ended(30 * SECOND, dirty, 1000);
        assert_eq!(convergence.delay() > Duration::ZERO, throttles, "{dirty}");
    }
    let mut convergence = Convergence::new(100 * MS);
    convergence.began(SECOND);
    convergence.first_pass_ended(2 * SECOND - MS, 1000, 1000);
    assert_eq!(convergence.delay(), Duration::ZERO, "the pass was too short to compare");
}

#[test]
fn small_requests_are_sent_in_bursts_within_the_limit() {
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
fn restarted_meter_counts_only_later_requests() {
    let mut meter = Meter::new(SECOND);
    meter.sent(SECOND);
    meter.acknowledged(SECOND + MS, 1_000_000, 1_000_000, true);
    meter.restart(SECOND + MS);
    meter.sent(SECOND + MS);
    meter.acknowledged_uncounted(SECOND + 11 * MS, true);
    assert_eq!(meter.link_rate(), None);
    meter.acknowledged(SECOND + 12 * MS, 4096, 4096, false);
    assert_eq!(meter.link_rate().map(NonZeroU64::get), Some(4_096_000));
}

#[test]
fn writers_are_not_throttled_once_the_rest_fits() {
    let rate = NonZeroU64::new(1000);
    for (left, throttles) in [(100, false), (101, true)] {
        let mut convergence = Convergence::new(100 * MS);
        convergence.pass_ended(SECOND, left, rate);
        convergence.pass_ended(2 * SECOND, left, rate);
        assert_eq!(convergence.delay() > Duration::ZERO, throttles, "{left} bytes");
    }
}

#[test]
fn short_passes_are_not_compared() {
    let mut convergence = Convergence::new(100 * MS);
    for turn in 0..900 {
        convergence.pass_ended(SECOND + turn * MS, 1 << 30, None);
    }
    assert_eq!(convergence.delay(), Duration::ZERO);
}

proptest! {
    #[test]
    fn limit_holds_over_any_second(
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
    fn bytes_are_ready_at_the_promised_time(
        limit in 1u64..1 << 24, bytes in 1u64..1 << 21, first in 1u64..1 << 21,
    ) {
        let mut speed = speed(limit);
        speed.sent(SECOND, first);
        let ready = speed.ready_at(SECOND, bytes);
        prop_assert!(speed.ready_at(ready, bytes) <= ready);
    }
}

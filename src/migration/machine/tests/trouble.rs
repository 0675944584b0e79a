//! Failures before the handover: retries, reports, and ends of the migration.

use super::rig::*;

#[test]
fn nothing_is_retried_before_the_first_greeting() {
    let mut rig = Rig::new(job(), plain());
    let refused = Trouble::Connect("refused".to_owned());
    rig.give(Event::Unreachable(refused.clone()));
    assert_eq!(rig.until_end(), Outcome::Failed(refused));
    assert_eq!(rig.milestones(), ["Connect", "HangUp", "End"]);
}

#[test]
fn incompatible_destination_receives_no_data() {
    let block = Caps { block_min: 1 << 17, ..plain().caps };
    let odd_block = Caps { block_min: 3, ..plain().caps };
    let serving = Answer { listening: None, has: Has::Nothing };
    let incompatible = [
        (
            DestinationInfo { size: SIZE - 512, ..plain() },
            Trouble::Size { local: SIZE, remote: SIZE - 512 },
        ),
        (
            DestinationInfo { size: SIZE + 512, ..plain() },
            Trouble::Size { local: SIZE, remote: SIZE + 512 },
        ),
        (DestinationInfo { read_only: true, ..plain() }, Trouble::ReadOnly),
        (DestinationInfo { answer: Some(serving), ..plain() }, Trouble::Serving),
        (DestinationInfo { caps: block, ..plain() }, Trouble::BlockSize(1 << 17)),
        (DestinationInfo { caps: odd_block, ..plain() }, Trouble::BlockSize(3)),
    ];
    for (peer, trouble) in incompatible {
        let mut rig = Rig::new(job(), peer);
        assert_eq!(rig.until_end(), Outcome::Failed(trouble));
        assert_eq!(rig.written(), 0);
    }
}

fn obstructed(trouble: Trouble) -> News {
    News::Obstructed(Obstacle::Trouble(trouble))
}

#[test]
fn trouble_after_the_greeting_is_retried() {
    let troubles = [
        (lost(), Trouble::Lost("reset".to_owned())),
        (Event::Unsent("pipe".to_owned()), Trouble::Lost("pipe".to_owned())),
        (Event::Reply { cookie: 1, error: Some(28) }, Trouble::ErrorReply(28)),
        (Event::Reply { cookie: 4711, error: None }, Trouble::Cookie(4711)),
        (Event::Failed("no memory".to_owned()), Trouble::Local("no memory".to_owned())),
    ];
    for (event, trouble) in troubles {
        let mut rig = Rig::new(job(), plain());
        rig.until(is_wait);
        assert_eq!(rig.give(event), &Action::HangUp);
        assert_eq!(
            rig.machine.progress(rig.now).obstacle,
            Some(Obstacle::Trouble(trouble.clone()))
        );
        assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: false });
        assert_eq!(rig.machine.progress(rig.now).obstacle, None);
        let expected = [News::Started, obstructed(trouble), News::Restarted, News::GateClosed];
        assert_eq!(rig.news(), expected);
    }
}

#[test]
fn reason_is_reported_on_change_and_once_a_minute() {
    let refused = || Trouble::Connect("refused".to_owned());
    let busy = || Trouble::Rejected("busy".to_owned());
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait).give(lost());
    let start = rig.now;
    let mut attempts = 0;
    while rig.now < start + Duration::from_secs(100) {
        rig.until(|action| matches!(action, Action::Connect(_)));
        attempts += 1;
        let why = if attempts < 20 { refused() } else { busy() };
        rig.give(Event::Unreachable(why));
    }
    assert!(attempts > 90);
    let expected = [
        News::Started,
        obstructed(Trouble::Lost("reset".to_owned())),
        obstructed(refused()),
        obstructed(busy()),
        obstructed(busy()),
    ];
    assert_eq!(rig.news(), expected);
}

#[test]
fn rejection_is_reported_once_a_minute() {
    let taken = |seconds| Trouble::Rejected(format!("taken, silent for {seconds} s"));
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait).give(lost());
    for attempt in 0..30 {
        rig.until(|action| matches!(action, Action::Connect(_)));
        rig.give(Event::Unreachable(taken(attempt)));
    }
    let current = Some(Obstacle::Trouble(taken(29)));
    assert_eq!(rig.machine.progress(rig.now).obstacle, current);
    let expected =
        [News::Started, obstructed(Trouble::Lost("reset".to_owned())), obstructed(taken(0))];
    assert_eq!(rig.news(), expected);
}

#[test]
fn failure_after_each_greeting_is_reported_once() {
    let mut rig = Rig::new(job(), plain());
    for _ in 0..30 {
        rig.until(is_wait).give(Event::Reply { cookie: 0, error: Some(28) });
        rig.until(|action| matches!(action, Action::Connect(_)));
    }
    let expected = [News::Started, obstructed(Trouble::Cookie(0)), News::Restarted];
    let expected_28 = [News::Started, obstructed(Trouble::ErrorReply(28)), News::Restarted];
    let news = rig.news();
    assert!(news == expected || news == expected_28, "{news:?}");
}

#[test]
fn unreadable_disk_ends_the_migration() {
    let unreadable = || "cannot read disk.img at byte 4096: EIO".to_owned();
    let ends: [fn(&Action) -> bool; 2] = [is_write, |action| matches!(action, Action::Look(_))];
    for end in ends {
        let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
        rig.until(end).give(Event::Unreadable(unreadable()));
        assert_eq!(rig.until_end(), Outcome::Failed(Trouble::Unreadable(unreadable())));
        assert_eq!(rig.milestones(), ["Connect", "HangUp", "End"]);
    }
}

#[test]
fn read_error_behind_the_closed_gate_opens_it() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_closing);
    rig.marks = VecDeque::from([Range::whole(SIZE).until(4096)]);
    rig.give(Event::Done);
    rig.until(|action| matches!(action, Action::Look(_)));
    rig.give(Event::Unreadable("EIO".to_owned()));
    assert!(matches!(rig.until_end(), Outcome::Failed(Trouble::Unreadable(_))));
    assert!(rig.milestones().ends_with(&["HangUp", "OpenGate", "End"].map(str::to_owned)));
}

#[test]
fn next_attempt_comes_a_second_later() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_write).give(lost());
    rig.give(Event::Done);
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    assert_eq!(until, rig.now + RETRY_EVERY);
    rig.now = until - 2 * MS;
    assert_eq!(rig.give(Event::Tick), &Action::Wait { until });
    assert!(matches!(rig.give(Event::Tick), Action::Connect(_)));
}

#[test]
fn silent_destination_is_lost_after_sixty_seconds() {
    let mut rig = Rig::new(job(), plain());
    rig.until(is_wait);
    let Action::Wait { until } = rig.action else { panic!("{:?}", rig.action) };
    rig.now = until - 2 * MS;
    assert!(matches!(rig.give(Event::Tick), Action::TakeDirty { .. }), "two milliseconds early");
    rig.until(is_wait);
    rig.now = until;
    assert_eq!(rig.give(Event::Tick), &Action::HangUp);
    assert!(rig.news().contains(&obstructed(Trouble::NoProgress(Duration::from_secs(60)))));
}

#[test]
fn same_process_gets_only_unacknowledged_data() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait);
    rig.give(Event::Reply { cookie: 1, error: None });
    rig.give(lost());
    rig.peer = ours(TOKEN, Has::Incomplete);
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::Resumed));
    let handover = Handover::LENGTH as u64;
    assert_eq!(rig.written() - handover, 2 * SIZE - (1 << 20));
}

#[test]
fn process_without_the_copy_gets_everything() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait).give(lost());
    assert_eq!(rig.until_end(), Outcome::Arrived { acknowledged: true });
    assert!(rig.news().contains(&News::Restarted));
}

#[test]
fn another_process_gets_everything_under_another_id() {
    let mut rig = Rig::new(job(), ours(TOKEN, Has::Nothing));
    rig.until(is_wait);
    rig.give(Event::Reply { cookie: 1, error: None });
    rig.give(lost());
    rig.peer = ours(OTHER, Has::Incomplete);
    rig.until(is_handover);
    let Action::Send(DestinationRequest { kind, .. }) = rig.action else {
        panic!("{:?}", rig.action)
    };
    assert_eq!(kind, RequestKind::Handover(Handover { id: ID.next(), token: OTHER }));
    assert_eq!(rig.machine.job().id, ID.next());
    assert_eq!(rig.machine.progress(rig.now).id, ID.next());
    assert!(rig.news().contains(&News::Restarted));
}

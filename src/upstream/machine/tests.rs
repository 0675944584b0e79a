//! Decisions of the machine, one at a time.

use super::sending::COMPACT_LENGTH_MAX;
use super::*;
use crate::disk::{Buffer, Zeroing};
use crate::nbd::reply::Dialect;
use crate::nbd::wire::{CommandFlags, CommandKind};
use crate::upstream::unflushed::SEGMENT_OVERHEAD;

const SIZE: u64 = 1 << 40;
const BLOCK: usize = 512;
/// Memory of a write of one block.
const WRITE: u64 = BLOCK as u64 + 2 * SEGMENT_OVERHEAD;

fn terms() -> ServerTerms {
    ServerTerms {
        size: SIZE,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        dialect: Dialect::Structured,
        block_min: 512,
        block_preferred: 4096,
        payload_max: 4096,
        allocation_context: None,
        disk_id: None,
    }
}

fn lacking(flags: TransmissionFlags) -> ServerTerms {
    ServerTerms { flags: terms().flags - flags, ..terms() }
}

fn machine(unflushed_max: u64) -> UpstreamMachine {
    with_terms(terms(), unflushed_max)
}

fn with_terms(terms: ServerTerms, unflushed_max: u64) -> UpstreamMachine {
    let mut machine = UpstreamMachine::new(terms, unflushed_max);
    machine.connected(terms, 1);
    machine
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap()
}

fn read(offset: u64, length: usize) -> Op {
    Op::Read { offset, data: Buffer::from(vec![0; length]) }
}

fn write(offset: u64, length: usize) -> Op {
    Op::Write { offset, data: Buffer::from(vec![7; length]), durable: false }
}

fn durable(offset: u64) -> Op {
    Op::Write { offset, data: Buffer::from(vec![7; BLOCK]), durable: true }
}

fn zero(length: u64, only_if_fast: bool) -> Op {
    let how = Zeroing { keep_allocated: false, only_if_fast };
    Op::Zero { range: range(0, length), how, durable: false }
}

/// All messages that the connection may get: kind, offset, length, cookie.
fn messages(machine: &mut UpstreamMachine) -> Vec<(CommandKind, u64, u64, u64)> {
    let next = || machine.next_message(0).map(|message| message.header);
    let sent = |header: crate::nbd::request::RequestHeader| {
        let kind = CommandKind::try_from(header.kind).unwrap();
        (kind, header.offset, header.length, header.cookie)
    };
    std::iter::from_fn(next).map(sent).collect()
}

/// The kinds and offsets of all messages; each is replied to in turn, with this error.
fn reply_to_all(machine: &mut UpstreamMachine, error: Option<i32>) -> Vec<(CommandKind, u64)> {
    let sent = messages(machine);
    for (kind, .., cookie) in &sent {
        if *kind == CommandKind::Read {
            let Ok(Expected::Data(range)) = machine.expected(0, *cookie) else { panic!() };
            machine.expect_data(0, *cookie, (range.offset(), range.length())).unwrap();
        }
        if let Some(error) = error {
            machine.store_error(0, *cookie, error).unwrap();
        }
        machine.replied(0, *cookie).unwrap();
    }
    sent.into_iter().map(|(kind, offset, ..)| (kind, offset)).collect()
}

/// Keys and errors of the operations that have completed.
fn completed(machine: &mut UpstreamMachine) -> Vec<(u64, Option<i32>)> {
    let next = || machine.next_completion();
    let outcome = |completion: Completion| match completion.outcome.unwrap() {
        Ok(()) => (completion.key, None),
        Err(error) => (completion.key, error.raw_os_error()),
    };
    std::iter::from_fn(next).map(|(_, completion)| outcome(completion)).collect()
}

fn reconnect(machine: &mut UpstreamMachine) {
    machine.lost();
    machine.connected(terms(), 1);
}

#[test]
fn a_new_connection_begins_with_the_replay_then_changes_then_reads() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
    reply_to_all(&mut machine, None);
    machine.submit(0, 1.into(), read(8192, BLOCK)).unwrap();
    machine.submit(0, 2.into(), write(4096, BLOCK)).unwrap();
    assert_eq!(messages(&mut machine).len(), 2);
    reconnect(&mut machine);
    machine.submit(0, 3.into(), Op::Flush).unwrap();
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 4096)]);
    let rest = [(CommandKind::Read, 8192), (CommandKind::Flush, 0)];
    assert_eq!(reply_to_all(&mut machine, None), rest);
    assert_eq!(completed(&mut machine), [(0, None), (2, None), (1, None), (3, None)]);
    assert_eq!(machine.unflushed_memory(), 0);
}

#[test]
fn a_failed_replay_ends_the_connection() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
    reply_to_all(&mut machine, None);
    reconnect(&mut machine);
    let cookie = messages(&mut machine)[0].3;
    machine.store_error(0, cookie, Errno::ENOSPC as i32).unwrap();
    let expected = Err(LossReason::Replay(Errno::ENOSPC as i32));
    assert_eq!(machine.replied(0, cookie), expected);
}

#[test]
fn changes_wait_at_the_bound_in_order_of_arrival() {
    for (bound, sent) in [(4 * WRITE, 4), (4 * WRITE - 1, 3)] {
        let mut machine = machine(bound);
        (0..4).for_each(|key| machine.submit(0, key.into(), write(key * 512, BLOCK)).unwrap());
        assert_eq!(messages(&mut machine).len(), sent, "{bound}");
    }
    let mut machine = machine(2 * WRITE);
    machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
    let first = messages(&mut machine)[0].3;
    // The second one fits only into empty memory; the third one would fit now.
    machine.submit(0, 1.into(), write(4096, 2 * BLOCK)).unwrap();
    machine.submit(0, 2.into(), write(512, BLOCK)).unwrap();
    assert!(messages(&mut machine).is_empty() && machine.holds_changes());
    machine.submit(0, 3.into(), read(1 << 20, BLOCK)).unwrap();
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Read, 1 << 20)]);
    machine.replied(0, first).unwrap();
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Flush, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 4096)]);
    assert_eq!(reply_to_all(&mut machine, None)[0], (CommandKind::Flush, 0));
    assert_eq!(reply_to_all(&mut machine, None)[0], (CommandKind::Write, 512));
    let keys: Vec<u64> = completed(&mut machine).iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, [3, 0, 1, 2]);
}

#[test]
fn a_write_larger_than_the_bound_is_sent_alone() {
    let mut machine = machine(0);
    machine.submit(0, 0.into(), write(0, 8192)).unwrap();
    machine.submit(0, 1.into(), write(8192, BLOCK)).unwrap();
    let parts = [(CommandKind::Write, 0), (CommandKind::Write, 4096)];
    assert_eq!(reply_to_all(&mut machine, None), parts);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Flush, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 8192)]);
}

#[test]
fn half_of_the_memory_causes_a_flush() {
    let used = BLOCK as u64 + SEGMENT_OVERHEAD;
    for (bound, flushes) in [(2 * used, true), (2 * used + 2, false)] {
        let mut machine = machine(bound);
        machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
        reply_to_all(&mut machine, None);
        assert_eq!(machine.unflushed_memory(), used);
        assert_eq!(!messages(&mut machine).is_empty(), flushes, "{bound}");
    }
}

#[test]
fn zeros_and_trims_count_towards_the_bound() {
    let mut machine = machine(2 * SEGMENT_OVERHEAD);
    machine.submit(0, 0.into(), zero(4096, false)).unwrap();
    machine.submit(0, 1.into(), Op::Trim { range: range(8192, 512), durable: false }).unwrap();
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::WriteZeroes, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Flush, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Trim, 8192)]);
}

#[test]
fn nothing_is_kept_for_a_server_without_flush() {
    let mut machine = with_terms(lacking(TransmissionFlags::SEND_FLUSH), 0);
    (0..4).for_each(|key| machine.submit(0, key.into(), write(key * 512, BLOCK)).unwrap());
    assert_eq!(reply_to_all(&mut machine, None).len(), 4);
    machine.submit(0, 4.into(), Op::Flush).unwrap();
    assert!(messages(&mut machine).is_empty());
    assert_eq!((completed(&mut machine).len(), machine.unflushed_memory()), (5, 0));
}

#[test]
fn requests_are_divided_at_the_limits_of_the_server() {
    let lengths = |terms, op| {
        let mut machine = with_terms(terms, 1 << 20);
        machine.submit(0, 0.into(), op).unwrap();
        let lengths: Vec<u64> = messages(&mut machine).iter().map(|sent| sent.2).collect();
        lengths
    };
    assert_eq!(lengths(terms(), read(0, 4096)), [4096]);
    assert_eq!(lengths(terms(), read(0, 4608)), [4096, 512]);
    assert_eq!(lengths(terms(), write(0, 8192)), [4096, 4096]);
    let most = COMPACT_LENGTH_MAX;
    assert_eq!(lengths(terms(), zero(most, false)), [most]);
    assert_eq!(lengths(terms(), zero(most + 512, false)), [most, 512]);
    let extended = ServerTerms { dialect: Dialect::Extended, ..terms() };
    assert_eq!(lengths(extended, zero(most + 512, false)), [most + 512]);
    let trim = Op::Trim { range: range(0, SIZE), durable: false };
    assert_eq!(lengths(extended, trim), [SIZE]);
}

#[test]
fn the_first_failure_of_a_request_is_its_outcome() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), read(0, 3 * 4096)).unwrap();
    let first = machine.next_message(0).unwrap().header.cookie;
    let second = machine.next_message(0).unwrap().header.cookie;
    machine.store_error(0, second, Errno::EIO as i32).unwrap();
    machine.replied(0, second).unwrap();
    assert!(messages(&mut machine).is_empty(), "the third part");
    assert!(completed(&mut machine).is_empty());
    machine.expect_data(0, first, (0, 4096)).unwrap();
    machine.replied(0, first).unwrap();
    assert_eq!(completed(&mut machine), [(0, Some(Errno::EIO as i32))]);
}

#[test]
fn fua_is_used_only_if_it_was_offered_at_first() {
    let flags = |machine: &mut UpstreamMachine| {
        let header = machine.next_message(0).unwrap().header;
        CommandFlags::from_bits_retain(header.flags)
    };
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), durable(0)).unwrap();
    assert_eq!(flags(&mut machine), CommandFlags::FUA);

    let mut machine = with_terms(lacking(TransmissionFlags::SEND_FUA), 1 << 20);
    assert!(machine.submit(0, 0.into(), durable(0)).is_err());
    reconnect(&mut machine);
    assert!(machine.submit(0, 1.into(), durable(0)).is_err());

    let neither = TransmissionFlags::SEND_FUA | TransmissionFlags::SEND_FLUSH;
    let mut machine = with_terms(lacking(neither), 1 << 20);
    machine.submit(0, 0.into(), durable(0)).unwrap();
    assert_eq!(flags(&mut machine), CommandFlags::empty());
}

#[test]
fn operations_that_no_message_can_execute_are_declined() {
    let mut machine = machine(1 << 20);
    let how = Zeroing::default();
    for op in [
        Op::Zero { range: range(0, 512), how, durable: true },
        Op::Trim { range: range(0, 512), durable: true },
        Op::Load(range(0, 512)),
        read(SIZE, 512),
    ] {
        assert!(machine.submit(0, 0.into(), op).is_err());
    }
    assert!(messages(&mut machine).is_empty() && completed(&mut machine).is_empty());
}

#[test]
fn empty_operations_complete_without_a_message() {
    let mut machine = machine(1 << 20);
    for (key, op) in [read(512, 0), write(512, 0), zero(0, true)].into_iter().enumerate() {
        machine.submit(0, (key as u64).into(), op).unwrap();
    }
    assert!(messages(&mut machine).is_empty());
    assert_eq!(completed(&mut machine), [(0, None), (1, None), (2, None)]);
}

#[test]
fn a_zeroing_that_is_sent_again_need_not_be_fast() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), zero(512, true)).unwrap();
    let is_fast = |machine: &mut UpstreamMachine| {
        let flags = machine.next_message(0).unwrap().header.flags;
        CommandFlags::from_bits_retain(flags).contains(CommandFlags::FAST_ZERO)
    };
    assert!(is_fast(&mut machine));
    reconnect(&mut machine);
    assert!(!is_fast(&mut machine));
}

#[test]
fn sent_changes_of_an_ended_session_are_sent_again() {
    let mut machine = machine(1 << 20);
    machine.submit(1, 0.into(), write(0, BLOCK)).unwrap();
    machine.submit(1, 1.into(), read(0, BLOCK)).unwrap();
    assert_eq!(messages(&mut machine).len(), 2);
    machine.submit(1, 2.into(), write(512, BLOCK)).unwrap();
    machine.submit(2, 3.into(), write(1024, BLOCK)).unwrap();
    assert!(!machine.cancel(1));
    machine.lost();
    assert!(machine.cancel(1));
    assert_eq!(completed(&mut machine), [(0, None), (1, None), (2, None)]);
    assert!(machine.cancel(1) && completed(&mut machine).is_empty());
    machine.connected(terms(), 1);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 0)]);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 1024)]);
    assert_eq!(completed(&mut machine), [(3, None)]);
}

#[test]
fn durable_requests_complete_after_a_flush_beside_them() {
    for error in [None, Some(Errno::EIO as i32)] {
        let mut machine = machine(WRITE);
        machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
        reply_to_all(&mut machine, None);
        let own = messages(&mut machine)[0].3;
        machine.submit(0, 1.into(), Op::Flush).unwrap();
        let flush = messages(&mut machine)[0].3;
        machine.replied(0, flush).unwrap();
        assert_eq!(completed(&mut machine), [(0, None)]);
        if let Some(error) = error {
            machine.store_error(0, own, error).unwrap();
        }
        machine.replied(0, own).unwrap();
        assert_eq!(completed(&mut machine), [(1, error)]);
        // The failure stays.
        machine.submit(0, 2.into(), Op::Flush).unwrap();
        reply_to_all(&mut machine, None);
        assert_eq!(completed(&mut machine), [(2, error)]);
    }
}

#[test]
fn changes_after_a_flush_was_sent_are_kept() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
    reply_to_all(&mut machine, None);
    machine.submit(0, 1.into(), Op::Flush).unwrap();
    machine.submit(0, 2.into(), write(4096, BLOCK)).unwrap();
    let sent = messages(&mut machine);
    machine.replied(0, sent[1].3).unwrap();
    machine.replied(0, sent[0].3).unwrap();
    assert_eq!(machine.unflushed_memory(), BLOCK as u64 + SEGMENT_OVERHEAD);
    reconnect(&mut machine);
    assert_eq!(reply_to_all(&mut machine, None), [(CommandKind::Write, 4096)]);
}

#[test]
fn extents_without_a_limit_return_one() {
    let context = ServerTerms { allocation_context: Some(3), ..terms() };
    let mut machine = with_terms(context, 1 << 20);
    let op = Op::Extents { range: range(0, 1024), limit: 0, found: Vec::new() };
    machine.submit(0, 0.into(), op).unwrap();
    let cookie = messages(&mut machine)[0].3;
    machine.store_extents(0, cookie, (3, &[(512, 0), (512, 3)])).unwrap();
    // The extents of a lost reply do not count.
    machine.lost();
    machine.connected(context, 1);
    let cookie = messages(&mut machine)[0].3;
    machine.store_extents(0, cookie, (3, &[(1024, 0), (512, 3)])).unwrap();
    machine.replied(0, cookie).unwrap();
    let (_, completion) = machine.next_completion().unwrap();
    let Op::Extents { found, .. } = completion.op else { panic!() };
    let allocated = crate::disk::Extent { range: range(0, 1024), allocated: true };
    assert_eq!(found, [allocated]);
}

#[test]
fn a_probe_reads_one_block_while_connected() {
    let mut machine = machine(1 << 20);
    machine.probe(0);
    let (kind, offset, length, cookie) = messages(&mut machine)[0];
    assert_eq!((kind, offset, length), (CommandKind::Read, 0, 512));
    assert!(machine.awaits_reply(0) && !machine.awaits_reply(1));
    assert_eq!(machine.expected(0, cookie), Ok(Expected::Data(range(0, 512))));
    machine.expect_data(0, cookie, (0, 512)).unwrap();
    assert_eq!((machine.take_buffer(cookie), machine.replies()), (None, 0));
    machine.replied(0, cookie).unwrap();
    assert_eq!((machine.awaits_reply(0), machine.replies()), (false, 0));
    machine.lost();
    machine.probe(0);
    machine.connected(terms(), 1);
    assert!(messages(&mut machine).is_empty());
}

#[test]
fn only_requests_while_serving_are_of_one_session() {
    let mut machine = machine(WRITE);
    let next = |machine: &mut UpstreamMachine| {
        let message = machine.next_message(0).unwrap();
        let (own, cookie) = (machine.awaits_own_reply(0), message.header.cookie);
        machine.replied(0, cookie).unwrap();
        assert_ne!(message.is_of_session, own);
        (CommandKind::try_from(message.header.kind).unwrap(), own)
    };
    machine.submit(0, 0.into(), write(0, BLOCK)).unwrap();
    assert_eq!(next(&mut machine), (CommandKind::Write, false));
    assert_eq!(next(&mut machine), (CommandKind::Flush, true));
    machine.submit(0, 1.into(), write(0, BLOCK)).unwrap();
    assert_eq!(messages(&mut machine).len(), 1);
    reconnect(&mut machine);
    assert_eq!(next(&mut machine), (CommandKind::Write, true));
    assert!(!machine.awaits_own_reply(0));
}

#[test]
fn a_closed_machine_fails_everything() {
    let mut machine = machine(1 << 20);
    machine.submit(0, 0.into(), read(0, BLOCK)).unwrap();
    messages(&mut machine);
    machine.close();
    machine.submit(0, 1.into(), Op::Flush).unwrap();
    machine.connected(terms(), 1);
    machine.submit(0, 2.into(), write(0, BLOCK)).unwrap();
    let error = Some(Errno::ESHUTDOWN as i32);
    assert_eq!(completed(&mut machine), [(0, error), (1, error), (2, error)]);
    assert!(messages(&mut machine).is_empty() && !machine.is_connected());
}

#[test]
fn no_session_waits_for_a_cancelled_change() {
    let mut machine = machine(1 << 20);
    machine.submit(1, 1.into(), write(0, BLOCK)).unwrap();
    assert!(machine.next_message(0).unwrap().is_of_session);
    assert!(!machine.awaits_own_reply(0));
    machine.lost();
    assert!(machine.cancel(1));
    machine.connected(terms(), 1);
    assert!(!machine.next_message(0).unwrap().is_of_session, "it is sent again");
    assert!(machine.awaits_own_reply(0));
}

#[test]
fn a_failed_write_keeps_its_data() {
    let mut machine = machine(1 << 20);
    machine.submit(1, 1.into(), durable(0)).unwrap();
    let message = machine.next_message(0).unwrap();
    machine.store_error(0, message.header.cookie, Errno::EIO as i32).unwrap();
    machine.replied(0, message.header.cookie).unwrap();
    let (_, completion) = machine.next_completion().unwrap();
    assert!(completion.outcome.unwrap().is_err());
    assert_eq!(completion.op, durable(0), "although its message is not sent as a whole");
}

/// Cookies of all messages that the connection may get.
fn cookies(machine: &mut UpstreamMachine) -> Vec<u64> {
    messages(machine).into_iter().map(|(.., cookie)| cookie).collect()
}

fn requested(key: u64, cookie: u64) -> OpId {
    OpId { key, cookie: Some(cookie) }
}

#[test]
fn a_single_message_has_the_cookie_of_its_client() {
    let mut machine = machine(1 << 20);
    machine.submit(1, requested(0, 7), read(0, 4096)).unwrap();
    machine.submit(1, requested(1, 8), read(0, 4097)).unwrap();
    machine.submit(1, 2.into(), Op::Flush).unwrap();
    machine.submit(1, requested(3, OWN_COOKIES + 3), write(0, BLOCK)).unwrap();
    machine.submit(1, 4.into(), read(0, BLOCK)).unwrap();
    // Two messages of a longer read, a flush without a client, and a read without one.
    let own = OWN_COOKIES;
    assert_eq!(cookies(&mut machine), [7, own, own + 1, own + 2, own + 3, own + 4]);
}

#[test]
fn a_cookie_is_in_flight_once_and_may_be_used_again() {
    let mut machine = machine(1 << 20);
    machine.submit(1, requested(0, 7), read(0, BLOCK)).unwrap();
    machine.submit(2, requested(1, 7), write(0, BLOCK)).unwrap();
    assert_eq!(cookies(&mut machine), [7, OWN_COOKIES]);
    machine.store_error(0, 7, Errno::EIO as i32).unwrap();
    machine.replied(0, 7).unwrap();
    machine.submit(2, requested(2, 7), write(512, BLOCK)).unwrap();
    assert_eq!(cookies(&mut machine), [7]);
    for cookie in [7, OWN_COOKIES] {
        machine.replied(0, cookie).unwrap();
    }
    assert_eq!(completed(&mut machine), [(0, Some(Errno::EIO as i32)), (2, None), (1, None)]);
}

#[test]
fn a_request_is_sent_again_with_its_cookie() {
    let mut machine = machine(1 << 20);
    machine.submit(1, requested(0, 7), read(0, BLOCK)).unwrap();
    machine.submit(2, requested(1, 7), read(512, BLOCK)).unwrap();
    machine.submit(2, 2.into(), read(1024, BLOCK)).unwrap();
    let sent = cookies(&mut machine);
    assert_eq!(sent, [7, OWN_COOKIES, OWN_COOKIES + 1]);
    machine.lost();
    // The change goes first, and may not take the cookie of a read that waits.
    machine.submit(3, requested(3, 7), write(0, BLOCK)).unwrap();
    machine.connected(terms(), 1);
    assert_eq!(cookies(&mut machine), [&sent[..], &[OWN_COOKIES + 2]].concat());
    for cookie in sent {
        machine.store_error(0, cookie, Errno::EIO as i32).unwrap();
        machine.replied(0, cookie).unwrap();
    }
    assert!(machine.kept_cookies.is_empty());
}

#[test]
fn a_request_that_becomes_several_messages_gives_up_its_cookie() {
    let mut machine = machine(1 << 20);
    machine.submit(1, requested(0, 7), read(0, 4096)).unwrap();
    assert_eq!(cookies(&mut machine), [7]);
    machine.lost();
    machine.connected(ServerTerms { payload_max: 2048, ..terms() }, 1);
    assert_eq!(cookies(&mut machine), [OWN_COOKIES, OWN_COOKIES + 1]);
    machine.submit(1, requested(1, 7), Op::Flush).unwrap();
    assert_eq!(cookies(&mut machine), [7]);
    assert!(machine.kept_cookies.is_empty());
}

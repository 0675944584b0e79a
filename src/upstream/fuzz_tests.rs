//! Fuzz target of the replies of another server (`tests/fuzz`): arbitrary bytes over one connection.
//! The outcome does not depend on how the bytes are divided, and every operation completes once: by its
//! reply, or by the end of the link.

use super::machine::{LossReason, UpstreamMachine};
use super::rx::UpstreamRx;
use super::terms::ServerTerms;
use crate::disk::{Buffer, Completion, Op, OpId, Zeroing};
use crate::nbd::reply::Dialect;
use crate::nbd::wire::TransmissionFlags;
use crate::range::Range;

const SIZE: u64 = 1 << 20;
const CONTEXT: u32 = 5;
/// Most memory for changes that are not flushed, in bytes.
const UNFLUSHED_MAX: u64 = 1 << 20;

/// The completions in order: key, and bytes of a read or error number.
type Completions = Vec<(u64, Result<Vec<u8>, i32>)>;

/// Replies to operations of each kind. The first two bytes are the dialect and the length of fragments; the
/// others are the server's.
pub(crate) fn replies(bytes: &[u8]) {
    let Some((&[switches, fragment], input)) = bytes.split_first_chunk() else { return };
    let dialect =
        [Dialect::Simple, Dialect::Structured, Dialect::Extended][usize::from(switches % 3)];
    let whole = outcome(dialect, input, input.len().max(1));
    // Fragments of up to 256 bytes, or of up to 64 KiB, of which some are received without a copy.
    let unit = if switches & 128 == 0 { 1 } else { 256 };
    let fragments = outcome(dialect, input, (usize::from(fragment) + 1) * unit);
    assert_eq!(whole, fragments, "in fragments");
}

fn range(offset: u64, length: u64) -> Range {
    Range::within(SIZE, offset, length).unwrap_or(Range::whole(SIZE))
}

/// One operation of each kind; none overlaps another, so that all are sent at once.
fn operations() -> Vec<Op> {
    let how = Zeroing { keep_allocated: false, only_if_fast: true };
    vec![
        Op::Cache(range(0, 7)),
        Op::Read { offset: 100, data: Buffer::from(vec![0xee; 600]) },
        Op::Read { offset: 4096, data: Buffer::from(vec![0xee; 70_000]) },
        Op::Extents { range: range(10, 1000), limit: 4, found: Vec::new() },
        Op::Write { offset: 200_000, data: Buffer::from(vec![1; 512]), durable: false },
        Op::Write { offset: 210_000, data: Buffer::from(vec![2; 512]), durable: true },
        Op::Zero { range: range(300_000, 5000), how, durable: false },
        Op::Trim { range: range(400_000, 5000), durable: false },
        Op::Flush,
    ]
}

fn outcome(dialect: Dialect, input: &[u8], fragment: usize) -> (Completions, Option<LossReason>) {
    let terms = ServerTerms {
        size: SIZE,
        flags: TransmissionFlags::all() - TransmissionFlags::READ_ONLY,
        dialect,
        block_min: 1,
        block_preferred: 4096,
        payload_max: 1 << 20,
        allocation_context: (dialect != Dialect::Simple).then_some(CONTEXT),
        disk_id: None,
    };
    let mut machine = UpstreamMachine::new(terms, UNFLUSHED_MAX);
    machine.connected(terms, 1);
    let operations = operations();
    let (count, mut refused) = (operations.len(), 0);
    for (key, op) in (0..).zip(operations) {
        refused += usize::from(machine.submit(0, OpId { key, cookie: Some(key) }, op).is_err());
    }
    while machine.next_message(0).is_some() {}
    let mut rx = UpstreamRx::new(0, dialect);
    let loss = receive(&mut rx, &mut machine, input, fragment).err();
    rx.abandon(&mut machine);
    machine.close();
    let completions = completions(&mut machine);
    assert_eq!(completions.len() + refused, count, "{completions:?}");
    (completions, loss)
}

fn receive(
    rx: &mut UpstreamRx,
    machine: &mut UpstreamMachine,
    input: &[u8],
    fragment: usize,
) -> Result<(), LossReason> {
    for mut part in input.chunks(fragment) {
        while !part.is_empty() {
            let room = rx.room();
            let count = room.len().min(part.len());
            assert!(count > 0, "no room");
            room[..count].copy_from_slice(&part[..count]);
            part = &part[count..];
            rx.received(count);
            if rx.needs_machine() {
                rx.process(machine)?;
            }
        }
    }
    Ok(())
}

fn completions(machine: &mut UpstreamMachine) -> Completions {
    let mut all = Completions::new();
    while let Some((_, Completion { key, op, outcome })) = machine.next_completion() {
        let bytes = match op {
            Op::Read { data, .. } => data.to_vec(),
            Op::Extents { range, limit, found } => {
                assert!(
                    found.len() <= limit
                        && found.iter().all(|extent| {
                            extent.range.offset() >= range.offset()
                                && extent.range.end() <= range.end()
                        })
                );
                format!("{found:?}").into_bytes()
            }
            _ => Vec::new(),
        };
        let error = |error: std::io::Error| error.raw_os_error().unwrap_or(0);
        all.push((key, outcome.unwrap_or(Ok(())).map(|()| bytes).map_err(error)));
    }
    all
}

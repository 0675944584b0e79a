//! Checks that the history of one register is linearizable: each operation takes effect at one moment
//! between its invocation and its response, and a read returns the value of the last write before it.
//! Pure: times are numbers.
//!
//! Each write has a different value, therefore no search is needed (Gibbons and Korach, "Testing shared
//! memories", SIAM J. Comput. 26, 1997). A write and the reads of its value are a *cluster*, which no
//! other write may divide. Its *zone* lies between the earliest response and the latest invocation of
//! its operations. If the response comes first, the zone is *forward*: the register has the value during
//! all of it. Otherwise the zone is *backward*: one moment in it suffices. The history is linearizable
//! if and only if each read returns the value of a write that it does not precede, no two forward zones
//! overlap, and no forward zone contains a backward zone. That takes O(n log n).

use std::collections::HashMap;
use std::fmt;

/// A value of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Value(pub(crate) u32);

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// It returned the value.
    Read,
    /// It wrote the value.
    Write,
    /// It wrote the value before its response, or has no effect at all.
    MayWrite,
}

/// One operation on the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operation {
    pub(crate) action: Action,
    pub(crate) value: Value,
    /// When it was invoked.
    pub(crate) invoked: u64,
    /// When it responded. `u64::MAX` for a write that may take effect at any later time.
    pub(crate) responded: u64,
    /// The session that invoked it, if any; only for messages.
    pub(crate) session: Option<usize>,
}

impl Operation {
    /// Whether it responded before the other one was invoked.
    pub(crate) fn precedes(&self, other: &Operation) -> bool {
        self.responded < other.invoked
    }

    /// Who invoked it, and when.
    pub(crate) fn origin(&self) -> String {
        let times = format!("in [{}, {}]", self.invoked, self.responded);
        self.session.map_or(times.clone(), |session| format!("by session {session} {times}"))
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {:#x} {}", self.action, self.value.0, self.origin())
    }
}

/// Why a history is not linearizable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Violation {
    /// A history that cannot be checked: two writes have the same value.
    Ambiguous(Operation, Operation),
    /// A read returned a value that no operation writes.
    Unwritten(Operation),
    /// A read returned the value of a write that was invoked after the read's response.
    FromTheFuture { read: Operation, write: Operation },
    /// Neither of two values can be written before the other: one operation of each cluster precedes
    /// one of the other cluster.
    Inverted(Box<[[Operation; 2]; 2]>),
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Violation::Ambiguous(one, other) => write!(f, "one value twice: {one}; {other}"),
            Violation::Unwritten(read) => write!(f, "a value that no request wrote: {read}"),
            Violation::FromTheFuture { read, write } => {
                write!(f, "a read precedes the write of its value: {read}; {write}")
            }
            Violation::Inverted(pairs) => {
                let [[a, b], [c, d]] = &**pairs;
                write!(f, "no order of two values: {a} precedes {b}, but {c} precedes {d}")
            }
        }
    }
}

/// A write and the reads of its value.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    write: Operation,
    is_read: bool,
    /// The operation with the earliest response.
    first: Operation,
    /// The operation that was invoked last.
    last: Operation,
}

impl Cluster {
    fn new(write: Operation) -> Cluster {
        Cluster { write, is_read: false, first: write, last: write }
    }

    fn add(&mut self, read: Operation) {
        self.is_read = true;
        if read.responded < self.first.responded {
            self.first = read;
        }
        if read.invoked > self.last.invoked {
            self.last = read;
        }
    }

    /// Whether it has an effect: a write that may have none has one if its value was read.
    fn is_certain(&self) -> bool {
        self.is_read || self.write.action != Action::MayWrite
    }

    fn is_forward(&self) -> bool {
        self.first.precedes(&self.last)
    }

    fn check_against(&self, other: &Cluster) -> Result<(), Violation> {
        if self.first.precedes(&other.last) && other.first.precedes(&self.last) {
            let pairs = [[self.first, other.last], [other.first, self.last]];
            return Err(Violation::Inverted(Box::new(pairs)));
        }
        Ok(())
    }
}

/// Checks a history, in any order. Its initial value is the value of a write that ended before all
/// other operations began.
pub(crate) fn check(history: &[Operation]) -> Result<(), Violation> {
    let clusters = clusters(history)?;
    let (mut forward, backward): (Vec<_>, Vec<_>) =
        clusters.into_iter().filter(Cluster::is_certain).partition(Cluster::is_forward);
    forward.sort_by_key(|cluster| cluster.first.responded);
    for pair in forward.windows(2) {
        pair[0].check_against(&pair[1])?;
    }
    for cluster in backward {
        // Forward zones do not overlap here, so only the last one that begins before can contain it.
        let begun = forward.partition_point(|other| other.first.responded < cluster.last.invoked);
        if let Some(other) = begun.checked_sub(1).map(|at| &forward[at]) {
            other.check_against(&cluster)?;
        }
    }
    Ok(())
}

fn clusters(history: &[Operation]) -> Result<Vec<Cluster>, Violation> {
    let (reads, writes): (Vec<&Operation>, Vec<&Operation>) =
        history.iter().partition(|operation| operation.action == Action::Read);
    let mut clusters: HashMap<Value, Cluster> = HashMap::with_capacity(writes.len());
    for write in writes {
        if let Some(other) = clusters.insert(write.value, Cluster::new(*write)) {
            return Err(Violation::Ambiguous(other.write, *write));
        }
    }
    for read in reads {
        let Some(cluster) = clusters.get_mut(&read.value) else {
            return Err(Violation::Unwritten(*read));
        };
        if read.precedes(&cluster.write) {
            return Err(Violation::FromTheFuture { read: *read, write: cluster.write });
        }
        cluster.add(*read);
    }
    Ok(clusters.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: u64 = u64::MAX;

    fn operation(action: Action, value: u32, invoked: u64, responded: u64) -> Operation {
        Operation { action, value: Value(value), invoked, responded, session: None }
    }

    fn read(value: u32, invoked: u64, responded: u64) -> Operation {
        operation(Action::Read, value, invoked, responded)
    }

    fn write(value: u32, invoked: u64, responded: u64) -> Operation {
        operation(Action::Write, value, invoked, responded)
    }

    fn may_write(value: u32, invoked: u64, responded: u64) -> Operation {
        operation(Action::MayWrite, value, invoked, responded)
    }

    /// The result for a history that begins with value 0.
    fn checked(operations: &[Operation]) -> Result<(), Violation> {
        check(&[&[write(0, 0, 0)], operations].concat())
    }

    #[track_caller]
    fn assert_inverted(operations: &[Operation]) {
        let found = checked(operations);
        assert!(matches!(found, Err(Violation::Inverted(_))), "{found:?}");
    }

    #[test]
    fn sequential_history_is_accepted() {
        assert_eq!(
            checked(&[read(0, 1, 2), write(1, 3, 4), read(1, 5, 6), write(2, 7, 8)]),
            Ok(())
        );
    }

    #[test]
    fn read_during_a_write_may_return_either_value() {
        assert_eq!(checked(&[write(1, 1, 10), read(0, 2, 3), read(1, 4, 5)]), Ok(()));
        assert_eq!(checked(&[write(1, 1, 10), read(0, 2, 8), read(1, 3, 7)]), Ok(()));
    }

    #[test]
    fn concurrent_writes_may_take_effect_in_either_order() {
        let writes = [write(1, 1, 10), write(2, 1, 10)];
        assert_eq!(checked(&[&writes[..], &[read(1, 11, 12)]].concat()), Ok(()));
        assert_eq!(checked(&[&writes[..], &[read(2, 11, 12)]].concat()), Ok(()));
        assert_inverted(&[&writes[..], &[read(1, 11, 12), read(2, 13, 14)]].concat());
    }

    #[test]
    fn stale_read_is_rejected() {
        assert_inverted(&[write(1, 1, 2), write(2, 3, 4), read(1, 5, 6)]);
        assert_inverted(&[write(1, 1, 2), read(0, 3, 4)]);
    }

    #[test]
    fn lost_write_is_rejected() {
        assert_inverted(&[write(1, 1, 2), read(1, 3, 4), write(2, 5, 6), read(1, 9, 9)]);
    }

    #[test]
    fn new_old_inversion_of_two_reads_is_rejected() {
        assert_inverted(&[write(1, 1, 10), read(1, 2, 3), read(0, 4, 5)]);
        assert_inverted(&[write(1, 1, 2), write(2, 3, 10), read(2, 4, 5), read(1, 6, 7)]);
    }

    #[test]
    fn value_from_the_future_is_rejected() {
        let (early, late) = (read(1, 1, 2), write(1, 3, 4));
        assert_eq!(
            checked(&[early, late]),
            Err(Violation::FromTheFuture { read: early, write: late })
        );
    }

    #[test]
    fn unwritten_value_is_rejected() {
        assert_eq!(checked(&[read(7, 1, 2)]), Err(Violation::Unwritten(read(7, 1, 2))));
    }

    #[test]
    fn two_writes_of_a_value_are_ambiguous() {
        let (one, other) = (write(1, 1, 2), write(1, 3, 4));
        assert_eq!(checked(&[one, other]), Err(Violation::Ambiguous(one, other)));
    }

    #[test]
    fn overwritten_value_in_a_forward_zone_is_rejected() {
        assert_inverted(&[write(1, 1, 2), write(2, 3, 6), read(2, 4, 5), read(1, 8, 9)]);
        assert_eq!(
            checked(&[write(1, 1, 2), write(2, 3, 9), read(1, 4, 8), read(2, 5, 7)]),
            Ok(()),
            "the read of 1 begins before the write of 2 ends"
        );
    }

    #[test]
    fn equal_times_are_concurrent() {
        assert_eq!(checked(&[write(1, 1, 5), write(2, 5, 9), read(1, 9, 12)]), Ok(()));
        assert_inverted(&[write(1, 1, 5), write(2, 6, 9), read(1, 10, 12)]);
    }

    #[test]
    fn write_without_reply_may_take_effect_late_or_never() {
        let lost = may_write(1, 1, NEVER);
        assert_eq!(checked(&[lost, read(0, 2, 3)]), Ok(()), "never");
        assert_eq!(checked(&[lost, read(0, 2, 3), read(1, 50, 60)]), Ok(()), "late");
        assert_eq!(checked(&[lost, write(2, 3, 4), read(1, 5, 6)]), Ok(()), "after a later write");
        assert_inverted(&[lost, read(1, 2, 3), read(0, 4, 5)]);
    }

    #[test]
    fn write_without_reply_takes_effect_before_its_server_ends() {
        let lost = may_write(1, 1, 10);
        assert_eq!(checked(&[lost, read(1, 11, 12)]), Ok(()));
        assert_eq!(checked(&[lost, read(0, 11, 12)]), Ok(()));
        assert_inverted(&[lost, read(0, 11, 12), read(1, 13, 14)]);
        assert_inverted(&[lost, write(2, 11, 12), read(1, 13, 14)]);
    }
}

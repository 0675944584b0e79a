//! A check of a register's history that tries every order, and random histories on which it agrees
//! with the fast check. Also random histories of a correct register, whole and with mistakes.

use crate::register::{Action, Operation, Value, check};
use fastrand::Rng;

/// Histories that both checks judge.
const SHORT_HISTORIES: u64 = 30_000;
/// Histories of a correct register.
const LONG_HISTORIES: u64 = 100;
/// The value of the register at first.
const INITIAL: Operation =
    Operation { action: Action::Write, value: Value(0), invoked: 0, responded: 0, session: None };

/// Whether there is a sequence of the operations in which each follows all that ended before it began, and
/// each read follows the write of its value. Tries all orders, and each subset of the possible writes.
fn is_linearizable(history: &[Operation]) -> bool {
    let (possible, certain): (Vec<Operation>, Vec<Operation>) =
        history.iter().partition(|operation| operation.action == Action::MayWrite);
    (0..1 << possible.len()).any(|chosen: u32| {
        let chosen = (0..possible.len()).filter(|at| chosen & 1 << at != 0);
        let mut rest = certain.clone();
        rest.extend(chosen.map(|at| possible[at]));
        has_order(&rest, None)
    })
}

/// Whether the operations can follow in some order on a register of this value.
fn has_order(rest: &[Operation], value: Option<Value>) -> bool {
    rest.is_empty()
        || (0..rest.len()).any(|next| {
            let operation = rest[next];
            let may_be_next = !rest.iter().any(|other| other.precedes(&operation));
            let is_write = operation.action != Action::Read;
            let others = [&rest[..next], &rest[next + 1..]].concat();
            may_be_next
                && (is_write || value == Some(operation.value))
                && has_order(&others, Some(operation.value))
        })
}

/// Up to six operations in a few moments, so that many of them overlap or touch.
fn short_history(seed: u64) -> Vec<Operation> {
    let mut random = Rng::with_seed(seed);
    let mut history = vec![INITIAL];
    let (writes, reads) = (random.u32(..4), random.u32(1..4));
    let moments = random.u64(4..12);
    for value in 1..=writes {
        let action = if random.u8(..4) == 0 { Action::MayWrite } else { Action::Write };
        history.push(random_times(&mut random, moments, action, value));
    }
    for _ in 0..reads {
        // Sometimes a value that no operation writes.
        let value = random.u32(..writes + 1) + u32::from(random.u8(..50) == 0) * 10;
        history.push(random_times(&mut random, moments, Action::Read, value));
    }
    random.shuffle(&mut history);
    history
}

fn random_times(random: &mut Rng, moments: u64, action: Action, value: u32) -> Operation {
    let invoked = random.u64(1..=moments);
    let is_endless = action == Action::MayWrite && random.bool();
    let responded = if is_endless { u64::MAX } else { invoked + random.u64(..moments / 2) };
    Operation { action, value: Value(value), invoked, responded, session: None }
}

#[test]
fn fast_check_agrees_with_the_exhaustive_one() {
    let mut accepted = 0;
    for seed in 0..SHORT_HISTORIES {
        let history = short_history(seed);
        let (fast, exhaustive) = (check(&history), is_linearizable(&history));
        assert_eq!(fast.is_ok(), exhaustive, "seed {seed}: {fast:?} for {history:#?}");
        accepted += u64::from(exhaustive);
    }
    let part = SHORT_HISTORIES / 4;
    assert!((part..3 * part).contains(&accepted), "only {accepted} histories are accepted");
}

/// A history of a correct register: each operation takes effect at a moment of its own, with a random
/// interval around it. In the order of these moments.
fn correct_history(random: &mut Rng) -> Vec<Operation> {
    let mut history = vec![INITIAL];
    let mut value = 0;
    for step in 1..400 {
        let effect = u64::from(step) * 1000;
        let action = match random.u8(..8) {
            0..4 => Action::Read,
            4 => Action::MayWrite,
            _ => Action::Write,
        };
        let (invoked, responded) = (effect - random.u64(..1000), effect + random.u64(..5000));
        let operation = Operation { action, value: Value(step), invoked, responded, session: None };
        match action {
            Action::Read => history.push(Operation { value: Value(value), ..operation }),
            // Without an effect.
            Action::MayWrite if random.bool() => history.push(operation),
            Action::MayWrite | Action::Write => {
                value = step;
                history.push(operation);
            }
        }
    }
    history
}

#[test]
fn histories_of_a_correct_register_are_accepted() {
    for seed in 0..LONG_HISTORIES {
        let mut random = Rng::with_seed(seed);
        let mut history = correct_history(&mut random);
        random.shuffle(&mut history);
        assert_eq!(check(&history), Ok(()), "seed {seed}");
    }
}

#[test]
fn read_of_an_overwritten_value_is_found_among_many() {
    for seed in 0..LONG_HISTORIES {
        let mut random = Rng::with_seed(seed);
        let mut history = correct_history(&mut random);
        let certain = |operation: &&Operation| operation.action == Action::Write;
        let writes: Vec<Operation> = history.iter().filter(certain).copied().collect();
        let old = writes[random.usize(..writes.len() / 2)];
        let overwritten = writes.iter().find(|write| old.precedes(write)).unwrap();
        let late = |read: &&mut Operation| {
            read.action == Action::Read && overwritten.precedes(read) && read.value != old.value
        };
        let mut reads: Vec<&mut Operation> = history.iter_mut().filter(late).collect();
        let at = random.usize(..reads.len());
        reads[at].value = old.value;
        assert!(check(&history).is_err(), "seed {seed}: the {at}th read is stale");
    }
}

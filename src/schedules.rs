//! For tests: runs simulations from seeds, and checks that they find known mistakes.
//! Knows nothing about any simulation; each one brings its own world, coverage and mutations.

use std::fmt::Debug;

/// A number in an environment variable.
pub(crate) fn env_number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Runs the schedules of the seeds below `FLEXNBD_SCHEDULES`, or below `count`, and returns the sum of their
/// coverages. With `FLEXNBD_SEED` it runs only that schedule, and returns `None`. A failure names the seed.
pub(crate) fn run_all<Coverage: Default + Debug>(
    count: u64,
    run: impl Fn(u64) -> Result<Coverage, String>,
    add: impl Fn(&mut Coverage, &Coverage),
) -> Option<Coverage> {
    if let Some(seed) = env_number("FLEXNBD_SEED") {
        let coverage = run(seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        println!("seed {seed}: {coverage:?}");
        return None;
    }
    let count = env_number("FLEXNBD_SCHEDULES").unwrap_or(count);
    let mut all = Coverage::default();
    for seed in 0..count {
        let coverage = run(seed).unwrap_or_else(|why| panic!("FLEXNBD_SEED={seed}: {why}"));
        add(&mut all, &coverage);
    }
    println!("{count} schedules: {all:?}");
    Some(all)
}

/// Asserts that the schedule of some seed fails for this reason with the mutation, and not without it. `run`
/// runs a schedule, with the mutation if its second argument is true.
pub(crate) fn assert_caught<Coverage>(
    mutation: &dyn Debug,
    reason: &str,
    mut seeds: impl Iterator<Item = u64>,
    run: impl Fn(u64, bool) -> Result<Coverage, String>,
) {
    let found = seeds.find_map(|seed| {
        let why = run(seed, true).err()?;
        (why.contains(reason) && run(seed, false).is_ok()).then_some((seed, why))
    });
    let Some((seed, why)) = found else { panic!("{mutation:?} is not found") };
    println!("{mutation:?}: seed {seed}: {why}");
}

/// Defines `set` and `is_active` for the mutation that a thread makes, in the module of this enum.
macro_rules! active_mutation {
    ($visibility:vis $mutation:ty) => {
        thread_local! {
            static ACTIVE: std::cell::Cell<Option<$mutation>> = const { std::cell::Cell::new(None) };
        }

        /// Sets the mistake that this thread makes.
        $visibility fn set(mutation: Option<$mutation>) {
            ACTIVE.set(mutation);
        }

        /// Whether this thread makes this mistake.
        $visibility fn is_active(mutation: $mutation) -> bool {
            ACTIVE.get() == Some(mutation)
        }
    };
}
pub(crate) use active_mutation;

/// Bytes on their way.
#[derive(Debug, Default)]
pub(crate) struct ByteQueue {
    /// With those in front of `start`, which are consumed.
    pub(crate) bytes: Vec<u8>,
    start: usize,
}

impl ByteQueue {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        }
    }

    /// Moves the first `count` bytes to another queue.
    pub(crate) fn pass(&mut self, count: usize, to: &mut Self) {
        to.extend(&self.bytes()[..count]);
        self.consume(count);
    }
}

//! What schedules reached, so that a test can assert that they reach everything.

macro_rules! situations {
    ($($name:ident: $doc:literal,)*) => {
        /// A situation that schedules have to reach.
        #[derive(Clone, Copy, Debug)]
        pub(super) enum Reached {
            $(#[doc = $doc] $name,)*
        }

        const REACHED: &[Reached] = &[$(Reached::$name,)*];
    };
}

situations! {
    Answered: "A request is answered.",
    Refused: "The policy refuses a request.",
    Invalid: "An invalid request is answered with its error.",
    Malformed: "A session ends because bytes are no request.",
    Suspended: "A session is saved and restored.",
    Direct: "A piece of a write arrives in the buffer of its operation.",
    Throttled: "A migration delays a write.",
    Recorded: "The policy records that the disk changes, or fails to.",
    HandedOver: "The policy decides about a handover.",
    Closed: "The gate is closed and drained.",
    Retired: "The gate is retired.",
    Requested: "A session is asked to end.",
    Lost: "A connection is lost.",
    Ended: "A session ends.",
    Outlived: "A session has ended, and its operations still execute.",
    Abandoned: "Completions are lost.",
}

/// What one or more schedules reached.
#[derive(Clone, Copy, Default)]
pub(super) struct Coverage {
    counts: [u64; REACHED.len()],
    /// Most operations and bytes of one session in flight.
    pub(super) peak: (usize, usize),
}

impl Coverage {
    pub(super) fn count(&mut self, event: Reached) {
        self.add_count(event, 1);
    }

    pub(super) fn add_count(&mut self, event: Reached, count: u64) {
        self.counts[event as usize] += count;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
        self.peak = (self.peak.0.max(other.peak.0), self.peak.1.max(other.peak.1));
    }

    /// A situation that was not reached.
    pub(super) fn missing(&self) -> Option<Reached> {
        REACHED.iter().find(|event| self.counts[**event as usize] == 0).copied()
    }
}

impl std::fmt::Debug for Coverage {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = REACHED.iter().zip(self.counts);
        out.debug_map().entries(counts).entry(&"peak", &self.peak).finish()
    }
}

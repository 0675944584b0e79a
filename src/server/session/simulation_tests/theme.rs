//! The themes of schedules: what happens more often in some of them.

/// A kind of schedule, in which some events are more frequent than in others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Theme {
    Any,
    /// A large disk, and possibly many operations in flight.
    Large,
    /// Mostly long zeroings.
    Zeroing,
    /// The gate is likely to be retired.
    Retired,
    /// Mostly flushes and durable changes, which may fail.
    Flushes,
    /// Completions are lost.
    Losses,
    /// Sessions are saved and restored again and again.
    Restarts,
}

impl Theme {
    /// The seeds of its schedules: one of so many, with this remainder.
    pub(super) fn seeds(self) -> (u64, u64) {
        match self {
            Self::Any => (1, 0),
            Self::Large => (16, 0),
            Self::Zeroing => (32, 17),
            Self::Retired => (16, 3),
            Self::Flushes => (16, 5),
            Self::Losses => (16, 7),
            Self::Restarts => (16, 9),
        }
    }

    /// The theme of a schedule.
    pub(super) fn of(seed: u64) -> Self {
        use Theme::{Flushes, Large, Losses, Restarts, Retired, Zeroing};
        let special = [Large, Zeroing, Retired, Flushes, Losses, Restarts];
        let of_seed = |theme: &Self| seed % theme.seeds().0 == theme.seeds().1;
        special.into_iter().find(of_seed).unwrap_or(Self::Any)
    }
}

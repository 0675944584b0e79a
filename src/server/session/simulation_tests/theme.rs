//! The themes of schedules: what happens more often in some of them.

/// What is special in a schedule, besides what its random numbers decide.
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
        }
    }

    /// The theme of a schedule.
    pub(super) fn of(seed: u64) -> Self {
        let special = [Self::Large, Self::Zeroing, Self::Retired, Self::Flushes, Self::Losses];
        let of_seed = |theme: &Self| seed % theme.seeds().0 == theme.seeds().1;
        special.into_iter().find(of_seed).unwrap_or(Self::Any)
    }
}

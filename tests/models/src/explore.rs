//! Runs a model in every order of its steps.

use loom::model::Builder;
use std::time::{Duration, Instant};

/// Executes `model` in every order of its steps.
pub(crate) fn explore(model: impl Fn() + Send + Sync + 'static) {
    Builder::new().check(model);
}

/// Executes `model` in every order with at most this many preemptions (switches away from a thread
/// that could continue), where all orders would take too long.
pub(crate) fn explore_preempted(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// A deadline that does not pass.
pub(crate) fn far() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

//! Group commit: durable operations are batched, and share one flush.

use super::super::buffer::Buffer;
use super::super::disk::Visit;
use super::super::flush_errors::FlushGuard;
#[cfg(test)]
use super::super::mutation::{self, Mutation};
use super::super::op::Op;
use super::InFlight;
use super::stage::OpStage;
use std::io;

impl<'a, T> InFlight<'a, T> {
    /// Has the next commit make an operation durable, and execute this write first.
    pub(super) fn batch(&mut self, visit: Visit<'a>, key: u64, write: Option<(u64, Buffer)>) {
        self.set_stage(key, OpStage::Batched { visit, write });
        self.commit_batch.push(key);
    }

    /// Makes the batched operations durable.
    pub(super) fn commit(&mut self) {
        let batch = std::mem::take(&mut self.commit_batch);
        let is_single = batch.len() == 1;
        let mut written = Vec::new();
        for key in batch {
            let Some(operation) = self.operations.get_mut(&key) else { continue };
            let OpStage::Batched { visit, write } = operation.stage.take() else { continue };
            let outcome = match write {
                Some((offset, data)) if is_single => {
                    let guard = self.disk.flush_errors.begin_flush();
                    let op = Op::Write { offset, data, durable: true };
                    return self.execute(key, op, OpStage::WritingDurably { visit, guard });
                }
                Some((offset, data)) => {
                    let outcome = self.disk.image().write(offset, &data, false);
                    self.mark(key);
                    outcome
                }
                None => Ok(()),
            };
            match outcome {
                Ok(()) => written.push((key, visit)),
                Err(error) => self.finish(key, Err(error)),
            }
        }
        #[cfg(test)]
        if mutation::is_active(Mutation::AnswerBeforeFlush) {
            return written.into_iter().for_each(|(key, _)| self.finish(key, Ok(())));
        }
        let Some((leader, visit)) = written.pop() else { return };
        let mut members = Vec::new();
        for (key, visit) in written {
            self.set_stage(key, OpStage::Joined { visit });
            members.push(key);
        }
        let guard = self.disk.flush_errors.begin_flush();
        self.execute(leader, Op::Flush, OpStage::Flushing { visit, guard, members });
    }

    pub(super) fn on_written_durably(
        &mut self,
        visit: Visit<'a>,
        key: u64,
        op: Op,
        outcome: io::Result<()>,
        guard: FlushGuard<'a>,
    ) {
        let Err(error) = outcome else {
            self.mark(key);
            drop(guard);
            return self.verify(vec![(key, visit)]);
        };
        // The error may be of the write or of the flush. A plain write tells which: if it succeeds,
        // durability failed. It may take as long as any other write.
        match op {
            Op::Write { offset, data, .. } => {
                let again = Op::Write { offset, data, durable: false };
                self.execute(key, again, OpStage::WritingAgain { visit, guard, error });
            }
            _ => self.on_written_again(visit, key, &error, Ok(()), guard),
        }
    }

    pub(super) fn on_written_again(
        &mut self,
        visit: Visit<'a>,
        key: u64,
        first: &io::Error,
        outcome: io::Result<()>,
        guard: FlushGuard<'a>,
    ) {
        self.mark(key);
        let error = match outcome {
            Ok(()) => self.disk.flush_errors.record(first),
            Err(error) => error,
        };
        drop(guard);
        self.finish(key, Err(error));
        drop(visit);
    }

    pub(super) fn on_flushed(
        &mut self,
        visit: Visit<'a>,
        leader: u64,
        members: Vec<u64>,
        outcome: io::Result<()>,
        guard: FlushGuard<'a>,
    ) {
        if let Err(error) = outcome {
            let first = self.disk.flush_errors.record(&error).raw_os_error().unwrap_or_default();
            drop(guard);
            for key in members.into_iter().chain([leader]) {
                self.finish(key, Err(io::Error::from_raw_os_error(first)));
            }
            return;
        }
        drop(guard);
        self.write_behind.started();
        let mut flushed = Vec::new();
        for key in members {
            let operation = self.operations.get_mut(&key);
            if let Some(OpStage::Joined { visit }) = operation.map(|found| found.stage.take()) {
                flushed.push((key, visit));
            }
        }
        flushed.push((leader, visit));
        self.verify(flushed);
    }

    /// Completes durable operations whose flush succeeded, once every concurrent flush has reported:
    /// the kernel may report a failure to one of them only.
    pub(super) fn verify(&mut self, flushed: Vec<(u64, Visit<'a>)>) {
        let flushes = self.disk.flush_errors.notify_after_concurrent(&self.notifier);
        #[cfg(test)]
        let flushes = flushes.filter(|_| !mutation::is_active(Mutation::SkipVerification));
        for (key, visit) in flushed {
            match flushes {
                None => self.finish(key, self.disk.flush_errors.check()),
                Some(flushes) => {
                    self.set_stage(key, OpStage::Verifying { _visit: visit, flushes });
                    self.verifying.push(key);
                }
            }
        }
    }

    /// Completes flushed operations whose concurrent flushes have all reported.
    pub(super) fn complete_verified(&mut self) {
        let mut at = 0;
        while at < self.verifying.len() {
            let key = self.verifying[at];
            let stage = self.operations.get(&key).map(|operation| &operation.stage);
            let waits = match stage {
                Some(OpStage::Verifying { flushes, .. }) => {
                    !self.disk.flush_errors.have_ended(*flushes)
                }
                _ => false,
            };
            if waits {
                at += 1;
            } else {
                self.verifying.swap_remove(at);
                self.finish(key, self.disk.flush_errors.check());
            }
        }
    }
}

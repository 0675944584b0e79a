//! Replies to requests, and the log of failed ones.
//! Never accesses the disk, except to ask whether a flush has failed before.

use super::tx::Tx;
#[cfg(test)]
use crate::disk::mutation::{self, Mutation};
use crate::disk::{Disk, Extent, errno_of};
use crate::message_id;
use crate::nbd::handshake::ALLOCATION_CONTEXT_ID;
use crate::nbd::reply::{Dialect, ReplyTo, StatusExtent};
use crate::nbd::request::Request;
use crate::nbd::wire::{Allocation, ErrorCode};
use crate::server::export_policy::{ExportPolicy, SessionId};
use std::io;
use tracing::warn;

/// How many failed requests of one session are logged.
const FAILURES_LOGGED_MAX: u32 = 10;

/// Writes the replies of one session into its send buffer.
#[derive(Debug)]
pub(super) struct Replies<'a> {
    pub(super) dialect: Dialect,
    disk: &'a Disk,
    policy: &'a dyn ExportPolicy,
    session: SessionId,
    /// For the log.
    client: String,
    failures: u32,
    /// Requests that the client should not have sent are not logged.
    is_quiet: bool,
}

impl<'a> Replies<'a> {
    pub(super) fn new(
        disk: &'a Disk,
        policy: &'a dyn ExportPolicy,
        dialect: Dialect,
        (client, session): (String, SessionId),
    ) -> Self {
        Self { dialect, disk, policy, session, client, failures: 0, is_quiet: false }
    }

    /// Logs no more requests that the client should not have sent. Failures of the disk are still logged.
    pub(super) fn be_quiet(&mut self) {
        self.is_quiet = true;
    }

    /// Replies to a request with its result.
    pub(super) fn complete(
        &mut self,
        to: ReplyTo,
        outcome: io::Result<()>,
        request: Request,
        tx: &mut Tx,
    ) {
        let Err(error) = outcome else { return self.succeed(to, tx) };
        let concerns_policy = request.writes() || request == Request::Flush;
        #[cfg(test)]
        let concerns_policy = concerns_policy && !mutation::is_active(Mutation::HideFailure);
        let code = ErrorCode::from_errno(errno_of(&error));
        let is_expected = request.may_be_unsupported() && code == ErrorCode::NotSupported;
        if concerns_policy && !is_expected {
            self.policy.on_write_failure(self.session, &error);
        }
        let is_lost = request == Request::Flush && !self.disk.all_flushes_succeeded();
        let kind = if is_lost { message_id::FLUSH_FAILED } else { message_id::REQUEST_FAILED };
        let code = self.log_error(kind, &request, &error);
        tx.reply(|out| self.dialect.failure(to, code, None, "", out));
    }

    pub(super) fn succeed(&self, to: ReplyTo, tx: &mut Tx) {
        #[cfg(test)]
        if mutation::is_active(Mutation::AnswerTwice) {
            tx.reply(|out| self.dialect.success(to, out));
        }
        tx.reply(|out| self.dialect.success(to, out));
    }

    /// Rejects a request that cannot be executed.
    pub(super) fn reject(&mut self, to: ReplyTo, code: ErrorCode, why: &str, tx: &mut Tx) {
        self.log(None, format_args!("refused a request: {why}; answered {code}"));
        tx.reply(|out| self.dialect.failure(to, code, None, why, out));
    }

    /// Replies to BLOCK_STATUS.
    pub(super) fn status(&self, to: ReplyTo, extents: &[Extent], tx: &mut Tx) {
        let hole = (Allocation::HOLE | Allocation::ZERO).bits();
        let status: Vec<StatusExtent> = extents
            .iter()
            .map(|extent| (extent.range.length(), if extent.allocated { 0 } else { hole }))
            .collect();
        tx.reply(|out| self.dialect.status(to, ALLOCATION_CONTEXT_ID, &status, out));
    }

    /// Logs a failure with a message id, and returns the error to reply with.
    pub(super) fn log_error(
        &mut self,
        kind: &'static str,
        what: &impl std::fmt::Debug,
        error: &io::Error,
    ) -> ErrorCode {
        let code = ErrorCode::from_errno(errno_of(error));
        let errno = error.raw_os_error();
        self.log(Some((kind, errno)), format_args!("{what:?} failed: {error}; answered {code}"));
        code
    }

    /// Logs a failed request, unless this session has reached its limit.
    fn log(&mut self, failure: Option<(&str, Option<i32>)>, what: std::fmt::Arguments<'_>) {
        if self.is_quiet && failure.is_none() {
            return;
        }
        let (kind, errno) = failure.unzip();
        let errno = errno.flatten();
        self.failures = self.failures.saturating_add(1);
        let client = &self.client;
        if self.failures <= FAILURES_LOGGED_MAX {
            warn!(message_id = kind, errno, "{client}: {what}");
        }
        if self.failures == FAILURES_LOGGED_MAX {
            warn!("{client}: further failed requests are not logged");
        }
    }
}

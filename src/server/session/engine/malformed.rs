//! Requests with a wrong magic number.

use super::{Engine, Step};
use crate::nbd::Malformed;
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::request;
use crate::nbd::wire::ErrorCode;
use crate::server::end::SessionEnd;

impl Engine<'_> {
    /// Ends the session because framing is lost. In old style it first replies with an error, once as
    /// many bytes as a request header have arrived.
    pub(super) fn reject_malformed(&mut self, malformed: Malformed) -> Result<Step, SessionEnd> {
        let magic = match malformed {
            Malformed::Magic(magic) => magic as u32,
            _ => 0,
        };
        let end = SessionEnd::BadMagic(magic);
        if !self.answers_malformed {
            return Err(end);
        }
        let bytes = self.rx.bytes();
        if bytes.len() < request::header_length(Dialect::Simple) {
            return Ok(Step::NeedsInput);
        }
        let cookie = bytes[8..].first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let to = ReplyTo { cookie, offset: 0, chunked: false };
        self.replies.reject(to, ErrorCode::Invalid, "no request at all", &mut self.tx);
        self.end = Some(end);
        Ok(Step::Progress)
    }
}

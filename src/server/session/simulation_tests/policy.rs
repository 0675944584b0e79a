//! A scripted policy of the export: it refuses requests, has changes recorded first, decides about
//! handovers, and checks when it is asked.

use super::disk::ScriptedDisk;
use crate::nbd::wire::ErrorCode;
use crate::server::export_policy::{
    ExportPolicy, HandoverReply, Permit, ProbeReply, SessionId, SessionsView,
};
use crate::sync;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::{Mutex, MutexGuard};

/// The error of requests that the policy refuses; nothing else replies with it.
pub(super) const REFUSED: ErrorCode = ErrorCode::Shutdown;
/// The error of handovers that the policy refuses.
pub(super) const NO_HANDOVER: ErrorCode = ErrorCode::NotPermitted;

#[derive(Debug)]
struct PolicyState {
    rng: fastrand::Rng,
    needs_record: bool,
    record_fails: bool,
    refuses: bool,
    /// Sessions whose record has failed since they last asked.
    failed: BTreeSet<SessionId>,
    /// Payloads of the private commands that each session has sent.
    handovers: BTreeMap<SessionId, VecDeque<Vec<u8>>>,
    disconnected: BTreeSet<SessionId>,
    /// Failures of changes and flushes of which the clients do not know yet.
    failures: u64,
}

/// The policy of one schedule.
#[derive(Debug)]
pub(super) struct ScriptedPolicy {
    state: Mutex<PolicyState>,
    image: ScriptedDisk,
}

/// The decision about a handover, which its first byte tells.
pub(super) fn handover_reply(payload: &[u8]) -> HandoverReply {
    match payload.first() {
        Some(1) => HandoverReply::Refuse(NO_HANDOVER),
        Some(2) => HandoverReply::Close,
        _ => HandoverReply::Acknowledge,
    }
}

impl ScriptedPolicy {
    pub(super) fn new(image: ScriptedDisk, rng: &mut fastrand::Rng) -> Self {
        let needs_record = rng.u8(..4) == 0;
        let state = PolicyState {
            needs_record,
            record_fails: needs_record && rng.bool(),
            refuses: rng.u8(..12) == 0,
            failed: BTreeSet::new(),
            handovers: BTreeMap::new(),
            disconnected: BTreeSet::new(),
            failures: 0,
            rng: rng.fork(),
        };
        image.state().awaits_record = needs_record;
        Self { state: Mutex::new(state), image }
    }

    fn state(&self) -> MutexGuard<'_, PolicyState> {
        sync::lock(&self.state)
    }

    /// Whether it may refuse a request that the specification permits.
    pub(super) fn may_refuse(&self) -> bool {
        let state = self.state();
        state.refuses || state.record_fails
    }

    /// A client sends the private command with this payload.
    pub(super) fn on_handover_sent(&self, session: SessionId, payload: Vec<u8>) {
        self.state().handovers.entry(session).or_default().push_back(payload);
    }

    /// A client receives the failure of a change or flush; false if the policy does not know of it.
    pub(super) fn knows_failure(&self) -> bool {
        let mut state = self.state();
        let is_known = state.failures > 0;
        state.failures = state.failures.saturating_sub(1);
        is_known
    }

    fn check_idle(&self, session: SessionId, what: &str) {
        let mut state = self.image.state();
        if state.is_busy(session) {
            state.break_promise(format!("session {session}: operations are in flight at {what}"));
        }
    }
}

impl ExportPolicy for ScriptedPolicy {
    fn probe(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        unreachable!("there is no handshake")
    }

    fn permit(&self, session: SessionId, changes: bool) -> Permit {
        let mut state = self.state();
        if changes && state.failed.remove(&session) {
            return Permit::Refused(REFUSED, "the record cannot be written");
        }
        if state.refuses && state.rng.u8(..8) == 0 {
            return Permit::Refused(REFUSED, "the script refuses it");
        }
        if changes && state.needs_record { Permit::RecordFirst } else { Permit::Granted }
    }

    fn record_change(&self, session: SessionId) {
        let mut state = self.state();
        if state.record_fails && state.rng.bool() {
            state.failed.insert(session);
        } else {
            state.needs_record = false;
            self.image.state().awaits_record = false;
        }
    }

    fn on_write_failure(&self, _: SessionId, _: &io::Error) {
        self.state().failures += 1;
    }

    fn handover(&self, session: SessionId, payload: &[u8]) -> HandoverReply {
        self.check_idle(session, "a handover");
        let sent = self.state().handovers.get_mut(&session).and_then(VecDeque::pop_front);
        if sent.as_deref() != Some(payload) {
            let what = format!("session {session}: handover of {payload:?} instead of {sent:?}");
            self.image.state().break_promise(what);
        }
        handover_reply(payload)
    }

    fn on_disconnect(&self, session: SessionId) {
        self.check_idle(session, "a disconnect");
        if !self.state().disconnected.insert(session) {
            self.image.state().break_promise(format!("session {session} disconnects twice"));
        }
    }
}

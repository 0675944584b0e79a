//! The handshake of one session, without a socket: options out of the receive buffer, replies into the send
//! buffer. Does everything possible now, and returns its reason to wait ([`HandshakeBlocked`]); never
//! waits, receives, sends or calls the policy. Time comes in as a clock.
//!
//! It is a state machine beside the [engine](super::engine) of the transmission phase, not a part of it: the two
//! have no state in common but the buffers, which pass from one to the other with the bytes in them
//! ([`SessionPhase`](super::phase::SessionPhase)), and the turns of the engine have no branch for the
//! handshake.
//!
//! The policy decides about the private option and about each request for the export. Its decision may need
//! other sessions to end first: sessions that this one displaces, or one that is in the way and may
//! just be ending. Neither a stop request nor the deadline of the handshake ends that wait, which has a deadline
//! of its own: an earlier session of the same source may still be changing the disk, and the next one waits
//! only for this one. A decision that begins after the deadline of the handshake waits for no session,
//! because a client can send a thousand options at once.
//!
//! The requests to suspend and to finish count once every received option is handled, so that a snapshot never
//! has a decision to make. Stronger ones count after each decision that has waited.

use super::engine::Clocks;
use super::rx::Rx;
use super::tx::Tx;
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::handshake::server::{
    Export, HandshakePosition, ProtocolViolation, ServerHandshake, ServerStep,
};
use crate::nbd::handshake::{Agreement, TlsOffer};
use crate::nbd::reply::Dialect;
use crate::nbd::wire::OptionReplyKind;
use crate::server::end::SessionEnd;
use crate::server::export_policy::{GoReply, ProbeReply, SessionId};
use crate::server::settings::Style;
use crate::server::snapshot::{PhaseSnapshot, SessionSnapshot};
use crate::server::stop_request::StopRequest;
use std::io;
use std::time::{Duration, Instant};

/// Length of the client flags in bytes; every option header is longer.
const CLIENT_FLAGS: usize = 4;
/// How long a source that reconnects waits for the end of its earlier connection.
const DISPLACED_END_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a client waits for the end of a session that is in its way.
const HOLDER_END_TIMEOUT: Duration = Duration::from_millis(500);
/// Message for a client whose earlier session does not end in time.
const STILL_AT_WORK: &str = "an earlier connection is still at work on the disk; try again";

/// What a handshake waits for when it can do no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum HandshakeBlocked {
    /// Every option that has arrived is handled, and the replies are sent. Until [`Handshake::deadline`].
    Input,
    /// Replies have to be sent before anything else is done. Until [`Handshake::deadline`].
    Output,
    /// The policy has to answer the private option with this data ([`Handshake::on_probe_reply`]).
    Probe(Vec<u8>),
    /// The policy has to decide about access to the export; with `enters`, to the transmission phase
    /// ([`Handshake::on_go_reply`]).
    Admission { enters: bool },
    /// These sessions have to be disconnected and to end, until then ([`Handshake::on_others`]).
    Displaced { sessions: Vec<SessionId>, until: Instant },
    /// This session is in the way. It may be ending: a client that reconnects at once may arrive before
    /// its earlier session has ended. Until then ([`Handshake::on_others`]).
    Holder { session: SessionId, until: Instant },
    /// The policy has to release what it has just given to this session ([`Handshake::on_released`]).
    Release,
    /// The handshake is complete: requests follow.
    Complete(Negotiated),
    /// TLS begins, and then the handshake begins again in it ([`Handshake::restart_in_tls`]).
    StartTls,
    /// The session is suspended.
    Suspend,
}

/// The result of a handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Negotiated {
    pub(super) dialect: Dialect,
    pub(super) allocation_selected: bool,
    /// The private command is valid.
    pub(super) private: bool,
}

/// What the table of sessions has to know of the last step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct HandshakeProgress {
    /// A whole option has arrived. The client flags do not count: any client can send them.
    pub(super) option_received: bool,
    /// The client is the source of a migration, and accepted as such.
    pub(super) is_source: bool,
}

/// One session's handshake.
#[derive(Debug)]
pub(super) struct Handshake {
    pub(super) rx: Rx,
    pub(super) tx: Tx,
    protocol: ServerHandshake,
    /// The export in old style, whose greeting is the whole handshake.
    oldstyle: Option<Export>,
    state: HandshakeState,
    /// The current decision, or the last one, has waited for other sessions.
    has_waited: bool,
    progress: HandshakeProgress,
    deadline: Instant,
    clocks: Clocks,
}

#[derive(Debug)]
enum HandshakeState {
    /// Handles options.
    Options,
    /// The policy has to decide.
    Deciding(Subject),
    /// Other sessions have to end before a decision takes effect.
    Displacing {
        sessions: Vec<SessionId>,
        until: Instant,
        granted: Decision,
        refused: Decision,
    },
    /// The policy is asked again if this session ends; otherwise its refusal stands.
    AwaitingHolder {
        session: SessionId,
        until: Instant,
        subject: Subject,
        refused: Decision,
    },
    /// The policy has to release what it has granted.
    Releasing {
        refused: Decision,
    },
    Complete(Negotiated),
    /// Begins TLS once the reply is sent.
    StartingTls,
    /// Refused in old style, where no reply can say so.
    Refused(String),
}

/// What a decision is about.
#[derive(Clone, Debug)]
enum Subject {
    Probe(Vec<u8>),
    Admission { enters: bool },
}

/// A decision as the client receives it.
#[derive(Debug)]
enum Decision {
    /// Data of the reply to the private option, and whether the client counts as a source.
    Probe(Result<(Vec<u8>, bool), OptionReply>),
    Admission(Result<(), String>),
}

impl Handshake {
    /// A new handshake. In newstyle the acceptor has greeted the client.
    pub(super) fn new(
        export: &Export,
        style: Style,
        tls: TlsOffer,
        deadline: Instant,
        clocks: Clocks,
    ) -> Self {
        let mut protocol = ServerHandshake::new(export.clone());
        protocol.set_tls(tls);
        let buffers = (Rx::default(), Tx::default());
        let handshake = Self::with(protocol, buffers, deadline, clocks);
        match style {
            Style::Newstyle => handshake,
            Style::Oldstyle => Self {
                oldstyle: Some(export.clone()),
                state: HandshakeState::Deciding(Subject::Admission { enters: true }),
                ..handshake
            },
        }
    }

    /// Continues a handshake in newstyle at this position.
    pub(super) fn restore(
        export: &Export,
        position: HandshakePosition,
        buffers: (Rx, Tx),
        tls: TlsOffer,
        deadline: Instant,
        clocks: Clocks,
    ) -> Self {
        let mut protocol = ServerHandshake::resume(export.clone(), position);
        protocol.set_tls(tls);
        Self::with(protocol, buffers, deadline, clocks)
    }

    fn with(
        mut protocol: ServerHandshake,
        (rx, tx): (Rx, Tx),
        deadline: Instant,
        clocks: Clocks,
    ) -> Self {
        protocol.enable_private_option();
        protocol.require_admission();
        let (oldstyle, state, has_waited) = (None, HandshakeState::Options, false);
        let progress = HandshakeProgress::default();
        Self { rx, tx, protocol, oldstyle, state, has_waited, progress, deadline, clocks }
    }

    /// The handshake in TLS, after [`HandshakeBlocked::StartTls`]. Of this one only the client flags and the
    /// deadline are left.
    pub(super) fn restart_in_tls(&self, export: &Export, sends_references: bool) -> Self {
        let position = HandshakePosition::begun(self.protocol.position().client);
        let tx = if sends_references { Tx::default() } else { Tx::without_references() };
        let buffers = (Rx::default(), tx);
        Self::restore(export, position, buffers, TlsOffer::InUse, self.deadline, self.clocks)
    }

    /// Saves the handshake after [`HandshakeBlocked::Suspend`]. Fails if replies cannot be saved.
    pub(super) fn save(self, session: SessionId) -> io::Result<SessionSnapshot> {
        Ok(SessionSnapshot {
            session,
            inbox: self.rx.bytes().to_vec(),
            outbox: self.tx.save()?,
            phase: PhaseSnapshot::Handshake(self.protocol.position().into()),
            introduction: None,
        })
    }

    /// Does everything that is possible now. Returns what it waits for, or the end of the session; then
    /// the replies made before it are still to be sent, such as the one to `NBD_OPT_ABORT`.
    pub(super) fn advance(&mut self, stop: StopRequest) -> Result<HandshakeBlocked, SessionEnd> {
        if matches!(self.state, HandshakeState::Options) {
            // A client can send a thousand options at once, each of which may need to wait.
            if self.has_waited && stop >= StopRequest::NotAdmitted {
                return Err(SessionEnd::Requested(stop));
            }
            self.handle_options()?;
        }
        Ok(match &self.state {
            HandshakeState::Options | HandshakeState::StartingTls => {
                return self.blocked_by_client(stop);
            }
            HandshakeState::Deciding(Subject::Probe(data)) => HandshakeBlocked::Probe(data.clone()),
            HandshakeState::Deciding(Subject::Admission { enters }) => {
                HandshakeBlocked::Admission { enters: *enters }
            }
            HandshakeState::Displacing { sessions, until, .. } => {
                HandshakeBlocked::Displaced { sessions: sessions.clone(), until: *until }
            }
            HandshakeState::AwaitingHolder { session, until, .. } => {
                HandshakeBlocked::Holder { session: *session, until: *until }
            }
            HandshakeState::Releasing { .. } => HandshakeBlocked::Release,
            HandshakeState::Complete(negotiated) => HandshakeBlocked::Complete(*negotiated),
            HandshakeState::Refused(why) => return Err(SessionEnd::Refused(why.clone())),
        })
    }

    /// Handles the options that have arrived, up to one that needs a decision.
    fn handle_options(&mut self) -> Result<(), SessionEnd> {
        let Self { rx, tx, protocol, .. } = self;
        let mut step = Ok((0, ServerStep::NeedInput));
        tx.reply(|out| step = protocol.advance(rx.bytes(), out));
        let (used, next) = step.map_err(SessionEnd::Misbehaved)?;
        rx.consume(used);
        self.progress.option_received |= used > CLIENT_FLAGS;
        match next {
            ServerStep::NeedInput => {}
            ServerStep::PrivateOption(data) => self.decide(Subject::Probe(data)),
            ServerStep::AdmissionRequired { enters_transmission: enters } => {
                self.decide(Subject::Admission { enters });
            }
            ServerStep::Aborted => return Err(SessionEnd::Aborted),
            ServerStep::Transmission(agreement) => self.complete(&agreement),
            ServerStep::StartTls if !self.rx.bytes().is_empty() => {
                return Err(SessionEnd::Misbehaved(ProtocolViolation::DataBeforeTls));
            }
            ServerStep::StartTls => self.state = HandshakeState::StartingTls,
        }
        Ok(())
    }

    /// A handshake has no requests to finish: every stop request ends it.
    fn blocked_by_client(&self, stop: StopRequest) -> Result<HandshakeBlocked, SessionEnd> {
        match stop {
            StopRequest::Serve if self.is_late() => Err(SessionEnd::HandshakeTimeout),
            StopRequest::Serve if self.tx.has_bytes() => Ok(HandshakeBlocked::Output),
            StopRequest::Serve if matches!(self.state, HandshakeState::StartingTls) => {
                Ok(HandshakeBlocked::StartTls)
            }
            StopRequest::Serve => Ok(HandshakeBlocked::Input),
            // The client expects TLS next, whose state cannot be saved.
            StopRequest::Suspend if matches!(self.state, HandshakeState::StartingTls) => {
                Err(SessionEnd::Requested(stop))
            }
            StopRequest::Suspend => Ok(HandshakeBlocked::Suspend),
            request => Err(SessionEnd::Requested(request)),
        }
    }

    fn decide(&mut self, subject: Subject) {
        self.has_waited = false;
        self.state = HandshakeState::Deciding(subject);
    }

    fn complete(&mut self, agreement: &Agreement) {
        self.state = HandshakeState::Complete(Negotiated {
            dialect: agreement.dialect,
            allocation_selected: agreement.allocation_context.is_some(),
            private: self.protocol.private_negotiated(),
        });
    }

    /// The policy's answer to the private option.
    pub(super) fn on_probe_reply(&mut self, reply: ProbeReply) {
        match reply {
            ProbeReply::Answer { data, displaced, is_source } => {
                let refusal = OptionReply::error(OptionReplyKind::ErrPolicy, STILL_AT_WORK);
                let granted = Decision::Probe(Ok((data, is_source)));
                self.displace(displaced, granted, Decision::Probe(Err(refusal)));
            }
            ProbeReply::Refuse { reply, holder } => {
                self.refuse(holder, Decision::Probe(Err(reply)));
            }
        }
    }

    /// The decision about access to the export.
    pub(super) fn on_go_reply(&mut self, reply: GoReply) {
        match reply {
            GoReply::Allow(displaced) => {
                let refused = Decision::Admission(Err(STILL_AT_WORK.to_owned()));
                self.displace(displaced, Decision::Admission(Ok(())), refused);
            }
            GoReply::Refuse { why, holder } => {
                self.refuse(holder, Decision::Admission(Err(why)));
            }
        }
    }

    fn displace(&mut self, sessions: Vec<SessionId>, granted: Decision, refused: Decision) {
        if sessions.is_empty() {
            return self.reply(granted);
        }
        self.has_waited = true;
        let until = self.now() + self.patience(DISPLACED_END_TIMEOUT);
        self.state = HandshakeState::Displacing { sessions, until, granted, refused };
    }

    fn refuse(&mut self, holder: Option<SessionId>, refused: Decision) {
        let state = std::mem::replace(&mut self.state, HandshakeState::Options);
        let may_not_wait = self.has_waited || !self.may_wait();
        let (Some(session), HandshakeState::Deciding(subject), false) =
            (holder, state, may_not_wait)
        else {
            return self.reply(refused);
        };
        self.has_waited = true;
        let until = self.now() + HOLDER_END_TIMEOUT;
        self.state = HandshakeState::AwaitingHolder { session, until, subject, refused };
    }

    /// How long to wait for other sessions.
    fn patience(&self, timeout: Duration) -> Duration {
        if self.may_wait() { timeout } else { Duration::ZERO }
    }

    /// Whether a decision may still wait for other sessions. The deadline is one for options, which old style
    /// has none of.
    fn may_wait(&self) -> bool {
        self.oldstyle.is_some() || !self.is_late()
    }

    /// Whether the other sessions that this one waits for have ended. Returns false if it has to go on
    /// waiting.
    pub(super) fn on_others(&mut self, have_ended: bool) -> bool {
        let (HandshakeState::Displacing { until, .. }
        | HandshakeState::AwaitingHolder { until, .. }) = &self.state
        else {
            return true;
        };
        if !have_ended && self.now() < *until {
            return false;
        }
        match std::mem::replace(&mut self.state, HandshakeState::Options) {
            HandshakeState::Displacing { granted, .. } if have_ended => self.reply(granted),
            HandshakeState::Displacing { refused: refused @ Decision::Admission(_), .. } => {
                self.state = HandshakeState::Releasing { refused };
            }
            HandshakeState::AwaitingHolder { subject, .. } if have_ended => {
                self.state = HandshakeState::Deciding(subject);
            }
            HandshakeState::Displacing { refused, .. }
            | HandshakeState::AwaitingHolder { refused, .. } => {
                self.reply(refused);
            }
            other => self.state = other,
        }
        true
    }

    /// The policy has released what it had given to this session.
    pub(super) fn on_released(&mut self) {
        match std::mem::replace(&mut self.state, HandshakeState::Options) {
            HandshakeState::Releasing { refused } => self.reply(refused),
            other => self.state = other,
        }
    }

    /// Applies a decision.
    fn reply(&mut self, outcome: Decision) {
        self.state = HandshakeState::Options;
        match (outcome, &self.oldstyle) {
            (Decision::Probe(answer), _) => {
                let answer = answer.map(|(data, is_source)| {
                    self.progress.is_source |= is_source;
                    data
                });
                self.tx.reply(|out| self.protocol.reply_to_private_option(answer, out));
            }
            // The option is still in the receive buffer.
            (Decision::Admission(admission), None) => self.protocol.set_admission(admission),
            (Decision::Admission(Err(why)), Some(_)) => self.state = HandshakeState::Refused(why),
            (Decision::Admission(Ok(())), Some(export)) => {
                let mut greeting = Vec::new();
                let agreement = ServerHandshake::greet_oldstyle(export, &mut greeting);
                self.tx.reply(|out| out.extend_from_slice(&greeting));
                self.complete(&agreement);
            }
        }
    }

    /// Bytes have arrived. Fails if that is too late: a client that sends without a pause never
    /// makes the handshake wait.
    pub(super) fn on_received(&self) -> Result<(), SessionEnd> {
        if self.is_late() { Err(SessionEnd::HandshakeTimeout) } else { Ok(()) }
    }

    /// The end of the session whose client has closed its side of the connection.
    pub(super) fn end_of_stream(&self) -> SessionEnd {
        if self.rx.bytes().is_empty() { SessionEnd::Closed } else { SessionEnd::Truncated }
    }

    /// When the client must have completed the handshake.
    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The progress since the last call.
    pub(super) fn take_progress(&mut self) -> HandshakeProgress {
        std::mem::take(&mut self.progress)
    }

    fn is_late(&self) -> bool {
        self.now() >= self.deadline
    }

    fn now(&self) -> Instant {
        (self.clocks.now)()
    }
}

#[cfg(test)]
mod tests;

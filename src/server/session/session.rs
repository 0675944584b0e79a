//! One client's session: handshake, then transmission, in a thread of its own.
//! Ends for one reason, which it returns; the acceptor's code logs it.

use super::driver::Driver;
use super::engine::{Clocks, Engine, EngineContext, PendingRequests};
use super::receive_delay::coarse_now;
use super::rx::Rx;
use super::tx::Tx;
use crate::disk::{Disk, Notifier};
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::handshake::server::{Export, ServerHandshake, ServerStep};
use crate::nbd::reply::Dialect;
use crate::nbd::request::Terms;
use crate::nbd::wire::OptionReplyKind;
use crate::net::{Interest, Peer, Stream};
use crate::server::end::SessionEnd;
use crate::server::export_policy::{ExportPolicy, GoReply, ProbeReply, SessionId};
use crate::server::sessions::Registration;
use crate::server::settings::{SessionSettings, Style};
use crate::server::snapshot::{PhaseSnapshot, SessionSnapshot, TransmissionSnapshot};
use crate::server::stop_request::StopRequest;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Largest payload in newstyle, in bytes. Twice the advertised maximum: some clients do not request
/// block sizes and assume more than the specification allows them.
pub const PAYLOAD_MAX: u32 = 64 << 20;
/// Largest payload in old style, which cannot advertise a maximum, in bytes: the largest `--size` of
/// `flexnbd read` and `write`.
pub const PAYLOAD_MAX_OLDSTYLE: u32 = 1 << 30;
/// Length of the client flags in bytes; every option header is longer.
const CLIENT_FLAGS: usize = 4;
/// How long a source that reconnects waits for the end of its earlier connection.
const DISPLACED_END_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a client waits for the end of a session that is in its way.
const HOLDER_END_TIMEOUT: Duration = Duration::from_millis(500);
/// How long to wait for a client to receive the last replies.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection, and all that its session needs.
#[derive(Debug)]
pub(in crate::server) struct Session<'a> {
    pub(in crate::server) stream: Stream,
    pub(in crate::server) peer: Peer,
    pub(in crate::server) registration: Registration,
    pub(in crate::server) disk: &'a Disk,
    pub(in crate::server) policy: &'a dyn ExportPolicy,
    pub(in crate::server) export: Export,
    pub(in crate::server) settings: SessionSettings,
    pub(in crate::server) cpus: usize,
}

/// The state that a session starts from, new or restored.
struct SessionStart {
    rx: Rx,
    tx: Tx,
    phase: SessionPhase,
}

enum SessionPhase {
    Handshake(Box<ServerHandshake>),
    Transmission(Terms, Box<PendingRequests>),
}

impl Session<'_> {
    /// Serves the client until the session ends, starting with the handshake or from a snapshot.
    /// Returns a snapshot if the end is [`SessionEnd::Suspended`].
    pub(in crate::server) fn run(
        &self,
        snapshot: Option<SessionSnapshot>,
    ) -> (SessionEnd, Option<SessionSnapshot>) {
        let start = match snapshot {
            None => match self.start() {
                Ok(start) => start,
                Err(end) => return (end, None),
            },
            Some(snapshot) => match self.restore(snapshot) {
                Some(start) => start,
                None => return (SessionEnd::NotRestorable, None),
            },
        };
        let (end, snapshot) = self.serve(start);
        if end.needs_linger() {
            self.linger();
        }
        (end, snapshot)
    }

    /// The start of a new session. In newstyle the acceptor has greeted the client.
    fn start(&self) -> Result<SessionStart, SessionEnd> {
        let (rx, mut tx) = (Rx::default(), Tx::default());
        let phase = match self.settings.style {
            Style::Oldstyle => {
                self.check_policy(true).map_err(SessionEnd::Refused)?;
                let mut greeting = Vec::new();
                let agreement = ServerHandshake::greet_oldstyle(&self.export, &mut greeting);
                tx.reply(|out| out.extend_from_slice(&greeting));
                let terms = self.terms(agreement.dialect, false, false);
                SessionPhase::Transmission(terms, Box::default())
            }
            Style::Newstyle => {
                SessionPhase::Handshake(Box::new(ServerHandshake::new(self.export.clone())))
            }
        };
        Ok(SessionStart { rx, tx, phase })
    }

    /// The start of a session from a snapshot; `None` if that does not fit this server.
    fn restore(&self, snapshot: SessionSnapshot) -> Option<SessionStart> {
        let size = self.export.size;
        let rx = Rx::restore(&snapshot.inbox)?;
        let tx = Tx::restore(snapshot.outbox, size)?;
        let phase = match snapshot.phase {
            PhaseSnapshot::Handshake(handshake) => {
                let handshake = ServerHandshake::resume(self.export.clone(), handshake.position()?);
                SessionPhase::Handshake(Box::new(handshake))
            }
            PhaseSnapshot::Transmission(TransmissionSnapshot {
                form,
                allocation_selected,
                introduced,
                pending,
            }) => {
                let terms = self.terms(form.into(), allocation_selected, introduced);
                let pending = PendingRequests::restore(pending, size)?;
                SessionPhase::Transmission(terms, Box::new(pending))
            }
        };
        Some(SessionStart { rx, tx, phase })
    }

    fn serve(&self, start: SessionStart) -> (SessionEnd, Option<SessionSnapshot>) {
        let SessionStart { mut rx, mut tx, phase } = start;
        let (terms, pending) = match phase {
            SessionPhase::Transmission(terms, pending) => (terms, *pending),
            SessionPhase::Handshake(mut handshake) => {
                match self.handshake(&mut handshake, &mut rx, &mut tx) {
                    Ok(agreed) => {
                        let selected = agreed.allocation_context.is_some();
                        let terms =
                            self.terms(agreed.dialect, selected, handshake.private_negotiated());
                        (terms, PendingRequests::default())
                    }
                    Err(SessionEnd::Requested(StopRequest::Suspend)) => {
                        return self.save_handshake(&handshake, &rx, tx);
                    }
                    Err(end) => {
                        // Sends replies made before the end, such as the one to `NBD_OPT_ABORT`.
                        let _ = tx.send(&self.stream);
                        return (end, None);
                    }
                }
            }
        };
        // In old style the first request ends the handshake.
        if self.settings.style == Style::Newstyle && !self.registration.establish() {
            return (SessionEnd::Full, None);
        }
        self.transmission(terms, rx, tx, pending).run()
    }

    fn save_handshake(
        &self,
        handshake: &ServerHandshake,
        rx: &Rx,
        tx: Tx,
    ) -> (SessionEnd, Option<SessionSnapshot>) {
        let outbox = match tx.save() {
            Ok(outbox) => outbox,
            Err(error) => return (SessionEnd::Connection(error), None),
        };
        let snapshot = SessionSnapshot {
            session: self.registration.id,
            inbox: rx.bytes().to_vec(),
            outbox,
            phase: PhaseSnapshot::Handshake(handshake.position().into()),
        };
        (SessionEnd::Suspended, Some(snapshot))
    }

    fn handshake(
        &self,
        handshake: &mut ServerHandshake,
        rx: &mut Rx,
        tx: &mut Tx,
    ) -> Result<Agreement, SessionEnd> {
        let deadline = self.registration.since + self.settings.handshake_timeout;
        handshake.enable_private_option();
        handshake.require_admission();
        loop {
            self.send_greeting(tx, deadline)?;
            self.receive_greeting(rx, deadline)?;
            // A client that sends without a pause never makes us wait, so that `wait` sees no timeout.
            if Instant::now() >= deadline {
                return Err(SessionEnd::HandshakeTimeout);
            }
            if let Some(agreement) = self.advance(handshake, rx, tx)? {
                return Ok(agreement);
            }
        }
    }

    /// Handles the options that have arrived.
    fn advance(
        &self,
        handshake: &mut ServerHandshake,
        rx: &mut Rx,
        tx: &mut Tx,
    ) -> Result<Option<Agreement>, SessionEnd> {
        loop {
            let mut step = Ok((0, ServerStep::NeedInput));
            tx.reply(|out| step = handshake.advance(rx.bytes(), out));
            let (used, next) = step.map_err(SessionEnd::Misbehaved)?;
            rx.consume(used);
            // The flags do not count: any client can send them.
            if used > CLIENT_FLAGS {
                self.registration.option_received(Instant::now());
            }
            match next {
                ServerStep::NeedInput => return Ok(None),
                ServerStep::PrivateOption(data) => {
                    let answer = self.probe(&data).map(|(data, is_source)| {
                        if is_source {
                            self.registration.mark_source();
                        }
                        data
                    });
                    tx.reply(|out| handshake.reply_to_private_option(answer, out));
                }
                ServerStep::AdmissionRequired { enters_transmission } => {
                    handshake.set_admission(self.check_policy(enters_transmission));
                }
                ServerStep::Aborted => return Err(SessionEnd::Aborted),
                ServerStep::Transmission(agreement) => return Ok(Some(agreement)),
            }
        }
    }

    /// Data of the reply to the private option, and whether the client counts as a source.
    fn probe(&self, data: &[u8]) -> Result<(Vec<u8>, bool), OptionReply> {
        let mut may_wait = true;
        loop {
            match self.policy.probe(self.registration.id, data, self.registration.sessions()) {
                ProbeReply::Answer { data, displaced, is_source } => {
                    return self
                        .disconnect(&displaced)
                        .map(|()| (data, is_source))
                        .map_err(|why| OptionReply::error(OptionReplyKind::ErrPolicy, &why));
                }
                ProbeReply::Refuse { holder: Some(holder), .. }
                    if std::mem::take(&mut may_wait) && self.wait_for_end_of(holder) => {}
                ProbeReply::Refuse { reply, .. } => return Err(reply),
            }
        }
    }

    /// Asks the policy for access to the export; with `enters`, to enter the transmission phase. Returns
    /// why it is refused.
    fn check_policy(&self, enters: bool) -> Result<(), String> {
        if let Some(why) = self.registration.establish_refusal() {
            return Err(why.to_owned());
        }
        if self.disk.gate().is_parting() {
            return Err("the disk is being handed over to another host".to_owned());
        }
        let mut may_wait = true;
        loop {
            match self.policy.go(self.registration.id, enters, self.registration.sessions()) {
                GoReply::Allow(displaced) => {
                    // On failure the policy must release what it has just given to this session.
                    return self.disconnect(&displaced).inspect_err(|_| {
                        self.policy.on_session_end(self.registration.id);
                    });
                }
                GoReply::Refuse { holder: Some(holder), .. }
                    if std::mem::take(&mut may_wait) && self.wait_for_end_of(holder) => {}
                GoReply::Refuse { why, .. } => return Err(why),
            }
        }
    }

    /// Disconnects other sessions, and waits until they have no I/O in flight.
    fn disconnect(&self, displaced: &[SessionId]) -> Result<(), String> {
        if self.registration.disconnect_others(displaced, Instant::now() + DISPLACED_END_TIMEOUT) {
            return Ok(());
        }
        Err("an earlier connection is still at work on the disk; try again".to_owned())
    }

    /// Waits for a session in the way: a client that reconnects at once may arrive before its earlier
    /// session has ended.
    fn wait_for_end_of(&self, holder: SessionId) -> bool {
        self.registration.wait_for_end_of(holder, Instant::now() + HOLDER_END_TIMEOUT)
    }

    fn send_greeting(&self, tx: &mut Tx, deadline: Instant) -> Result<(), SessionEnd> {
        while !tx.send(&self.stream).map_err(SessionEnd::Connection)? {
            self.wait(Interest { readable: false, writable: true }, deadline)?;
        }
        Ok(())
    }

    fn receive_greeting(&self, rx: &mut Rx, deadline: Instant) -> Result<(), SessionEnd> {
        loop {
            match rx.receive(&self.stream) {
                Ok(0) if rx.bytes().is_empty() => return Err(SessionEnd::Closed),
                Ok(0) => return Err(SessionEnd::Truncated),
                Ok(_) => {
                    self.registration.control.record_activity();
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(Interest { readable: true, writable: false }, deadline)?;
                }
                Err(error) => return Err(SessionEnd::Connection(error)),
            }
        }
    }

    fn wait(&self, interest: Interest, deadline: Instant) -> Result<(), SessionEnd> {
        let wake = &self.registration.control.wake;
        let ready = self
            .stream
            .wait(interest, Some(wake), Some(deadline))
            .map_err(SessionEnd::Connection)?;
        // A handshake has no requests to finish: every stop request ends it.
        match self.registration.control.current() {
            StopRequest::Serve if ready.timed_out => Err(SessionEnd::HandshakeTimeout),
            StopRequest::Serve => Ok(()),
            request => Err(SessionEnd::Requested(request)),
        }
    }

    fn terms(&self, dialect: Dialect, allocation_selected: bool, introduced: bool) -> Terms {
        let oldstyle = self.settings.style == Style::Oldstyle;
        Terms {
            size: self.export.size,
            read_only: self.disk.read_only(),
            dialect,
            allocation_selected,
            private: introduced,
            payload_length_max: if oldstyle { PAYLOAD_MAX_OLDSTYLE } else { PAYLOAD_MAX },
            reads_beyond_end_are_no_space: oldstyle,
        }
    }

    fn transmission(&self, terms: Terms, rx: Rx, tx: Tx, pending: PendingRequests) -> Driver<'_> {
        let context = EngineContext {
            disk: self.disk,
            policy: self.policy,
            notifier: Arc::clone(&self.registration.control) as Arc<dyn Notifier>,
            terms,
            answers_malformed: self.settings.style == Style::Oldstyle,
            client: (self.peer.to_string(), self.registration.id),
            clocks: Clocks { now: Instant::now, coarse: coarse_now },
        };
        let engine = Engine::new(context, rx, tx, pending);
        let connection = (&self.stream, &self.registration);
        Driver::new(connection, self.policy, self.cpus, self.settings.stall_limit, engine)
    }

    /// Lets the client receive the last replies: closing a socket with unread requests makes the
    /// kernel send a reset, which discards replies on both sides.
    fn linger(&self) {
        let deadline = Instant::now() + LINGER_TIMEOUT;
        let mut discarded = [0; 4096];
        let interest = Interest { readable: true, writable: false };
        if self.stream.shutdown_write().is_err() {
            return;
        }
        loop {
            match self.stream.try_recv(&mut discarded) {
                Ok(0) => return,
                Ok(_) if Instant::now() < deadline => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    match self.stream.wait(interest, None, Some(deadline)) {
                        Ok(ready) if ready.readable => {}
                        _ => return,
                    }
                }
                _ => return,
            }
        }
    }
}

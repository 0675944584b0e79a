//! One client, from greeting to goodbye.
//! Ends for one reason, which it returns; whoever started it logs that.

use super::control::StopRequest;
use super::delay::ReceiveDelay;
use super::end::SessionEnd;
use super::inbox::Inbox;
use super::outbox::Outbox;
use super::policy::{ExportPolicy, GoReply, ProbeReply, SessionId};
use super::polling::AdaptivePolling;
use super::progress::SessionProgress;
use super::sessions::Registration;
use super::snapshot::{PhaseSnapshot, SessionSnapshot, TransmissionSnapshot};
use super::transmission::Transmission;
use super::work::Worker;
use super::{SessionSettings, Style};
use crate::disk::Disk;
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::handshake::server::{Export, ServerHandshake, ServerStep};
use crate::nbd::reply::Dialect;
use crate::nbd::request::Terms;
use crate::nbd::wire::OptionReplyKind;
use crate::net::{Interest, Peer, Stream};
use std::io;
use std::time::{Duration, Instant};

/// Largest payload that is accepted in newstyle. Twice what is advertised: some clients ask for
/// no block sizes and assume more than the specification lets them.
pub const PAYLOAD_MAX: u32 = 64 << 20;
/// Largest payload in old style, which cannot advertise any: what `flexnbd read` and `write`
/// allow in `--size`.
pub const PAYLOAD_MAX_OLDSTYLE: u32 = 1 << 30;
/// Length of the client flags in bytes; every option is longer.
const CLIENT_FLAGS: usize = 4;
/// How long a source that has come back waits for what its earlier connection still does.
const DISMISSAL: Duration = Duration::from_secs(4);
/// How long a newcomer waits for the end of a connection that is in its way.
const LEAVING: Duration = Duration::from_millis(500);
/// How long to wait for a client to read the last replies.
const LINGER: Duration = Duration::from_secs(1);

/// A client and everything it needs.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) stream: Stream,
    pub(super) peer: Peer,
    pub(super) registration: Registration,
    pub(super) disk: &'a Disk,
    pub(super) policy: &'a dyn ExportPolicy,
    pub(super) export: Export,
    pub(super) settings: SessionSettings,
    pub(super) cpus: usize,
}

/// Where a session begins, or goes on.
struct SessionStart {
    inbox: Inbox,
    outbox: Outbox,
    stage: SessionPhase,
}

enum SessionPhase {
    Greeting(Box<ServerHandshake>),
    Transmission(Terms, Box<SessionProgress>),
}

impl Session<'_> {
    /// Serves the client until there is a reason not to, from the greeting on or from where another
    /// process has left it; with what it was in the middle of when it was packed up.
    pub(super) fn run(
        &self,
        carried: Option<SessionSnapshot>,
    ) -> (SessionEnd, Option<SessionSnapshot>) {
        let begun = match carried {
            None => match self.start() {
                Ok(start) => Some(start),
                Err(end) => return (end, None),
            },
            Some(carried) => self.resume(carried),
        };
        let Some(start) = begun else { return (SessionEnd::Unfit, None) };
        let (end, carried) = self.serve(start);
        if end.leaves_replies() {
            self.linger();
        }
        (end, carried)
    }

    /// In newstyle it has been greeted.
    fn start(&self) -> Result<SessionStart, SessionEnd> {
        let (inbox, mut outbox) = (Inbox::default(), Outbox::default());
        let stage = match self.settings.style {
            Style::Oldstyle => {
                self.let_in(true).map_err(SessionEnd::NotLetIn)?;
                let mut greeting = Vec::new();
                let agreement = ServerHandshake::greet_oldstyle(&self.export, &mut greeting);
                outbox.reply(|out| out.extend_from_slice(&greeting));
                SessionPhase::Transmission(
                    self.terms(agreement.dialect, false, false),
                    Box::default(),
                )
            }
            Style::Newstyle => {
                SessionPhase::Greeting(Box::new(ServerHandshake::new(self.export.clone())))
            }
        };
        Ok(SessionStart { inbox, outbox, stage })
    }

    /// None if it does not fit this server.
    fn resume(&self, carried: SessionSnapshot) -> Option<SessionStart> {
        let size = self.export.size;
        let inbox = Inbox::holding(&carried.inbox)?;
        let outbox = Outbox::unpack(carried.outbox, size)?;
        let stage = match carried.phase {
            PhaseSnapshot::Greeting(greeting) => {
                let handshake = ServerHandshake::resume(self.export.clone(), greeting.position()?);
                SessionPhase::Greeting(Box::new(handshake))
            }
            PhaseSnapshot::Transmission(TransmissionSnapshot {
                form,
                allocation_selected,
                introduced,
                outstanding,
            }) => {
                let terms = self.terms(form.into(), allocation_selected, introduced);
                SessionPhase::Transmission(
                    terms,
                    Box::new(SessionProgress::unpack(outstanding, size)?),
                )
            }
        };
        Some(SessionStart { inbox, outbox, stage })
    }

    fn serve(&self, start: SessionStart) -> (SessionEnd, Option<SessionSnapshot>) {
        let SessionStart { mut inbox, mut outbox, stage } = start;
        let (terms, progress) = match stage {
            SessionPhase::Transmission(terms, progress) => (terms, *progress),
            SessionPhase::Greeting(mut handshake) => {
                match self.handshake(&mut handshake, &mut inbox, &mut outbox) {
                    Ok(agreed) => {
                        let selected = agreed.allocation_context.is_some();
                        let introduced = handshake.is_introduced();
                        (
                            self.terms(agreed.dialect, selected, introduced),
                            SessionProgress::default(),
                        )
                    }
                    Err(SessionEnd::Ordered(StopRequest::PackUp)) => {
                        let (session, inbox) = (self.registration.id, inbox.bytes().to_vec());
                        let phase = PhaseSnapshot::Greeting(handshake.position().into());
                        let outbox = match outbox.pack() {
                            Ok(outbox) => outbox,
                            Err(error) => return (SessionEnd::Connection(error), None),
                        };
                        let carried = SessionSnapshot { session, inbox, outbox, phase };
                        return (SessionEnd::PackedUp, Some(carried));
                    }
                    Err(end) => {
                        // What was said before the end, such as the answer to an abort, is still
                        // to go.
                        let _ = outbox.send(&self.stream);
                        return (end, None);
                    }
                }
            }
        };
        // In old style nothing is known of a client before its first request.
        if self.settings.style == Style::Newstyle && !self.registration.greeted() {
            return (SessionEnd::Full, None);
        }
        self.transmission(terms, inbox, outbox, progress).run()
    }

    fn handshake(
        &self,
        handshake: &mut ServerHandshake,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
    ) -> Result<Agreement, SessionEnd> {
        let deadline = self.registration.since + self.settings.handshake_timeout;
        handshake.understand_private();
        handshake.admit_selectively();
        loop {
            self.send_greeting(outbox, deadline)?;
            self.receive_greeting(inbox, deadline)?;
            // A client that always has something to say never makes us wait.
            if Instant::now() >= deadline {
                return Err(SessionEnd::HandshakeTimeout);
            }
            if let Some(agreement) = self.advance(handshake, inbox, outbox)? {
                return Ok(agreement);
            }
        }
    }

    /// Takes the handshake as far as it can be taken with what has arrived.
    fn advance(
        &self,
        handshake: &mut ServerHandshake,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
    ) -> Result<Option<Agreement>, SessionEnd> {
        loop {
            let mut step = Ok((0, ServerStep::More));
            outbox.reply(|out| step = handshake.advance(inbox.bytes(), out));
            let (used, next) = step.map_err(SessionEnd::Misbehaved)?;
            inbox.consume(used);
            // Not for its flags: they commit a client to nothing.
            if used > CLIENT_FLAGS {
                self.registration.spoke(Instant::now());
            }
            match next {
                ServerStep::More => return Ok(None),
                ServerStep::Asked(data) => {
                    let answer = self.introduce(&data).map(|(data, is_source)| {
                        if is_source {
                            self.registration.introduced();
                        }
                        data
                    });
                    outbox.reply(|out| handshake.answer_private(answer, out));
                }
                ServerStep::Wants { to_enter } => handshake.decide(self.let_in(to_enter)),
                ServerStep::Goodbye => return Err(SessionEnd::Aborted),
                ServerStep::Transmission(agreement) => return Ok(Some(agreement)),
            }
        }
    }

    /// The answer to the private option, and whether the client counts as a source.
    fn introduce(&self, data: &[u8]) -> Result<(Vec<u8>, bool), OptionReply> {
        let mut waits = true;
        loop {
            match self.policy.introduced(self.registration.id, data, self.registration.sessions()) {
                ProbeReply::Answer { data, retire, is_source } => {
                    let gone = self.dismiss(&retire);
                    return gone
                        .map(|()| (data, is_source))
                        .map_err(|why| OptionReply::error(OptionReplyKind::ErrPolicy, &why));
                }
                ProbeReply::Refuse { holder: Some(holder), .. }
                    if std::mem::take(&mut waits) && self.sees_leave(holder) => {}
                ProbeReply::Refuse { reply, .. } => return Err(reply),
            }
        }
    }

    /// Whether the client gets at the export, and enters the transmission phase if `now`.
    fn let_in(&self, now: bool) -> Result<(), String> {
        if let Some(why) = self.registration.closed() {
            return Err(why.to_owned());
        }
        if self.disk.gate().is_parting() {
            return Err("the disk is being handed over to another host".to_owned());
        }
        let mut waits = true;
        loop {
            match self.policy.enters(self.registration.id, now, self.registration.sessions()) {
                GoReply::Open(retire) => {
                    // What it has got is free for the next one.
                    return self.dismiss(&retire).inspect_err(|_| {
                        self.policy.closed(self.registration.id);
                    });
                }
                GoReply::Closed { holder: Some(holder), .. }
                    if std::mem::take(&mut waits) && self.sees_leave(holder) => {}
                GoReply::Closed { why, .. } => return Err(why),
            }
        }
    }

    /// Ends sessions that may do nothing any more, and waits until nothing of them is under way.
    fn dismiss(&self, retire: &[SessionId]) -> Result<(), String> {
        if self.registration.dismiss(retire, Instant::now() + DISMISSAL) {
            return Ok(());
        }
        Err("an earlier connection is still at work on the disk; try again".to_owned())
    }

    /// A client that connects again at once may be here before the end of its last connection.
    fn sees_leave(&self, holder: SessionId) -> bool {
        self.registration.sees_leave(holder, Instant::now() + LEAVING)
    }

    fn send_greeting(&self, outbox: &mut Outbox, deadline: Instant) -> Result<(), SessionEnd> {
        while !outbox.send(&self.stream).map_err(SessionEnd::Connection)? {
            self.wait(Interest { readable: false, writable: true }, deadline)?;
        }
        Ok(())
    }

    fn receive_greeting(&self, inbox: &mut Inbox, deadline: Instant) -> Result<(), SessionEnd> {
        loop {
            match inbox.receive(&self.stream) {
                Ok(0) if inbox.bytes().is_empty() => return Err(SessionEnd::Left),
                Ok(0) => return Err(SessionEnd::Vanished),
                Ok(_) => {
                    self.registration.orders.heard();
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
        let wake = &self.registration.orders.wake;
        let ready = self
            .stream
            .wait(interest, Some(wake), Some(deadline))
            .map_err(SessionEnd::Connection)?;
        // Nothing is outstanding in a handshake: to finish is to leave.
        match self.registration.orders.current() {
            StopRequest::Serve if ready.timed_out => Err(SessionEnd::HandshakeTimeout),
            StopRequest::Serve => Ok(()),
            order => Err(SessionEnd::Ordered(order)),
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

    fn transmission(
        &self,
        terms: Terms,
        inbox: Inbox,
        outbox: Outbox,
        progress: SessionProgress,
    ) -> Transmission<'_> {
        let who = (self.peer.to_string(), self.registration.id);
        let orders = &self.registration.orders;
        Transmission {
            stream: &self.stream,
            registration: &self.registration,
            cpus: self.cpus,
            worker: Worker::new(self.disk, orders, self.policy, terms.dialect, who),
            terms,
            answers_nonsense: self.settings.style == Style::Oldstyle,
            stall_limit: self.settings.stall_limit,
            inbox,
            outbox,
            progress,
            stuck: false,
            place: None,
            delay: ReceiveDelay::default(),
            written: 0,
            unfinished: false,
            taken: 0,
            polling: AdaptivePolling::default(),
        }
    }

    /// Lets the client read the last replies: closing with unread requests in the socket would
    /// make the kernel throw the replies away on both sides.
    fn linger(&self) {
        let deadline = Instant::now() + LINGER;
        let mut rest = [0; 4096];
        let interest = Interest { readable: true, writable: false };
        if self.stream.shutdown_write().is_err() {
            return;
        }
        loop {
            match self.stream.try_recv(&mut rest) {
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

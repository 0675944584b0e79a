//! One client, from greeting to goodbye.
//! Ends for one reason, which it returns; whoever started it logs that.

use super::end::SessionEnd;
use super::inbox::Inbox;
use super::orders::Order;
use super::outbox::Outbox;
use super::reception::{Introduction, Reception};
use super::roster::Seat;
use super::transmission::{Progress, Transmission};
use super::work::Worker;
use super::{Settings, Style};
use crate::disk::Disk;
use crate::nbd::handshake::Agreement;
use crate::nbd::handshake::option::OptionReply;
use crate::nbd::handshake::server::{Export, Handshake, Next};
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
/// How long a source that has come back waits for what its earlier connection still does.
const DISMISSAL: Duration = Duration::from_secs(4);
/// How long to wait for a client to read the last replies.
const LINGER: Duration = Duration::from_secs(1);

/// A client and everything it needs.
#[derive(Debug)]
pub(super) struct Session<'a> {
    pub(super) stream: Stream,
    pub(super) peer: Peer,
    pub(super) seat: Seat,
    pub(super) disk: &'a Disk,
    pub(super) reception: &'a dyn Reception,
    pub(super) export: Export,
    pub(super) settings: Settings,
}

impl Session<'_> {
    /// Serves the client until there is a reason not to.
    pub(super) fn run(&self) -> SessionEnd {
        let (mut inbox, mut outbox) = (Inbox::default(), Outbox::default());
        let end = match self.handshake(&mut inbox, &mut outbox) {
            Ok(agreement) => {
                self.seat.greeted();
                self.transmission(&agreement, inbox, outbox).run()
            }
            Err(end) => {
                // What was said before the end, such as the answer to an abort, is still to go.
                let _ = outbox.send(&self.stream);
                end
            }
        };
        if end.leaves_replies() {
            self.linger();
        }
        end
    }

    fn handshake(&self, inbox: &mut Inbox, outbox: &mut Outbox) -> Result<Agreement, SessionEnd> {
        let deadline = Instant::now() + self.settings.handshake_timeout;
        if self.settings.style == Style::Oldstyle {
            let mut greeting = Vec::new();
            let agreement = Handshake::greet_oldstyle(&self.export, &mut greeting);
            outbox.reply(|out| out.extend_from_slice(&greeting));
            self.send_greeting(outbox, deadline)?;
            return Ok(agreement);
        }
        let mut handshake = Handshake::new(self.export.clone());
        handshake.understand_private();
        outbox.reply(|out| handshake.greet(out));
        loop {
            self.send_greeting(outbox, deadline)?;
            self.receive_greeting(inbox, deadline)?;
            // A client that always has something to say never makes us wait.
            if Instant::now() >= deadline {
                return Err(SessionEnd::HandshakeTimeout);
            }
            if let Some(agreement) = self.advance(&mut handshake, inbox, outbox)? {
                return Ok(agreement);
            }
        }
    }

    /// Takes the handshake as far as it can be taken with what has arrived.
    fn advance(
        &self,
        handshake: &mut Handshake,
        inbox: &mut Inbox,
        outbox: &mut Outbox,
    ) -> Result<Option<Agreement>, SessionEnd> {
        loop {
            handshake.set_closed(self.reception.admit(self.seat.id).err());
            let mut step = Ok((0, Next::More));
            outbox.reply(|out| step = handshake.advance(inbox.bytes(), out));
            let (used, next) = step.map_err(SessionEnd::Misbehaved)?;
            inbox.consume(used);
            match next {
                Next::More => return Ok(None),
                Next::Asked(data) => {
                    let answer = self.introduce(&data);
                    outbox.reply(|out| handshake.answer_private(answer, out));
                }
                Next::Goodbye => return Err(SessionEnd::Aborted),
                Next::Transmission(agreement) => return Ok(Some(agreement)),
            }
        }
    }

    fn introduce(&self, data: &[u8]) -> Result<Vec<u8>, OptionReply> {
        match self.reception.introduced(self.seat.id, data) {
            Introduction::Answer { data, retire } => {
                let deadline = Instant::now() + DISMISSAL;
                match retire {
                    Some(earlier) if !self.seat.dismiss(earlier, deadline) => {
                        let why = "your earlier connection is still at work on the disk";
                        Err(OptionReply::error(OptionReplyKind::ErrPolicy, why))
                    }
                    _ => Ok(data),
                }
            }
            Introduction::Refuse(refusal) => Err(refusal),
        }
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
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(Interest { readable: true, writable: false }, deadline)?;
                }
                Err(error) => return Err(SessionEnd::Connection(error)),
            }
        }
    }

    fn wait(&self, interest: Interest, deadline: Instant) -> Result<(), SessionEnd> {
        let wake = &self.seat.orders.wake;
        let ready = self
            .stream
            .wait(interest, Some(wake), Some(deadline))
            .map_err(SessionEnd::Connection)?;
        // Nothing is outstanding in a handshake: to finish is to leave.
        match self.seat.orders.current() {
            Order::Serve if ready.timed_out => Err(SessionEnd::HandshakeTimeout),
            Order::Serve => Ok(()),
            order => Err(SessionEnd::Ordered(order)),
        }
    }

    fn transmission(&self, agreed: &Agreement, inbox: Inbox, outbox: Outbox) -> Transmission<'_> {
        let oldstyle = agreed.oldstyle;
        let terms = Terms {
            size: agreed.size,
            read_only: self.disk.read_only(),
            dialect: agreed.dialect,
            allocation_selected: agreed.allocation_context.is_some(),
            private: !oldstyle,
            payload_length_max: if oldstyle { PAYLOAD_MAX_OLDSTYLE } else { PAYLOAD_MAX },
            reads_beyond_end_are_no_space: oldstyle,
        };
        let client = self.peer.to_string();
        let orders = &*self.seat.orders;
        Transmission {
            stream: &self.stream,
            worker: Worker::new(
                self.disk,
                orders,
                self.reception,
                agreed.dialect,
                (client, self.seat.id),
            ),
            terms,
            answers_nonsense: oldstyle,
            stall_limit: self.settings.stall_limit,
            inbox,
            outbox,
            progress: Progress::default(),
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

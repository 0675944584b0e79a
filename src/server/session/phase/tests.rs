//! A session from its first option to its last request, without a socket or a thread.

use super::*;
use crate::disk::memory_backend::MemoryBackend;
use crate::disk::slow_backend::TestNotifier;
use crate::nbd::handshake::TlsOffer;
use crate::nbd::handshake::option::encode_option;
use crate::nbd::reply::Dialect;
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, OptionKind, PRIVATE_OPTION};
use crate::server::export_policy::{AllowAll, GoReply, ProbeReply};
use crate::server::session::engine::Blocked;
use crate::server::session::handshake::HandshakeBlocked;
use crate::server::shared::export;
use crate::server::stop_request::StopRequest;
use std::sync::LazyLock;
use std::time::Duration;

const SIZE: u64 = 1 << 20;
const BLOCK: u64 = 512;
/// Client flags and the options of a client with structured replies.
const OPTIONS: [u32; 3] =
    [OptionKind::StructuredReply.number(), PRIVATE_OPTION, OptionKind::Go.number()];

static PAYLOADS: LazyLock<Arc<PayloadMemory>> = LazyLock::new(|| PayloadMemory::new(1 << 30));

fn context<'a>(disk: &'a Disk, export: &'a Export, style: Style) -> SessionContext<'a> {
    SessionContext {
        disk,
        policy: &AllowAll,
        export,
        style,
        tls: TlsOffer::Unsupported,
        notifier: Arc::new(TestNotifier::default()),
        payloads: &PAYLOADS,
        client: (String::new(), 7),
        handshake_deadline: Instant::now() + Duration::from_secs(3600),
        clocks: Clocks { now: Instant::now, coarse: || Duration::ZERO },
    }
}

/// Everything that a client sends: a handshake in newstyle, a write, a read of it, and a disconnection.
fn script(style: Style) -> Vec<u8> {
    let mut bytes = Vec::new();
    if style == Style::Newstyle {
        bytes.extend_from_slice(&3u32.to_be_bytes());
        for number in OPTIONS {
            let data: &[u8] = if number == OptionKind::Go.number() { &[0; 6] } else { &[] };
            encode_option(number, data, &mut bytes);
        }
    }
    let dialect = dialect(style);
    for kind in [CommandKind::Write, CommandKind::Read, CommandKind::Disconnect] {
        let (cookie, length) = (u64::from(kind.number()), BLOCK);
        let length = if kind == CommandKind::Disconnect { 0 } else { length };
        let flags = CommandFlags::empty().bits();
        let header = RequestHeader { flags, kind: kind.number(), cookie, offset: 0, length };
        header.encode(dialect, &mut bytes);
        if kind == CommandKind::Write {
            bytes.resize(bytes.len() + BLOCK as usize, 0xab);
        }
    }
    bytes
}

fn dialect(style: Style) -> Dialect {
    if style == Style::Newstyle { Dialect::Structured } else { Dialect::Simple }
}

/// A session and the bytes that it has sent.
struct ScriptedPhase<'a> {
    context: SessionContext<'a>,
    phase: Option<SessionPhase<'a>>,
    sent: Vec<u8>,
}

impl<'a> ScriptedPhase<'a> {
    fn new(context: SessionContext<'a>) -> Self {
        let phase = Some(SessionPhase::new(&context));
        Self { context, phase, sent: Vec::new() }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let rx = match self.phase.as_mut().unwrap() {
            SessionPhase::Handshake(handshake) => &mut handshake.rx,
            SessionPhase::Transmission(engine) => &mut engine.rx,
        };
        assert_eq!(rx.fill(bytes), bytes.len());
    }

    /// Takes turns until the session waits for its client; `Some` at its end, or when it suspends.
    fn run(&mut self, stop: StopRequest) -> Option<Result<Turn, SessionEnd>> {
        loop {
            let turn = match self.phase.as_mut().unwrap() {
                SessionPhase::Handshake(handshake) => negotiate(handshake, &mut self.sent, stop),
                SessionPhase::Transmission(engine) => transmit(engine, &mut self.sent, stop),
            };
            match turn {
                Some(Ok(Turn::Continue)) => {}
                Some(Ok(Turn::Complete(negotiated))) => {
                    let phase = self.phase.take().unwrap();
                    self.phase = Some(phase.into_transmission(&self.context, negotiated));
                }
                ended => return ended,
            }
        }
    }

    fn restart(&mut self) {
        let suspended = self.run(StopRequest::Suspend);
        assert!(matches!(suspended, Some(Ok(Turn::Suspended))), "{suspended:?}");
        let snapshot = self.phase.take().unwrap().save(7).unwrap();
        let snapshot = rmp_serde::from_slice(&rmp_serde::to_vec_named(&snapshot).unwrap()).unwrap();
        self.phase = SessionPhase::restore(&self.context, snapshot);
    }
}

fn negotiate(
    handshake: &mut Handshake,
    sent: &mut Vec<u8>,
    stop: StopRequest,
) -> Option<Result<Turn, SessionEnd>> {
    match handshake.advance(stop) {
        Ok(HandshakeBlocked::Input) => return None,
        Ok(HandshakeBlocked::Output) => sent.extend(handshake.tx.take(usize::MAX)),
        Ok(HandshakeBlocked::Probe(_)) => {
            let (data, displaced, is_source) = (Vec::new(), Vec::new(), true);
            handshake.on_probe_reply(ProbeReply::Answer { data, displaced, is_source });
        }
        Ok(HandshakeBlocked::Admission { .. }) => {
            handshake.on_go_reply(GoReply::Allow(Vec::new()));
        }
        Ok(HandshakeBlocked::Complete(negotiated)) => return Some(Ok(Turn::Complete(negotiated))),
        Ok(HandshakeBlocked::Suspend) => return Some(Ok(Turn::Suspended)),
        Ok(other) => panic!("{other:?}"),
        Err(end) => return Some(Err(end)),
    }
    Some(Ok(Turn::Continue))
}

fn transmit(
    engine: &mut Engine<'_>,
    sent: &mut Vec<u8>,
    stop: StopRequest,
) -> Option<Result<Turn, SessionEnd>> {
    let blocked = engine.advance(stop);
    sent.extend(engine.tx.take(usize::MAX));
    match blocked {
        Ok(Blocked::Input) => None,
        Ok(Blocked::Suspend) => Some(Ok(Turn::Suspended)),
        Ok(Blocked::End) => Some(Err(engine.take_end().unwrap())),
        Ok(Blocked::Output | Blocked::InputWithReads | Blocked::Batch) => Some(Ok(Turn::Continue)),
        Ok(other) => panic!("{other:?}"),
        Err(end) => Some(Err(end)),
    }
}

/// Runs the script in two pieces, with or without a restart between them; returns the sent bytes.
fn run_cut(style: Style, cut: usize, restarts: bool) -> Vec<u8> {
    let disk = Disk::new(Box::new(MemoryBackend::new(SIZE)), false);
    let export = export(&disk, "disk", false);
    let mut session = ScriptedPhase::new(context(&disk, &export, style));
    let bytes = script(style);
    session.receive(&bytes[..cut]);
    let ended = session.run(StopRequest::Serve);
    assert_eq!(ended.is_some(), cut == bytes.len(), "cut at {cut}: {ended:?}");
    if restarts {
        session.restart();
    }
    session.receive(&bytes[cut..]);
    let ended = ended.or_else(|| session.run(StopRequest::Serve));
    assert!(matches!(ended, Some(Err(SessionEnd::Disconnected))), "cut at {cut}: {ended:?}");
    session.sent
}

#[test]
fn requests_behind_the_last_option_are_answered() {
    for style in [Style::Newstyle, Style::Oldstyle] {
        let sent = run_cut(style, script(style).len(), false);
        assert!(sent.ends_with(&[0xab; BLOCK as usize]), "{style:?}: the data that was written");
        let is_greeted = sent.starts_with(b"NBDMAGIC");
        assert_eq!(is_greeted, style == Style::Oldstyle, "the acceptor greets in newstyle");
    }
}

#[test]
fn pieces_and_a_restart_between_them_change_no_reply() {
    for style in [Style::Newstyle, Style::Oldstyle] {
        let length = script(style).len();
        let whole = run_cut(style, length, false);
        for cut in 0..length {
            assert!(run_cut(style, cut, false) == whole, "{style:?}: cut at {cut}");
            assert!(run_cut(style, cut, true) == whole, "{style:?}: restarted at {cut}");
        }
    }
}

#[test]
fn a_snapshot_that_does_not_fit_is_not_restored() {
    let disk = Disk::new(Box::new(MemoryBackend::new(SIZE)), false);
    let export = export(&disk, "disk", false);
    let context = context(&disk, &export, Style::Newstyle);
    let snapshot = || SessionPhase::new(&context).save(7).unwrap();
    assert!(SessionPhase::restore(&context, snapshot()).is_some());
    let inbox = vec![0; crate::server::session::rx::CAPACITY + 1];
    let too_long = SessionSnapshot { inbox, ..snapshot() };
    assert!(SessionPhase::restore(&context, too_long).is_none());
}

//! The handshake without a socket, on a clock that the test sets. [`Scripted`] is the driver: it passes
//! the bytes on, and answers as the policy and the table of sessions would.

use super::*;
use crate::nbd::handshake::BlockSizes;
use crate::nbd::handshake::TlsOffer;
use crate::nbd::handshake::option::encode_option;
use crate::nbd::handshake::server::ProtocolViolation;
use crate::nbd::wire::{OptionKind, PRIVATE_OPTION, TransmissionFlags};
use proptest::prelude::*;
use std::cell::Cell;
use std::collections::VecDeque;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const NANOSECOND: Duration = Duration::from_nanos(1);
/// A client that knows fixed newstyle and needs no zeros.
const FLAGS: [u8; 4] = [0, 0, 0, 3];
/// The first bytes of a request, which the handshake must not consume.
const REQUEST: [u8; 4] = [0x25, 0x60, 0x95, 0x13];
/// Length of the greeting in old style in bytes.
const OLDSTYLE_GREETING: usize = 152;
const STRONG: [StopRequest; 5] = [
    StopRequest::Finish,
    StopRequest::NotAdmitted,
    StopRequest::Evict,
    StopRequest::Disconnect,
    StopRequest::Displaced,
];

thread_local! {
    static BEGAN: Instant = Instant::now();
    /// Time since then.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn now() -> Instant {
    BEGAN.with(|began| *began + ELAPSED.get())
}

fn advance_clock(by: Duration) {
    ELAPSED.set(ELAPSED.get() + by);
}

fn clocks() -> Clocks {
    Clocks { now, coarse: || ELAPSED.get() }
}

fn export() -> Export {
    Export {
        name: "disk".to_owned(),
        description: String::new(),
        size: 1 << 20,
        flags: TransmissionFlags::HAS_FLAGS,
        block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    }
}

/// Plays the driver of one handshake.
struct Scripted {
    handshake: Handshake,
    sent: Vec<u8>,
    stop: StopRequest,
    /// The policy's answers; the source is accepted and the client admitted when there are none.
    probes: VecDeque<ProbeReply>,
    gos: VecDeque<GoReply>,
    /// The questions to the policy, and its calls.
    calls: Vec<&'static str>,
    progress: HandshakeProgress,
}

impl Scripted {
    fn new(style: Style) -> Self {
        Self::with_tls(style, TlsOffer::Unsupported)
    }

    fn with_tls(style: Style, tls: TlsOffer) -> Self {
        let deadline = now() + HANDSHAKE_TIMEOUT;
        Self::with(Handshake::new(&export(), style, tls, deadline, clocks()))
    }

    fn newstyle(bytes: &[u8]) -> Self {
        let mut scripted = Self::new(Style::Newstyle);
        scripted.receive(bytes);
        scripted
    }

    fn with(handshake: Handshake) -> Self {
        Self {
            handshake,
            sent: Vec::new(),
            stop: StopRequest::Serve,
            probes: VecDeque::new(),
            gos: VecDeque::new(),
            calls: Vec::new(),
            progress: HandshakeProgress::default(),
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        assert_eq!(self.handshake.rx.fill(bytes), bytes.len());
    }

    /// Takes turns until the handshake waits for its client or for other sessions.
    fn run(&mut self) -> Result<HandshakeBlocked, SessionEnd> {
        loop {
            let blocked = self.handshake.advance(self.stop);
            let progress = self.handshake.take_progress();
            self.progress.option_received |= progress.option_received;
            self.progress.is_source |= progress.is_source;
            let blocked = match blocked {
                Ok(blocked) => blocked,
                Err(end) => {
                    self.sent.extend(self.handshake.tx.take(usize::MAX));
                    return Err(end);
                }
            };
            match blocked {
                HandshakeBlocked::Output => {
                    let sent = self.handshake.tx.take(usize::MAX);
                    assert!(!sent.is_empty(), "nothing to send");
                    self.sent.extend(sent);
                }
                HandshakeBlocked::Probe(data) => {
                    self.calls.push("probe");
                    self.handshake.on_probe_reply(self.probes.pop_front().unwrap_or(answer(&data)));
                }
                HandshakeBlocked::Admission { enters } => {
                    self.calls.push(if enters { "go" } else { "info" });
                    let allow = GoReply::Allow(Vec::new());
                    self.handshake.on_go_reply(self.gos.pop_front().unwrap_or(allow));
                }
                HandshakeBlocked::Release => {
                    self.calls.push("release");
                    self.handshake.on_released();
                }
                HandshakeBlocked::Complete(_) => {
                    // The engine sends these.
                    self.sent.extend(self.handshake.tx.take(usize::MAX));
                    return Ok(blocked);
                }
                _ => return Ok(blocked),
            }
        }
    }

    /// The session in the next process, from an encoded snapshot.
    fn restart(self) -> Self {
        let snapshot = self.handshake.save(7).unwrap();
        let snapshot: SessionSnapshot =
            rmp_serde::from_slice(&rmp_serde::to_vec_named(&snapshot).unwrap()).unwrap();
        let PhaseSnapshot::Handshake(saved) = snapshot.phase else { panic!("{snapshot:?}") };
        let rx = Rx::restore(&snapshot.inbox).unwrap();
        let tx = Tx::restore(snapshot.outbox, export().size).unwrap();
        let (position, deadline) = (saved.position().unwrap(), now() + HANDSHAKE_TIMEOUT);
        let handshake = Handshake::restore(
            &export(),
            position,
            (rx, tx),
            TlsOffer::Unsupported,
            deadline,
            clocks(),
        );
        Self { handshake, stop: StopRequest::Serve, ..self }
    }

    /// The replies as option and kind: 1 for an acknowledgement.
    fn replies(&self) -> Vec<(u32, u32)> {
        let (mut rest, mut replies) = (&self.sent[..], Vec::new());
        while !rest.is_empty() {
            let word = |at: usize| u32::from_be_bytes(*rest[at..].first_chunk().unwrap());
            replies.push((word(8), word(12)));
            rest = &rest[20 + word(16) as usize..];
        }
        replies
    }

    fn last_reply(&self) -> (u32, u32) {
        *self.replies().last().unwrap()
    }
}

fn answer(data: &[u8]) -> ProbeReply {
    ProbeReply::Answer { data: data.to_vec(), displaced: Vec::new(), is_source: true }
}

fn displacing(displaced: &[SessionId]) -> ProbeReply {
    ProbeReply::Answer { data: vec![9], displaced: displaced.to_vec(), is_source: true }
}

fn held(holder: SessionId) -> GoReply {
    GoReply::Refuse { why: format!("held by {holder}"), holder: Some(holder) }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_option(number, data, &mut bytes);
    bytes
}

fn go() -> Vec<u8> {
    option(OptionKind::Go.number(), &[0; 6])
}

fn info() -> Vec<u8> {
    option(OptionKind::Info.number(), &[0; 6])
}

fn private() -> Vec<u8> {
    option(PRIVATE_OPTION, b"question")
}

fn after_flags(options: &[Vec<u8>]) -> Vec<u8> {
    [FLAGS.to_vec(), options.concat()].concat()
}

/// Options of every kind, and a request behind the last one.
fn every_option() -> Vec<u8> {
    let context = [&4u32.to_be_bytes()[..], b"disk", &1u32.to_be_bytes()].concat();
    let context = [&context[..], &15u32.to_be_bytes(), b"base:allocation"].concat();
    let go = [&4u32.to_be_bytes()[..], b"disk", &[0; 2]].concat();
    after_flags(&[
        option(OptionKind::List.number(), &[]),
        option(OptionKind::StructuredReply.number(), &[]),
        option(77, &[1; 40]),
        private(),
        option(OptionKind::SetMetaContext.number(), &context),
        info(),
        option(OptionKind::Go.number(), &go),
        REQUEST.to_vec(),
    ])
}

const STRUCTURED: Negotiated =
    Negotiated { dialect: Dialect::Structured, allocation_selected: true, private: true };

fn assert_complete(blocked: Result<HandshakeBlocked, SessionEnd>, negotiated: Negotiated) {
    assert!(
        matches!(blocked, Ok(HandshakeBlocked::Complete(found)) if found == negotiated),
        "{blocked:?}"
    );
}

fn assert_input(blocked: Result<HandshakeBlocked, SessionEnd>) {
    assert!(matches!(blocked, Ok(HandshakeBlocked::Input)), "{blocked:?}");
}

#[test]
fn options_may_arrive_in_any_two_pieces() {
    let bytes = every_option();
    let mut whole = Scripted::newstyle(&bytes);
    assert_complete(whole.run(), STRUCTURED);
    assert_eq!(whole.calls, ["probe", "info", "go"]);
    assert_eq!(whole.last_reply(), (OptionKind::Go.number(), 1));
    for cut in 0..=bytes.len() - REQUEST.len() {
        let mut scripted = Scripted::newstyle(&bytes[..cut]);
        let blocked = scripted.run();
        if cut < bytes.len() - REQUEST.len() {
            assert_input(blocked);
        } else {
            assert_complete(blocked, STRUCTURED);
        }
        scripted.receive(&bytes[cut..]);
        assert_complete(scripted.run(), STRUCTURED);
        assert_eq!(scripted.handshake.rx.bytes(), REQUEST, "cut at {cut}");
        assert!(scripted.sent == whole.sent, "cut at {cut}");
        assert_eq!(scripted.calls, whole.calls, "cut at {cut}");
    }
}

#[test]
fn a_handshake_goes_on_after_suspension_at_every_byte() {
    let bytes = every_option();
    let mut whole = Scripted::newstyle(&bytes);
    assert_complete(whole.run(), STRUCTURED);
    let handshake = &bytes[..bytes.len() - REQUEST.len()];
    let mut each = Scripted::new(Style::Newstyle);
    for (at, byte) in handshake.iter().enumerate() {
        each.stop = StopRequest::Suspend;
        let blocked = each.run();
        assert!(matches!(blocked, Ok(HandshakeBlocked::Suspend)), "byte {at}: {blocked:?}");
        each = each.restart();
        each.receive(&[*byte]);
    }
    assert_complete(each.run(), STRUCTURED);
    assert_eq!(each.calls, whole.calls);
    assert!(each.sent == whole.sent);
}

#[test]
fn unsent_replies_are_sent_by_the_next_process() {
    let mut scripted = Scripted::newstyle(&after_flags(&[
        option(OptionKind::List.number(), &[]),
        go()[..9].to_vec(),
    ]));
    let blocked = scripted.handshake.advance(StopRequest::Suspend);
    assert!(matches!(blocked, Ok(HandshakeBlocked::Suspend)), "{blocked:?}");
    assert!(scripted.handshake.tx.has_bytes() && scripted.sent.is_empty());
    let mut restored = scripted.restart();
    assert_input(restored.run());
    let list = OptionKind::List.number();
    assert_eq!(restored.replies(), [(list, OptionReplyKind::Server as u32), (list, 1)]);
    restored.receive(&go()[9..]);
    let simple = Dialect::Simple;
    let negotiated = Negotiated { dialect: simple, allocation_selected: false, private: false };
    assert_complete(restored.run(), negotiated);
}

#[test]
fn every_stop_request_ends_a_handshake_between_options() {
    for stop in STRONG {
        let mut scripted = Scripted::newstyle(&after_flags(&[info()]));
        scripted.stop = stop;
        let end = scripted.run();
        assert!(matches!(end, Err(SessionEnd::Requested(request)) if request == stop), "{end:?}");
        assert_eq!(
            scripted.last_reply(),
            (OptionKind::Info.number(), 1),
            "answered before the end"
        );
    }
}

#[test]
fn a_handshake_times_out_after_every_byte() {
    let bytes = every_option();
    for cut in 0..bytes.len() - REQUEST.len() {
        let mut scripted = Scripted::newstyle(&bytes[..cut]);
        advance_clock(HANDSHAKE_TIMEOUT - NANOSECOND);
        assert_input(scripted.run());
        assert!(scripted.handshake.on_received().is_ok());
        advance_clock(NANOSECOND);
        let end = scripted.run();
        assert!(matches!(end, Err(SessionEnd::HandshakeTimeout)), "cut at {cut}: {end:?}");
        let end = scripted.handshake.on_received();
        assert!(matches!(end, Err(SessionEnd::HandshakeTimeout)), "a chatty client: {end:?}");
    }
}

#[test]
fn a_client_that_receives_nothing_times_out() {
    let mut scripted = Scripted::newstyle(&after_flags(&[info()]));
    let blocked = scripted.handshake.advance(StopRequest::Serve);
    assert!(matches!(blocked, Ok(HandshakeBlocked::Admission { enters: false })), "{blocked:?}");
    scripted.handshake.on_go_reply(GoReply::Allow(Vec::new()));
    let blocked = scripted.handshake.advance(StopRequest::Serve);
    assert!(matches!(blocked, Ok(HandshakeBlocked::Output)), "{blocked:?}");
    advance_clock(HANDSHAKE_TIMEOUT);
    let end = scripted.handshake.advance(StopRequest::Serve);
    assert!(matches!(end, Err(SessionEnd::HandshakeTimeout)), "{end:?}");
}

#[test]
fn only_whole_options_count_as_progress() {
    let bytes = after_flags(&[info()]);
    let mut scripted = Scripted::new(Style::Newstyle);
    for byte in &bytes {
        assert_input(scripted.run());
        assert!(!scripted.progress.option_received);
        scripted.receive(&[*byte]);
    }
    assert_input(scripted.run());
    assert!(scripted.progress.option_received && !scripted.progress.is_source);
}

#[test]
fn the_end_of_the_stream_tells_whether_an_option_is_cut_off() {
    let mut scripted = Scripted::newstyle(&after_flags(&[info()]));
    assert_input(scripted.run());
    assert!(matches!(scripted.handshake.end_of_stream(), SessionEnd::Closed));
    scripted.receive(&info()[..1]);
    assert_input(scripted.run());
    assert!(matches!(scripted.handshake.end_of_stream(), SessionEnd::Truncated));
}

/// Asserts that the handshake is complete with simple replies, once the policy was asked, and that the
/// request behind it is left.
fn assert_complete_before_request(scripted: &mut Scripted) {
    let simple = Dialect::Simple;
    let negotiated = Negotiated { dialect: simple, allocation_selected: false, private: false };
    assert_complete(scripted.run(), negotiated);
    let left = (&scripted.calls[..], scripted.handshake.rx.bytes());
    assert_eq!(left, (&["go"][..], &REQUEST[..]));
}

#[test]
fn export_name_completes_a_handshake() {
    for (flags, zeros) in [(1, 124), (3, 0)] {
        let name = option(OptionKind::ExportName.number(), b"disk");
        let bytes = [vec![0, 0, 0, flags], name, REQUEST.to_vec()].concat();
        let mut scripted = Scripted::newstyle(&bytes);
        assert_complete_before_request(&mut scripted);
        let sent = scripted.sent;
        assert_eq!((sent.len(), &sent[..8]), (10 + zeros, &export().size.to_be_bytes()[..]));
    }
}

#[test]
fn a_refused_export_name_ends_the_session_and_a_refused_go_does_not() {
    let refuse = || GoReply::Refuse { why: "no".to_owned(), holder: None };
    let name = option(OptionKind::ExportName.number(), b"disk");
    let mut by_name = Scripted::newstyle(&after_flags(&[name]));
    by_name.gos.push_back(refuse());
    let end = by_name.run();
    let violation = ProtocolViolation::NotAdmitted("no".to_owned());
    assert!(matches!(end, Err(SessionEnd::Misbehaved(ref why)) if *why == violation), "{end:?}");
    let mut by_go = Scripted::newstyle(&after_flags(&[go()]));
    by_go.gos.push_back(refuse());
    assert_input(by_go.run());
    assert_eq!(by_go.replies(), [(OptionKind::Go.number(), OptionReplyKind::ErrPolicy as u32)]);
    by_go.receive(&go());
    assert!(
        matches!(by_go.run(), Ok(HandshakeBlocked::Complete(_))),
        "the next one is decided anew"
    );
    assert_eq!(by_go.calls, ["go", "go"]);
}

#[test]
fn an_abort_is_acknowledged() {
    let abort = option(OptionKind::Abort.number(), &[]);
    let mut scripted = Scripted::newstyle(&after_flags(&[info(), abort, go()]));
    let end = scripted.run();
    assert!(matches!(end, Err(SessionEnd::Aborted)), "{end:?}");
    assert_eq!(scripted.last_reply(), (OptionKind::Abort.number(), 1));
    assert_eq!(scripted.calls, ["info"]);
}

#[test]
fn a_wrong_magic_number_ends_the_session() {
    let mut scripted = Scripted::newstyle(&after_flags(&[vec![0xee; 16]]));
    let end = scripted.run();
    let violation = ProtocolViolation::BadOptionMagic(0xeeee_eeee_eeee_eeee);
    assert!(matches!(end, Err(SessionEnd::Misbehaved(ref why)) if *why == violation), "{end:?}");
}

mod others;

proptest! {
    /// Whatever a client sends, and in however many pieces, has one result.
    #[test]
    fn garbage_has_the_same_result_in_any_pieces(
        options in prop::collection::vec((0u32..14, prop::collection::vec(0u8..5, 0..40)), 0..6),
        tail: Vec<u8>,
        cuts in prop::collection::vec(1usize..60, 1..20),
    ) {
        let options = options.into_iter().map(|(number, data)| option(number, &data));
        let bytes = after_flags(&options.chain([tail]).collect::<Vec<_>>());
        let mut whole = Scripted::newstyle(&bytes);
        let expected = format!("{:?}", whole.run());
        let mut pieces = Scripted::new(Style::Newstyle);
        let (mut rest, mut cuts) = (&bytes[..], cuts.into_iter().cycle());
        let mut found = format!("{:?}", pieces.run());
        while found == "Ok(Input)" && !rest.is_empty() {
            let length = cuts.next().unwrap().min(rest.len());
            pieces.receive(&rest[..length]);
            rest = &rest[length..];
            found = format!("{:?}", pieces.run());
        }
        prop_assert_eq!(found, expected);
        prop_assert_eq!(pieces.calls, whole.calls);
        prop_assert_eq!(pieces.sent, whole.sent);
    }
}

//! Turns of the handshake with a real table of sessions and a socket, on a clock that the test sets: it
//! lags behind the real one, so that no turn waits.

use super::*;
use crate::disk::Disk;
use crate::disk::memory_backend::MemoryBackend;
use crate::disk::slow_backend::TestNotifier;
use crate::nbd::handshake::TlsOffer;
use crate::nbd::handshake::option::encode_option;
use crate::nbd::wire::{OptionKind, PRIVATE_OPTION};
use crate::net::{Peer, Stream};
use crate::server::ClientLimits;
use crate::server::acl::Acl;
use crate::server::events::IgnoreEvents;
use crate::server::export_policy::{
    AllowAll, ExportPolicy, ProbeReply, RecordingPolicy, SessionId, SessionsView,
};
use crate::server::payload_memory::PayloadMemory;
use crate::server::session::engine::Clocks;
use crate::server::session::phase::SessionPhase;
use crate::server::sessions::{Capacity, Sessions};
use crate::server::shared::export;
use crate::server::stop_request::StopRequest;
use std::cell::Cell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

/// How far the clock of a test lags behind.
const LAG: Duration = Duration::from_secs(60);
/// Longer than a session waits for others.
const LATE: Duration = Duration::from_secs(5);

static PAYLOADS: LazyLock<Arc<PayloadMemory>> = LazyLock::new(|| PayloadMemory::new(1 << 30));
static BEGAN: LazyLock<Instant> = LazyLock::new(|| Instant::now().checked_sub(LAG).unwrap());

thread_local! {
    /// Time since then.
    static ELAPSED: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

fn sessions(most: usize) -> Arc<Sessions> {
    let handshake_timeout = Duration::from_secs(1);
    let capacity = Capacity {
        clients: ClientLimits::of(most),
        waits_when_full: false,
        handshakes: 9,
        handshake_timeout,
    };
    Sessions::new(capacity, Acl::default(), Arc::new(IgnoreEvents)).unwrap()
}

fn admit(sessions: &Arc<Sessions>) -> Registration {
    sessions.admit(Peer::Unix { pid: None, uid: None }, Instant::now()).unwrap()
}

fn disk() -> Disk {
    Disk::new(Box::new(MemoryBackend::new(1 << 20)), false)
}

/// Takes this many turns of a client's handshake, and returns what follows the last one, and the replies.
fn turns(
    registration: &Registration,
    disk: &Disk,
    policy: &dyn ExportPolicy,
    options: &[u32],
    mut after: impl FnMut(usize),
) -> (Result<Turn, SessionEnd>, Vec<u8>) {
    let export = export(disk, "disk", false);
    let context = SessionContext {
        disk,
        policy,
        export: &export,
        style: Style::Newstyle,
        tls: TlsOffer::Unsupported,
        notifier: Arc::new(TestNotifier::default()),
        payloads: &PAYLOADS,
        client: (String::new(), registration.id),
        handshake_deadline: *BEGAN + LAG / 2,
        clocks: Clocks { now: || *BEGAN + ELAPSED.get(), coarse: || Duration::ZERO },
    };
    let (mut client, stream) = UnixStream::pair().unwrap();
    let mut bytes = 3u32.to_be_bytes().to_vec();
    options.iter().for_each(|option| encode_option(*option, &[0; 6], &mut bytes));
    client.write_all(&bytes).unwrap();
    // So that a session that waits for more ends.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let stream = Stream::Unix(stream);
    let mut socket = SessionSocket::new(&stream, &registration.control);
    let SessionPhase::Handshake(mut handshake) = SessionPhase::new(&context) else { panic!() };
    let driver = HandshakeTurns { context: &context, registration };
    let mut count = 0;
    let end = loop {
        let turn = driver.turn(&mut socket, &mut handshake);
        if !matches!(turn, Ok(Turn::Continue)) {
            break turn;
        }
        count += 1;
        after(count);
        assert!(count < 100, "the handshake makes no progress");
    };
    drop(stream);
    let mut replies = Vec::new();
    client.read_to_end(&mut replies).unwrap();
    (end, replies)
}

fn ends_with(replies: &[u8], message: &str) -> bool {
    replies.ends_with(message.as_bytes())
}

#[test]
fn options_are_reported_to_the_table() {
    let (sessions, disk) = (sessions(9), disk());
    let (active, silent) = (admit(&sessions), admit(&sessions));
    let info = OptionKind::Info.number();
    let (end, replies) = turns(&active, &disk, &AllowAll, &[info], |_| {});
    assert!(matches!(end, Err(SessionEnd::Closed)) && !replies.is_empty(), "{end:?}");
    assert!(sessions.evict_one(Instant::now()));
    let stops = [&active, &silent].map(|registration| registration.control.current());
    assert_eq!(stops, [StopRequest::Serve, StopRequest::Evict], "the older one is not silent");
}

#[test]
fn a_source_is_admitted_beyond_the_limit() {
    let (sessions, disk) = (sessions(0), disk());
    let go = OptionKind::Go.number();
    let (end, replies) = turns(&admit(&sessions), &disk, &AllowAll, &[go], |_| {});
    assert!(matches!(end, Err(SessionEnd::Closed)), "{end:?}");
    assert!(ends_with(&replies, "as many clients are connected as may be"));
    let source = admit(&sessions);
    let (end, _) = turns(&source, &disk, &AllowAll, &[PRIVATE_OPTION, go], |_| {});
    assert!(matches!(end, Ok(Turn::Complete(_))) && source.is_established(), "{end:?}");
}

#[test]
fn no_client_is_admitted_to_a_disk_that_leaves() {
    let (sessions, disk) = (sessions(9), disk());
    disk.gate().set_parting(true);
    let policy = RecordingPolicy::default();
    let go = OptionKind::Go.number();
    let (end, replies) = turns(&admit(&sessions), &disk, &policy, &[go], |_| {});
    assert!(matches!(end, Err(SessionEnd::Closed)), "{end:?}");
    assert!(ends_with(&replies, "the disk is being handed over to another host"));
}

/// Admits each client in place of one session, which may be in the way.
#[derive(Debug)]
struct InPlaceOf {
    other: SessionId,
    is_holder: bool,
    calls: RecordingPolicy,
}

impl ExportPolicy for InPlaceOf {
    fn probe(&self, session: SessionId, data: &[u8], others: &dyn SessionsView) -> ProbeReply {
        self.calls.probe(session, data, others)
    }

    fn go(&self, _: SessionId, _: bool, others: &dyn SessionsView) -> GoReply {
        let is_there = others.peer(self.other).is_some();
        if self.is_holder && is_there {
            return GoReply::Refuse { why: "held".to_owned(), holder: Some(self.other) };
        }
        GoReply::Allow(if is_there { vec![self.other] } else { Vec::new() })
    }

    fn on_session_end(&self, session: SessionId) {
        self.calls.on_session_end(session);
    }
}

/// A client in place of another session. That ends after some turns, or stays.
fn in_place_of(is_holder: bool, ends: bool) -> (Result<Turn, SessionEnd>, Vec<u8>, InPlaceOf) {
    let (sessions, disk) = (sessions(9), disk());
    let mut other = Some(admit(&sessions));
    let client = admit(&sessions);
    let calls = RecordingPolicy::default();
    let policy = InPlaceOf { other: other.as_ref().unwrap().id, is_holder, calls };
    let (end, replies) = turns(&client, &disk, &policy, &[OptionKind::Go.number()], |count| {
        let is_asked = |other: &Registration| other.control.current() == StopRequest::Displaced;
        match count {
            // Does not end the wait.
            5 => client.control.request(StopRequest::Finish),
            10 => {
                assert_eq!(other.as_ref().is_some_and(is_asked), !is_holder);
                if ends {
                    other = None;
                } else {
                    ELAPSED.set(ELAPSED.get() + LATE);
                }
            }
            _ => {}
        }
    });
    (end, replies, policy)
}

#[test]
fn a_client_waits_for_the_end_of_a_displaced_session() {
    let (end, _, policy) = in_place_of(false, true);
    assert!(matches!(end, Ok(Turn::Complete(_))), "{end:?}");
    assert!(policy.calls.calls().is_empty());
    let (end, replies, policy) = in_place_of(false, false);
    assert!(matches!(end, Err(SessionEnd::Requested(StopRequest::Finish))), "{end:?}");
    assert!(ends_with(&replies, "an earlier connection is still at work on the disk; try again"));
    assert_eq!(policy.calls.calls(), ["on_session_end"], "the policy releases its place");
}

#[test]
fn a_client_waits_for_the_end_of_a_holder() {
    let (end, _, _) = in_place_of(true, true);
    assert!(matches!(end, Ok(Turn::Complete(_))), "{end:?}");
    let (end, replies, policy) = in_place_of(true, false);
    assert!(matches!(end, Err(SessionEnd::Requested(StopRequest::Finish))), "{end:?}");
    assert!(ends_with(&replies, "held") && policy.calls.calls().is_empty());
}

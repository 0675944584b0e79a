//! Misbehaving clients: they abort, stall, flood, or never read. Other clients must be served
//! meanwhile, and descriptors, threads and memory must be released afterwards.
//! Never measures time: each test waits for an event, with a generous deadline.

use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{
    Builder, Endpoint, KIB, MIB, Resources, Server, TIMEOUT, TempDir, noise, poll_until,
    sparse_image, temp_dir, wait_until,
};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

const IMAGE_SIZE: u64 = 16 * MIB;

/// Memory that the allocator may retain after all clients have gone.
const MEMORY_RETAINED_BYTES_MAX: u64 = 16 * MIB;

/// Memory of one session whose client does not read: less than half of the requested data.
const SESSION_MEMORY_BYTES_MAX: u64 = 96 * MIB;

/// The default of `--max-clients`.
const CLIENTS_MAX: usize = 128;

/// A server, and its resources before the first connection.
struct Subject {
    server: Server,
    before: Resources,
    _dir: TempDir,
}

impl Subject {
    #[track_caller]
    fn over_tcp() -> Subject {
        Subject::start(|builder, _| builder)
    }

    #[track_caller]
    fn over_unix() -> Subject {
        Subject::start(|builder, dir| builder.unix(&dir.path().join("nbd.sock")))
    }

    #[track_caller]
    fn start(adapt: impl FnOnce(Builder, &TempDir) -> Builder) -> Subject {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", IMAGE_SIZE);
        let server = adapt(Builder::serve(&image), &dir).start();
        let before = server.settled_resources();
        Subject { server, before, _dir: dir }
    }

    fn endpoint(&self) -> &Endpoint {
        self.server.endpoint()
    }

    #[track_caller]
    fn session(&self, mode: Mode) -> Session {
        Session::open(self.endpoint(), mode).expect("flexnbd supports every mode")
    }

    /// Fails unless another client is served and the resources return to their initial level.
    #[track_caller]
    fn assert_recovered(mut self) {
        let mut session = self.session(Mode::Structured);
        session.ok(Request::write(0, &noise(4096, 1)));
        assert!(session.read(0, 4096) == noise(4096, 1), "another client is served");
        drop(session);
        let before = self.before;
        let is_released = |now: Resources| {
            now.descriptors <= before.descriptors
                && now.threads <= before.threads
                && now.rss_bytes < before.rss_bytes + MEMORY_RETAINED_BYTES_MAX
        };
        let released = poll_until(TIMEOUT, || is_released(self.server.resources()));
        assert!(released, "before: {before:?}\nafter: {:?}", self.server.resources());
        assert!(self.server.is_running());
    }
}

/// A pipeline of 200 requests.
fn reads_and_writes() -> Vec<Request> {
    let patch = noise(64 << 10, 3);
    let mix = |i: u64| match i % 2 {
        0 => Request::new(READ, i * KIB, MIB),
        _ => Request::write(8 * MIB + i * KIB, &patch),
    };
    (0..200).map(mix).collect()
}

fn large_reads() -> Vec<Request> {
    (0..200).map(|i| Request::new(READ, i * KIB, MIB)).collect()
}

fn small_reads() -> Vec<Request> {
    (0..200).map(|i| Request::new(READ, i * 4 * KIB, 4 * KIB)).collect()
}

#[track_caller]
fn check_late_reader(subject: Subject) {
    let data = noise(2 * MIB as usize, 2);
    for mode in MODES {
        let mut session = subject.session(mode);
        session.ok(Request::write(0, &data));
        for requests in [reads_and_writes(), large_reads(), small_reads()] {
            let requested = requests.len();
            let mut completed = 0;
            session.pipeline(requests, |request, reply| {
                assert_eq!(reply.error, 0);
                let at = request.offset as usize;
                let same = request.command == WRITE
                    || reply.data == data[at..at + request.length as usize];
                assert!(same, "data of a READ at {at}");
                completed += 1;
            });
            assert_eq!(completed, requested, "count of replies ({mode:?})");
        }
        assert!(session.read(8 * MIB + 199 * KIB, 64 * KIB) == noise(64 << 10, 3));
    }
    let peak = subject.server.resources().rss_bytes_peak;
    let growth = peak.saturating_sub(subject.before.rss_bytes);
    assert!(
        growth < SESSION_MEMORY_BYTES_MAX,
        "growth of {growth} bytes for one client that does not read"
    );
    subject.assert_recovered();
}

#[test]
fn late_readers_get_200_replies_over_tcp() {
    check_late_reader(Subject::over_tcp());
}

#[test]
fn late_readers_get_200_replies_over_unix() {
    check_late_reader(Subject::over_unix());
}

#[test]
fn clients_that_never_read_use_bounded_memory() {
    let subject = Subject::over_tcp();
    let mut silent: Vec<Session> = MODES.map(|mode| subject.session(mode)).into();
    for session in &mut silent {
        for request in large_reads() {
            session.send(&request);
        }
    }
    let mut other = subject.session(Mode::Simple);
    for i in 0..100 {
        other.ok(Request::write(i * 4096, &[1; 4096]));
        other.read(i * 4096, 4096);
    }
    let growth = subject.server.resources().rss_bytes_peak.saturating_sub(subject.before.rss_bytes);
    assert!(
        growth < 3 * SESSION_MEMORY_BYTES_MAX,
        "growth of {growth} bytes for three clients that do not read"
    );
    drop(other);
    for session in silent {
        session.wire.reset();
    }
    subject.assert_recovered();
}

#[test]
fn aborted_handshakes_release_their_resources() {
    let subject = Subject::over_tcp();
    let handshake = typical_handshake();
    for abort in [Wire::reset, drop::<Wire>] {
        for length in 0..=handshake.len() {
            let mut wire = Wire::connect_with_retries(subject.endpoint());
            wire.send(&handshake[..length]);
            abort(wire);
        }
    }
    drop(Wire::connect(subject.endpoint()));
    subject.assert_recovered();
}

#[test]
fn aborted_writes_release_their_resources() {
    const AT: u64 = 4096;
    const LENGTH: usize = 300;
    let subject = Subject::over_tcp();
    let mut bystander = subject.session(Mode::Simple);
    let around = noise(3 * 4096, 4);
    bystander.ok(Request::write(0, &around));
    let mode_of = |i: usize| MODES[i % MODES.len()];
    for length in 0..=28 + LENGTH {
        let mut session = session_with_retries(subject.endpoint(), mode_of(length));
        let (_, bytes) = session.encode(&Request::write(AT, &[7; LENGTH]));
        session.wire.send(&bytes[..length]);
        if length % 2 == 0 { session.wire.reset() } else { drop(session) }
    }
    let after = bystander.read(0, 3 * 4096);
    let (start, end) = (AT as usize, AT as usize + LENGTH);
    assert!(after[..start] == around[..start] && after[end..] == around[end..], "the bytes around");
    drop(bystander);
    subject.assert_recovered();
}

/// Opens a session. Retries while closed connections still count for the limit of clients.
#[track_caller]
fn session_with_retries(target: &Endpoint, mode: Mode) -> Session {
    let mut wire = Wire::connect_with_retries(target);
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let option = match mode {
        Mode::Simple => return Session::go(wire, mode, None, b""),
        Mode::Structured => OPT_STRUCTURED_REPLY,
        Mode::Extended => OPT_EXTENDED_HEADERS,
    };
    assert_eq!(wire.ask_final(option, &[]), REP_ACK);
    Session::go(wire, mode, None, b"")
}

/// The pieces that a slow client sends, one per second.
#[derive(Clone, Copy, Debug)]
enum Trickle {
    Nothing,
    /// A handshake, one byte at a time.
    Bytes,
    /// Valid options, endlessly.
    Options,
}

impl Trickle {
    fn piece(self, i: usize) -> Vec<u8> {
        let flags = (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes();
        match self {
            Trickle::Nothing => Vec::new(),
            Trickle::Bytes => vec![typical_handshake()[i]],
            Trickle::Options if i == 0 => flags.to_vec(),
            Trickle::Options => encode_option(OPT_LIST, &[]),
        }
    }
}

/// Sends a piece per second until the server closes; fails at [`TIMEOUT`].
#[track_caller]
fn trickle_until_closed(target: &Endpoint, trickle: Trickle) {
    let mut wire = Wire::connect_with_retries(target);
    wire.set_read_timeout(Duration::from_secs(1));
    let start = Instant::now();
    for i in 0.. {
        assert!(start.elapsed() < TIMEOUT, "{trickle:?}: not closed after {TIMEOUT:?}");
        if wire.try_send(&trickle.piece(i)).is_err() || is_closed_within_a_second(&mut wire) {
            return;
        }
    }
}

fn is_closed_within_a_second(wire: &mut Wire) -> bool {
    loop {
        match wire.try_recv(&mut [0; 4096]) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(_) => return true,
        }
    }
}

#[test]
fn slow_handshakes_are_closed_at_the_deadline() {
    let subject = Subject::over_tcp();
    let target = subject.endpoint();
    std::thread::scope(|scope| {
        let slow: Vec<_> = [Trickle::Nothing, Trickle::Bytes, Trickle::Options]
            .map(|trickle| scope.spawn(move || trickle_until_closed(target, trickle)))
            .into();
        let mut other = subject.session(Mode::Structured);
        while !slow.iter().all(|thread| thread.is_finished()) {
            other.ok(Request::write(0, &[1; 4096]));
            std::thread::park_timeout(Duration::from_millis(100));
        }
    });
    subject.assert_recovered();
}

/// Sends options as fast as possible until the server closes, reading the replies or not.
#[track_caller]
fn flood_until_closed(target: &Endpoint, reads_replies: bool) {
    let mut wire = Wire::connect_with_retries(target);
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let mut replies = wire.try_clone();
    let options = encode_option(OPT_LIST, &[]).repeat(1000);
    let start = Instant::now();
    std::thread::scope(|scope| {
        if reads_replies {
            let mut buffer = vec![0; 1 << 16];
            scope.spawn(move || while matches!(replies.try_recv(&mut buffer), Ok(1..)) {});
        }
        while wire.try_send(&options).is_ok() {
            let is_overdue = start.elapsed() > TIMEOUT;
            if is_overdue {
                wire.shutdown_write();
            }
            assert!(!is_overdue, "not closed after {TIMEOUT:?}, reading replies: {reads_replies}");
        }
    });
}

#[test]
fn floods_of_options_are_closed() {
    let subject = Subject::over_tcp();
    let target = subject.endpoint();
    std::thread::scope(|scope| {
        let floods: Vec<_> = [true, false]
            .map(|reads_replies| scope.spawn(move || flood_until_closed(target, reads_replies)))
            .into();
        let mut other = subject.session(Mode::Structured);
        while !floods.iter().all(|thread| thread.is_finished()) {
            other.ok(Request::write(0, &[1; 4096]));
            std::thread::park_timeout(Duration::from_millis(100));
        }
    });
    let growth = subject.server.resources().rss_bytes_peak.saturating_sub(subject.before.rss_bytes);
    assert!(
        growth < MEMORY_RETAINED_BYTES_MAX,
        "growth of {growth} bytes for two clients in option haggling"
    );
    subject.assert_recovered();
}

#[test]
fn clients_over_the_limit_are_closed_without_greeting() {
    let subject = Subject::over_tcp();
    let mut sessions: Vec<Session> =
        (0..CLIENTS_MAX).map(|i| subject.session(MODES[i % MODES.len()])).collect();
    for _ in 0..3 {
        Wire::connect(subject.endpoint()).expect_closed("a client over the limit");
    }
    for (i, session) in sessions.iter_mut().enumerate() {
        let at = i as u64 * 4096;
        session.ok(Request::write(at, &noise(4096, at)));
    }
    for (i, session) in sessions.iter_mut().enumerate() {
        let at = (CLIENTS_MAX - 1 - i) as u64 * 4096;
        assert!(session.read(at, 4096) == noise(4096, at), "client {i} reads the data of another");
    }
    let (_, disc) = sessions[0].encode_header(DISC, 0, 0, 0);
    sessions[0].wire.send(&disc);
    sessions[0].wire.expect_closed("after DISC");
    session_with_retries(subject.endpoint(), Mode::Simple).assert_in_sync();
    drop(sessions);
    wait_until("the sessions to end", || {
        subject.server.resources().threads <= subject.before.threads
    });
    subject.assert_recovered();
}

//! Clients that no server deserves: each is let loose on a server of our own, which must then be as
//! it was. Other clients are served, and descriptors, threads and memory are back.
//! Never judges by the clock: what must happen is waited for, with a deadline far beyond it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

use harness::raw::*;
use harness::session::{MODES, Mode, Request, Session};
use harness::{
    Builder, Endpoint, KIB, MIB, Resources, Server, TIMEOUT, TempDir, noise, poll_until,
    sparse_image, temp_dir, wait_until,
};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

const IMAGE_SIZE: u64 = 16 * MIB;

/// What an allocator may keep for later when all clients are gone.
const MEMORY_KEPT_MAX: u64 = 16 * MIB;

/// What one session may occupy while its client reads nothing: less than half of what was asked.
const MEMORY_BUSY_MAX: u64 = 96 * MIB;

/// The default of `--max-clients`.
const CLIENTS_MAX: usize = 128;

/// A server and how it looked before anything happened.
struct Victim {
    server: Server,
    before: Resources,
    _dir: TempDir,
}

impl Victim {
    #[track_caller]
    fn over_tcp() -> Victim {
        Victim::start(|builder, _| builder)
    }

    #[track_caller]
    fn over_unix() -> Victim {
        Victim::start(|builder, dir| builder.unix(&dir.path().join("nbd.sock")))
    }

    #[track_caller]
    fn start(adapt: impl FnOnce(Builder, &TempDir) -> Builder) -> Victim {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", IMAGE_SIZE);
        let server = adapt(Builder::serve(&image), &dir).start();
        let before = server.settled_resources();
        Victim { server, before, _dir: dir }
    }

    fn endpoint(&self) -> &Endpoint {
        self.server.endpoint()
    }

    #[track_caller]
    fn session(&self, mode: Mode) -> Session {
        Session::open(self.endpoint(), mode).expect("our own server speaks every dialect")
    }

    /// Fails unless another client is served, and everything that was taken is given back.
    #[track_caller]
    fn must_be_as_before(mut self) {
        let mut session = self.session(Mode::Structured);
        session.ok(Request::write(0, &noise(4096, 1)));
        assert!(session.read(0, 4096) == noise(4096, 1), "others are served");
        drop(session);
        let before = self.before;
        let is_back = |now: Resources| {
            now.descriptors <= before.descriptors
                && now.threads <= before.threads
                && now.rss_bytes < before.rss_bytes + MEMORY_KEPT_MAX
        };
        let back = poll_until(TIMEOUT, || is_back(self.server.resources()));
        assert!(back, "before: {before:?}\nafter: {:?}", self.server.resources());
        assert!(self.server.is_running());
    }
}

/// Requests of which all are sent before the first reply is taken.
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
fn survives_a_client_that_reads_late(victim: Victim) {
    let data = noise(2 * MIB as usize, 2);
    for mode in MODES {
        let mut session = victim.session(mode);
        session.ok(Request::write(0, &data));
        for requests in [reads_and_writes(), large_reads(), small_reads()] {
            let asked = requests.len();
            let mut answered = 0;
            session.pipeline(requests, |request, answer| {
                assert_eq!(answer.error, 0);
                let at = request.offset as usize;
                let same = request.command == WRITE
                    || answer.data == data[at..at + request.length as usize];
                assert!(same, "the data of a READ at {at}");
                answered += 1;
            });
            assert_eq!(answered, asked, "every request is answered ({mode:?})");
        }
        assert!(session.read(8 * MIB + 199 * KIB, 64 * KIB) == noise(64 << 10, 3));
    }
    let peak = victim.server.resources().rss_bytes_peak;
    let grown = peak - victim.before.rss_bytes;
    assert!(grown < MEMORY_BUSY_MAX, "{grown} bytes more for one client that did not read");
    victim.must_be_as_before();
}

#[test]
fn a_client_that_sends_200_requests_before_it_reads_is_served_over_tcp() {
    survives_a_client_that_reads_late(Victim::over_tcp());
}

#[test]
fn a_client_that_sends_200_requests_before_it_reads_is_served_over_unix() {
    survives_a_client_that_reads_late(Victim::over_unix());
}

#[test]
fn a_client_that_never_reads_is_held_back_and_others_are_served() {
    let victim = Victim::over_tcp();
    let mut deaf: Vec<Session> = MODES.map(|mode| victim.session(mode)).into();
    for session in &mut deaf {
        for request in large_reads() {
            session.send(&request);
        }
    }
    let mut other = victim.session(Mode::Simple);
    for i in 0..100 {
        other.ok(Request::write(i * 4096, &[1; 4096]));
        other.read(i * 4096, 4096);
    }
    let grown = victim.server.resources().rss_bytes_peak - victim.before.rss_bytes;
    assert!(grown < 3 * MEMORY_BUSY_MAX, "{grown} bytes more for three clients that do not read");
    drop(other);
    for session in deaf {
        session.wire.reset();
    }
    victim.must_be_as_before();
}

#[test]
fn a_client_that_vanishes_at_any_byte_of_its_handshake_leaves_nothing_behind() {
    let victim = Victim::over_tcp();
    let handshake = typical_handshake();
    for vanish in [Wire::reset, drop::<Wire>] {
        for length in 0..=handshake.len() {
            let mut wire = Wire::connect_with_retries(victim.endpoint());
            wire.send(&handshake[..length]);
            vanish(wire);
        }
    }
    drop(Wire::connect(victim.endpoint()));
    victim.must_be_as_before();
}

#[test]
fn a_client_that_vanishes_at_any_byte_of_a_write_leaves_nothing_behind() {
    const AT: u64 = 4096;
    const LENGTH: usize = 300;
    let victim = Victim::over_tcp();
    let mut bystander = victim.session(Mode::Simple);
    let around = noise(3 * 4096, 4);
    bystander.ok(Request::write(0, &around));
    let mode_of = |i: usize| MODES[i % MODES.len()];
    for length in 0..=28 + LENGTH {
        let mut session = patient_session(victim.endpoint(), mode_of(length));
        let (_, bytes) = session.encode(&Request::write(AT, &[7; LENGTH]));
        session.wire.send(&bytes[..length]);
        if length % 2 == 0 { session.wire.reset() } else { drop(session) }
    }
    let after = bystander.read(0, 3 * 4096);
    let (start, end) = (AT as usize, AT as usize + LENGTH);
    assert!(after[..start] == around[..start] && after[end..] == around[end..], "the neighbours");
    drop(bystander);
    victim.must_be_as_before();
}

/// A session with a server that may just be busy with burying others.
#[track_caller]
fn patient_session(target: &Endpoint, mode: Mode) -> Session {
    let mut wire = Wire::connect_with_retries(target);
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let dialect = match mode {
        Mode::Simple => return Session::go(wire, mode, None, b""),
        Mode::Structured => OPT_STRUCTURED_REPLY,
        Mode::Extended => OPT_EXTENDED_HEADERS,
    };
    assert_eq!(wire.ask_final(dialect, &[]), REP_ACK);
    Session::go(wire, mode, None, b"")
}

/// What a slow client sends, piece by piece.
#[derive(Clone, Copy, Debug)]
enum Trickle {
    Nothing,
    /// A handshake, byte by byte.
    Bytes,
    /// Whole options that are answered, without end.
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

/// Sends a piece a second until the server closes; fails when it never does.
#[track_caller]
fn trickles_until_cut(target: &Endpoint, trickle: Trickle) {
    let mut wire = Wire::connect_with_retries(target);
    wire.set_read_timeout(Duration::from_secs(1));
    let start = Instant::now();
    for i in 0.. {
        assert!(start.elapsed() < TIMEOUT, "{trickle:?}: after {TIMEOUT:?} still not cut");
        if wire.try_send(&trickle.piece(i)).is_err() || is_cut_within_a_second(&mut wire) {
            return;
        }
    }
}

fn is_cut_within_a_second(wire: &mut Wire) -> bool {
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
fn a_client_that_trickles_its_handshake_is_cut_at_the_deadline_and_others_are_served() {
    let victim = Victim::over_tcp();
    let target = victim.endpoint();
    std::thread::scope(|scope| {
        let slow: Vec<_> = [Trickle::Nothing, Trickle::Bytes, Trickle::Options]
            .map(|trickle| scope.spawn(move || trickles_until_cut(target, trickle)))
            .into();
        let mut other = victim.session(Mode::Structured);
        while !slow.iter().all(|thread| thread.is_finished()) {
            other.ok(Request::write(0, &[1; 4096]));
            std::thread::park_timeout(Duration::from_millis(100));
        }
    });
    victim.must_be_as_before();
}

/// Options without end, as fast as they are taken; whether the answers are read makes no
/// difference.
#[track_caller]
fn floods_until_cut(target: &Endpoint, reads: bool) {
    let mut wire = Wire::connect_with_retries(target);
    wire.send(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    let mut ear = wire.try_clone();
    let options = encode_option(OPT_LIST, &[]).repeat(1000);
    let start = Instant::now();
    std::thread::scope(|scope| {
        if reads {
            let mut buffer = vec![0; 1 << 16];
            scope.spawn(move || while matches!(ear.try_recv(&mut buffer), Ok(1..)) {});
        }
        while wire.try_send(&options).is_ok() {
            let endless = start.elapsed() > TIMEOUT;
            if endless {
                wire.shutdown_write();
            }
            assert!(!endless, "after {TIMEOUT:?} still not cut, reading: {reads}");
        }
    });
}

#[test]
fn a_client_that_haggles_without_end_is_cut_at_the_deadline_and_others_are_served() {
    let victim = Victim::over_tcp();
    let target = victim.endpoint();
    std::thread::scope(|scope| {
        let floods: Vec<_> =
            [true, false].map(|reads| scope.spawn(move || floods_until_cut(target, reads))).into();
        let mut other = victim.session(Mode::Structured);
        while !floods.iter().all(|thread| thread.is_finished()) {
            other.ok(Request::write(0, &[1; 4096]));
            std::thread::park_timeout(Duration::from_millis(100));
        }
    });
    let grown = victim.server.resources().rss_bytes_peak - victim.before.rss_bytes;
    assert!(grown < MEMORY_KEPT_MAX, "{grown} bytes more for two clients that only haggle");
    victim.must_be_as_before();
}

#[test]
fn the_129th_client_is_closed_without_a_greeting_and_128_are_served() {
    let victim = Victim::over_tcp();
    let mut sessions: Vec<Session> =
        (0..CLIENTS_MAX).map(|i| victim.session(MODES[i % MODES.len()])).collect();
    for _ in 0..3 {
        Wire::connect(victim.endpoint()).expect_closed("one client too many");
    }
    for (i, session) in sessions.iter_mut().enumerate() {
        let at = i as u64 * 4096;
        session.ok(Request::write(at, &noise(4096, at)));
    }
    for (i, session) in sessions.iter_mut().enumerate() {
        let at = (CLIENTS_MAX - 1 - i) as u64 * 4096;
        assert!(session.read(at, 4096) == noise(4096, at), "client {i} sees what others wrote");
    }
    let (_, goodbye) = sessions[0].encode_header(DISC, 0, 0, 0);
    sessions[0].wire.send(&goodbye);
    sessions[0].wire.expect_closed("after DISC");
    patient_session(victim.endpoint(), Mode::Simple).assert_in_sync();
    drop(sessions);
    wait_until("the sessions to end", || {
        victim.server.resources().threads <= victim.before.threads
    });
    victim.must_be_as_before();
}

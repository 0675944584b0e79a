//! Sources that violate the protocol, and clients that are not sources, against our `listen`.

use harness::host::{Host, MIRROR_STARTED};
use harness::image::{assert_same, stamped_image};
use harness::raw::{
    CAN_MULTI_CONN, DISC, EINVAL, ENOSPC, EPERM, FIXED_NEWSTYLE, NO_ZEROES, OPT_EXPORT_NAME,
    OPT_GO, OPT_INFO, OPT_PRIVATE, READ, REP_ACK, REP_ERR_INVALID, REP_ERR_POLICY, WRITE, Wire,
    encode_go, encode_request,
};
use harness::session::{Mode, Request, Session};
use harness::{
    Endpoint, FILE_SYSTEMS, MIB, Server, TIMEOUT, TempDir, poll_until, sparse_file, temp_dir_in,
};
use nix::sys::signal::Signal;
use std::time::Duration;

const SIZE: u64 = MIB;
/// Length of the longest write in these tests.
const CHUNK: usize = 64 << 10;

/// The private handover command and the version of its payload, see flexnbd-migration(7).
const HANDOVER: u16 = 0x464c;
const VERSION: [u8; 4] = [0, 0, 0, 1];
const MIGRATION_ID: [u8; 16] = [7; 16];
const OTHER_ID: [u8; 16] = [8; 16];

/// A `listen` process that waits for a disk.
struct Listening {
    host: Host,
    server: Server,
    _directory: TempDir,
}

impl Listening {
    fn new(arguments: &[&str]) -> Listening {
        let directory = temp_dir_in(FILE_SYSTEMS[1]);
        let host = Host::new(directory.path(), "dest");
        sparse_file(&host.image, SIZE);
        let server = host.mode("listen").args(arguments).start();
        Listening { host, server, _directory: directory }
    }

    fn oldstyle() -> Listening {
        Listening::new(&["--oldstyle"])
    }

    fn newstyle() -> Listening {
        Listening::new(&[])
    }

    fn plain() -> Listening {
        Listening::new(&["--plain"])
    }

    fn endpoint(&self) -> Endpoint {
        self.server.endpoint().clone()
    }

    /// Opens an oldstyle session.
    fn oldstyle_session(&self) -> Session {
        Session::open_oldstyle(&self.endpoint())
    }

    /// Starts a newstyle handshake.
    fn haggle(&self) -> Wire {
        Wire::haggle(&self.endpoint(), FIXED_NEWSTYLE | NO_ZEROES)
    }

    /// Opens a session of a source that has introduced itself with migration `id`; also returns the
    /// token of the `listen` process.
    fn introduced(&self, id: [u8; 16]) -> (Session, Vec<u8>) {
        let mut wire = self.haggle();
        let (replies, last) = wire.ask(OPT_PRIVATE, &introduction(id));
        assert_eq!(last, REP_ACK, "the server accepts the introduction");
        let token = replies[0].data[8..24].to_vec();
        (Session::go(wire, Mode::Simple, None, b""), token)
    }

    /// Asserts that no disk has arrived, that the record is `record`, and that the process still
    /// listens, like the original flexnbd.
    fn assert_still_waiting(mut self, record: &str) {
        assert_eq!(self.host.record(), record);
        assert!(self.server.is_running(), "{}", self.server.stderr());
        assert_eq!(self.host.status_of("has_control"), "false");
        self.server.signal(Signal::SIGTERM);
        assert_eq!(self.server.wait_for_end().code(), Some(1), "`listen` exits without a disk");
        assert_eq!(self.host.record(), record);
        // `serve` refuses an incomplete copy, and accepts an image without any write.
        let mut serving = self.host.mode("serve").spawn();
        assert_eq!(serving.starts_listening(), record.is_empty());
    }

    /// Asserts that the process still receives a disk from a correct oldstyle source.
    fn assert_still_receives(mut self) {
        let directory = temp_dir_in(FILE_SYSTEMS[1]);
        let disk = directory.path().join("sent");
        stamped_image(&disk, SIZE);
        let bytes = std::fs::read(&disk).unwrap();
        let mut session = self.oldstyle_session();
        for (index, piece) in bytes.chunks(CHUNK).enumerate() {
            session.ok(Request::write((index * CHUNK) as u64, piece));
        }
        session.send(&Request::new(DISC, 0, 0));
        assert!(self.server.wait_for_end().success(), "{}", self.server.stderr());
        assert_eq!(self.host.record(), "ours");
        assert_same(&disk, &self.host.image);
    }
}

fn introduction(id: [u8; 16]) -> Vec<u8> {
    [&VERSION[..], &SIZE.to_be_bytes(), &id].concat()
}

/// Sends a handover request and returns the error of its reply.
fn hand_over(session: &mut Session, id: [u8; 16], token: &[u8]) -> u32 {
    let payload = [&VERSION[..], &id, token].concat();
    let header = encode_request(HANDOVER, 0, 77, 0, payload.len() as u32);
    session.wire.send(&[header, payload].concat());
    assert_eq!(session.wire.recv_u32(), harness::raw::SIMPLE_REPLY);
    let error = session.wire.recv_u32();
    assert_eq!(session.wire.recv_u64(), 77);
    error
}

#[test]
fn correct_oldstyle_source_is_accepted() {
    let listening = Listening::oldstyle();
    listening.assert_still_receives();
}

#[test]
fn connections_without_handshake_are_tolerated() {
    let listening = Listening::oldstyle();
    Wire::connect(&listening.endpoint()).reset();
    drop(Wire::connect(&listening.endpoint()));
    listening.assert_still_receives();
}

#[test]
fn disc_without_a_write_completes_no_migration() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.read(0, 512);
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.assert_still_waiting("");
}

#[test]
fn close_without_disc_leaves_the_copy_incomplete() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.ok(Request::write(0, &[0xee; CHUNK]));
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    assert_eq!(listening.host.record(), "incoming");
    listening.assert_still_receives();
}

#[test]
fn source_may_restart_the_copy_after_a_reset() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.ok(Request::write(0, &[0xee; CHUNK]));
    session.wire.reset();
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_receives();
}

#[test]
fn incomplete_copy_is_not_served() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.ok(Request::write(0, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

#[test]
fn close_within_a_request_header_writes_nothing() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    let (_, bytes) = session.encode(&Request::write(0, &[0xee; 512]));
    session.wire.send(&bytes[..17]);
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_waiting("");
}

#[test]
fn close_within_a_payload_is_tolerated() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    let (_, bytes) = session.encode(&Request::write(0, &[0xee; CHUNK]));
    session.wire.send(&bytes[..CHUNK / 2]);
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_receives();
}

#[test]
fn disc_after_failed_writes_completes_no_migration() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.refused(Request::write(SIZE - 512, &[0xee; 1024]), &[ENOSPC]);
    session.refused(Request::write(u64::MAX - 511, &[0xee; 1024]), &[ENOSPC]);
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.assert_still_waiting("");
}

#[test]
fn wrong_request_magic_ends_the_session_only() {
    let listening = Listening::oldstyle();
    let mut session = listening.oldstyle_session();
    session.ok(Request::write(0, &[0xee; 512]));
    session.wire.send(&[0x47; 28]);
    session.wire.recv_to_end();
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_receives();
}

#[test]
fn second_oldstyle_source_can_neither_write_nor_finish() {
    let listening = Listening::oldstyle();
    let mut first = listening.oldstyle_session();
    first.ok(Request::write(0, &[0xee; 512]));
    let mut second = listening.oldstyle_session();
    assert_eq!(second.ask(Request::write(0, &[0xdd; 512])).error, EPERM);
    second.send(&Request::new(DISC, 0, 0));
    second.wire.expect_closed("after a DISC");
    first.ok(Request::write(512, &[0xee; 512]));
    drop(first);
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_receives();
}

#[test]
fn second_newstyle_source_is_refused_in_the_handshake() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MIGRATION_ID);
    let mut wire = listening.haggle();
    assert_eq!(wire.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    assert_eq!(wire.ask_final(OPT_PRIVATE, &introduction(OTHER_ID)), REP_ERR_POLICY);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME while another source is active");
    first.ok(Request::write(0, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

/// Asserts that no option takes a client without introduction into the transmission phase.
#[track_caller]
fn assert_unintroduced_is_refused(listening: &Listening) {
    for option in [OPT_GO, OPT_INFO] {
        let mut wire = listening.haggle();
        assert_eq!(wire.ask_final(option, &encode_go(b"", &[])), REP_ERR_POLICY, "{option}");
        wire.assert_haggling_in_sync();
    }
    let mut wire = listening.haggle();
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME without introduction");
}

#[test]
fn client_without_introduction_is_always_refused() {
    let listening = Listening::newstyle();
    assert_unintroduced_is_refused(&listening);
    let (mut first, _) = listening.introduced(MIGRATION_ID);
    assert_unintroduced_is_refused(&listening);
    first.ok(Request::write(0, &[0xee; 512]));
    drop(first);
    listening.host.wait_for_status("num_clients", "0");
    assert_unintroduced_is_refused(&listening);
    listening.assert_still_waiting("incoming");
}

#[test]
fn earlier_handshake_without_introduction_is_refused() {
    let listening = Listening::newstyle();
    let mut early = listening.haggle();
    let (mut source, _) = listening.introduced(MIGRATION_ID);
    source.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(early.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    source.ok(Request::write(512, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

#[test]
fn introduction_without_opt_go_excludes_no_other_source() {
    let listening = Listening::newstyle();
    let mut introduced = listening.haggle();
    assert_eq!(introduced.ask(OPT_PRIVATE, &introduction(MIGRATION_ID)).1, REP_ACK);
    let (mut source, _) = listening.introduced(OTHER_ID);
    source.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(introduced.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    source.ok(Request::write(512, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

#[test]
fn refusal_names_the_active_source_and_its_silence() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MIGRATION_ID);
    first.ok(Request::write(0, &[0xee; 512]));
    let source = Host::new(listening.host.image.parent().unwrap(), "source");
    stamped_image(&source.image, SIZE);
    let _serving = source.serve();
    let reply = source.mirror_to(listening.host.address, &[]);
    assert!(reply.starts_with("1: Mirror was rejected"), "{reply}");
    let holder = first.wire.local_address();
    for part in [&holder, "migration 07070707070707070707070707070707", "silent for 0 s"] {
        assert!(reply.contains(part), "{part:?} is not in {reply}");
    }
    first.ok(Request::write(512, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

#[test]
fn stopped_source_is_displaced_within_seconds() {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [stopped, source, destination] =
        ["stopped", "source", "dest"].map(|name| Host::new(directory.path(), name));
    stamped_image(&stopped.image, 16 * SIZE);
    stamped_image(&source.image, 16 * SIZE);
    sparse_file(&destination.image, 16 * SIZE);
    let (holder, mut serving) = (stopped.serve(), source.serve());
    let mut listening = destination.listen();
    // The copy takes a minute, so that SIGSTOP interrupts it.
    let speed = (16 * SIZE / 60).to_string();
    assert_eq!(
        stopped.mirror_to(destination.address, &["exit", "0.0.0.0", &speed]),
        MIRROR_STARTED
    );
    let copying = poll_until(TIMEOUT, || destination.record() == "incoming");
    assert!(copying, "the copy does not start");
    let reply = source.mirror_to(destination.address, &[]);
    assert!(reply.starts_with("1: Mirror was rejected"), "a live source is not displaced: {reply}");
    holder.signal(Signal::SIGSTOP);
    let mut reply = String::new();
    let started = poll_until(Duration::from_secs(20), || {
        reply = source.mirror_to(destination.address, &[]);
        reply == MIRROR_STARTED
    });
    assert!(started, "{reply}");
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_same(&source.image, &destination.image);
    holder.signal(Signal::SIGCONT);
    stopped.command(&["break"]);
    assert_eq!(stopped.record(), "", "the stopped source keeps its disk");
}

#[test]
fn plain_mode_admits_one_writer_at_a_time() {
    let listening = Listening::plain();
    let mut first = Session::open(&listening.endpoint(), Mode::Structured).unwrap();
    assert_eq!(first.flags & CAN_MULTI_CONN, 0, "plain mode allows one connection");
    first.ok(Request::write(0, &[0xee; 512]));
    assert_unintroduced_is_refused(&listening);
    let source = listening.haggle().ask_final(OPT_PRIVATE, &introduction(MIGRATION_ID));
    assert_eq!(source, REP_ERR_POLICY);
    first.ok(Request::write(512, &[0xee; 512]));
    // The second client connects before the server has seen the first one close.
    drop(first);
    let mut second = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    second.ok(Request::write(0, &[0xdd; 512]));
    assert_eq!(second.read(0, 512), [0xdd; 512], "the writer reads its own data");
    drop(second);
    let (mut source, token) = listening.introduced(MIGRATION_ID);
    source.ok(Request::write(0, &[0xcc; 512]));
    assert_eq!(hand_over(&mut source, MIGRATION_ID, &token), 0);
}

#[test]
fn source_displaces_a_plain_client_without_writes() {
    let listening = Listening::plain();
    let mut reader = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    reader.read(0, 512);
    let (mut source, _) = listening.introduced(MIGRATION_ID);
    source.ok(Request::write(0, &[0xee; 512]));
    reader.wire.recv_to_end();
    listening.assert_still_waiting("incoming");
}

#[test]
fn only_the_oldstyle_writer_reads_the_incoming_disk() {
    let listening = Listening::oldstyle();
    let mut early = listening.oldstyle_session();
    early.read(0, 512);
    let mut writer = listening.oldstyle_session();
    writer.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(writer.read(0, 512), [0xee; 512]);
    let mut late = listening.oldstyle_session();
    for other in [&mut early, &mut late] {
        assert_eq!(other.ask(Request::new(READ, 0, 512)).error, EPERM);
        assert_eq!(other.ask(Request::new(WRITE, 0, 512)).error, EPERM);
    }
    drop((writer, late));
    listening.host.wait_for_status("num_clients", "1");
    assert_eq!(early.ask(Request::new(READ, 0, 512)).error, EPERM, "an incomplete copy");
    drop(early);
    listening.host.wait_for_status("num_clients", "0");
    listening.assert_still_receives();
}

#[test]
fn disc_of_a_plain_writer_completes_no_migration() {
    let listening = Listening::plain();
    let mut session = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    session.ok(Request::write(0, &[0xee; 512]));
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.assert_still_waiting("incoming");
}

#[test]
fn malformed_introductions_are_refused() {
    let listening = Listening::newstyle();
    let mut wire = listening.haggle();
    let good = introduction(MIGRATION_ID);
    for bad in [&b""[..], &good[..27], &[&good[..], &[0]].concat(), &[&[9], &good[1..]].concat()] {
        assert_eq!(wire.ask_final(OPT_PRIVATE, bad), REP_ERR_INVALID, "{bad:02x?}");
    }
    wire.assert_haggling_in_sync();
    listening.assert_still_waiting("");
}

#[test]
fn disk_id_is_taken_from_introduced_sources_only() {
    let listening = Listening::newstyle();
    let mut wire = listening.haggle();
    let disk_id = [&[0, 0, 0, 3][..], &[7; 16]].concat();
    assert_eq!(wire.ask_final(OPT_PRIVATE, &disk_id), REP_ERR_INVALID, "before the introduction");
    assert_eq!(wire.ask(OPT_PRIVATE, &introduction(MIGRATION_ID)).1, REP_ACK);
    for bad in [&disk_id[..19], &[&disk_id[..], &[0]].concat()] {
        assert_eq!(wire.ask_final(OPT_PRIVATE, bad), REP_ERR_INVALID, "{bad:02x?}");
    }
    let (replies, last) = wire.ask(OPT_PRIVATE, &disk_id);
    assert_eq!((&replies[0].data[..], last), (&[0, 0, 0, 3][..], REP_ACK));
    drop(wire);
    listening.assert_still_waiting("");
}

#[test]
fn handover_without_introduction_is_refused() {
    let listening = Listening::plain();
    let mut session = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    session.ok(Request::write(0, &[0xee; 512]));
    session.refused(Request::new(HANDOVER, 0, 36), &[EINVAL]);
    session.assert_in_sync();
    listening.assert_still_waiting("incoming");
}

#[test]
fn handover_without_a_write_is_refused() {
    let listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MIGRATION_ID);
    assert_eq!(hand_over(&mut session, MIGRATION_ID, &token), EINVAL);
    session.assert_in_sync();
    listening.assert_still_waiting("");
}

#[test]
fn handover_with_wrong_token_or_id_is_refused() {
    let listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MIGRATION_ID);
    session.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(hand_over(&mut session, MIGRATION_ID, &[0x55; 16]), EINVAL);
    assert_eq!(hand_over(&mut session, OTHER_ID, &token), EINVAL);
    session.assert_in_sync();
    listening.assert_still_waiting("incoming");
}

#[test]
fn correct_handover_is_acknowledged_and_ends_listen() {
    let mut listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MIGRATION_ID);
    session.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(hand_over(&mut session, MIGRATION_ID, &token), 0);
    assert!(listening.server.wait_for_end().success(), "{}", listening.server.stderr());
    assert_eq!(listening.host.record(), "ours");
    // A second `listen` exits successfully at once; a `serve` answers probes of the source.
    let mut again = listening.host.mode("listen").spawn();
    assert!(!again.starts_listening());
    assert!(again.wait_for_end().success(), "{}", again.stderr());
    let serving = listening.host.serve();
    for (id, disk) in [(MIGRATION_ID, 2), (OTHER_ID, 0)] {
        let mut wire = Wire::haggle(serving.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        let (replies, last) = wire.ask(OPT_PRIVATE, &introduction(id));
        assert_eq!(
            (last, &replies[0].data[4..6]),
            (REP_ACK, &[2, disk][..]),
            "state and disk of migration {id:02x?}"
        );
    }
}

#[test]
fn reconnecting_source_replaces_its_first_connection() {
    let listening = Listening::newstyle();
    let (mut first, token) = listening.introduced(MIGRATION_ID);
    first.ok(Request::write(0, &[0xee; 512]));
    let (mut second, same) = listening.introduced(MIGRATION_ID);
    assert_eq!(token, same, "the token belongs to the process");
    first.wire.recv_to_end();
    second.ok(Request::write(512, &[0xee; 512]));
    listening.assert_still_waiting("incoming");
}

#[test]
fn late_write_of_a_replaced_connection_is_discarded() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MIGRATION_ID);
    first.ok(Request::write(0, &[0xee; 512]));
    // The source reconnects while half a write of its first connection is in flight.
    let (_, late) = first.encode(&Request::write(0, &[0xaa; CHUNK]));
    first.wire.send(&late[..CHUNK]);
    let (mut second, _) = listening.introduced(MIGRATION_ID);
    second.ok(Request::write(0, &[0xbb; CHUNK]));
    let _ = first.wire.try_send(&late[CHUNK..]);
    first.wire.recv_to_end();
    assert_eq!(second.read(0, CHUNK as u64), vec![0xbb; CHUNK]);
    listening.assert_still_waiting("incoming");
}

#[test]
fn source_outside_the_acl_is_refused() {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let source = Host::new(directory.path(), "source");
    let destination = Host::new(directory.path(), "dest");
    stamped_image(&source.image, SIZE);
    sparse_file(&destination.image, SIZE);
    let mut serving = source.serve();
    let mut listening = destination.mode("listen").args(["127.0.0.9"]).start();
    let reply = source.mirror_to(destination.address, &[]);
    assert!(reply.starts_with("1: Mirror was rejected"), "{reply}");
    assert_eq!(source.mirror_to(destination.address, &["exit", "127.0.0.9"]), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_same(&source.image, &destination.image);
}

#[test]
fn served_disk_is_refused_as_destination() {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [source, other] = ["source", "other"].map(|name| Host::new(directory.path(), name));
    for host in [&source, &other] {
        stamped_image(&host.image, SIZE);
    }
    let (mut serving, mut other_serving) = (source.serve(), other.serve());
    let reply = source.mirror_to(other.address, &[]);
    assert!(reply.starts_with("1: Mirror was rejected (the destination serves"), "{reply}");
    for server in [&mut serving, &mut other_serving] {
        assert!(server.stop().success());
    }
    assert_same(&source.image, &other.image);
}

#[test]
fn sigterm_ends_listen_with_an_error() {
    let mut listening = Listening::newstyle();
    let (mut session, _) = listening.introduced(MIGRATION_ID);
    listening.server.signal(Signal::SIGTERM);
    assert_eq!(listening.server.wait_for_end().code(), Some(1));
    session.wire.recv_to_end();
    assert_eq!(listening.host.record(), "");
}

//! What rude sources, and others who happen by, do to our `listen`.

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
/// Longest write of the sources here.
const PIECE: usize = 64 << 10;

/// The private command and its version (flexnbd-migration(7)).
const HANDOVER: u16 = 0x464c;
const VERSION: [u8; 4] = [0, 0, 0, 1];
const MINE: [u8; 16] = [7; 16];
const OTHERS: [u8; 16] = [8; 16];

/// A process that listens for a disk.
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

    /// A session of old style.
    fn old(&self) -> Session {
        Session::open_old_style(&self.endpoint())
    }

    /// The haggling of newstyle, just begun.
    fn haggle(&self) -> Wire {
        Wire::haggle(&self.endpoint(), FIXED_NEWSTYLE | NO_ZEROES)
    }

    /// Introduces itself with that migration, and goes on to transmission; also the token.
    fn introduced(&self, id: [u8; 16]) -> (Session, Vec<u8>) {
        let mut wire = self.haggle();
        let (replies, last) = wire.ask(OPT_PRIVATE, &question(id));
        assert_eq!(last, REP_ACK, "the question is answered");
        let token = replies[0].data[8..24].to_vec();
        (Session::go(wire, Mode::Simple, None, b""), token)
    }

    /// Nothing has arrived, and it waits for somebody who sends a whole disk, as the original does.
    fn listens_on(mut self, record: &str) {
        assert_eq!(self.host.record(), record);
        assert!(self.server.is_running(), "{}", self.server.stderr());
        assert_eq!(self.host.status_of("has_control"), "false");
        self.server.signal(Signal::SIGTERM);
        assert_eq!(self.server.wait_for_end().code(), Some(1), "nothing has arrived");
        assert_eq!(self.host.record(), record);
        // An incomplete copy is not served; what was never touched is.
        let mut serving = self.host.mode("serve").spawn();
        assert_eq!(serving.starts_listening(), record.is_empty());
    }

    /// Whoever comes next and behaves succeeds.
    fn still_receives(mut self) {
        let directory = temp_dir_in(FILE_SYSTEMS[1]);
        let disk = directory.path().join("sent");
        stamped_image(&disk, SIZE);
        let bytes = std::fs::read(&disk).unwrap();
        let mut session = self.old();
        for (index, piece) in bytes.chunks(PIECE).enumerate() {
            session.ok(Request::write((index * PIECE) as u64, piece));
        }
        session.send(&Request::new(DISC, 0, 0));
        assert!(self.server.wait_for_end().success(), "{}", self.server.stderr());
        assert_eq!(self.host.record(), "ours");
        assert_same(&disk, &self.host.image);
    }
}

fn question(id: [u8; 16]) -> Vec<u8> {
    [&VERSION[..], &SIZE.to_be_bytes(), &id].concat()
}

/// Sends a HANDOVER and takes its reply: the error.
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
fn an_honest_source_of_old_style_is_received_from() {
    let listening = Listening::oldstyle();
    listening.still_receives();
}

#[test]
fn connects_and_leaves() {
    let listening = Listening::oldstyle();
    Wire::connect(&listening.endpoint()).reset();
    drop(Wire::connect(&listening.endpoint()));
    listening.still_receives();
}

#[test]
fn says_goodbye_without_having_written() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.read(0, 512);
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.listens_on("");
}

#[test]
fn leaves_without_goodbye_after_having_written() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.ok(Request::write(0, &[0xee; PIECE]));
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    assert_eq!(listening.host.record(), "incoming");
    listening.still_receives();
}

#[test]
fn vanishes_after_a_write_and_another_one_starts_over() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.ok(Request::write(0, &[0xee; PIECE]));
    session.wire.reset();
    listening.host.wait_for_status("num_clients", "0");
    listening.still_receives();
}

#[test]
fn an_incomplete_copy_is_never_served() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.ok(Request::write(0, &[0xee; 512]));
    listening.listens_on("incoming");
}

#[test]
fn closes_in_the_middle_of_a_request() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    let (_, bytes) = session.encode(&Request::write(0, &[0xee; 512]));
    session.wire.send(&bytes[..17]);
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    listening.listens_on("");
}

#[test]
fn closes_in_the_middle_of_the_data() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    let (_, bytes) = session.encode(&Request::write(0, &[0xee; PIECE]));
    session.wire.send(&bytes[..PIECE / 2]);
    drop(session);
    listening.host.wait_for_status("num_clients", "0");
    listening.still_receives();
}

#[test]
fn writes_out_of_range_and_says_goodbye() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.refused(Request::write(SIZE - 512, &[0xee; 1024]), &[ENOSPC]);
    session.refused(Request::write(u64::MAX - 511, &[0xee; 1024]), &[ENOSPC]);
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.listens_on("");
}

#[test]
fn sends_what_is_no_request() {
    let listening = Listening::oldstyle();
    let mut session = listening.old();
    session.ok(Request::write(0, &[0xee; 512]));
    session.wire.send(&[0x47; 28]);
    session.wire.recv_to_end();
    listening.host.wait_for_status("num_clients", "0");
    listening.still_receives();
}

#[test]
fn a_second_source_may_neither_write_nor_end_what_the_first_has_begun() {
    let listening = Listening::oldstyle();
    let mut first = listening.old();
    first.ok(Request::write(0, &[0xee; 512]));
    let mut second = listening.old();
    assert_eq!(second.ask(Request::write(0, &[0xdd; 512])).error, EPERM);
    second.send(&Request::new(DISC, 0, 0));
    second.wire.expect_closed("after a DISC");
    first.ok(Request::write(512, &[0xee; 512]));
    drop(first);
    listening.host.wait_for_status("num_clients", "0");
    listening.still_receives();
}

#[test]
fn a_second_source_may_not_even_greet_where_it_could_be_told_so() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MINE);
    let mut wire = listening.haggle();
    assert_eq!(wire.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    assert_eq!(wire.ask_final(OPT_PRIVATE, &question(OTHERS)), REP_ERR_POLICY);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("an export that is taken");
    first.ok(Request::write(0, &[0xee; 512]));
    listening.listens_on("incoming");
}

/// Not one way into the transmission phase is open to a client that did not introduce itself.
#[track_caller]
fn is_closed_to_strangers(listening: &Listening) {
    for option in [OPT_GO, OPT_INFO] {
        let mut wire = listening.haggle();
        assert_eq!(wire.ask_final(option, &encode_go(b"", &[])), REP_ERR_POLICY, "{option}");
        wire.assert_haggling_in_sync();
    }
    let mut wire = listening.haggle();
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("an export name from a stranger");
}

#[test]
fn a_client_without_introduction_is_refused_before_and_between_sources() {
    let listening = Listening::newstyle();
    is_closed_to_strangers(&listening);
    let (mut first, _) = listening.introduced(MINE);
    is_closed_to_strangers(&listening);
    first.ok(Request::write(0, &[0xee; 512]));
    drop(first);
    listening.host.wait_for_status("num_clients", "0");
    is_closed_to_strangers(&listening);
    listening.listens_on("incoming");
}

#[test]
fn a_client_that_haggles_before_the_source_is_refused_after_it() {
    let listening = Listening::newstyle();
    let mut early = listening.haggle();
    let (mut source, _) = listening.introduced(MINE);
    source.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(early.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    source.ok(Request::write(512, &[0xee; 512]));
    listening.listens_on("incoming");
}

#[test]
fn a_question_without_entering_keeps_no_source_out() {
    let listening = Listening::newstyle();
    let mut asking = listening.haggle();
    assert_eq!(asking.ask(OPT_PRIVATE, &question(MINE)).1, REP_ACK);
    let (mut source, _) = listening.introduced(OTHERS);
    source.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(asking.ask_final(OPT_GO, &encode_go(b"", &[])), REP_ERR_POLICY);
    source.ok(Request::write(512, &[0xee; 512]));
    listening.listens_on("incoming");
}

#[test]
fn a_refused_source_is_told_the_holder_and_its_silence() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MINE);
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
    listening.listens_on("incoming");
}

#[test]
fn a_stopped_source_loses_its_seat_to_another_within_seconds() {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [stopped, source, destination] =
        ["stopped", "source", "dest"].map(|name| Host::new(directory.path(), name));
    stamped_image(&stopped.image, 16 * SIZE);
    stamped_image(&source.image, 16 * SIZE);
    sparse_file(&destination.image, 16 * SIZE);
    let (holder, mut serving) = (stopped.serve(), source.serve());
    let mut listening = destination.listen();
    // In full flight: the copy takes a minute.
    let speed = (16 * SIZE / 60).to_string();
    assert_eq!(
        stopped.mirror_to(destination.address, &["exit", "0.0.0.0", &speed]),
        MIRROR_STARTED
    );
    let began = poll_until(TIMEOUT, || destination.record() == "incoming");
    assert!(began, "nothing is copied");
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
    assert_eq!(stopped.record(), "", "its disk is still its own");
}

#[test]
fn one_plain_writer_is_admitted_at_a_time() {
    let listening = Listening::plain();
    let mut first = Session::open(&listening.endpoint(), Mode::Structured).unwrap();
    assert_eq!(first.flags & CAN_MULTI_CONN, 0, "one connection is all there is");
    first.ok(Request::write(0, &[0xee; 512]));
    is_closed_to_strangers(&listening);
    let source = listening.haggle().ask_final(OPT_PRIVATE, &question(MINE));
    assert_eq!(source, REP_ERR_POLICY);
    first.ok(Request::write(512, &[0xee; 512]));
    // The next one comes before the end of the first was seen.
    drop(first);
    let mut second = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    second.ok(Request::write(0, &[0xdd; 512]));
    assert_eq!(second.read(0, 512), [0xdd; 512], "it reads its own copy");
    drop(second);
    let (mut source, token) = listening.introduced(MINE);
    source.ok(Request::write(0, &[0xcc; 512]));
    assert_eq!(hand_over(&mut source, MINE, &token), 0);
}

#[test]
fn a_plain_client_that_wrote_nothing_is_ended_by_a_source() {
    let listening = Listening::plain();
    let mut reader = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    reader.read(0, 512);
    let (mut source, _) = listening.introduced(MINE);
    source.ok(Request::write(0, &[0xee; 512]));
    reader.wire.recv_to_end();
    listening.listens_on("incoming");
}

#[test]
fn only_the_writer_of_old_style_reads_the_arriving_disk() {
    let listening = Listening::oldstyle();
    let mut early = listening.old();
    early.read(0, 512);
    let mut writer = listening.old();
    writer.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(writer.read(0, 512), [0xee; 512]);
    let mut late = listening.old();
    for other in [&mut early, &mut late] {
        assert_eq!(other.ask(Request::new(READ, 0, 512)).error, EPERM);
        assert_eq!(other.ask(Request::new(WRITE, 0, 512)).error, EPERM);
    }
    drop((writer, late));
    listening.host.wait_for_status("num_clients", "1");
    assert_eq!(early.ask(Request::new(READ, 0, 512)).error, EPERM, "half a copy");
    drop(early);
    listening.host.wait_for_status("num_clients", "0");
    listening.still_receives();
}

#[test]
fn a_plain_client_that_writes_and_says_goodbye_has_not_sent_a_disk() {
    let listening = Listening::plain();
    let mut session = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    session.ok(Request::write(0, &[0xee; 512]));
    session.send(&Request::new(DISC, 0, 0));
    session.wire.expect_closed("after a DISC");
    listening.listens_on("incoming");
}

#[test]
fn introduces_itself_with_nonsense() {
    let listening = Listening::newstyle();
    let mut wire = listening.haggle();
    let good = question(MINE);
    for bad in [&b""[..], &good[..27], &[&good[..], &[0]].concat(), &[&[9], &good[1..]].concat()] {
        assert_eq!(wire.ask_final(OPT_PRIVATE, bad), REP_ERR_INVALID, "{bad:02x?}");
    }
    wire.assert_haggling_in_sync();
    listening.listens_on("");
}

#[test]
fn hands_over_without_an_introduction() {
    let listening = Listening::plain();
    let mut session = Session::open(&listening.endpoint(), Mode::Simple).unwrap();
    session.ok(Request::write(0, &[0xee; 512]));
    session.refused(Request::new(HANDOVER, 0, 36), &[EINVAL]);
    session.assert_in_sync();
    listening.listens_on("incoming");
}

#[test]
fn hands_over_a_disk_that_it_has_not_sent() {
    let listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MINE);
    assert_eq!(hand_over(&mut session, MINE, &token), EINVAL);
    session.assert_in_sync();
    listening.listens_on("");
}

#[test]
fn hands_over_to_another_process_or_another_migration() {
    let listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MINE);
    session.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(hand_over(&mut session, MINE, &[0x55; 16]), EINVAL);
    assert_eq!(hand_over(&mut session, OTHERS, &token), EINVAL);
    session.assert_in_sync();
    listening.listens_on("incoming");
}

#[test]
fn a_handover_as_it_should_be_is_acknowledged_and_ends_it() {
    let mut listening = Listening::newstyle();
    let (mut session, token) = listening.introduced(MINE);
    session.ok(Request::write(0, &[0xee; 512]));
    assert_eq!(hand_over(&mut session, MINE, &token), 0);
    assert!(listening.server.wait_for_end().success(), "{}", listening.server.stderr());
    assert_eq!(listening.host.record(), "ours");
    // A second `listen` says so; a `serve` answers the question that only it can answer.
    let mut again = listening.host.mode("listen").spawn();
    assert!(!again.starts_listening());
    assert!(again.wait_for_end().success(), "{}", again.stderr());
    let serving = listening.host.serve();
    for (id, has) in [(MINE, 2), (OTHERS, 0)] {
        let mut wire = Wire::haggle(serving.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        let (replies, last) = wire.ask(OPT_PRIVATE, &question(id));
        assert_eq!((last, &replies[0].data[4..6]), (REP_ACK, &[2, has][..]), "serving; has it");
    }
}

#[test]
fn comes_again_while_its_first_connection_is_still_there() {
    let listening = Listening::newstyle();
    let (mut first, token) = listening.introduced(MINE);
    first.ok(Request::write(0, &[0xee; 512]));
    let (mut second, same) = listening.introduced(MINE);
    assert_eq!(token, same, "a token is the process's");
    first.wire.recv_to_end();
    second.ok(Request::write(512, &[0xee; 512]));
    listening.listens_on("incoming");
}

#[test]
fn what_a_source_left_in_its_first_connection_is_not_carried_out_after_it_came_again() {
    let listening = Listening::newstyle();
    let (mut first, _) = listening.introduced(MINE);
    first.ok(Request::write(0, &[0xee; 512]));
    // Half a write stays on its way while the source comes again.
    let (_, late) = first.encode(&Request::write(0, &[0xaa; PIECE]));
    first.wire.send(&late[..PIECE]);
    let (mut second, _) = listening.introduced(MINE);
    second.ok(Request::write(0, &[0xbb; PIECE]));
    let _ = first.wire.try_send(&late[PIECE..]);
    first.wire.recv_to_end();
    assert_eq!(second.read(0, PIECE as u64), vec![0xbb; PIECE]);
    listening.listens_on("incoming");
}

#[test]
fn a_source_from_a_banned_address_is_refused_until_it_binds_one_that_is_not() {
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
fn a_disk_is_not_moved_onto_one_that_is_served() {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [source, other] = ["source", "other"].map(|name| Host::new(directory.path(), name));
    for host in [&source, &other] {
        stamped_image(&host.image, SIZE);
    }
    let (mut serving, mut serving_too) = (source.serve(), other.serve());
    let reply = source.mirror_to(other.address, &[]);
    assert!(reply.starts_with("1: Mirror was rejected (the destination serves"), "{reply}");
    for server in [&mut serving, &mut serving_too] {
        assert!(server.stop().success());
    }
    assert_same(&source.image, &other.image);
}

#[test]
fn sigterm_after_hello_ends_a_listen_with_an_error() {
    let mut listening = Listening::newstyle();
    let (mut session, _) = listening.introduced(MINE);
    listening.server.signal(Signal::SIGTERM);
    assert_eq!(listening.server.wait_for_end().code(), Some(1));
    session.wire.recv_to_end();
    assert_eq!(listening.host.record(), "");
}

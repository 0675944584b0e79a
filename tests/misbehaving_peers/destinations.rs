//! Destinations that violate the protocol, against our `mirror`.

use crate::fake_destination::{Connection, FakeDestination};
use harness::host::{Host, MIRROR_STARTED};
use harness::image::stamped_image;
use harness::raw::{EIO, OLD_STYLE, OPT_GO, REP_ERR_POLICY, REP_PRIVATE, SIMPLE_REPLY};
use harness::writers::Writers;
use harness::{Endpoint, FILE_SYSTEMS, MIB, Server, TempDir, temp_dir_in, unused_loopback_address};
use nix::sys::signal::Signal;
use std::io::Write as _;
use std::sync::mpsc;
use std::time::Duration;

const SIZE: u64 = 8 * MIB;
const PAUSE: Duration = Duration::from_millis(20);
/// Seconds without progress after which the source gives up a connection.
const REQUEST_LIMIT: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";

/// A server with a disk to migrate, and two writers.
struct Source {
    host: Host,
    server: Server,
    writers: Writers,
    _directory: TempDir,
}

impl Source {
    fn new() -> Source {
        Source::with_request_limit("1")
    }

    fn with_request_limit(seconds: &str) -> Source {
        let directory = temp_dir_in(FILE_SYSTEMS[1]);
        let host = Host::new(directory.path(), "source").env(REQUEST_LIMIT, seconds);
        stamped_image(&host.image, SIZE);
        let server = host.serve();
        let writers = Writers::start(Endpoint::Tcp(host.address), MIB, (2, 1, PAUSE));
        writers.wait_for_writes(10);
        Source { host, server, writers, _directory: directory }
    }

    /// Asserts that client sessions are unaffected, and that the disk stays with the source.
    fn assert_serves_on(self) {
        assert_eq!(self.host.record(), "");
        self.writers.wait_for_writes(10);
        let mut server = self.server;
        assert_eq!(self.host.status_of("is_mirroring"), "false");
        let written = self.writers.stop();
        assert_eq!(written.connections, 2, "client sessions stay open");
        assert!(server.stop().success());
        written.assert_all_present(&self.host.image, "at the source");
    }
}

/// `mirror` must fail with a reply that begins with `words`; the source must still serve.
fn assert_refused(misbehave: impl FnOnce(&mut Connection) + Send + 'static, words: &str) {
    let source = Source::new();
    let destination = FakeDestination::misbehave_first(SIZE, misbehave);
    let reply = source.host.mirror_to(destination.address, &[]);
    assert!(reply.starts_with(&format!("1: {words}")), "{reply}");
    source.assert_serves_on();
}

/// The source must log `cause`, retry, and succeed as soon as the destination follows the protocol.
fn assert_retried(misbehave: impl FnOnce(&mut Connection) + Send + 'static, cause: &str) {
    let mut source = Source::new();
    let destination = FakeDestination::misbehave_first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(destination.address, &[]), MIRROR_STARTED);
    let disk = destination.disk();
    let status = source.server.wait_for_end();
    let log = source.server.stderr();
    assert!(status.success(), "{log}");
    assert!(log.contains(cause) && log.contains("trying again"), "{cause:?} is not in {log}");
    let written = source.writers.stop();
    assert_eq!(written.connections, 2, "client sessions stay open");
    let image = std::fs::read(&source.host.image).unwrap();
    assert!(disk == image, "the disks of source and destination differ");
    written.assert_all_present(&source.host.image, "at the source");
    assert_eq!(source.host.record(), "departed");
}

#[test]
fn mirror_is_refused_without_a_listener() {
    let source = Source::new();
    let reply = source.host.mirror_to(unused_loopback_address(), &[]);
    assert!(reply.starts_with("1: Mirror failed to connect"), "{reply}");
    source.assert_serves_on();
}

#[test]
fn close_after_connect_is_refused() {
    assert_refused(|_| {}, "Mirror was rejected");
}

#[test]
fn close_within_the_greeting_is_refused() {
    assert_refused(
        |connection| connection.stream.write_all(b"NBDMAGIC\0\0").unwrap(),
        "Mirror was rejected",
    );
}

#[test]
fn silence_after_connect_is_refused() {
    assert_refused(
        |connection| assert!(!connection.wait_for_close()),
        "Remote server failed to respond",
    );
}

#[test]
fn wrong_greeting_magic_is_refused() {
    assert_refused(|connection| connection.greet_with(OLD_STYLE + 1, SIZE), "Mirror was rejected");
}

#[test]
fn wrong_export_size_is_refused() {
    let words = "Remote size does not match local size";
    assert_refused(|connection| connection.greet_with(OLD_STYLE, SIZE - 512), words);
}

#[test]
fn malformed_reply_to_the_private_option_is_refused() {
    let misbehave = |connection: &mut Connection| {
        let (option, _) = connection.greet_newstyle();
        connection.reply_to_option(option, REP_PRIVATE, b"nonsense");
        connection.wait_for_close();
    };
    assert_refused(misbehave, "Mirror was rejected");
}

#[test]
fn policy_refusal_of_opt_go_is_reported() {
    let misbehave = |connection: &mut Connection| {
        let (mut option, _) = connection.greet_newstyle();
        while option != OPT_GO {
            connection.reject_option(option);
            option = connection.recv_option().0;
        }
        connection.reply_to_option(option, REP_ERR_POLICY, b"not you");
        connection.wait_for_close();
    };
    assert_refused(misbehave, "Mirror was rejected");
}

#[test]
fn close_after_greeting_is_retried() {
    assert_retried(|connection| connection.greet(), "the connection broke");
}

#[test]
fn close_within_a_request_header_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.recv(13);
    };
    assert_retried(misbehave, "the connection broke");
}

#[test]
fn close_within_a_payload_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.recv(28 + 4000);
    };
    assert_retried(misbehave, "the connection broke");
}

#[test]
fn close_before_a_reply_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.recv_request();
    };
    assert_retried(misbehave, "the connection broke");
}

#[test]
fn close_after_a_reply_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply(request.cookie, 0);
    };
    assert_retried(misbehave, "the connection broke");
}

/// A connection that closes with the last reply, before NBD_CMD_DISC, must be retried. There are no
/// writers, so that the destination knows which reply is the last.
fn assert_close_before_disc_is_retried(action: &str) {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let host = Host::new(directory.path(), "source");
    stamped_image(&host.image, SIZE);
    let image = std::fs::read(&host.image).unwrap();
    let mut server = host.serve();
    let destination = FakeDestination::misbehave_first(SIZE, Connection::close_with_the_last_reply);
    assert_eq!(host.mirror_to(destination.address, &[action]), MIRROR_STARTED);
    assert!(destination.disk() == image, "the disks of source and destination differ");
    let status = server.wait_for_end();
    let log = server.stderr();
    assert!(status.success() && log.contains("trying again"), "{log}");
}

#[test]
fn close_before_disc_is_retried() {
    assert_close_before_disc_is_retried("exit");
}

#[test]
fn close_before_disc_is_retried_with_unlink() {
    assert_close_before_disc_is_retried("unlink");
}

/// Longer than the request limit of the source.
const HANG: Duration = Duration::from_secs(3);

#[test]
fn stalled_connection_is_reset_and_its_data_discarded() {
    let (tx, reset) = mpsc::channel();
    let misbehave = move |connection: &mut Connection| {
        connection.greet();
        std::thread::sleep(HANG);
        tx.send(connection.wait_for_close()).unwrap();
    };
    assert_retried(misbehave, "nothing was taken for 1 s");
    assert!(reset.recv().unwrap(), "without a RST old data could arrive after new data");
}

#[test]
fn silence_after_a_reply_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply(request.cookie, 0);
        std::thread::sleep(HANG);
    };
    assert_retried(misbehave, "for 1 s");
}

#[test]
fn missing_replies_are_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.wait_for_close();
    };
    assert_retried(misbehave, "no progress for 1 s");
}

#[test]
fn error_reply_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply(request.cookie, EIO);
        connection.wait_for_close();
    };
    assert_retried(misbehave, "NBD error 5");
}

#[test]
fn reply_with_an_unknown_cookie_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply(request.cookie + 1_000_000, 0);
        connection.wait_for_close();
    };
    assert_retried(misbehave, "not outstanding");
}

#[test]
fn reply_with_a_wrong_magic_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply_with(SIMPLE_REPLY + 1, request.cookie, 0);
        connection.wait_for_close();
    };
    assert_retried(misbehave, "no reply");
}

#[test]
fn duplicate_reply_is_retried() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        let request = connection.recv_request();
        connection.reply(request.cookie, 0);
        connection.reply(request.cookie, 0);
        connection.wait_for_close();
    };
    assert_retried(misbehave, "not outstanding");
}

/// `break` must end the migration whatever the destination does.
fn assert_break_works(misbehave: impl FnOnce(&mut Connection) + Send + 'static, stage: &str) {
    let source = Source::with_request_limit("30");
    let destination = FakeDestination::misbehave_first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(destination.address, &[]), MIRROR_STARTED);
    source.host.wait_for_status("migration_stage", stage);
    assert_eq!(source.host.command(&["break"]), "0: mirror stopped");
    source.host.wait_for_status("is_mirroring", "false");
    source.assert_serves_on();
}

#[test]
fn break_works_while_the_destination_reads_nothing() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        std::thread::sleep(HANG);
    };
    assert_break_works(misbehave, "copying");
}

#[test]
fn break_works_while_the_destination_sends_no_reply() {
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.wait_for_close();
    };
    assert_break_works(misbehave, "copying");
}

#[test]
fn break_works_between_two_attempts() {
    let source = Source::new();
    let misbehave = |connection: &mut Connection| {
        connection.greet();
        connection.recv_request();
    };
    let destination = FakeDestination::misbehave_first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(destination.address, &[]), MIRROR_STARTED);
    source.server.wait_for_stderr("trying again every second");
    assert_eq!(source.host.command(&["break"]), "0: mirror stopped");
    source.assert_serves_on();
}

#[test]
fn sigterm_during_migration_fails_and_keeps_the_disk() {
    let mut source = Source::new();
    let destination = FakeDestination::misbehave_first(SIZE, |connection| {
        connection.greet();
        connection.wait_for_close();
    });
    assert_eq!(source.host.mirror_to(destination.address, &[]), MIRROR_STARTED);
    source.server.signal(Signal::SIGTERM);
    assert_eq!(source.server.wait_for_end().code(), Some(1));
    assert_eq!(source.host.record(), "");
    let written = source.writers.stop();
    written.assert_all_present(&source.host.image, "after SIGTERM");
    assert!(source.host.serve().stop().success(), "a second `serve` accepts the image");
}

#[test]
fn unlink_deletes_the_image_before_the_disc() {
    let mut source = Source::new();
    let image = source.host.image.clone();
    let bytes = std::fs::File::open(&image).unwrap();
    let (tx, deleted) = mpsc::channel();
    let destination =
        FakeDestination::with_on_disc(SIZE, |_| {}, move || tx.send(!image.exists()).unwrap());
    // The destination closes its first connection at once, which counts as a refusal.
    let reply = source.host.mirror_to(destination.address, &["unlink"]);
    assert!(reply.starts_with("1: Mirror was rejected"), "{reply}");
    assert!(source.host.image.exists(), "a refused migration deletes nothing");
    assert_eq!(source.host.mirror_to(destination.address, &["unlink"]), MIRROR_STARTED);
    let disk = destination.disk();
    assert!(deleted.recv().unwrap(), "the image is deleted before NBD_CMD_DISC");
    assert!(source.server.wait_for_end().success(), "{}", source.server.stderr());
    let mut image = vec![0; SIZE as usize];
    std::os::unix::fs::FileExt::read_exact_at(&bytes, &mut image, 0).unwrap();
    assert!(disk == image, "the received disk equals the deleted image");
    source.writers.stop();
}

#[test]
fn mirror_connects_from_the_bind_address() {
    let source = Source::new();
    let (tx, from) = mpsc::channel();
    let destination = FakeDestination::misbehave_first(SIZE, move |connection| {
        tx.send(connection.stream.peer_addr().unwrap().ip()).unwrap();
    });
    source.host.mirror_to(destination.address, &["exit", "127.0.0.7"]);
    assert_eq!(from.recv().unwrap().to_string(), "127.0.0.7");
    source.assert_serves_on();
}

#[test]
fn restarted_source_probes_from_the_recorded_address() {
    const ID: &str = "07070707070707070707070707070707";
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [source, destination] = ["source", "dest"].map(|name| Host::new(directory.path(), name));
    for host in [&source, &destination] {
        stamped_image(&host.image, SIZE);
    }
    let set_record = |host: &Host, record: String| {
        xattr::set(&host.image, "user.flexnbd", record.as_bytes()).unwrap();
    };
    set_record(&destination, format!("flexnbd 1 incoming id={ID}\n"));
    let to = destination.address;
    set_record(
        &source,
        format!("flexnbd 2 departing id={ID} before=native from=127.0.0.7 to={to}\n"),
    );
    let mut listening = destination.mode("listen").args(["127.0.0.7"]).start();
    assert!(source.serve().stop().success(), "the destination denies having the disk");
    assert_eq!(source.record(), "");
    assert_eq!(listening.stop().code(), Some(1), "`listen` exits without a disk");
}

#[test]
fn second_mirror_is_refused_during_the_first_handshake() {
    let source = Source::new();
    let (tx, connected) = mpsc::channel();
    let destination = FakeDestination::misbehave_first(SIZE, move |connection| {
        tx.send(()).unwrap();
        connection.wait_for_close();
    });
    let host = source.host.clone();
    let first = std::thread::spawn(move || host.mirror_to(destination.address, &[]));
    connected.recv().unwrap();
    let second = source.host.mirror_to(unused_loopback_address(), &[]);
    assert_eq!(second, "1: mirror already running");
    assert!(first.join().unwrap().starts_with("1: Remote server failed to respond"));
    source.assert_serves_on();
}

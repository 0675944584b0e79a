//! What rude destinations do to our `mirror`.

use crate::rude::{Guest, Rude};
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
/// After how many seconds without progress the source gives a connection up.
const PATIENCE: &str = "FLEXNBD_MS_REQUEST_LIMIT_SECS";

/// A served disk with two writers on it.
struct Source {
    host: Host,
    server: Server,
    writers: Writers,
    _directory: TempDir,
}

impl Source {
    fn new() -> Source {
        Source::with_patience("1")
    }

    fn with_patience(seconds: &str) -> Source {
        let directory = temp_dir_in(FILE_SYSTEMS[1]);
        let host = Host::new(directory.path(), "source").env(PATIENCE, seconds);
        stamped_image(&host.image, SIZE);
        let server = host.serve();
        let writers = Writers::start(Endpoint::Tcp(host.address), MIB, (2, 1, PAUSE));
        writers.wait_for_writes(10);
        Source { host, server, writers, _directory: directory }
    }

    /// Nothing has happened to clients, and the disk is ours alone.
    fn serves_on(self) {
        assert_eq!(self.host.record(), "");
        self.writers.wait_for_writes(10);
        let mut server = self.server;
        assert_eq!(self.host.status_of("is_mirroring"), "false");
        let written = self.writers.stop();
        assert_eq!(written.connections, 2, "sessions did not notice");
        assert!(server.stop().success());
        written.assert_all_present(&self.host.image, "at the source");
    }
}

/// `mirror` must say that, and the source serve on.
fn is_refused(misbehave: impl FnOnce(&mut Guest) + Send + 'static, words: &str) {
    let source = Source::new();
    let rude = Rude::first(SIZE, misbehave);
    let reply = source.host.mirror_to(rude.address, &[]);
    assert!(reply.starts_with(&format!("1: {words}")), "{reply}");
    source.serves_on();
}

/// The source must try again, and succeed as soon as the destination behaves.
fn is_retried(misbehave: impl FnOnce(&mut Guest) + Send + 'static, said: &str) {
    let mut source = Source::new();
    let rude = Rude::first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(rude.address, &[]), MIRROR_STARTED);
    let disk = rude.disk();
    let status = source.server.wait_for_end();
    let log = source.server.stderr();
    assert!(status.success(), "{log}");
    assert!(log.contains(said) && log.contains("trying again"), "{said:?} is not in {log}");
    let written = source.writers.stop();
    assert_eq!(written.connections, 2, "sessions did not notice");
    let image = std::fs::read(&source.host.image).unwrap();
    assert!(disk == image, "the disk at the destination is not the disk at the source");
    written.assert_all_present(&source.host.image, "at the source");
    assert_eq!(source.host.record(), "departed");
}

#[test]
fn nobody_listens() {
    let source = Source::new();
    let reply = source.host.mirror_to(unused_loopback_address(), &[]);
    assert!(reply.starts_with("1: Mirror failed to connect"), "{reply}");
    source.serves_on();
}

#[test]
fn closes_after_connect() {
    is_refused(|_| {}, "Mirror was rejected");
}

#[test]
fn closes_in_the_middle_of_its_hello() {
    is_refused(|guest| guest.stream.write_all(b"NBDMAGIC\0\0").unwrap(), "Mirror was rejected");
}

#[test]
fn hangs_after_connect() {
    is_refused(|guest| assert!(!guest.outlast()), "Remote server failed to respond");
}

#[test]
fn greets_with_a_wrong_magic() {
    is_refused(|guest| guest.greet_with(OLD_STYLE + 1, SIZE), "Mirror was rejected");
}

#[test]
fn greets_with_a_wrong_size() {
    let words = "Remote size does not match local size";
    is_refused(|guest| guest.greet_with(OLD_STYLE, SIZE - 512), words);
}

#[test]
fn answers_the_private_option_with_nonsense() {
    let misbehave = |guest: &mut Guest| {
        let (option, _) = guest.greet_newstyle();
        guest.answer_option(option, REP_PRIVATE, b"nonsense");
        guest.outlast();
    };
    is_refused(misbehave, "Mirror was rejected");
}

#[test]
fn turns_us_away_by_policy() {
    let misbehave = |guest: &mut Guest| {
        let (mut option, _) = guest.greet_newstyle();
        while option != OPT_GO {
            guest.answer_unknown(option);
            option = guest.take_option().0;
        }
        guest.answer_option(option, REP_ERR_POLICY, b"not you");
        guest.outlast();
    };
    is_refused(misbehave, "Mirror was rejected");
}

#[test]
fn closes_after_hello() {
    is_retried(|guest| guest.greet(), "the connection broke");
}

#[test]
fn closes_in_the_middle_of_a_request() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.take(13);
    };
    is_retried(misbehave, "the connection broke");
}

#[test]
fn closes_in_the_middle_of_the_data() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.take(28 + 4000);
    };
    is_retried(misbehave, "the connection broke");
}

#[test]
fn closes_after_the_data_and_before_the_reply() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.request();
    };
    is_retried(misbehave, "the connection broke");
}

#[test]
fn closes_after_a_write() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply(asked.cookie, 0);
    };
    is_retried(misbehave, "the connection broke");
}

/// No writers: so that the last reply is known to be the last.
fn a_lost_goodbye_is_noticed(action: &str) {
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let host = Host::new(directory.path(), "source");
    stamped_image(&host.image, SIZE);
    let image = std::fs::read(&host.image).unwrap();
    let mut server = host.serve();
    let rude = Rude::first(SIZE, Guest::leave_with_the_last_reply);
    assert_eq!(host.mirror_to(rude.address, &[action]), MIRROR_STARTED);
    assert!(rude.disk() == image, "the disk at the destination is not the disk at the source");
    let status = server.wait_for_end();
    let log = server.stderr();
    assert!(status.success() && log.contains("trying again"), "{log}");
}

#[test]
fn closes_after_the_last_write_and_before_the_goodbye() {
    a_lost_goodbye_is_noticed("exit");
}

#[test]
fn closes_after_the_last_write_when_the_image_is_to_be_deleted() {
    a_lost_goodbye_is_noticed("unlink");
}

/// Longer than the source is patient.
const LONG: Duration = Duration::from_secs(3);

#[test]
fn hangs_after_hello_and_what_it_did_not_take_is_thrown_away() {
    let (told, abrupt) = mpsc::channel();
    let misbehave = move |guest: &mut Guest| {
        guest.greet();
        std::thread::sleep(LONG);
        told.send(guest.outlast()).unwrap();
    };
    is_retried(misbehave, "nothing was taken for 1 s");
    assert!(abrupt.recv().unwrap(), "old data could have arrived after the new");
}

#[test]
fn hangs_after_a_write() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply(asked.cookie, 0);
        std::thread::sleep(LONG);
    };
    is_retried(misbehave, "for 1 s");
}

#[test]
fn takes_everything_and_replies_to_nothing() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.outlast();
    };
    is_retried(misbehave, "no progress for 1 s");
}

#[test]
fn replies_with_an_error() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply(asked.cookie, EIO);
        guest.outlast();
    };
    is_retried(misbehave, "NBD error 5");
}

#[test]
fn replies_with_a_wrong_handle() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply(asked.cookie + 1_000_000, 0);
        guest.outlast();
    };
    is_retried(misbehave, "not outstanding");
}

#[test]
fn replies_with_something_that_is_no_reply() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply_with(SIMPLE_REPLY + 1, asked.cookie, 0);
        guest.outlast();
    };
    is_retried(misbehave, "no reply");
}

#[test]
fn replies_twice() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        let asked = guest.request();
        guest.reply(asked.cookie, 0);
        guest.reply(asked.cookie, 0);
        guest.outlast();
    };
    is_retried(misbehave, "not outstanding");
}

/// `break` must be heard whatever the destination is doing.
fn can_be_broken_off(misbehave: impl FnOnce(&mut Guest) + Send + 'static, stage: &str) {
    let source = Source::with_patience("30");
    let rude = Rude::first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(rude.address, &[]), MIRROR_STARTED);
    source.host.wait_for_status("migration_stage", stage);
    assert_eq!(source.host.command(&["break"]), "0: mirror stopped");
    source.host.wait_for_status("is_mirroring", "false");
    source.serves_on();
}

#[test]
fn a_break_while_it_takes_nothing_is_heard() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        std::thread::sleep(LONG);
    };
    can_be_broken_off(misbehave, "copying");
}

#[test]
fn a_break_while_it_does_not_reply_is_heard() {
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.outlast();
    };
    can_be_broken_off(misbehave, "copying");
}

#[test]
fn a_break_between_two_attempts_is_heard() {
    let source = Source::new();
    let misbehave = |guest: &mut Guest| {
        guest.greet();
        guest.request();
    };
    let listener = Rude::first(SIZE, misbehave);
    assert_eq!(source.host.mirror_to(listener.address, &[]), MIRROR_STARTED);
    source.server.wait_for_stderr("trying again every second");
    assert_eq!(source.host.command(&["break"]), "0: mirror stopped");
    source.serves_on();
}

#[test]
fn sigterm_after_hello_ends_the_source_with_an_error_and_its_disk_stays() {
    let mut source = Source::new();
    let rude = Rude::first(SIZE, |guest| {
        guest.greet();
        guest.outlast();
    });
    assert_eq!(source.host.mirror_to(rude.address, &[]), MIRROR_STARTED);
    source.server.signal(Signal::SIGTERM);
    assert_eq!(source.server.wait_for_end().code(), Some(1));
    assert_eq!(source.host.record(), "");
    let written = source.writers.stop();
    written.assert_all_present(&source.host.image, "after SIGTERM");
    assert!(source.host.serve().stop().success(), "it can be served again");
}

#[test]
fn an_old_destination_is_left_with_a_disc_just_after_the_image_is_deleted() {
    let mut source = Source::new();
    let image = source.host.image.clone();
    let bytes = std::fs::File::open(&image).unwrap();
    let (told, deleted) = mpsc::channel();
    let rude = Rude::with_goodbye(SIZE, |_| {}, move || told.send(!image.exists()).unwrap());
    // Its first connection is closed at once, which counts as a refusal.
    let reply = source.host.mirror_to(rude.address, &["unlink"]);
    assert!(reply.starts_with("1: Mirror was rejected"), "{reply}");
    assert!(source.host.image.exists(), "a refused migration deletes nothing");
    assert_eq!(source.host.mirror_to(rude.address, &["unlink"]), MIRROR_STARTED);
    let disk = rude.disk();
    assert!(deleted.recv().unwrap(), "the image is deleted before the DISC");
    assert!(source.server.wait_for_end().success(), "{}", source.server.stderr());
    let mut image = vec![0; SIZE as usize];
    std::os::unix::fs::FileExt::read_exact_at(&bytes, &mut image, 0).unwrap();
    assert!(disk == image, "what arrived is what was deleted");
    source.writers.stop();
}

#[test]
fn a_source_that_binds_an_address_comes_from_there() {
    let source = Source::new();
    let (told, from) = mpsc::channel();
    let rude = Rude::first(SIZE, move |guest| {
        told.send(guest.stream.peer_addr().unwrap().ip()).unwrap();
    });
    source.host.mirror_to(rude.address, &["exit", "127.0.0.7"]);
    assert_eq!(from.recv().unwrap().to_string(), "127.0.0.7");
    source.serves_on();
}

#[test]
fn a_restarted_source_asks_from_the_address_on_record() {
    const ID: &str = "07070707070707070707070707070707";
    let directory = temp_dir_in(FILE_SYSTEMS[1]);
    let [source, destination] = ["source", "dest"].map(|name| Host::new(directory.path(), name));
    for host in [&source, &destination] {
        stamped_image(&host.image, SIZE);
    }
    let set = |host: &Host, record: String| {
        xattr::set(&host.image, "user.flexnbd", record.as_bytes()).unwrap();
    };
    set(&destination, format!("flexnbd 1 incoming id={ID}\n"));
    let to = destination.address;
    set(&source, format!("flexnbd 2 departing id={ID} before=native from=127.0.0.7 to={to}\n"));
    let mut listening = destination.mode("listen").args(["127.0.0.7"]).start();
    assert!(source.serve().stop().success(), "it says that the disk has not arrived");
    assert_eq!(source.record(), "");
    assert_eq!(listening.stop().code(), Some(1), "nothing has arrived");
}

#[test]
fn a_second_mirror_is_refused_while_the_first_waits_for_its_hello() {
    let source = Source::new();
    let (told, connected) = mpsc::channel();
    let rude = Rude::first(SIZE, move |guest| {
        told.send(()).unwrap();
        guest.outlast();
    });
    let host = source.host.clone();
    let first = std::thread::spawn(move || host.mirror_to(rude.address, &[]));
    connected.recv().unwrap();
    let second = source.host.mirror_to(unused_loopback_address(), &[]);
    assert_eq!(second, "1: mirror already running");
    assert!(first.join().unwrap().starts_with("1: Remote server failed to respond"));
    source.serves_on();
}

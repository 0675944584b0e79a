//! A flush that fails once: every later flush of the process fails, and the record tells later processes
//! until an operator adopts the disk. Until then the disk is not moved.

use crate::image;
use harness::host::{Host, MIRROR_STARTED};
use harness::raw::*;
use harness::session::{Mode, Request, Session};
use harness::{
    Endpoint, Program, Server, TempDir, failing_fsync, require_tool, temp_dir_in, wait_until,
};
use std::fs::{self, File};
use std::path::PathBuf;

/// Two hosts, of which the first fails fsync while a file exists.
struct Pair {
    source: Host,
    destination: Host,
    fail: PathBuf,
    _dir: TempDir,
}

impl Pair {
    fn new() -> Option<Pair> {
        if !require_tool("cc") {
            return None;
        }
        let dir = temp_dir_in("/var/tmp");
        let path = dir.path().to_str().unwrap();
        let library = failing_fsync(dir.path());
        let source = Host::new(dir.path(), "a")
            .env("LD_PRELOAD", library.to_str().unwrap())
            .env("FAILING_FSYNC_DIR", path);
        let destination = Host::new(dir.path(), "b");
        image(&source, b"precious");
        image(&destination, b"old bytes");
        Some(Pair { source, destination, fail: dir.path().join("fail"), _dir: dir })
    }

    fn session(&self) -> Session {
        Session::open(&Endpoint::Tcp(self.source.address), Mode::Structured).unwrap()
    }

    /// Has one flush of a client fail.
    #[track_caller]
    fn fail_a_flush(&self, session: &mut Session) {
        session.ok(Request::write(0, &[1; 512]));
        File::create(&self.fail).unwrap();
        session.refused(flush(), &[EIO]);
        fs::remove_file(&self.fail).unwrap();
    }

    #[track_caller]
    fn assert_not_moved(&self) {
        let reply = self.source.mirror_to(self.destination.address, &[]);
        assert!(reply.starts_with("1: a flush of ") && reply.contains("adopt -f"), "{reply}");
    }

    #[track_caller]
    fn status_of_file(&self) -> String {
        self.flexnbd("status --file").ok()
    }

    fn flexnbd(&self, words: &str) -> Program {
        let state = self.source.state_directory().display();
        Program::new("env")
            .words(&format!("STATE_DIRECTORY={state}"))
            .args([harness::flexnbd()])
            .words(words)
            .args([&self.source.image])
    }
}

fn flush() -> Request {
    Request::new(FLUSH, 0, 0)
}

#[track_caller]
fn stop(mut server: Server) -> String {
    assert!(server.stop().success(), "{}", server.stderr());
    server.stderr()
}

#[test]
fn a_failed_flush_outlives_the_process_until_adopted() {
    let Some(pair) = Pair::new() else { return };
    let (source, destination) = (&pair.source, &pair.destination);
    let server = source.serve();
    assert_eq!(source.status_of("flush_failed"), "");
    let mut session = pair.session();
    pair.fail_a_flush(&mut session);
    session.refused(flush(), &[EIO]);
    session.refused(Request::write(0, &[2; 512]).flags(FUA), &[EIO]);
    pair.session().refused(flush(), &[EIO]);
    session.ok(Request::new(READ, 0, 512));
    server.wait_for_stderr("has failed: data may be lost");
    let since = source.status_of("flush_failed");
    assert!(since.parse::<u64>().is_ok_and(|since| since > 0), "{since:?}");
    wait_until("the record", || source.record() == "ours");
    pair.assert_not_moved();
    drop(session);
    stop(server);

    assert!(pair.status_of_file().contains(&format!(" flush_failed={since}")));
    let server = source.serve();
    server.wait_for_stderr("so that data may be lost");
    assert_eq!(source.status_of("flush_failed"), since);
    pair.session().ok(flush());
    pair.assert_not_moved();
    stop(server);

    let adopted = pair.flexnbd("adopt --file").ok();
    assert!(adopted.contains("of which a flush failed at"), "{adopted}");
    assert!(!pair.status_of_file().contains("flush_failed"));
    let mut server = source.serve();
    let mut listening = destination.listen();
    assert_eq!(source.status_of("flush_failed"), "");
    assert_eq!(source.mirror_to(destination.address, &[]), MIRROR_STARTED);
    assert!(server.wait_for_end().success(), "{}", server.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
}

#[test]
fn a_flush_that_fails_during_a_migration_ends_it() {
    let Some(pair) = Pair::new() else { return };
    let (source, destination) = (&pair.source, &pair.destination);
    let server = source.serve();
    let _listening = destination.listen();
    let mut session = pair.session();
    session.ok(Request::write(0, &vec![1; 1 << 20]));
    // So slow that it does not end by itself.
    let slow = ["exit", "0.0.0.0", "10000"];
    assert_eq!(source.mirror_to(destination.address, &slow), MIRROR_STARTED);
    pair.fail_a_flush(&mut session);
    source.command(&["mirror_max_bps", "0"]);
    source.wait_for_status("is_mirroring", "false");
    let why = source.status_of("migration_failed");
    assert!(why.contains("has%20failed:%20data%20may%20be%20lost"), "{why}");
    wait_until("the record", || source.record() == "ours");
    assert_ne!(source.status_of("flush_failed"), "");
    session.ok(Request::new(READ, 0, 512));
    drop(session);
    stop(server);
    assert!(pair.status_of_file().contains(" flush_failed="));
}

/// The failure of the last request is recorded before the process ends.
#[test]
fn a_server_that_stops_records_the_failure_first() {
    let Some(pair) = Pair::new() else { return };
    let server = pair.source.serve();
    let mut session = pair.session();
    pair.fail_a_flush(&mut session);
    stop(server);
    assert!(pair.status_of_file().contains(" flush_failed="));
}

//! Concurrent reads and writes of several sessions are linearizable, sector by sector: served by one
//! process, across restarts that keep the sessions, across kills, and across a migration.

use crate::mixed_load::drop_page_cache;
use crate::requests::{FIRST_SECTOR, INITIAL, SECTORS};
use crate::sessions::Sessions;
use crate::stamp::{SECTOR, encode};
use harness::host::{Host, MIRROR_STARTED};
use harness::manager::{Inherited, Service, ServiceManager};
use harness::{
    Builder, Endpoint, FILE_SYSTEMS, MIB, env_number, failing_fsync, noise, require_tool,
    sparse_file, temp_dir, temp_dir_in, write_at,
};
use nix::sys::signal::Signal;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Size of the disk in bytes. Only a small part of it is used.
const SIZE: u64 = 4 * MIB;
/// Replies that each session waits for before the next event.
const SOME: u64 = 200;
const MANY: u64 = 1500;
/// Count of restarts, and of kills.
const RESTARTS: u64 = 5;
/// Rate limit of the copy, in bytes per second: half a second for the disk.
const BYTES_PER_SEC_MAX: &str = "8000000";

/// `FLEXNBD_SEED`, or the seed of a test.
fn seed(default: u64) -> u64 {
    env_number("FLEXNBD_SEED").unwrap_or(default)
}

/// Creates an image whose sectors have the initial value.
fn create_image(path: &Path, seed: u64) {
    std::fs::write(path, noise(SIZE as usize, seed)).unwrap();
    write_at(path, FIRST_SECTOR * SECTOR, &encode(seed, INITIAL, FIRST_SECTOR, SECTORS));
}

/// Sets a flag when dropped, also if the test fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Serves an image from a cold and from a warm page cache, and checks the history.
#[track_caller]
fn check_one_process(parent: &str, seed: u64, configure: impl FnOnce(&Path, Builder) -> Builder) {
    let dir = temp_dir_in(parent);
    let image = dir.path().join("image");
    create_image(&image, seed);
    let server = configure(dir.path(), Builder::serve(&image).args(["--quiet"])).start();
    let sessions = Sessions::start(seed, server.endpoint());
    let is_warm = AtomicBool::new(false);
    thread::scope(|scope| {
        let _set = SetOnDrop(&is_warm);
        scope.spawn(|| {
            while !is_warm.load(Ordering::Acquire) {
                drop_page_cache(&image);
            }
        });
        sessions.wait_for_replies(MANY);
    });
    sessions.wait_for_replies(MANY);
    let history = sessions.stop(&image);
    assert_eq!(history.lost_requests(), 0);
    history.assert_linearizable();
}

#[test]
fn one_process_on_disk_file_system_is_linearizable() {
    check_one_process(FILE_SYSTEMS[0], seed(1), |_, builder| builder);
}

#[test]
fn one_process_on_tmpfs_is_linearizable() {
    check_one_process(FILE_SYSTEMS[1], seed(2), |_, builder| builder);
}

#[test]
fn one_process_without_io_uring_is_linearizable() {
    if !require_tool("cc") {
        return;
    }
    check_one_process(FILE_SYSTEMS[0], seed(3), |dir, builder| {
        builder.env("LD_PRELOAD", failing_fsync(dir)).env("FAILING_FSYNC_DIR", dir)
    });
}

/// Starts a process that inherits sockets and sessions.
fn start_service(manager: &ServiceManager, image: &Path) -> Service {
    let service = manager.start(Inherited::Nbd, "serve --file", &[image]);
    manager.wait_for("READY=1");
    service
}

#[test]
fn sessions_across_restarts_are_linearizable() {
    let seed = seed(4);
    let manager = ServiceManager::new().env("FDSTORE", "9");
    let image = manager.path("disk.img");
    create_image(&image, seed);
    let mut service = start_service(&manager, &image);
    let mut sessions = Sessions::start(seed, &Endpoint::Tcp(manager.address()));
    for _ in 0..RESTARTS {
        sessions.wait_for_replies(SOME);
        assert!(service.stop().success(), "seed {seed}");
        sessions.server_ended(&image);
        service = start_service(&manager, &image);
    }
    sessions.wait_for_replies(SOME);
    let history = sessions.stop(&image);
    assert_eq!(history.lost_requests(), 0, "seed {seed}: restarts keep sessions");
    history.assert_linearizable();
}

#[test]
fn acknowledged_writes_across_kills_are_linearizable() {
    let seed = seed(5);
    let dir = temp_dir();
    let image = dir.path().join("image");
    create_image(&image, seed);
    let mut server = Builder::serve(&image).start();
    let endpoint = server.endpoint().clone();
    let mut sessions = Sessions::start(seed, &endpoint);
    for _ in 0..RESTARTS {
        sessions.wait_for_replies(SOME);
        server.signal(Signal::SIGKILL);
        server.wait_for_end();
        sessions.server_ended(&image);
        server = Builder::serve(&image).at(endpoint.clone()).start();
        sessions.continue_at(&endpoint);
    }
    sessions.wait_for_replies(SOME);
    let history = sessions.stop(&image);
    assert!(history.lost_requests() > 0, "seed {seed}: kills interrupt requests");
    history.assert_linearizable();
}

#[test]
fn sessions_across_a_migration_are_linearizable() {
    let seed = seed(6);
    let dir = temp_dir_in(FILE_SYSTEMS[0]);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    create_image(&source.image, seed);
    sparse_file(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let mut sessions = Sessions::start(seed, &Endpoint::Tcp(source.address));
    sessions.wait_for_replies(SOME);
    let options = ["exit", "0.0.0.0", BYTES_PER_SEC_MAX];
    // The sessions go on meanwhile, as fast as the disk lets them.
    assert_eq!(source.mirror_to(destination.address, &options), MIRROR_STARTED);
    assert!(serving.wait_for_end().success(), "seed {seed}: {}", serving.stderr());
    assert!(listening.wait_for_end().success(), "seed {seed}: {}", listening.stderr());
    sessions.server_ended(&destination.image);
    let _server = destination.serve();
    sessions.continue_at(&Endpoint::Tcp(destination.address));
    sessions.wait_for_replies(SOME);
    let history = sessions.stop(&destination.image);
    history.assert_linearizable();
}

//! Sessions that survive a restart: one process stores them in the fd store of the service manager,
//! the next restores them.

use harness::manager::{Inherited, Service, ServiceManager};
use harness::raw::{READ, WRITE};
use harness::session::{Mode, Request, Session};
use harness::{Endpoint, MIB, noise, read_at, sparse_image, wait_until};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

fn manager() -> (ServiceManager, PathBuf) {
    let manager = ServiceManager::new().env("FDSTORE", "9");
    let image = sparse_image(manager.dir.path(), "disk.img", 8 * MIB);
    (manager, image)
}

fn serve(manager: &ServiceManager, image: &Path) -> Service {
    serve_with(manager, image, "")
}

fn serve_with(manager: &ServiceManager, image: &Path, options: &str) -> Service {
    let service = manager.start(Inherited::Nbd, &format!("serve {options} --file"), &[image]);
    manager.wait_for("READY=1");
    service
}

fn client(manager: &ServiceManager, mode: Mode) -> Session {
    Session::open(&Endpoint::Tcp(manager.address()), mode).unwrap()
}

/// The names of sessions in the fd store, without the snapshot's.
fn sessions(manager: &ServiceManager) -> Vec<String> {
    let (snapshot, rest): (Vec<_>, Vec<_>) =
        manager.stored().into_iter().partition(|name| name.split('-').count() == 2);
    assert_eq!(snapshot.len(), usize::from(!rest.is_empty()), "snapshots");
    rest
}

#[test]
fn restarts_preserve_sessions_with_requests_in_flight() {
    restarts_preserve_requests("");
}

#[test]
fn restarts_with_direct_io_preserve_sessions_with_requests_in_flight() {
    restarts_preserve_requests("--direct");
}

fn restarts_preserve_requests(options: &str) {
    let (manager, image) = manager();
    let mut service = serve_with(&manager, &image, options);
    let mut clients = MODES.map(|mode| client(&manager, mode));
    let mut expected = vec![0; 8 * MIB as usize];
    for round in 0..8u64 {
        let mut unsent_parts = Vec::new();
        for (index, client) in clients.iter_mut().enumerate() {
            let (offset, mut pending) = ((index as u64 * 2 + 1) * MIB, HashMap::new());
            for step in 0..32 {
                let request = Request::new(READ, offset - MIB + step * 16_384, 16_384);
                let cookie = client.send(&request);
                pending.insert(cookie, request);
            }
            let data = noise(400_000, round * 3 + index as u64 + 1);
            expected[offset as usize..][..data.len()].copy_from_slice(&data);
            let request = Request::write(offset, &data);
            let (cookie, bytes) = client.encode(&request);
            let (before, after) = bytes.split_at(bytes.len() * (round as usize + 1) / 9);
            client.wire.send(before);
            pending.insert(cookie, request);
            unsent_parts.push((pending, after.to_vec()));
        }
        assert!(service.stop().success());
        assert_eq!(sessions(&manager).len(), 3, "{}", service.stderr());
        service = serve_with(&manager, &image, options);
        assert_eq!(manager.stored(), [] as [&str; 0], "removed before the first client is served");
        for (client, (mut pending, unsent)) in clients.iter_mut().zip(unsent_parts) {
            client.wire.send(&unsent);
            while !pending.is_empty() {
                let (cookie, answer) = client.recv_reply(&pending);
                let request = pending.remove(&cookie).unwrap();
                assert_eq!(answer.error, 0);
                if request.command != WRITE {
                    let written = &expected[request.offset as usize..][..16_384];
                    assert!(answer.data == written, "wrong data read in round {round}");
                }
            }
        }
    }
    assert!(read_at(&image, 0, expected.len()) == expected, "wrong data in the image");
    assert_eq!(service.stderr(), "");
}

#[test]
fn a_session_in_its_handshake_survives_a_restart() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let target = Endpoint::Tcp(manager.address());
    let mut wire = harness::raw::Wire::haggle(&target, 3);
    wire.assert_haggling_in_sync();
    assert!(service.stop().success());
    assert_eq!(sessions(&manager).len(), 1);
    let _service = serve(&manager, &image);
    wire.assert_haggling_in_sync();
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    session.assert_in_sync();
}

#[test]
fn a_crash_ends_sessions_for_good() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut session = client(&manager, Mode::Structured);
    assert!(service.stop().success());
    let mut service = serve(&manager, &image);
    session.assert_in_sync();
    service.signal(Signal::SIGKILL);
    service.wait_for_exit();
    session.wire.expect_closed("its server was killed");
    assert!(manager.stored().is_empty());
    let _service = serve(&manager, &image);
    client(&manager, Mode::Structured).assert_in_sync();
}

/// Stops a service with a session, calls `change`, and starts it again, which must close the
/// session and serve new clients. Returns the second process's stderr.
fn closed_after(change: impl FnOnce(&ServiceManager, &Path)) -> String {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut session = client(&manager, Mode::Extended);
    assert!(service.stop().success());
    assert_eq!(sessions(&manager).len(), 1);
    change(&manager, &image);
    let mut service = serve(&manager, &image);
    session.wire.expect_closed("it could not be restored");
    client(&manager, Mode::Extended).assert_in_sync();
    assert!(manager.stored().is_empty());
    assert!(service.stop().success());
    service.stderr()
}

fn snapshot_name(manager: &ServiceManager) -> String {
    manager.stored().into_iter().find(|name| name.split('-').count() == 2).unwrap()
}

#[test]
fn a_snapshot_of_another_version_closes_sessions() {
    let log = closed_after(|manager, _| {
        let name = snapshot_name(manager);
        let mut bytes = Vec::new();
        let mut snapshot = File::from(manager.take_from_store(&name));
        snapshot.rewind().unwrap();
        snapshot.read_to_end(&mut bytes).unwrap();
        bytes[11] += 1;
        manager.store(&name, sealed(&bytes));
    });
    assert!(log.contains("another version of the program"), "{log}");
}

/// A sealed memfd with these bytes, as the server stores its snapshot.
fn sealed(bytes: &[u8]) -> OwnedFd {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut file = File::from(memfd_create(c"snapshot", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all(bytes).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
    file.into()
}

#[test]
fn a_missing_snapshot_closes_sessions() {
    let log = closed_after(|manager, _| drop(manager.take_from_store(&snapshot_name(manager))));
    assert!(log.contains("notes came with them"), "{log}");
}

#[test]
fn a_disk_of_another_size_closes_sessions() {
    let log = closed_after(|_, image| {
        File::options().write(true).open(image).unwrap().set_len(4 * MIB).unwrap();
    });
    assert!(log.contains("the size of the disk is not what their clients were told"), "{log}");
}

#[test]
fn another_disk_with_equal_size_closes_sessions() {
    let log = closed_after(|manager, image| {
        std::fs::rename(image, manager.path("old.img")).unwrap();
        sparse_image(manager.dir.path(), "disk.img", 8 * MIB);
    });
    assert!(log.contains("the disk itself is not what their clients were told"), "{log}");
}

#[test]
fn a_full_fd_store_closes_sessions_cleanly() {
    let (manager, image) = manager();
    let manager = manager.env("FDSTORE", "1");
    let mut service = serve(&manager, &image);
    let mut session = client(&manager, Mode::Simple);
    session.assert_in_sync();
    assert!(service.stop().success());
    session.wire.expect_closed("the fd store is full");
    assert!(manager.stored().is_empty());
}

#[test]
fn a_missing_disk_closes_stored_sessions() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut session = client(&manager, Mode::Simple);
    assert!(service.stop().success());
    std::fs::rename(&image, manager.path("elsewhere")).unwrap();
    let mut service = manager.start(Inherited::Nbd, "serve --file", &[&image]);
    assert_eq!(service.wait_for_exit().code(), Some(78));
    session.wire.expect_closed("its disk is gone");
    wait_until("the store to be empty", || manager.stored().is_empty());
}

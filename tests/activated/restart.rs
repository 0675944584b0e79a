//! Sessions that outlive the process: left to the service manager by one, taken out by the next.

use crate::manager::{Handed, Manager, Service};
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

fn manager() -> (Manager, PathBuf) {
    let manager = Manager::new().env("FDSTORE", "9");
    let image = sparse_image(manager.dir.path(), "disk.img", 8 * MIB);
    (manager, image)
}

fn serve(manager: &Manager, image: &Path) -> Service {
    let service = manager.start(Handed::Nbd, "serve --file", &[image]);
    manager.wait_for("READY=1");
    service
}

fn client(manager: &Manager, mode: Mode) -> Session {
    Session::open(&Endpoint::Tcp(manager.address()), mode).unwrap()
}

/// The names in the store, but for the note's.
fn sessions(manager: &Manager) -> Vec<String> {
    let (note, rest): (Vec<_>, Vec<_>) =
        manager.stored().into_iter().partition(|name| name.split('-').count() == 2);
    assert_eq!(note.len(), usize::from(!rest.is_empty()), "notes");
    rest
}

#[test]
fn clients_do_not_notice_a_restart_whatever_they_have_under_way() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut clients = MODES.map(|mode| client(&manager, mode));
    let mut expected = vec![0; 8 * MIB as usize];
    for round in 0..8u64 {
        let mut halves = Vec::new();
        for (place, client) in clients.iter_mut().enumerate() {
            let (offset, mut pending) = ((place as u64 * 2 + 1) * MIB, HashMap::new());
            for step in 0..32 {
                let request = Request::new(READ, offset - MIB + step * 16_384, 16_384);
                let cookie = client.send(&request);
                pending.insert(cookie, request);
            }
            let data = noise(400_000, round * 3 + place as u64 + 1);
            expected[offset as usize..][..data.len()].copy_from_slice(&data);
            let request = Request::write(offset, &data);
            let (cookie, bytes) = client.encode(&request);
            let (before, after) = bytes.split_at(bytes.len() * (round as usize + 1) / 9);
            client.wire.send(before);
            pending.insert(cookie, request);
            halves.push((pending, after.to_vec()));
        }
        assert!(service.stop().success());
        assert_eq!(sessions(&manager).len(), 3, "{}", service.stderr());
        service = serve(&manager, &image);
        assert_eq!(manager.stored(), [] as [&str; 0], "removed before anybody is served");
        for (client, (mut pending, half)) in clients.iter_mut().zip(halves) {
            client.wire.send(&half);
            while !pending.is_empty() {
                let (cookie, answer) = client.recv_reply(&pending);
                let request = pending.remove(&cookie).unwrap();
                assert_eq!(answer.error, 0);
                if request.command != WRITE {
                    let there = &expected[request.offset as usize..][..16_384];
                    assert!(answer.data == there, "what was read in round {round}");
                }
            }
        }
    }
    assert!(read_at(&image, 0, expected.len()) == expected, "what was written");
    assert_eq!(service.stderr(), "");
}

#[test]
fn a_client_that_is_half_way_through_the_handshake_goes_on_with_it() {
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
fn a_crash_ends_sessions_and_they_do_not_come_back() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut one = client(&manager, Mode::Structured);
    assert!(service.stop().success());
    let mut service = serve(&manager, &image);
    one.assert_in_sync();
    service.signal(Signal::SIGKILL);
    service.ends();
    one.wire.expect_closed("its server was killed");
    assert!(manager.stored().is_empty());
    let _service = serve(&manager, &image);
    client(&manager, Mode::Structured).assert_in_sync();
}

/// What becomes of a session when something happens to what is kept; the service serves others.
fn closed_after(happens: impl FnOnce(&Manager, &Path)) -> String {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut one = client(&manager, Mode::Extended);
    assert!(service.stop().success());
    assert_eq!(sessions(&manager).len(), 1);
    happens(&manager, &image);
    let mut service = serve(&manager, &image);
    one.wire.expect_closed("it could not be taken over");
    client(&manager, Mode::Extended).assert_in_sync();
    assert!(manager.stored().is_empty());
    assert!(service.stop().success());
    service.stderr()
}

fn note_of(manager: &Manager) -> String {
    manager.stored().into_iter().find(|name| name.split('-').count() == 2).unwrap()
}

#[test]
fn another_version_of_the_program_closes_sessions() {
    let told = closed_after(|manager, _| {
        let name = note_of(manager);
        let mut bytes = Vec::new();
        let mut note = File::from(manager.take_from_store(&name));
        note.rewind().unwrap();
        note.read_to_end(&mut bytes).unwrap();
        bytes[11] += 1;
        manager.store(&name, sealed(&bytes));
    });
    assert!(told.contains("another version of the program"), "{told}");
}

fn sealed(bytes: &[u8]) -> OwnedFd {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let mut file = File::from(memfd_create(c"note", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.write_all(bytes).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
    file.into()
}

#[test]
fn without_the_note_sessions_are_closed() {
    let told = closed_after(|manager, _| drop(manager.take_from_store(&note_of(manager))));
    assert!(told.contains("notes came with them"), "{told}");
}

#[test]
fn a_disk_of_another_size_closes_sessions() {
    let told = closed_after(|_, image| {
        File::options().write(true).open(image).unwrap().set_len(4 * MIB).unwrap();
    });
    assert!(told.contains("the size of the disk is not what their clients were told"), "{told}");
}

#[test]
fn another_disk_of_the_same_name_and_size_closes_sessions() {
    let told = closed_after(|manager, image| {
        std::fs::rename(image, manager.path("old.img")).unwrap();
        sparse_image(manager.dir.path(), "disk.img", 8 * MIB);
    });
    assert!(told.contains("the disk itself is not what their clients were told"), "{told}");
}

#[test]
fn without_room_in_the_store_sessions_are_answered_and_closed() {
    let (manager, image) = manager();
    let manager = manager.env("FDSTORE", "1");
    let mut service = serve(&manager, &image);
    let mut one = client(&manager, Mode::Simple);
    one.assert_in_sync();
    assert!(service.stop().success());
    one.wire.expect_closed("there is no room");
    assert!(manager.stored().is_empty());
}

#[test]
fn a_disk_that_cannot_be_served_any_more_leaves_no_client_hanging() {
    let (manager, image) = manager();
    let mut service = serve(&manager, &image);
    let mut one = client(&manager, Mode::Simple);
    assert!(service.stop().success());
    std::fs::rename(&image, manager.path("elsewhere")).unwrap();
    let mut service = manager.start(Handed::Nbd, "serve --file", &[&image]);
    assert_eq!(service.ends().code(), Some(78));
    one.wire.expect_closed("its disk is gone");
    wait_until("the store to be empty", || manager.stored().is_empty());
}

//! Disks of the same size, which a proxy tells apart by their ids.

use crate::{builder_of, proxy_of, status, wait_for_status};
use harness::host::{Host, MIRROR_STARTED};
use harness::manager::{Inherited, ServiceManager};
use harness::session::{Mode, Request, Session};
use harness::{
    Endpoint, MIB, Program, Server, TempDir, read_at, sparse_file, temp_dir_in, wait_until,
};
use std::path::PathBuf;

/// A file system whose files have attributes.
const PARENT: &str = harness::FILE_SYSTEMS[0];

/// Two hosts at one address, each with a disk of 1 MiB.
fn two_disks() -> (TempDir, Host, Host) {
    let dir = temp_dir_in(PARENT);
    let right = Host::new(dir.path(), "right");
    let wrong = Host::new(dir.path(), "wrong").at(right.address);
    for host in [&right, &wrong] {
        sparse_file(&host.image, MIB);
    }
    (dir, right, wrong)
}

/// Starts the server of a disk, and returns its id.
#[track_caller]
fn serve(host: &Host) -> (Server, String) {
    let server = host.serve();
    let id = host.wait_for_disk_id();
    (server, id)
}

/// A proxy of the disk at the address of this host, a client, and its control socket.
#[track_caller]
fn client_of(host: &Host, dir: &TempDir) -> (Server, Session, PathBuf) {
    let sock = dir.path().join("proxy.sock");
    let options = format!("--quiet --sock {}", sock.display());
    let proxy = proxy_of(&[&Endpoint::Tcp(host.address)], &options);
    let session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    (proxy, session, sock)
}

#[track_caller]
fn wait_for_refusal(sock: &std::path::Path, id: &str) {
    let why = format!("its disk has the id {id}");
    wait_until("the proxy to refuse the other disk", || {
        status(sock)
            .get("upstream_error")
            .is_some_and(|error| error.contains(&why.replace(' ', "%20")))
    });
}

#[test]
fn another_disk_of_the_same_size_is_refused() {
    let (dir, right, wrong) = two_disks();
    let (server, id) = serve(&right);
    let (_proxy, mut session, sock) = client_of(&right, &dir);
    assert_eq!(status(&sock)["disk_id"], id);
    session.ok(Request::write(0, b"hello"));
    drop(server);
    let (server, other) = serve(&wrong);
    assert_ne!(other, id);
    wait_for_refusal(&sock, &other);
    assert_eq!(
        (&status(&sock)["upstream_connected"], &status(&sock)["disk_id"]),
        (&"false".into(), &id)
    );
    drop(server);
    assert_eq!(read_at(&wrong.image, 0, 5), [0; 5], "the other disk is unchanged");
    let (_server, again) = serve(&right);
    assert_eq!(again, id, "a restart changes no id");
    assert_eq!(session.read(0, 5), b"hello");
}

#[test]
fn a_disk_without_an_id_is_accepted() {
    let (dir, right, without) = two_disks();
    drop(serve(&right));
    // A disk that is served read-only gets no id.
    let serve = |host: &Host| host.mode("serve").args(["--read-only"]).start();
    let server = serve(&right);
    let (_proxy, mut session, sock) = client_of(&right, &dir);
    let id = status(&sock)["disk_id"].clone();
    assert_eq!(id, right.disk_id());
    drop(server);
    wait_for_status(&sock, "upstream_connected", "false");
    let server = serve(&without);
    session.assert_in_sync();
    assert_eq!((without.status_of("disk_id"), without.disk_id()), (String::new(), String::new()));
    assert_eq!(status(&sock)["disk_id"], id, "it is remembered");
    drop(server);
    // So a disk with another id is still refused.
    drop(self::serve(&without));
    let _server = serve(&without);
    wait_for_refusal(&sock, &without.disk_id());
}

#[test]
fn a_proxy_of_a_proxy_gets_the_id() {
    let (dir, right, _) = two_disks();
    let (_server, id) = serve(&right);
    let (first, ..) = client_of(&right, &dir);
    let sock = dir.path().join("second.sock");
    let _second = builder_of(&[first.endpoint()], &format!("--sock {}", sock.display())).start();
    assert_eq!(status(&sock)["disk_id"], id);
}

/// A restarted proxy cannot know the id, but the sessions of the process before it do.
#[test]
fn sessions_are_not_restored_on_another_disk() {
    let (_dir, right, wrong) = two_disks();
    let manager = ServiceManager::new().env("FDSTORE", "9");
    let start = || {
        let command = format!("proxy --to nbd://{}", right.address);
        let service = manager.start(Inherited::Nbd, &command, &[]);
        manager.wait_for("READY=1");
        service
    };
    let (server, _) = serve(&right);
    let mut service = start();
    let mut session = Session::open(&Endpoint::Tcp(manager.address()), Mode::Structured).unwrap();
    session.assert_in_sync();
    assert!(service.stop().success());
    let mut service = start();
    session.assert_in_sync();
    assert!(service.stop().success());
    drop(server);
    let _server = serve(&wrong);
    let service = start();
    session.wire.expect_closed("the disk is another one");
    let why = "the disk itself is not what their clients were told";
    wait_until("the reason in the log", || service.stderr().contains(why));
}

#[test]
fn the_id_moves_to_and_fro_with_the_disk() {
    let dir = temp_dir_in(PARENT);
    let (a, b) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
    for host in [&a, &b] {
        sparse_file(&host.image, MIB);
    }
    // The image of the destination had another disk.
    drop(serve(&b));
    let before = b.disk_id();
    let (mut serving, id) = serve(&a);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let mut listening = to.listen();
        assert_eq!(from.mirror_to(to.address, &[]), MIRROR_STARTED);
        assert!(serving.wait_for_end().success(), "{}", serving.stderr());
        assert!(listening.wait_for_end().success(), "{}", listening.stderr());
        assert_eq!((to.disk_id(), from.disk_id()), (id.clone(), String::new()));
        serving = to.serve();
        assert_eq!(to.status_of("disk_id"), id, "at once, since it is durable");
    }
    assert!(serving.stop().success());
    assert_ne!(before, id);
    // The copy that has departed is adopted: it may be older than what clients have seen.
    Program::flexnbd("adopt --force --file").args([&b.image]).ok();
    let adopted = b.disk_id();
    assert!(!adopted.is_empty() && adopted != id && adopted != before, "{adopted}");
    // Without need for force the disk keeps its id.
    let c = Host::new(dir.path(), "c");
    sparse_file(&c.image, MIB);
    let (_, id) = serve(&c);
    Program::flexnbd("adopt --file").args([&c.image]).ok();
    assert_eq!((c.record(), c.disk_id()), ("ours".to_owned(), id));
}

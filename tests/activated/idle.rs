//! `--idle-exit`: when a service with nothing to do ends, and what keeps it from that.

use crate::manager::{Handed, Manager};
use harness::{Builder, MIB, Server, sparse_image, temp_dir, wait_until, write_at};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The shortest time that can be asked for.
const LINE: &str = "serve --idle-exit 1 --file";
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_service_that_nobody_uses_ends_well_and_says_that_it_stops() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let began = Instant::now();
    let mut service = manager.start(Handed::NbdAndControl, LINE, &[&image]);
    assert_eq!(service.ends().code(), Some(0));
    assert!(began.elapsed() >= SECOND);
    manager.wait_for("STOPPING=1");
}

#[test]
fn a_client_keeps_it_be_it_in_the_handshake_only_and_the_time_begins_when_it_leaves() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Handed::NbdAndControl, LINE, &[&image]);
    let mut client = TcpStream::connect(manager.address()).unwrap();
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    std::thread::sleep(3 * SECOND / 2);
    assert!(service.is_running());
    let left = Instant::now();
    drop(client);
    assert_eq!(service.ends().code(), Some(0));
    assert!(left.elapsed() >= SECOND, "it ended {:?} after its client", left.elapsed());
}

#[test]
fn whoever_comes_afterwards_waits_for_the_next_process() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Handed::NbdAndControl, LINE, &[&image]);
    assert_eq!(service.ends().code(), Some(0));
    let mut client = TcpStream::connect(manager.address()).unwrap();
    let mut service = manager.start(Handed::NbdAndControl, LINE, &[&image]);
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    drop(client);
    assert_eq!(service.ends().code(), Some(0));
}

#[test]
fn orders_are_answered_and_do_not_keep_it() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Handed::NbdAndControl, LINE, &[&image]);
    manager.wait_for("READY=1");
    let mut orders = 0;
    while service.is_running() {
        let mut stream = UnixStream::connect(manager.control()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        stream.write_all(b"status\n\n").unwrap();
        let mut reply = String::new();
        // One that comes too late waits in the socket for the next process.
        let answered = stream.read_to_string(&mut reply).is_ok() && !reply.is_empty();
        let expected = reply.starts_with("0: pid=") || reply == "1: the server is stopping\n";
        assert!(!answered || expected, "{reply}");
        orders += u32::from(answered);
    }
    assert!(orders > 0);
    assert_eq!(service.ends().code(), Some(0));
}

/// A server that ends when idle, with its control socket.
fn idler(dir: &std::path::Path) -> Server {
    let image = sparse_image(dir, "from.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    let socket = dir.join("control.sock");
    let server = Builder::serve(&image).args(["--idle-exit", "1", "--sock"]).args([&socket]);
    let server = server.start();
    wait_until("the control socket", || socket.exists());
    server
}

#[test]
fn a_migration_keeps_it() {
    let dir = temp_dir();
    let to = sparse_image(dir.path(), "to.img", MIB);
    let destination = Builder::mode("listen", &to).start();
    let mut source = idler(dir.path());
    let mut stream = UnixStream::connect(dir.path().join("control.sock")).unwrap();
    let port = destination.port();
    // For two seconds at least.
    let order = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n524288\n\n");
    stream.write_all(order.as_bytes()).unwrap();
    let status = source.wait_for_end();
    assert_eq!(status.code(), Some(0), "{}", source.stderr());
    let moved = std::fs::read(&to).unwrap();
    assert!(moved.iter().all(|byte| *byte == 7), "it ended before the disk had moved");
}

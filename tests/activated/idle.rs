//! `--idle-exit`: when an idle service exits, and what counts as activity.

use harness::manager::{Inherited, ServiceManager};
use harness::{Builder, MIB, Server, sparse_image, temp_dir, wait_until, write_at};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A server with the shortest idle time, one second.
const SERVE: &str = "serve --idle-exit 1 --file";
const SECOND: Duration = Duration::from_secs(1);

#[test]
fn an_unused_service_exits_and_reports_stopping() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let began = Instant::now();
    let mut service = manager.start(Inherited::NbdAndControl, SERVE, &[&image]);
    assert_eq!(service.wait_for_exit().code(), Some(0));
    assert!(began.elapsed() >= SECOND);
    manager.wait_for("STOPPING=1");
}

#[test]
fn a_handshaking_client_postpones_the_idle_exit() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Inherited::NbdAndControl, SERVE, &[&image]);
    let mut client = TcpStream::connect(manager.address()).unwrap();
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    std::thread::sleep(3 * SECOND / 2);
    assert!(service.is_running());
    let left = Instant::now();
    drop(client);
    assert_eq!(service.wait_for_exit().code(), Some(0));
    assert!(left.elapsed() >= SECOND, "exit {:?} after the client left", left.elapsed());
}

#[test]
fn later_clients_wait_for_the_next_process() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Inherited::NbdAndControl, SERVE, &[&image]);
    assert_eq!(service.wait_for_exit().code(), Some(0));
    let mut client = TcpStream::connect(manager.address()).unwrap();
    let mut service = manager.start(Inherited::NbdAndControl, SERVE, &[&image]);
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).unwrap();
    drop(client);
    assert_eq!(service.wait_for_exit().code(), Some(0));
}

#[test]
fn control_commands_do_not_postpone_the_idle_exit() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Inherited::NbdAndControl, SERVE, &[&image]);
    manager.wait_for("READY=1");
    let mut replies = 0;
    while service.is_running() {
        let mut stream = UnixStream::connect(manager.control()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        stream.write_all(b"status\n\n").unwrap();
        let mut reply = String::new();
        // A late connection waits in the backlog for the next process.
        let answered = stream.read_to_string(&mut reply).is_ok() && !reply.is_empty();
        let expected = reply.starts_with("0: pid=") || reply == "1: the server is stopping\n";
        assert!(!answered || expected, "{reply}");
        replies += u32::from(answered);
    }
    assert!(replies > 0);
    assert_eq!(service.wait_for_exit().code(), Some(0));
}

/// A server with `--idle-exit 1` and a control socket.
fn start_idle_server(dir: &std::path::Path) -> Server {
    let image = sparse_image(dir, "from.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    let socket = dir.join("control.sock");
    let server = Builder::serve(&image).args(["--idle-exit", "1", "--sock"]).args([&socket]);
    let server = server.start();
    wait_until("the control socket", || socket.exists());
    server
}

#[test]
fn a_migration_postpones_the_idle_exit() {
    let dir = temp_dir();
    let to = sparse_image(dir.path(), "to.img", MIB);
    let destination = Builder::mode("listen", &to).start();
    let mut source = start_idle_server(dir.path());
    let mut stream = UnixStream::connect(dir.path().join("control.sock")).unwrap();
    let port = destination.port();
    // At this speed the migration takes at least two seconds.
    let mirror = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n524288\n\n");
    stream.write_all(mirror.as_bytes()).unwrap();
    let status = source.wait_for_end();
    assert_eq!(status.code(), Some(0), "{}", source.stderr());
    let moved = std::fs::read(&to).unwrap();
    assert!(moved.iter().all(|byte| *byte == 7), "the source exited before the copy was complete");
}

//! A service that can no longer work exits, or stops feeding the watchdog, so that the service
//! manager restarts it.

use crate::degraded::send_command;
use harness::manager::{Inherited, ServiceManager};
use harness::mount::mount_nbd_as_file;
use harness::{Builder, GIB, MIB, require_tool, run, sparse_image, temp_dir, wait_until, write_at};
use nix::sys::signal::Signal;
use std::net::TcpStream;
use std::time::Duration;

#[test]
fn a_server_unable_to_accept_exits_with_1() {
    if !require_tool("prlimit") {
        return;
    }
    let manager = ServiceManager::new().env("WATCHDOG_USEC", "100000");
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    // poll(2) refuses more descriptors than a process may have.
    run("prlimit", &["--pid", &service.pid().to_string(), "--nofile=0:0"]);
    // Wakes its poll(2).
    let _client = TcpStream::connect(manager.address()).unwrap();
    assert_eq!(service.wait_for_exit().code(), Some(1));
    let log = service.stderr();
    let why = "no longer accepting clients: ";
    assert!(log.lines().any(|line| line.contains(":F:") && line.contains(why)), "{log}");
    // It cannot open another descriptor, and must still notify.
    assert!(!log.contains("cannot notify"), "{log}");
    manager.wait_for_status(why);
}

#[test]
fn a_healthy_service_feeds_the_watchdog() {
    let manager = ServiceManager::new().env("WATCHDOG_USEC", "100000");
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for mode in ["serve", "listen"] {
        let mut service =
            manager.start(Inherited::NbdAndControl, &format!("{mode} --file"), &[&image]);
        for _ in 0..5 {
            manager.wait_for("WATCHDOG=1");
        }
        // A client that stays silent in the handshake blocks nothing.
        let _client = TcpStream::connect(manager.address()).unwrap();
        for _ in 0..5 {
            manager.wait_for("WATCHDOG=1");
        }
        service.stop();
    }
}

#[test]
fn a_migration_feeds_the_watchdog_until_its_end() {
    let (manager, dir) = (ServiceManager::new().env("WATCHDOG_USEC", "100000"), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let mut destination = Builder::mode("listen", &to).start();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let mirror = format!("mirror\n127.0.0.1\n{}\nexit\n0.0.0.0\n524288", destination.port());
    assert_eq!(send_command(&manager.control(), &mirror), "0: Mirror started\n");
    for _ in 0..10 {
        manager.wait_for("WATCHDOG=1");
    }
    assert_eq!(service.wait_for_exit().code(), Some(0));
    assert_eq!(destination.wait_for_end().code(), Some(0));
    let log = service.stderr();
    assert!(!log.contains("not feeding the watchdog"), "{log}");
}

#[test]
fn blocked_reads_starve_the_watchdog_until_they_return() {
    let (manager, dir) = (ServiceManager::new().env("WATCHDOG_USEC", "200000"), temp_dir());
    // Larger than the kernel's readahead, so that most of it is never in the page cache.
    let backing = sparse_image(dir.path(), "far.img", GIB);
    let backing = Builder::serve(&backing).start();
    let Some(disk) = mount_nbd_as_file(&backing.uri(), &dir.path().join("mount")) else { return };
    let mut service = manager.start(Inherited::NbdAndControl, "serve -v --file", &[&disk.file]);
    manager.wait_for("WATCHDOG=1");
    backing.signal(Signal::SIGSTOP);
    let starving = "the disk has not answered for 0 s; not feeding the watchdog until it does";
    wait_until("the warning", || service.stderr().contains(starving));
    manager.messages();
    // No event ends this wait: the test is that no message arrives.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(manager.messages(), Vec::<String>::new());
    backing.signal(Signal::SIGCONT);
    manager.wait_for("WATCHDOG=1");
    wait_until("the recovery", || service.stderr().contains("everything makes progress again"));
    assert_eq!(service.stop().code(), Some(0));
    disk.unmount();
}

//! A service that cannot do its work any more ends, or is ended, so that it is started again.

use crate::manager::{Handed, Manager};
use crate::refusing::order;
use harness::mount::mount_nbd_as_file;
use harness::{Builder, GIB, MIB, require_tool, run, sparse_image, temp_dir, wait_until, write_at};
use nix::sys::signal::Signal;
use std::net::TcpStream;
use std::time::Duration;

#[test]
fn a_server_that_can_let_nobody_in_any_more_ends_with_an_error() {
    if !require_tool("prlimit") {
        return;
    }
    let manager = Manager::new().env("WATCHDOG_USEC", "100000");
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    // poll(2) refuses more descriptors than a process may have.
    run("prlimit", &["--pid", &service.pid().to_string(), "--nofile=0:0"]);
    // Makes it look up.
    let _client = TcpStream::connect(manager.address()).unwrap();
    assert_eq!(service.ends().code(), Some(1));
    let log = service.stderr();
    let why = "no longer accepting clients: ";
    assert!(log.lines().any(|line| line.contains(":F:") && line.contains(why)), "{log}");
    // It has no descriptor left to open, and still says so.
    assert!(!log.contains("cannot notify"), "{log}");
    manager.wait_for_status(why);
}

#[test]
fn the_watchdog_is_fed_for_as_long_as_all_goes_well_and_while_the_service_stops() {
    let manager = Manager::new().env("WATCHDOG_USEC", "100000");
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for mode in ["serve", "listen"] {
        let mut service =
            manager.start(Handed::NbdAndControl, &format!("{mode} --file"), &[&image]);
        for _ in 0..5 {
            manager.wait_for("WATCHDOG=1");
        }
        // A client that neither greets nor leaves holds nothing up.
        let _client = TcpStream::connect(manager.address()).unwrap();
        for _ in 0..5 {
            manager.wait_for("WATCHDOG=1");
        }
        service.stop();
    }
}

#[test]
fn a_migration_does_not_starve_the_watchdog_up_to_its_end() {
    let (manager, dir) = (Manager::new().env("WATCHDOG_USEC", "100000"), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let mut destination = Builder::mode("listen", &to).start();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let mirror = format!("mirror\n127.0.0.1\n{}\nexit\n0.0.0.0\n524288", destination.port());
    assert_eq!(order(&manager.control(), &mirror), "0: Mirror started\n");
    for _ in 0..10 {
        manager.wait_for("WATCHDOG=1");
    }
    assert_eq!(service.ends().code(), Some(0));
    assert_eq!(destination.wait_for_end().code(), Some(0));
    let log = service.stderr();
    assert!(!log.contains("not feeding the watchdog"), "{log}");
}

#[test]
fn a_disk_whose_reads_do_not_return_starves_the_watchdog_until_they_do() {
    let (manager, dir) = (Manager::new().env("WATCHDOG_USEC", "200000"), temp_dir());
    // Larger than what the kernel reads ahead, so that most of it is never in memory.
    let far = sparse_image(dir.path(), "far.img", GIB);
    let far = Builder::serve(&far).start();
    let Some(disk) = mount_nbd_as_file(&far.uri(), &dir.path().join("mount")) else { return };
    let mut service = manager.start(Handed::NbdAndControl, "serve -v --file", &[&disk.file]);
    manager.wait_for("WATCHDOG=1");
    far.signal(Signal::SIGSTOP);
    let starving = "the disk has not answered for 0 s; not feeding the watchdog until it does";
    wait_until("the complaint", || service.stderr().contains(starving));
    manager.messages();
    // There is nothing to wait for: nothing must happen.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(manager.messages(), Vec::<String>::new());
    far.signal(Signal::SIGCONT);
    manager.wait_for("WATCHDOG=1");
    wait_until("the relief", || service.stderr().contains("everything makes progress again"));
    assert_eq!(service.stop().code(), Some(0));
    disk.unmount();
}

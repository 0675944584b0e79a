//! Messages to the service manager: status, reload, and extensions of timeouts.

use crate::degraded::{record, send_command};
use harness::manager::{Inherited, ServiceManager};
use harness::{Builder, KIB, MIB, sparse_image, temp_dir, wait_until, write_at};
use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;

/// A client that has received the greeting.
fn client(manager: &ServiceManager) -> TcpStream {
    let mut client = TcpStream::connect(manager.address()).unwrap();
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    client
}

#[test]
fn the_status_names_image_address_and_client_count() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", 3 * MIB);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let start = format!("serving {} (3 MiB) on {}, ", image.display(), manager.address());
    manager.wait_for_status(&format!("{start}no clients"));
    let first = client(&manager);
    manager.wait_for_status(&format!("{start}1 client\n"));
    let second = client(&manager);
    manager.wait_for_status(&format!("{start}2 clients"));
    drop((first, second));
    manager.wait_for_status(&format!("{start}no clients"));
    assert_eq!(service.stop().code(), Some(0));
    let messages = manager.messages();
    assert!(messages.iter().any(|message| message == "STOPPING=1\n"), "{messages:?}");
    assert!(
        messages.iter().any(|message| message.starts_with("EXTEND_TIMEOUT_USEC=")),
        "{messages:?}"
    );
}

#[test]
fn start_and_end_of_every_reload_are_announced() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let config = manager.path("disk.conf");
    std::fs::write(&config, format!("FILE={}\n", image.display())).unwrap();
    let mut service = manager.start(Inherited::NbdAndControl, "serve --config", &[&config]);
    manager.wait_for("READY=1");
    for (text, reply) in [(format!("FILE={}\n", image.display()), "0: "), ("?\n".into(), "1: ")] {
        std::fs::write(&config, text).unwrap();
        assert!(send_command(&manager.control(), "reload").starts_with(reply));
        let messages = manager.wait_for("READY=1");
        let reloading = messages.iter().find(|message| message.starts_with("RELOADING=1\n"));
        assert!(
            reloading.is_some_and(|message| message.contains("MONOTONIC_USEC=")),
            "{messages:?}"
        );
    }
    assert_eq!(service.stop().code(), Some(0));
}

/// An image full of data.
fn full_image(directory: &Path) -> std::path::PathBuf {
    let image = sparse_image(directory, "from.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    image
}

#[test]
fn the_status_shows_migration_progress_and_destination() {
    let (manager, dir) = (ServiceManager::new(), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let mut destination = Builder::mode("listen", &to).start();
    let image = full_image(manager.dir.path());
    let mut service = manager.start(Inherited::NbdAndControl, "serve -v --file", &[&image]);
    manager.wait_for("READY=1");
    let port = destination.port();
    let mirror = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n{}", 256 * KIB);
    assert_eq!(send_command(&manager.control(), &mirror), "0: Mirror started\n");
    let start = format!("moving {} to 127.0.0.1:{port}: ", image.display());
    let messages = manager.wait_for_status(" % copied, ");
    assert!(messages.last().unwrap().contains(&start), "{messages:?}");
    manager.wait_for_status(&format!("the disk has moved to 127.0.0.1:{port}"));
    assert_eq!(service.wait_for_exit().code(), Some(0));
    assert_eq!(destination.wait_for_end().code(), Some(0));
    let lines = service.stderr();
    let count = lines.lines().filter(|line| line.contains(" % copied, ")).count();
    assert!((2..=10).contains(&count), "the log has {count} lines of progress: {lines}");
}

#[test]
fn the_status_keeps_a_failed_migration() {
    let manager = ServiceManager::new();
    let image = full_image(manager.dir.path());
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let unused_port = harness::free_port();
    let mirror = format!("mirror\n127.0.0.1\n{unused_port}");
    assert!(send_command(&manager.control(), &mirror).starts_with("1: Mirror failed to connect"));
    manager.wait_for_status(&format!(
        ", no clients; the migration to 127.0.0.1:{unused_port} failed: "
    ));
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn aborting_a_migration_extends_the_stop_timeout() {
    let (manager, dir) = (ServiceManager::new(), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let destination = Builder::mode("listen", &to).start();
    let image = full_image(manager.dir.path());
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let port = destination.port();
    let mirror = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n{}", 32 * KIB);
    assert_eq!(send_command(&manager.control(), &mirror), "0: Mirror started\n");
    assert_eq!(service.stop().code(), Some(1));
    let messages = manager.messages().concat();
    let stop = messages.find("STOPPING=1").unwrap();
    let aborting = messages.find("STATUS=stopping: breaking the migration off").unwrap();
    let extension = messages.find("EXTEND_TIMEOUT_USEC=").unwrap();
    assert!(stop < aborting && aborting < extension, "{messages}");
    assert!(messages.contains("while the disk was being moved"), "{messages}");
}

#[test]
fn querying_another_host_at_startup_extends_the_timeout() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let unused_port = harness::free_port();
    record(
        &manager,
        &image,
        &format!("departing id={ID} before=native to=127.0.0.1:{unused_port}"),
    );
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    let messages = manager.wait_for("READY=1").concat();
    assert!(
        messages.contains(&format!("STATUS=asking 127.0.0.1:{unused_port} whether")),
        "{messages}"
    );
    assert!(messages.contains("EXTEND_TIMEOUT_USEC="), "{messages}");
    wait_until("the refusal", || {
        send_command(&manager.control(), "status").contains("only 127.0.0.1")
    });
    assert_eq!(service.stop().code(), Some(0));
}

const ID: &str = "0123456789abcdef0123456789abcdef";

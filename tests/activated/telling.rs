//! What the service manager hears: how the service is, and for how long it has to wait.

use crate::manager::{Handed, Manager};
use crate::refusing::{order, record};
use harness::{Builder, KIB, MIB, sparse_image, temp_dir, wait_until, write_at};
use std::io::Read as _;
use std::net::TcpStream;
use std::path::Path;

/// A client that was greeted.
fn client(manager: &Manager) -> TcpStream {
    let mut client = TcpStream::connect(manager.address()).unwrap();
    client.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    client
}

#[test]
fn the_status_tells_what_is_served_where_and_to_how_many() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", 3 * MIB);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
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
    let heard = manager.messages();
    assert!(heard.iter().any(|message| message == "STOPPING=1\n"), "{heard:?}");
    assert!(heard.iter().any(|message| message.starts_with("EXTEND_TIMEOUT_USEC=")), "{heard:?}");
}

#[test]
fn a_reload_is_announced_and_its_end_as_well_be_it_good_or_not() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let config = manager.path("disk.conf");
    std::fs::write(&config, format!("FILE={}\n", image.display())).unwrap();
    let mut service = manager.start(Handed::NbdAndControl, "serve --config", &[&config]);
    manager.wait_for("READY=1");
    for (text, reply) in [(format!("FILE={}\n", image.display()), "0: "), ("?\n".into(), "1: ")] {
        std::fs::write(&config, text).unwrap();
        assert!(order(&manager.control(), "reload").starts_with(reply));
        let heard = manager.wait_for("READY=1");
        let reloading = heard.iter().find(|message| message.starts_with("RELOADING=1\n"));
        assert!(reloading.is_some_and(|message| message.contains("MONOTONIC_USEC=")), "{heard:?}");
    }
    assert_eq!(service.stop().code(), Some(0));
}

/// An image full of data that a manager's service serves.
fn full(directory: &Path) -> std::path::PathBuf {
    let image = sparse_image(directory, "from.img", MIB);
    write_at(&image, 0, &vec![7; MIB as usize]);
    image
}

#[test]
fn a_migration_tells_how_far_it_is_and_at_the_end_where_the_disk_went() {
    let (manager, dir) = (Manager::new(), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let mut destination = Builder::mode("listen", &to).start();
    let image = full(manager.dir.path());
    let mut service = manager.start(Handed::NbdAndControl, "serve -v --file", &[&image]);
    manager.wait_for("READY=1");
    let port = destination.port();
    let mirror = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n{}", 256 * KIB);
    assert_eq!(order(&manager.control(), &mirror), "0: Mirror started\n");
    let start = format!("moving {} to 127.0.0.1:{port}: ", image.display());
    let heard = manager.wait_for_status(" % copied, ");
    assert!(heard.last().unwrap().contains(&start), "{heard:?}");
    manager.wait_for_status(&format!("the disk has moved to 127.0.0.1:{port}"));
    assert_eq!(service.ends().code(), Some(0));
    assert_eq!(destination.wait_for_end().code(), Some(0));
    let lines = service.stderr();
    let count = lines.lines().filter(|line| line.contains(" % copied, ")).count();
    assert!((2..=10).contains(&count), "the log has {count} lines of progress: {lines}");
}

#[test]
fn a_migration_that_does_not_happen_is_remembered_in_the_status() {
    let manager = Manager::new();
    let image = full(manager.dir.path());
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let nobody = harness::free_port();
    let mirror = format!("mirror\n127.0.0.1\n{nobody}");
    assert!(order(&manager.control(), &mirror).starts_with("1: Mirror failed to connect"));
    manager.wait_for_status(&format!(", no clients; the migration to 127.0.0.1:{nobody} failed: "));
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn a_stop_that_has_to_break_a_migration_off_asks_for_the_time() {
    let (manager, dir) = (Manager::new(), temp_dir());
    let to = sparse_image(dir.path(), "to.img", MIB);
    let destination = Builder::mode("listen", &to).start();
    let image = full(manager.dir.path());
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let port = destination.port();
    let mirror = format!("mirror\n127.0.0.1\n{port}\nexit\n0.0.0.0\n{}", 32 * KIB);
    assert_eq!(order(&manager.control(), &mirror), "0: Mirror started\n");
    assert_eq!(service.stop().code(), Some(1));
    let heard = manager.messages().concat();
    let stop = heard.find("STOPPING=1").unwrap();
    let breaking = heard.find("STATUS=stopping: breaking the migration off").unwrap();
    let longer = heard.find("EXTEND_TIMEOUT_USEC=").unwrap();
    assert!(stop < breaking && breaking < longer, "{heard}");
    assert!(heard.contains("while the disk was being moved"), "why it failed: {heard}");
}

#[test]
fn asking_another_host_at_the_start_asks_for_the_time() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let nobody = harness::free_port();
    record(&manager, &image, &format!("departing id={ID} before=native to=127.0.0.1:{nobody}"));
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    let heard = manager.wait_for("READY=1").concat();
    assert!(heard.contains(&format!("STATUS=asking 127.0.0.1:{nobody} whether")), "{heard}");
    assert!(heard.contains("EXTEND_TIMEOUT_USEC="), "{heard}");
    wait_until("the refusal", || order(&manager.control(), "status").contains("only 127.0.0.1"));
    assert_eq!(service.stop().code(), Some(0));
}

const ID: &str = "0123456789abcdef0123456789abcdef";

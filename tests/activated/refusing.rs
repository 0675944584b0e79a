//! A service that cannot serve: stays for those who wait, ends at once when nobody does.

use crate::manager::{Handed, Manager, Service};
use harness::{MIB, restore_default_signals, sparse_image, wait_until};
use nix::sys::signal::Signal;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bad configuration (sysexits.h).
const EXIT_CONFIG: Option<i32> = Some(78);
const EXIT_USAGE: Option<i32> = Some(2);

/// An image that has moved away.
fn departed(manager: &Manager) -> PathBuf {
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let id = "0123456789abcdef0123456789abcdef";
    record(manager, &image, &format!("departed id={id} when=1700000000 to=192.0.2.7:10809"));
    image
}

/// Gives the image this record.
pub(crate) fn record(manager: &Manager, image: &Path, record: &str) {
    let record = format!("flexnbd 1 {record}\n");
    if xattr::set(image, "user.flexnbd", record.as_bytes()).is_err() {
        // Where that cannot be, records are files.
        let name = image.display().to_string().replace('/', "%2F");
        std::fs::write(manager.path(&name), record).unwrap();
    }
}

/// A client that has connected, though nobody has accepted it yet.
pub(crate) fn client(manager: &Manager) -> TcpStream {
    let stream = TcpStream::connect(manager.address()).unwrap();
    stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    stream
}

/// It was closed without a byte.
#[track_caller]
pub(crate) fn was_refused(mut client: TcpStream) {
    let mut nothing = Vec::new();
    client.read_to_end(&mut nothing).unwrap();
    assert_eq!(nothing, b"");
}

/// What the control socket answers.
pub(crate) fn order(path: &Path, order: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    stream.write_all(format!("{order}\n\n").as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

/// It refuses everybody for this reason until it is stopped, and ends well then.
#[track_caller]
fn stays_and_refuses(manager: &Manager, service: &mut Service, reason: &str) {
    let heard = manager.wait_for("READY=1");
    let told = [heard, manager.wait_for_status("refusing clients: ")].concat();
    let status = told.last().unwrap();
    assert!(status.contains(reason), "{status}");
    for _ in 0..100 {
        was_refused(client(manager));
    }
    for command in ["status", "reload", "acl\n127.0.0.1", "break"] {
        let reply = order(&manager.control(), command);
        assert!(reply.starts_with("1: ") && reply.contains(reason), "{command}: {reply}");
    }
    assert!(service.is_running());
    assert_eq!(service.stop().code(), Some(0));
    assert!(manager.messages().iter().any(|message| message == "STOPPING=1\n"));
    let log = service.stderr();
    let lines = |part: &str| log.lines().filter(|line| line.contains(part)).count();
    assert_eq!(lines(":E:"), 1, "why, once: {log}");
    assert_eq!(lines("refusing clients: "), 1, "{log}");
    assert_eq!(lines("refused 127.0.0.1:"), 1, "the first client at once, others later: {log}");
}

#[test]
fn a_disk_that_has_moved_is_refused_until_the_service_is_stopped() {
    let manager = Manager::new();
    let image = departed(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    stays_and_refuses(&manager, &mut service, "has moved to 192.0.2.7:10809");
}

#[test]
fn whoever_refuses_leaves_the_disk_to_others() {
    let manager = Manager::new();
    let image = departed(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    let adopt = Command::new(env!("CARGO_BIN_EXE_flexnbd"))
        .args(["adopt", "--force", "--file"])
        .arg(&image)
        .env("STATE_DIRECTORY", manager.dir.path())
        .output()
        .unwrap();
    assert!(adopt.status.success(), "{adopt:?}");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn without_a_handed_control_socket_the_configured_one_tells_why() {
    let manager = Manager::new();
    let image = departed(&manager);
    let socket = manager.path("own.sock");
    let line = format!("serve --sock {} --file", socket.display());
    let mut service = manager.start(Handed::Nbd, &line, &[&image]);
    manager.wait_for("READY=1");
    let reply = order(&socket, "status");
    assert!(reply.starts_with("1: ") && reply.contains("has moved to"), "{reply}");
    assert_eq!(service.stop().code(), Some(0));
    assert!(!socket.exists());
}

/// Ways to be unable to serve: the rest of the command line, and words of the reason.
fn troubles(manager: &Manager) -> Vec<(String, &'static str)> {
    let dir = manager.dir.path().display();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    std::fs::write(manager.path("bad.conf"), "FILE=/a\nBOGUS=1\n").unwrap();
    std::fs::write(manager.path("empty.conf"), "READ_ONLY=yes\n").unwrap();
    let image = image.display();
    vec![
        (format!("--file {dir}/none"), "/none does not exist"),
        (format!("--file {dir}"), "is a directory"),
        (format!("--config {dir}/bad.conf"), "bad.conf, line 2: unknown key BOGUS"),
        (format!("--config {dir}/none.conf"), "cannot read the configuration file"),
        (format!("--config {dir}/empty.conf"), "has no FILE="),
        (format!("--file {image} --port 1"), "--port needs --addr as well"),
    ]
}

#[test]
fn messages_of_a_service_name_keys_and_file() {
    let manager = Manager::new();
    let place = manager.dir.path().to_owned();
    let manager = manager.env("FLEXNBD_CONFIGURATIONS", place);
    let dir = manager.dir.path().display();
    let conf = |text: String| std::fs::write(manager.path("disk.conf"), text).unwrap();
    for (text, reason) in [
        (format!("FILE={dir}/none\n"), "CREATE=SIZE in "),
        (format!("FILE={dir}/none\nPORT=7\n"), "/disk.conf: PORT needs ADDR as well"),
        ("READ_ONLY=yes\n".to_owned(), "/disk.conf has no FILE="),
        (format!("FILE={dir}/none\nCREATE=1M\nADDR=::\nPORT=0\n"), "a port that is not 0"),
        ("FILE=none\nCREATE=1M\n".to_owned(), "FILE: none: a path in a unit begins with /"),
    ] {
        conf(text);
        let mut service =
            manager.start(Handed::NbdAndControl, &format!("serve --config {dir}/disk.conf"), &[]);
        assert!(!service.ends().success());
        let log = service.stderr();
        assert!(log.contains(reason) && !log.contains("--create"), "{log}");
        assert!(!log.contains("--port needs") && !log.contains("--file FILE is"), "{log}");
    }
}

#[test]
fn whoever_waits_is_refused_and_told_why_whatever_the_trouble_is() {
    let manager = Manager::new();
    for (flags, reason) in troubles(&manager) {
        let waiting = client(&manager);
        let mut service = manager.start(Handed::NbdAndControl, &format!("serve {flags}"), &[]);
        was_refused(waiting);
        stays_and_refuses(&manager, &mut service, reason);
    }
}

#[test]
fn an_operator_who_waits_is_told_why() {
    let manager = Manager::new();
    let control = manager.control();
    let operator = std::thread::spawn(move || order(&control, "status"));
    // It has connected when the socket can be read from.
    wait_until("the operator", || manager.somebody_waits_for_control());
    let missing = manager.path("none");
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&missing]);
    let reply = operator.join().unwrap();
    assert!(reply.starts_with("1: ") && reply.contains("/none does not exist"), "{reply}");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn with_nobody_waiting_it_ends_at_once_and_says_why() {
    let manager = Manager::new();
    for (flags, reason) in troubles(&manager) {
        let line = format!("serve {flags}");
        let mut service = manager.start(Handed::NbdAndControl, &line, &[]);
        let status = service.ends();
        let is_misuse = reason.contains("FILE=") || reason.contains("--port");
        assert_eq!(status.code(), if is_misuse { EXIT_USAGE } else { EXIT_CONFIG }, "{flags}");
        let heard = manager.messages();
        // On a slow machine it may have told before what it is doing.
        let mut told = heard.iter().filter_map(|message| message.strip_prefix("STATUS="));
        assert!(told.any(|told| told.contains(reason)), "{flags}: {heard:?}");
        assert!(!heard.iter().any(|message| message.contains("READY=1")), "{heard:?}");
        let errno = heard.iter().find_map(|message| message.strip_prefix("ERRNO="));
        let expected = match reason {
            "/none does not exist" => Some("2\n"),
            "is a directory" => Some("21\n"),
            _ => None,
        };
        assert_eq!(errno, expected, "{flags}: {heard:?}");
        assert!(service.stderr().contains(reason), "{}", service.stderr());
    }
}

#[test]
fn an_image_in_use_is_refused_to_whoever_waits() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let file = std::fs::File::open(&image).unwrap();
    let _lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    assert_eq!(service.ends().code(), EXIT_CONFIG);
    assert!(manager.messages().contains(&format!("ERRNO={}\n", nix::libc::EBUSY)));
    let waiting = client(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    was_refused(waiting);
    stays_and_refuses(&manager, &mut service, "is in use");
}

/// Descriptors that a service cannot use: their names, and words of the reason.
fn bad_descriptors(manager: &Manager) -> Vec<(&'static str, OwnedFd, &'static str)> {
    let file = std::fs::File::open(manager.dir.path()).unwrap();
    let second = UnixListener::bind(manager.path("second.sock")).unwrap();
    vec![
        ("nbd", file.into(), "is neither a TCP nor a unix stream socket"),
        ("control", second.into(), "there can be only one control socket"),
    ]
}

#[test]
fn waiting_clients_are_refused_beside_a_bad_descriptor() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for (name, descriptor, reason) in bad_descriptors(&manager) {
        manager.store(name, descriptor);
        let waiting = client(&manager);
        let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
        was_refused(waiting);
        stays_and_refuses(&manager, &mut service, reason);
        drop(manager.take_from_store(name));
    }
}

#[test]
fn a_bad_descriptor_without_clients_ends_the_service() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for (name, descriptor, reason) in bad_descriptors(&manager) {
        manager.store(name, descriptor);
        let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
        assert_eq!(service.ends().code(), EXIT_CONFIG);
        assert!(service.stderr().contains(reason), "{}", service.stderr());
        drop(manager.take_from_store(name));
    }
}

#[test]
fn a_client_at_the_misnamed_socket_is_refused() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let (name, second, _) = bad_descriptors(&manager).remove(1);
    manager.store(name, second);
    let mut waiting = UnixStream::connect(manager.path("second.sock")).unwrap();
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    waiting.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    assert_eq!(waiting.read(&mut [0]).unwrap(), 0);
    manager.wait_for_status("there can be only one control socket");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn without_handed_sockets_a_disk_that_has_moved_ends_the_process() {
    let manager = Manager::new();
    let image = departed(&manager);
    let line = "serve --addr 127.0.0.1 --port 0 --file";
    let mut service = manager.start(Handed::Nothing, line, &[&image]);
    assert_eq!(service.ends().code(), EXIT_CONFIG);
    let heard = manager.messages();
    assert!(heard.iter().any(|message| message.contains("has moved to")), "{heard:?}");
}

#[test]
fn hangup_ends_a_refusing_service_cleanly() {
    restore_default_signals();
    let manager = Manager::new();
    let image = departed(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    service.signal(Signal::SIGUSR1);
    was_refused(client(&manager));
    assert!(service.is_running(), "SIGUSR1 has no meaning");
    service.signal(Signal::SIGHUP);
    assert_eq!(service.ends().code(), Some(0));
}

#[test]
fn a_receiver_never_stays() {
    let manager = Manager::new();
    let missing = manager.path("none");
    let waiting = client(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "listen --file", &[&missing]);
    assert_eq!(service.ends().code(), EXIT_CONFIG);
    drop(waiting);
}

#[test]
fn the_watchdog_is_fed_while_clients_are_refused() {
    let manager = Manager::new().env("WATCHDOG_USEC", "100000");
    let image = departed(&manager);
    let mut service = manager.start(Handed::NbdAndControl, "serve --file", &[&image]);
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1");
    }
    was_refused(client(&manager));
    manager.wait_for("WATCHDOG=1");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn sockets_that_are_where_the_configuration_says_are_no_surprise() {
    let manager = Manager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let (address, control) = (manager.address(), manager.control());
    let line = |port, sock: &Path| {
        format!("serve --addr {} --port {port} --sock {} --file", address.ip(), sock.display())
    };
    let same = line(address.port(), &control);
    let mut service = manager.start(Handed::NbdAndControl, &same, &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.stop().code(), Some(0));
    assert_eq!(service.stderr(), "");
    let other = line(1, &manager.path("other.sock"));
    let mut service = manager.start(Handed::NbdAndControl, &other, &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.stop().code(), Some(0));
    let log = service.stderr();
    for part in ["not listening on 127.0.0.1:1: ", "/other.sock: the control socket handed over"] {
        assert!(log.contains(part), "{log}");
    }
}

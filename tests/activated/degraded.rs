//! A service that cannot serve: it refuses clients that wait at its sockets, and exits at once if
//! there are none.

use harness::manager::{Inherited, Service, ServiceManager};
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
fn departed(manager: &ServiceManager) -> PathBuf {
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let id = "0123456789abcdef0123456789abcdef";
    record(manager, &image, &format!("departed id={id} when=1700000000 to=192.0.2.7:10809"));
    image
}

/// Sets the record of an image.
pub(crate) fn record(manager: &ServiceManager, image: &Path, record: &str) {
    let record = format!("flexnbd 1 {record}\n");
    if xattr::set(image, "user.flexnbd", record.as_bytes()).is_err() {
        // File systems without extended attributes keep the record in a file.
        let name = image.display().to_string().replace('/', "%2F");
        std::fs::write(manager.path(&name), record).unwrap();
    }
}

/// A client that has connected and may not have been accepted yet.
pub(crate) fn client(manager: &ServiceManager) -> TcpStream {
    let stream = TcpStream::connect(manager.address()).unwrap();
    stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    stream
}

/// Fails unless the server closes the connection without sending a byte.
#[track_caller]
pub(crate) fn assert_refused(mut client: TcpStream) {
    let mut nothing = Vec::new();
    client.read_to_end(&mut nothing).unwrap();
    assert_eq!(nothing, b"");
}

/// Sends a control command; returns the reply.
pub(crate) fn send_command(path: &Path, command: &str) -> String {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    stream.write_all(format!("{command}\n\n").as_bytes()).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    reply
}

/// Fails unless the service refuses clients and commands with this reason until it is stopped, and
/// then exits with 0.
#[track_caller]
fn assert_refuses_until_stopped(manager: &ServiceManager, service: &mut Service, reason: &str) {
    let messages = manager.wait_for("READY=1");
    let messages = [messages, manager.wait_for_status("refusing clients: ")].concat();
    let status = messages.last().unwrap();
    assert!(status.contains(reason), "{status}");
    for _ in 0..100 {
        assert_refused(client(manager));
    }
    for command in ["status", "reload", "acl\n127.0.0.1", "break"] {
        let reply = send_command(&manager.control(), command);
        assert!(reply.starts_with("1: ") && reply.contains(reason), "{command}: {reply}");
    }
    assert!(service.is_running());
    assert_eq!(service.stop().code(), Some(0));
    assert!(manager.messages().iter().any(|message| message == "STOPPING=1\n"));
    let log = service.stderr();
    let lines = |part: &str| log.lines().filter(|line| line.contains(part)).count();
    assert_eq!(lines(":E:"), 1, "the reason, once: {log}");
    assert_eq!(lines("refusing clients: "), 1, "{log}");
    assert_eq!(lines("refused 127.0.0.1:"), 1, "only the first client at once: {log}");
}

#[test]
fn a_service_refuses_a_departed_disk_until_stopped() {
    let manager = ServiceManager::new();
    let image = departed(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    assert_refuses_until_stopped(&manager, &mut service, "has moved to 192.0.2.7:10809");
}

#[test]
fn a_refusing_service_does_not_lock_the_disk() {
    let manager = ServiceManager::new();
    let image = departed(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
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
fn the_configured_control_socket_reports_the_reason() {
    let manager = ServiceManager::new();
    let image = departed(&manager);
    let socket = manager.path("own.sock");
    let line = format!("serve --sock {} --file", socket.display());
    let mut service = manager.start(Inherited::Nbd, &line, &[&image]);
    manager.wait_for("READY=1");
    let reply = send_command(&socket, "status");
    assert!(reply.starts_with("1: ") && reply.contains("has moved to"), "{reply}");
    assert_eq!(service.stop().code(), Some(0));
    assert!(!socket.exists());
}

/// Reasons not to serve: arguments of `serve`, and part of the message.
fn startup_errors(manager: &ServiceManager) -> Vec<(String, &'static str)> {
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
    let manager = ServiceManager::new();
    let place = manager.dir.path().to_owned();
    let manager = manager.env("FLEXNBD_CONFIGURATIONS", place);
    let dir = manager.dir.path().display();
    let write_config = |text: String| std::fs::write(manager.path("disk.conf"), text).unwrap();
    for (text, reason) in [
        (format!("FILE={dir}/none\n"), "CREATE=SIZE in "),
        (format!("FILE={dir}/none\nPORT=7\n"), "/disk.conf: PORT needs ADDR as well"),
        ("READ_ONLY=yes\n".to_owned(), "/disk.conf has no FILE="),
        (format!("FILE={dir}/none\nCREATE=1M\nADDR=::\nPORT=0\n"), "a port that is not 0"),
        ("FILE=none\nCREATE=1M\n".to_owned(), "FILE: none: a path in a unit begins with /"),
    ] {
        write_config(text);
        let mut service = manager.start(
            Inherited::NbdAndControl,
            &format!("serve --config {dir}/disk.conf"),
            &[],
        );
        assert!(!service.wait_for_exit().success());
        let log = service.stderr();
        assert!(log.contains(reason) && !log.contains("--create"), "{log}");
        assert!(!log.contains("--port needs") && !log.contains("--file FILE is"), "{log}");
    }
}

#[test]
fn waiting_clients_are_refused_on_every_startup_error() {
    let manager = ServiceManager::new();
    for (flags, reason) in startup_errors(&manager) {
        let waiting = client(&manager);
        let mut service = manager.start(Inherited::NbdAndControl, &format!("serve {flags}"), &[]);
        assert_refused(waiting);
        assert_refuses_until_stopped(&manager, &mut service, reason);
    }
}

#[test]
fn a_waiting_control_command_gets_the_reason() {
    let manager = ServiceManager::new();
    let control = manager.control();
    let operator = std::thread::spawn(move || send_command(&control, "status"));
    // The control socket becomes readable once the operator has connected.
    wait_until("the operator", || manager.control_connection_waits());
    let missing = manager.path("none");
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&missing]);
    let reply = operator.join().unwrap();
    assert!(reply.starts_with("1: ") && reply.contains("/none does not exist"), "{reply}");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn without_waiting_clients_startup_errors_exit_at_once() {
    let manager = ServiceManager::new();
    for (flags, reason) in startup_errors(&manager) {
        let line = format!("serve {flags}");
        let mut service = manager.start(Inherited::NbdAndControl, &line, &[]);
        let status = service.wait_for_exit();
        let is_misuse = reason.contains("FILE=") || reason.contains("--port");
        assert_eq!(status.code(), if is_misuse { EXIT_USAGE } else { EXIT_CONFIG }, "{flags}");
        let messages = manager.messages();
        // On a slow machine an earlier status may precede the reason.
        let mut statuses = messages.iter().filter_map(|message| message.strip_prefix("STATUS="));
        assert!(statuses.any(|status| status.contains(reason)), "{flags}: {messages:?}");
        assert!(!messages.iter().any(|message| message.contains("READY=1")), "{messages:?}");
        let errno = messages.iter().find_map(|message| message.strip_prefix("ERRNO="));
        let expected = match reason {
            "/none does not exist" => Some("2\n"),
            "is a directory" => Some("21\n"),
            _ => None,
        };
        assert_eq!(errno, expected, "{flags}: {messages:?}");
        assert!(service.stderr().contains(reason), "{}", service.stderr());
    }
}

#[test]
fn waiting_clients_are_refused_an_image_in_use() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let file = std::fs::File::open(&image).unwrap();
    let _lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive).unwrap();
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    assert_eq!(service.wait_for_exit().code(), EXIT_CONFIG);
    assert!(manager.messages().contains(&format!("ERRNO={}\n", nix::libc::EBUSY)));
    let waiting = client(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    assert_refused(waiting);
    assert_refuses_until_stopped(&manager, &mut service, "is in use");
}

/// Descriptors that a service cannot use: their names, and part of the message.
fn bad_descriptors(manager: &ServiceManager) -> Vec<(&'static str, OwnedFd, &'static str)> {
    let file = std::fs::File::open(manager.dir.path()).unwrap();
    let second = UnixListener::bind(manager.path("second.sock")).unwrap();
    vec![
        ("nbd", file.into(), "is neither a TCP nor a unix stream socket"),
        ("control", second.into(), "there can be only one control socket"),
    ]
}

#[test]
fn waiting_clients_are_refused_beside_a_bad_descriptor() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for (name, descriptor, reason) in bad_descriptors(&manager) {
        manager.store(name, descriptor);
        let waiting = client(&manager);
        let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
        assert_refused(waiting);
        assert_refuses_until_stopped(&manager, &mut service, reason);
        drop(manager.take_from_store(name));
    }
}

#[test]
fn a_bad_descriptor_without_clients_ends_the_service() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    for (name, descriptor, reason) in bad_descriptors(&manager) {
        manager.store(name, descriptor);
        let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
        assert_eq!(service.wait_for_exit().code(), EXIT_CONFIG);
        assert!(service.stderr().contains(reason), "{}", service.stderr());
        drop(manager.take_from_store(name));
    }
}

#[test]
fn a_client_at_a_misnamed_socket_is_refused() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let (name, second, _) = bad_descriptors(&manager).remove(1);
    manager.store(name, second);
    let mut waiting = UnixStream::connect(manager.path("second.sock")).unwrap();
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    waiting.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    assert_eq!(waiting.read(&mut [0]).unwrap(), 0);
    manager.wait_for_status("there can be only one control socket");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn without_inherited_sockets_a_departed_disk_is_fatal() {
    let manager = ServiceManager::new();
    let image = departed(&manager);
    let line = "serve --addr 127.0.0.1 --port 0 --file";
    let mut service = manager.start(Inherited::Nothing, line, &[&image]);
    assert_eq!(service.wait_for_exit().code(), EXIT_CONFIG);
    let messages = manager.messages();
    assert!(messages.iter().any(|message| message.contains("has moved to")), "{messages:?}");
}

#[test]
fn sighup_ends_a_refusing_service_cleanly() {
    restore_default_signals();
    let manager = ServiceManager::new();
    let image = departed(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    manager.wait_for("READY=1");
    service.signal(Signal::SIGUSR1);
    assert_refused(client(&manager));
    assert!(service.is_running(), "SIGUSR1 has no meaning");
    service.signal(Signal::SIGHUP);
    assert_eq!(service.wait_for_exit().code(), Some(0));
}

#[test]
fn listen_never_stays_to_refuse_clients() {
    let manager = ServiceManager::new();
    let missing = manager.path("none");
    let waiting = client(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "listen --file", &[&missing]);
    assert_eq!(service.wait_for_exit().code(), EXIT_CONFIG);
    drop(waiting);
}

#[test]
fn a_refusing_service_feeds_the_watchdog() {
    let manager = ServiceManager::new().env("WATCHDOG_USEC", "100000");
    let image = departed(&manager);
    let mut service = manager.start(Inherited::NbdAndControl, "serve --file", &[&image]);
    for _ in 0..5 {
        manager.wait_for("WATCHDOG=1");
    }
    assert_refused(client(&manager));
    manager.wait_for("WATCHDOG=1");
    assert_eq!(service.stop().code(), Some(0));
}

#[test]
fn only_sockets_that_contradict_the_configuration_are_logged() {
    let manager = ServiceManager::new();
    let image = sparse_image(manager.dir.path(), "disk.img", MIB);
    let (address, control) = (manager.address(), manager.control());
    let line = |port, sock: &Path| {
        format!("serve --addr {} --port {port} --sock {} --file", address.ip(), sock.display())
    };
    let same = line(address.port(), &control);
    let mut service = manager.start(Inherited::NbdAndControl, &same, &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.stop().code(), Some(0));
    assert_eq!(service.stderr(), "");
    let other = line(1, &manager.path("other.sock"));
    let mut service = manager.start(Inherited::NbdAndControl, &other, &[&image]);
    manager.wait_for("READY=1");
    assert_eq!(service.stop().code(), Some(0));
    let log = service.stderr();
    for part in ["not listening on 127.0.0.1:1: ", "/other.sock: the control socket handed over"] {
        assert!(log.contains(part), "{log}");
    }
}

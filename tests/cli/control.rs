//! Commands over the control socket: status, acl, reload, and the protocol of the original flexnbd.

use crate::{flags_of, read};
use harness::raw::Wire;
use harness::session::{Mode, Session};
use harness::{Builder, MIB, Program, Server, TempDir, sparse_image, temp_dir, wait_until};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A server with a control socket.
struct ControlledServer {
    server: Server,
    sock: PathBuf,
    dir: TempDir,
}

impl ControlledServer {
    #[track_caller]
    fn start(arguments: &[&str]) -> ControlledServer {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 8 * MIB);
        let sock = dir.path().join("control.sock");
        let builder = Builder::serve(&image).args(["--sock"]).args([&sock]).args(arguments);
        let controlled = ControlledServer { server: builder.start(), sock, dir };
        // The server creates the control socket last; once it exists, clients can connect.
        wait_until("the control socket", || controlled.sock.exists());
        controlled
    }

    /// `MODE --sock SOCK ARGUMENTS`.
    fn command(&self, mode: &str, arguments: &str) -> Program {
        command(&self.sock, mode, arguments)
    }

    fn status(&self, key: &str) -> String {
        let status = self.command("status", "").ok();
        let mut words = status.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(&format!("{key}=")));
        value.unwrap_or_else(|| panic!("no {key} in {status}")).to_owned()
    }

    /// Sends bytes to the control socket; returns everything received.
    fn exchange(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.sock).unwrap();
        stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    }

    /// A client in transmission.
    fn client(&self) -> Session {
        Session::open(self.server.endpoint(), Mode::Simple).unwrap()
    }
}

fn command(sock: &Path, mode: &str, arguments: &str) -> Program {
    Program::flexnbd(mode).args(["--sock"]).args([sock]).words(arguments)
}

#[test]
fn status_prints_ordered_pairs_on_one_line() {
    let controlled = ControlledServer::start(&[]);
    let status = controlled.command("status", "").ok();
    let start = format!(
        "pid={} size=8388608 is_mirroring=false clients_allowed=true num_clients=0 has_control=true",
        controlled.server.pid()
    );
    assert!(status.starts_with(&start) && status.ends_with('\n'), "{status}");
    assert_eq!(status.lines().count(), 1, "{status}");
    let _client = controlled.client();
    assert_eq!(controlled.status("num_clients"), "1");
}

#[test]
fn status_can_be_json() {
    let controlled = ControlledServer::start(&[]);
    let text = controlled.command("status", "--json").ok();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["pid"], controlled.server.pid());
    assert_eq!(json["size"], 8 * MIB);
    assert_eq!(json["is_mirroring"], false);
    assert_eq!(json["has_control"], true);
}

#[test]
fn a_new_acl_closes_sessions_no_longer_admitted() {
    let controlled = ControlledServer::start(&["127.0.0.1"]);
    let flags = flags_of(&controlled.server);
    let mut client = controlled.client();
    client.assert_in_sync();
    assert_eq!(controlled.command("acl", "127.0.0.1 192.0.2.0/24").ok(), "updated\n");
    client.assert_in_sync();
    assert_eq!(controlled.command("acl", "192.0.2.0/24 2001:db8::/32").ok(), "updated\n");
    client.wire.expect_closed("no longer admitted");
    Wire::connect(controlled.server.endpoint()).expect_closed("not admitted");
    read(&flags, 0, 512).run().ended_with(1);
    controlled.command("acl", "0.0.0.0/0").run().succeeded();
    read(&flags, 0, 512).run().succeeded();
}

#[test]
fn a_bad_acl_entry_changes_nothing() {
    let controlled = ControlledServer::start(&["127.0.0.1"]);
    let bad = controlled.command("acl", "192.0.2.1 bogus").run();
    bad.refused(1, &["bad spec: bogus"]);
    assert_eq!(bad.text(), "");
    read(&flags_of(&controlled.server), 0, 512).run().succeeded();
    assert_eq!(
        controlled.exchange(b"acl\n192.0.2.1\n10.0.0.0/33\n\n"),
        "1: bad spec: 10.0.0.0/33\n"
    );
    read(&flags_of(&controlled.server), 0, 512).run().succeeded();
}

#[test]
fn changes_are_logged_with_uid_and_pid() {
    let controlled = ControlledServer::start(&["--verbose"]);
    controlled.command("acl", "127.0.0.1").ok();
    let from = format!("\"acl 127.0.0.1\" from uid {}, pid ", nix::unistd::getuid());
    controlled.server.wait_for_stderr(&from);
}

#[test]
fn reload_reads_the_acl_and_the_limit_again() {
    let dir = temp_dir();
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, "MAX_CLIENTS=1\n").unwrap();
    let controlled = ControlledServer::start(&["--config", config.to_str().unwrap()]);
    let mut client = controlled.client();
    Wire::connect(controlled.server.endpoint()).expect_closed("the second of one");
    std::fs::write(&config, "MAX_CLIENTS=2\n").unwrap();
    assert_eq!(controlled.command("reload", "").ok(), "reloaded\n");
    let mut second = controlled.client();
    client.assert_in_sync();
    second.assert_in_sync();
    std::fs::write(&config, "MAX_CLIENTS=2\nACL=192.0.2.1\n").unwrap();
    controlled.command("reload", "").ok();
    client.wire.expect_closed("no longer admitted");
    second.wire.expect_closed("no longer admitted");
    std::fs::write(&config, "MAX_CLIENTS=2\nBOGUS=1\n").unwrap();
    controlled.command("reload", "").run().refused(1, &["/disk.conf, line 2", "BOGUS"]);
    Wire::connect(controlled.server.endpoint()).expect_closed("a bad file changes nothing");
    std::fs::write(&config, "ACL=127.0.0.0/8\n").unwrap();
    controlled.command("reload", "").ok();
    controlled.client().assert_in_sync();
}

#[test]
fn reload_without_a_configuration_file_is_refused() {
    let controlled = ControlledServer::start(&[]);
    controlled.command("reload", "").run().refused(1, &["--config"]);
}

#[test]
fn commands_without_a_server_name_the_reason() {
    let dir = temp_dir();
    let none = dir.path().join("none.sock");
    let dead = dir.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (mode, arguments) in [("status", ""), ("acl", "::1"), ("reload", "")] {
        let assert_error = |sock: &Path, why: &str| {
            let start = format!("flexnbd {mode}: control socket {}: {why}", sock.display());
            command(sock, mode, arguments).run().refused(1, &[&start]);
        };
        assert_error(&none, "no such socket; is the server running?");
        assert_error(&dead, "no process listens there");
        assert_error(&file, "this is not a socket");
    }
    let instance = Program::flexnbd("status --instance no-such-disk").run();
    instance.refused(1, &["control socket /run/flexnbd/no-such-disk.sock: "]);
}

#[test]
fn requests_of_the_original_client_get_compatible_replies() {
    let controlled = ControlledServer::start(&[]);
    let status = controlled.exchange(b"status\n\n");
    assert!(status.starts_with("0: pid="), "{status}");
    assert!(status.ends_with('\n') && status.lines().count() == 1, "{status}");
    assert_eq!(controlled.exchange(b"acl\n127.0.0.1\n\n"), "0: updated\n");
    assert_eq!(controlled.exchange(b"acl\n\n"), "0: updated\n");
    assert_eq!(controlled.exchange(b"break\n\n"), "1: not mirroring\n");
    assert_eq!(controlled.exchange(b"mirror_max_bps\n1000\n\n"), "1: Not currently mirroring\n");
    assert_eq!(controlled.exchange(b"\n"), "9: missing command\n");
    assert_eq!(controlled.exchange(b"frobnicate\n\n"), "10: unknown command\n");
}

#[test]
fn replies_of_the_original_server_set_the_status() {
    let dir = temp_dir();
    let sock = dir.path().join("original.sock");
    let listener = UnixListener::bind(&sock).unwrap();
    let server = std::thread::spawn(move || {
        for reply in ["0: pid=7 is_mirroring=false has_control=true\n", "3: not today\n"] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 8];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(&request, b"status\n\n");
            stream.write_all(reply.as_bytes()).unwrap();
        }
    });
    let status = command(&sock, "status", "").ok();
    assert_eq!(status, "pid=7 is_mirroring=false has_control=true\n");
    command(&sock, "status", "").run().refused(3, &["not today"]);
    server.join().unwrap();
}

#[test]
fn only_the_owner_can_use_the_control_socket() {
    let controlled = ControlledServer::start(&[]);
    let mode = controlled.sock.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(controlled.dir.path().read_dir().unwrap().count(), 2, "the image and the socket");
}

/// `flexnbd status ARGUMENTS PATH`.
fn offline_status(arguments: &str, path: &Path) -> Program {
    Program::flexnbd("status").words(arguments).args([path])
}

#[test]
fn offline_status_works_beside_a_running_server() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "a disk", 8 * MIB + 100);
    let escaped = image.display().to_string().replace(' ', "%20");
    let expected = format!("image={escaped} size=8388608 ownership=none\n");
    assert_eq!(offline_status("--file", &image).ok(), expected);
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, format!("FILE={}\n", image.display())).unwrap();
    assert_eq!(offline_status("--config", &config).ok(), expected);
    let mut server = Builder::serve(&image).start();
    // The server may have given the disk an id by now.
    let served = offline_status("--file", &image).ok();
    assert!(served.starts_with(expected.trim_end()), "{served}");
    let json: serde_json::Value =
        serde_json::from_str(&offline_status("--json --file", &image).ok()).unwrap();
    assert_eq!(json["image"], image.display().to_string());
    assert_eq!((&json["size"], &json["ownership"]), (&(8 * MIB).into(), &"none".into()));
    read(&flags_of(&server), 0, 512).run().succeeded();
    assert!(server.stop().success());
}

#[test]
fn offline_status_errors_name_disk_and_reason() {
    let dir = temp_dir();
    let none = dir.path().join("none");
    let missing = offline_status("--file", &none).run();
    missing.refused(1, &[&format!("flexnbd status: {} does not exist\n", none.display())]);
    offline_status("--file", dir.path()).run().refused(1, &["is a directory"]);
    offline_status("--config", &none).run().refused(1, &["cannot read the configuration file"]);
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, "READ_ONLY=yes\n").unwrap();
    offline_status("--config", &config).run().refused(1, &["disk.conf has no FILE="]);
    let damaged = sparse_image(dir.path(), "damaged", MIB);
    if xattr::set(&damaged, "user.flexnbd", b"?").is_ok() {
        offline_status("--file", &damaged).run().refused(1, &["its ownership record is damaged"]);
    }
}

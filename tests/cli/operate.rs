//! The control socket from the operator's side: status, acl, reload, and the bytes of the original.

use crate::{flags_of, read};
use harness::raw::Wire;
use harness::session::{Mode, Session};
use harness::{Builder, MIB, Program, Server, TempDir, sparse_image, temp_dir, wait_until};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A server with a control socket.
struct Operated {
    server: Server,
    sock: PathBuf,
    dir: TempDir,
}

impl Operated {
    #[track_caller]
    fn start(arguments: &[&str]) -> Operated {
        let dir = temp_dir();
        let image = sparse_image(dir.path(), "image", 8 * MIB);
        let sock = dir.path().join("control.sock");
        let builder = Builder::serve(&image).args(["--sock"]).args([&sock]).args(arguments);
        let operated = Operated { server: builder.start(), sock, dir };
        // It comes last: whoever sees it knows that clients can connect, not the other way round.
        wait_until("the control socket", || operated.sock.exists());
        operated
    }

    /// `MODE --sock SOCK ARGUMENTS`.
    fn order(&self, mode: &str, arguments: &str) -> Program {
        order(&self.sock, mode, arguments)
    }

    fn status(&self, key: &str) -> String {
        let status = self.order("status", "").ok();
        let mut words = status.split_whitespace();
        let value = words.find_map(|word| word.strip_prefix(&format!("{key}=")));
        value.unwrap_or_else(|| panic!("no {key} in {status}")).to_owned()
    }

    /// Sends bytes and takes everything that comes back.
    fn say(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(&self.sock).unwrap();
        stream.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
        stream.write_all(bytes).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    }

    /// A client in the middle of its session.
    fn client(&self) -> Session {
        Session::open(self.server.endpoint(), Mode::Simple).unwrap()
    }
}

fn order(sock: &Path, mode: &str, arguments: &str) -> Program {
    Program::flexnbd(mode).args(["--sock"]).args([sock]).words(arguments)
}

#[test]
fn status_is_a_line_of_pairs_in_their_order() {
    let operated = Operated::start(&[]);
    let status = operated.order("status", "").ok();
    let start = format!(
        "pid={} size=8388608 is_mirroring=false clients_allowed=true num_clients=0 has_control=true",
        operated.server.pid()
    );
    assert!(status.starts_with(&start) && status.ends_with('\n'), "{status}");
    assert_eq!(status.lines().count(), 1, "{status}");
    let _client = operated.client();
    assert_eq!(operated.status("num_clients"), "1");
}

#[test]
fn status_can_be_json() {
    let operated = Operated::start(&[]);
    let text = operated.order("status", "--json").ok();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["pid"], operated.server.pid());
    assert_eq!(json["size"], 8 * MIB);
    assert_eq!(json["is_mirroring"], false);
    assert_eq!(json["has_control"], true);
}

#[test]
fn a_new_acl_ends_the_sessions_that_it_no_longer_admits() {
    let operated = Operated::start(&["127.0.0.1"]);
    let place = flags_of(&operated.server);
    let mut client = operated.client();
    client.assert_in_sync();
    assert_eq!(operated.order("acl", "127.0.0.1 192.0.2.0/24").ok(), "updated\n");
    client.assert_in_sync();
    assert_eq!(operated.order("acl", "192.0.2.0/24 2001:db8::/32").ok(), "updated\n");
    client.wire.expect_closed("no longer admitted");
    Wire::connect(operated.server.endpoint()).expect_closed("not admitted");
    read(&place, 0, 512).run().ended_with(1);
    operated.order("acl", "0.0.0.0/0").run().succeeded();
    read(&place, 0, 512).run().succeeded();
}

#[test]
fn a_bad_acl_entry_is_named_and_changes_nothing() {
    let operated = Operated::start(&["127.0.0.1"]);
    let bad = operated.order("acl", "192.0.2.1 bogus").run();
    bad.refused(1, &["bad spec: bogus"]);
    assert_eq!(bad.text(), "");
    read(&flags_of(&operated.server), 0, 512).run().succeeded();
    assert_eq!(operated.say(b"acl\n192.0.2.1\n10.0.0.0/33\n\n"), "1: bad spec: 10.0.0.0/33\n");
    read(&flags_of(&operated.server), 0, 512).run().succeeded();
}

#[test]
fn who_changed_something_is_logged() {
    let operated = Operated::start(&["--verbose"]);
    operated.order("acl", "127.0.0.1").ok();
    let from = format!("\"acl 127.0.0.1\" from uid {}, pid ", nix::unistd::getuid());
    operated.server.wait_for_stderr(&from);
}

#[test]
fn reload_reads_the_acl_and_the_limit_again() {
    let dir = temp_dir();
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, "MAX_CLIENTS=1\n").unwrap();
    let operated = Operated::start(&["--config", config.to_str().unwrap()]);
    let mut client = operated.client();
    Wire::connect(operated.server.endpoint()).expect_closed("the second of one");
    std::fs::write(&config, "MAX_CLIENTS=2\n").unwrap();
    assert_eq!(operated.order("reload", "").ok(), "reloaded\n");
    let mut second = operated.client();
    client.assert_in_sync();
    second.assert_in_sync();
    std::fs::write(&config, "MAX_CLIENTS=2\nACL=192.0.2.1\n").unwrap();
    operated.order("reload", "").ok();
    client.wire.expect_closed("no longer admitted");
    second.wire.expect_closed("no longer admitted");
    std::fs::write(&config, "MAX_CLIENTS=2\nBOGUS=1\n").unwrap();
    operated.order("reload", "").run().refused(1, &["/disk.conf, line 2", "BOGUS"]);
    Wire::connect(operated.server.endpoint()).expect_closed("a bad file changes nothing");
    std::fs::write(&config, "ACL=127.0.0.0/8\n").unwrap();
    operated.order("reload", "").ok();
    operated.client().assert_in_sync();
}

#[test]
fn reload_without_a_configuration_file_is_refused() {
    let operated = Operated::start(&[]);
    operated.order("reload", "").run().refused(1, &["--config"]);
}

#[test]
fn without_a_server_behind_it_each_order_says_so() {
    let dir = temp_dir();
    let none = dir.path().join("none.sock");
    let dead = dir.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (mode, arguments) in [("status", ""), ("acl", "::1"), ("reload", "")] {
        let told = |sock: &Path, why: &str| {
            let start = format!("flexnbd {mode}: control socket {}: {why}", sock.display());
            order(sock, mode, arguments).run().refused(1, &[&start]);
        };
        told(&none, "no such socket; is the server running?");
        told(&dead, "nobody listens there");
        told(&file, "this is not a socket");
    }
    let instance = Program::flexnbd("status --instance no-such-disk").run();
    instance.refused(1, &["control socket /run/flexnbd/no-such-disk.sock: "]);
}

#[test]
fn the_bytes_of_the_originals_client_are_answered_as_it_expects() {
    let operated = Operated::start(&[]);
    let status = operated.say(b"status\n\n");
    assert!(status.starts_with("0: pid="), "{status}");
    assert!(status.ends_with('\n') && status.lines().count() == 1, "{status}");
    assert_eq!(operated.say(b"acl\n127.0.0.1\n\n"), "0: updated\n");
    assert_eq!(operated.say(b"acl\n\n"), "0: updated\n");
    assert_eq!(operated.say(b"break\n\n"), "1: not mirroring\n");
    assert_eq!(operated.say(b"mirror_max_bps\n1000\n\n"), "1: Not currently mirroring\n");
    assert_eq!(operated.say(b"\n"), "9: missing command\n");
    assert_eq!(operated.say(b"frobnicate\n\n"), "10: unknown command\n");
}

#[test]
fn the_answer_of_the_originals_server_is_the_exit_status() {
    let dir = temp_dir();
    let sock = dir.path().join("original.sock");
    let listener = UnixListener::bind(&sock).unwrap();
    let server = std::thread::spawn(move || {
        for answer in ["0: pid=7 is_mirroring=false has_control=true\n", "3: not today\n"] {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = [0; 8];
            stream.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"status\n\n");
            stream.write_all(answer.as_bytes()).unwrap();
        }
    });
    let told = order(&sock, "status", "").ok();
    assert_eq!(told, "pid=7 is_mirroring=false has_control=true\n");
    order(&sock, "status", "").run().refused(3, &["not today"]);
    server.join().unwrap();
}

#[test]
fn the_control_socket_is_for_its_owner_only() {
    let operated = Operated::start(&[]);
    let mode = operated.sock.metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(operated.dir.path().read_dir().unwrap().count(), 2, "the image and the socket");
}

/// `status ARGUMENTS PATH`.
fn look(arguments: &str, path: &Path) -> Program {
    Program::flexnbd("status").words(arguments).args([path])
}

#[test]
fn a_disk_is_looked_at_without_a_server_and_while_one_has_it() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "a disk", 8 * MIB + 100);
    let shown = image.display().to_string().replace(' ', "%20");
    let expected = format!("image={shown} size=8388608 ownership=none\n");
    assert_eq!(look("--file", &image).ok(), expected);
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, format!("FILE={}\n", image.display())).unwrap();
    assert_eq!(look("--config", &config).ok(), expected);
    let mut server = Builder::serve(&image).start();
    assert_eq!(look("--file", &image).ok(), expected);
    let json: serde_json::Value =
        serde_json::from_str(&look("--json --file", &image).ok()).unwrap();
    assert_eq!(json["image"], image.display().to_string());
    assert_eq!((&json["size"], &json["ownership"]), (&(8 * MIB).into(), &"none".into()));
    read(&flags_of(&server), 0, 512).run().succeeded();
    assert!(server.stop().success());
}

#[test]
fn a_disk_that_cannot_be_looked_at_is_named_with_the_reason() {
    let dir = temp_dir();
    let none = dir.path().join("none");
    let missing = look("--file", &none).run();
    missing.refused(1, &[&format!("flexnbd status: {} does not exist\n", none.display())]);
    look("--file", dir.path()).run().refused(1, &["is a directory"]);
    look("--config", &none).run().refused(1, &["cannot read the configuration file"]);
    let config = dir.path().join("disk.conf");
    std::fs::write(&config, "READ_ONLY=yes\n").unwrap();
    look("--config", &config).run().refused(1, &["disk.conf has no FILE="]);
    let damaged = sparse_image(dir.path(), "damaged", MIB);
    if xattr::set(&damaged, "user.flexnbd", b"?").is_ok() {
        look("--file", &damaged).run().refused(1, &["its ownership record is damaged"]);
    }
}

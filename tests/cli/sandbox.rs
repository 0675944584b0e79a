//! The sandbox and `--user`, as `/proc` shows them of a running server, and what goes on working.
//! `src/sandbox/tests.rs` tests what a confined process cannot do.

use crate::{NOBODY, as_nobody, permit};
use harness::host::{Host, MIRROR_STARTED};
use harness::session::{Mode, Request, Session};
use harness::{
    Builder, MIB, Program, Server, TempDir, read_at, require_root, skip, sparse_image, temp_dir,
    temp_dir_in,
};
use nix::unistd::{Uid, chown};
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

/// The numbers of the capabilities that a server never has: CAP_SETUID, CAP_NET_ADMIN, CAP_SYS_PTRACE,
/// CAP_SYS_ADMIN.
const LOST: [u32; 4] = [7, 12, 19, 21];

/// The `status` files of all threads of a server.
fn threads(server: &Server) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let status = |task: fs::DirEntry| fs::read_to_string(task.path().join("status"));
    tasks.flatten().filter_map(|task| status(task).ok()).collect()
}

/// One value of such a file.
fn value<'a>(status: &'a str, key: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_else(|| panic!("no {key} in {status}")).trim()
}

/// A server in a directory of its own, with a client, so that threads of all kinds run.
struct Subject {
    host: Host,
    server: Server,
    _client: Session,
    dir: TempDir,
}

impl Subject {
    fn start(arguments: &[&str]) -> Self {
        let dir = temp_dir();
        let host = Host::new(dir.path(), "a");
        sparse_image(dir.path(), "a.img", MIB);
        let server = host.mode("serve").args(arguments).start();
        let mut client = Session::open(server.endpoint(), Mode::Structured).unwrap();
        client.ok(Request::write(0, &[7; 4096]));
        host.wait_for_status("num_clients", "1");
        Self { host, server, _client: client, dir }
    }
}

#[test]
fn all_threads_of_a_server_are_confined() {
    let subject = Subject::start(&[]);
    assert!(subject.host.status_of("sandbox").ends_with("seccomp"));
    let threads = threads(&subject.server);
    assert!(threads.len() > 4, "{threads:?}");
    for thread in threads {
        assert_eq!((value(&thread, "NoNewPrivs:"), value(&thread, "Seccomp:")), ("1", "2"));
        let effective = u64::from_str_radix(value(&thread, "CapEff:"), 16).unwrap();
        assert!(LOST.iter().all(|number| effective & (1 << number) == 0), "{thread}");
    }
    subject.server.wait_for_stderr("sandbox: ");
}

#[test]
fn sandbox_is_switched_off_by_option_or_key() {
    let dir = temp_dir();
    let config = dir.path().join("disk.conf");
    fs::write(&config, "SANDBOX=no\n").unwrap();
    for arguments in [&["--no-sandbox"][..], &["--config", config.to_str().unwrap()]] {
        let subject = Subject::start(arguments);
        assert_eq!(subject.host.status_of("sandbox"), "off");
        let before = fs::read_to_string("/proc/self/status").unwrap();
        for thread in threads(&subject.server) {
            for key in ["NoNewPrivs:", "Seccomp:", "CapEff:"] {
                assert_eq!(value(&thread, key), value(&before, key));
            }
        }
    }
}

/// Replaces a file as editors do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

/// A link to a configuration in a directory of its own, and another configuration elsewhere.
struct LinkedConfig {
    link: PathBuf,
    target: PathBuf,
    other: PathBuf,
}

impl LinkedConfig {
    fn new(dir: &Path) -> Self {
        let path = |name: &str| dir.join(name).join("disk.conf");
        let paths = Self { link: path("link"), target: path("target"), other: path("other") };
        for file in [&paths.link, &paths.target, &paths.other] {
            fs::create_dir(file.parent().unwrap()).unwrap();
        }
        fs::write(&paths.target, "").unwrap();
        fs::write(&paths.other, "").unwrap();
        symlink(&paths.target, &paths.link).unwrap();
        paths
    }

    fn lead_elsewhere(&self) {
        fs::remove_file(&self.link).unwrap();
        symlink(&self.other, &self.link).unwrap();
    }
}

#[test]
fn reload_reads_files_of_the_same_directories_only() {
    let dir = temp_dir();
    let config = LinkedConfig::new(dir.path());
    let link = config.link.to_str().unwrap();
    let (confined, free) =
        (Subject::start(&["--config", link]), Subject::start(&["--no-sandbox", "--config", link]));
    replace(&config.target, "MAX_CLIENTS=2\n");
    assert_eq!(confined.host.command(&["reload"]), "0: reloaded");
    config.lead_elsewhere();
    assert_eq!(free.host.command(&["reload"]), "0: reloaded");
    if !confined.host.status_of("sandbox").starts_with("landlock") {
        return skip("other files", "no Landlock here");
    }
    let reply = confined.host.command(&["reload"]);
    assert!(reply.starts_with("1: ") && reply.ends_with("permission denied"), "{reply}");
    replace(&config.link, "MAX_CLIENTS=2\n");
    assert_eq!(confined.host.command(&["reload"]), "0: reloaded");
}

/// A directory of `nobody`, on a file system with attributes.
fn directory_of_nobody() -> Option<TempDir> {
    if !require_root("another user") {
        return None;
    }
    let dir = temp_dir_in("/var/tmp");
    permit(dir.path(), 0o755);
    give(dir.path());
    Some(dir)
}

fn give(path: &Path) {
    chown(path, Some(Uid::from_raw(NOBODY.parse().unwrap())), None).unwrap();
}

/// An address with a free port that only root may use.
fn low_address() -> SocketAddr {
    let addresses = (600..1024).map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    addresses.rev().find(|address| TcpListener::bind(address).is_ok()).expect("a free port")
}

#[test]
fn root_becomes_the_user_with_all_threads() {
    let Some(dir) = directory_of_nobody() else { return };
    let host = Host::new(dir.path(), "a").at(low_address());
    let arguments = ["--create", "1M", "--user", "65534:65533"];
    let mut server = host.mode("serve").args(arguments).start();
    let mut client = Session::open(server.endpoint(), Mode::Structured).unwrap();
    client.ok(Request::write(0, &[7; 4096]));
    host.wait_for_status("num_clients", "1");
    for thread in threads(&server) {
        let ids = |key| value(&thread, key).split_whitespace().collect::<Vec<_>>();
        assert_eq!((ids("Uid:"), ids("Gid:")), (vec!["65534"; 4], vec!["65533"; 4]));
        assert_eq!(value(&thread, "Groups:"), "");
        for key in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
            assert_eq!(value(&thread, key), "0000000000000000", "{key}");
        }
    }
    for path in [&host.image, &host.control] {
        let found = fs::metadata(path).unwrap();
        assert_eq!((found.uid(), found.gid()), (65534, 65533), "{}", path.display());
    }
    assert!(server.stop().success());
    assert!(!host.control.exists(), "the control socket is removed");
}

#[test]
fn another_user_moves_and_unlinks_a_disk() {
    let Some(dir) = directory_of_nobody() else { return };
    let user = ["--user", NOBODY, "--no-sandbox"];
    for count in [2, 3] {
        let (from, to) = (Host::new(dir.path(), "a"), Host::new(dir.path(), "b"));
        for host in [&from, &to] {
            let _ = fs::create_dir(host.state_directory());
            give(host.state_directory());
        }
        let arguments = [&user[..count], &["--create", "1M"]].concat();
        let mut listening = to.mode("listen").args(&arguments).start();
        let mut serving = from.mode("serve").args(&arguments).start();
        let mut client = Session::open(serving.endpoint(), Mode::Structured).unwrap();
        client.ok(Request::write(4096, &[7; 4096]));
        assert_eq!(from.mirror_to(to.address, &["unlink"]), MIRROR_STARTED);
        assert!(serving.wait_for_end().success() && listening.wait_for_end().success());
        assert!(!from.image.exists(), "it is deleted");
        assert_eq!(read_at(&to.image, 4096, 4096), [7; 4096]);
        assert_eq!(to.record(), "ours");
        fs::remove_file(&to.image).unwrap();
        fs::remove_dir_all(from.state_directory()).unwrap();
    }
}

#[test]
fn user_that_cannot_be_had_is_refused() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", MIB);
    let serve = |user: &str| {
        let line = format!("serve --addr 127.0.0.1 --port 0 --user {user} --file");
        Program::flexnbd(&line).args([&image])
    };
    serve("no-such-user").run().refused(78, &["there is no user no-such-user"]);
    serve(":").run().refused(2, &["`:` is not USER or USER:GROUP"]);
    let Some(nobody) = as_nobody(dir.path()) else { return };
    permit(&image, 0o666);
    let line = "serve --addr 127.0.0.1 --port 0 --user root --file";
    let outcome = nobody.words(line).args([&image]).run();
    outcome.refused(78, &["only root can become user root"]);
}

#[test]
fn proxy_and_receiver_are_confined() {
    let subject = Subject::start(&[]);
    let path = |name: &str| subject.dir.path().join(name);
    let sock = path("proxy.sock");
    let to = subject.server.uri();
    let builder = Builder::proxy().args(["--to", &to, "--sock", sock.to_str().unwrap()]);
    let proxy = builder.start();
    let mut client = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    client.ok(Request::write(0, &[7; 4096]));
    let receiver = Builder::mode("listen", &path("b.img")).args(["--create", "1M"]).start();
    for server in [&proxy, &receiver] {
        for thread in threads(server) {
            assert_eq!(value(&thread, "Seccomp:"), "2");
        }
    }
}

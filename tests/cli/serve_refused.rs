//! Errors of `serve` at startup: exit status 78, one fatal log line with the object and a remedy, and
//! no leftover files.

use crate::{as_nobody, flags_of, permit, read};
use harness::{
    Builder, Endpoint, Outcome, Program, Served, Style, Transport, allocated, free_port, read_at,
    sparse_image, temp_dir,
};
use nix::sys::stat::Mode;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// Bad configuration (sysexits.h).
const EXIT_CONFIG: i32 = 78;

/// Runs `serve` with this image on a free port; it must fail with a message that contains `parts`.
#[track_caller]
fn assert_image_refused(image: &Path, parts: &[&str]) {
    let serve = Program::flexnbd("serve").words(&Endpoint::localhost(free_port()).flags());
    assert_fatal(&serve.args(["--file"]).args([image]).run(), parts);
}

#[track_caller]
fn assert_fatal(outcome: &Outcome, parts: &[&str]) {
    outcome.refused(EXIT_CONFIG, parts);
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one line: {lines:?}");
    assert!(lines[0].contains(":F:"), "of level F: {lines:?}");
    assert_eq!(outcome.text(), "");
}

#[test]
fn unusable_images_are_refused_by_name() {
    let dir = temp_dir();
    assert_image_refused(&dir.path().join("none"), &["/none does not exist", "--create"]);
    assert_image_refused(dir.path(), &[" is a directory"]);
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    assert_image_refused(&pipe, &["/pipe is neither a regular file nor a block device"]);
    assert_image_refused(Path::new("/dev/null"), &["/dev/null is neither"]);
    assert_image_refused(
        &sparse_image(dir.path(), "small", 511),
        &["/small of 511 bytes is too small", "512"],
    );
    assert_image_refused(
        &sparse_image(dir.path(), "empty", 0),
        &["/empty of 0 bytes is too small"],
    );
    assert_image_refused(&dir.path().join("small/er"), &["/small/er"]);
}

#[test]
fn an_irregular_configuration_file_is_refused() {
    let dir = temp_dir();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    for config in [&*pipe, Path::new("/dev/zero")] {
        let serve = Program::flexnbd("serve --config").args([config]);
        assert_fatal(&serve.run(), &[config.to_str().unwrap(), "it is not a regular file"]);
        let status = Program::flexnbd("status --config").args([config]);
        let outcome = status.run();
        assert!(outcome.stderr.contains("it is not a regular file"), "{}", outcome.stderr);
    }
}

#[test]
fn an_image_of_one_sector_is_served() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 512);
    let served = Served::existing(dir, image, Transport::Tcp, Style::New, &[]);
    assert_eq!(read(&flags_of(&served.server), 0, 512).run().succeeded().stdout, [0; 512]);
    assert_eq!(served.server.stderr(), "");
}

#[test]
fn a_partial_last_sector_is_not_served() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096 + 511);
    let served = Served::existing(dir, image, Transport::Tcp, Style::New, &[]);
    let flags = flags_of(&served.server);
    read(&flags, 4095, 1).run().succeeded();
    read(&flags, 4096, 1).run().refused(1, &["4096"]);
    let log = served.server.stderr();
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains(":W:") && log.contains("not serving its last 511 bytes,"), "{log}");
}

#[test]
fn missing_read_and_write_permissions_are_distinguished() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve = |flags: &str| {
        let nobody = as_nobody(dir.path())?.words("serve").words(flags).args(["--file"]);
        Some(nobody.args([&image]).words(&Endpoint::localhost(free_port()).flags()))
    };
    permit(&image, 0o600);
    let Some(unreadable) = serve("") else { return };
    assert_fatal(&unreadable.run(), &["/image may not be read by user id 65534"]);
    assert_fatal(
        &serve("--read-only").unwrap().run(),
        &["/image may not be read by user id 65534"],
    );
    permit(&image, 0o644);
    assert_fatal(&serve("").unwrap().run(), &["/image may be read but not written", "--read-only"]);
    let port = free_port();
    let reader = as_nobody(dir.path()).unwrap().words("serve --read-only --file").args([&image]);
    let peer = reader.words(&Endpoint::localhost(port).flags()).serve_at(Endpoint::localhost(port));
    read(&peer.endpoint.flags(), 0, 512).run().succeeded();
}

#[test]
fn a_disk_is_served_by_one_server_only() {
    let served = Served::with(&[]);
    assert_image_refused(&served.image, &["/image is in use", "(flexnbd) has locked it"]);
    read(&flags_of(&served.server), 0, 512).run().succeeded();
}

#[test]
fn an_unavailable_address_is_named_with_the_reason() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve =
        |address: &str| Program::flexnbd("serve --file").args([&image]).words(address).run();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let here = format!("cannot listen on 127.0.0.1:{port}");
    assert_fatal(
        &serve(&Endpoint::localhost(port).flags()),
        &[&here, "another program has this port"],
    );
    let elsewhere = serve(&format!("--addr 192.0.2.1 --port {port}"));
    assert_fatal(&elsewhere, &["cannot listen on 192.0.2.1:", "no interface of this host"]);
    let nowhere = serve("");
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(nowhere.stderr.contains("no address to listen on: give --addr and --port"));
    let image = image.display();
    assert_fatal(&serve(&format!("--addr {image}")), &["cannot listen on /", "is not a socket"]);
    assert_fatal(&serve(&format!("--addr {image}.d/sock")), &["directory does not exist"]);
    let long = format!("--addr /tmp/{}", "x".repeat(103));
    assert_fatal(&serve(&long), &["cannot listen on /tmp/xxx", "at most 107 bytes"]);
}

#[test]
fn unprivileged_users_are_refused_privileged_ports() {
    let first_free = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    if first_free.is_ok_and(|port| port.trim().parse().unwrap_or(1024) < 1024) {
        harness::skip("the refusal of a privileged port", "this host has none");
        return;
    }
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    permit(&image, 0o666);
    let Some(nobody) = as_nobody(dir.path()) else { return };
    let outcome = nobody.words("serve --addr 127.0.0.1 --port 1023 --file").args([&image]).run();
    assert_fatal(
        &outcome,
        &["cannot listen on 127.0.0.1:1023", "below 1024", "CAP_NET_BIND_SERVICE"],
    );
}

#[test]
fn a_control_socket_never_replaces_another_file() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve = |sock: &Path| {
        let serve = Program::flexnbd("serve --sock").args([sock]).args(["--file"]).args([&image]);
        serve.words(&Endpoint::localhost(free_port()).flags()).run()
    };
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_fatal(&serve(&file), &["control socket /", "/file: something that is not a socket"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let live = dir.path().join("live.sock");
    let owner = UnixListener::bind(&live).unwrap();
    assert_fatal(&serve(&live), &["control socket /", "/live.sock: ", "another"]);
    drop(owner);
    let missing = dir.path().join("none/x.sock");
    assert_fatal(&serve(&missing), &["/none/x.sock: its directory does not exist"]);
    let long = dir.path().join("x".repeat(107));
    assert_fatal(&serve(&long), &["where 107 are possible"]);
}

#[test]
fn a_stale_control_socket_is_replaced() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale).unwrap());
    let mut server = Builder::serve(&image).args(["--sock"]).args([&stale]).start();
    Program::flexnbd("status --sock").args([&stale]).ok();
    assert!(server.stop().success());
    assert!(!stale.exists());
}

#[test]
fn configuration_errors_name_file_line_and_key() {
    let dir = temp_dir();
    let config = dir.path().join("disk.conf");
    let serve = |text: &str| {
        std::fs::write(&config, text).unwrap();
        Program::flexnbd("serve --config").args([&config]).run()
    };
    for (text, parts) in [
        ("FILE=/a\n# BOGUS\nBOGUS=1\n", ["/disk.conf, line 3", "BOGUS"]),
        ("PORT=http\n", ["/disk.conf, line 1: PORT", "`http`"]),
        ("\nFILE=/a\nFILE=/b\n", ["/disk.conf, line 3", "FILE"]),
        ("FILE\n", ["/disk.conf, line 1", "="]),
        ("FILE=/a\nACL=10.0.0.0/33\n", ["/disk.conf, line 2: ACL", "10.0.0.0/33"]),
        ("KILLSWITCH=maybe\n", ["/disk.conf, line 1: KILLSWITCH", "`maybe`"]),
        ("MAX_CLIENTS=0\n", ["/disk.conf, line 1: MAX_CLIENTS", "`0`"]),
        ("ADDR=nowhere\n", ["/disk.conf, line 1: ADDR", "nowhere"]),
    ] {
        assert_fatal(&serve(text), &parts);
    }
    std::fs::remove_file(&config).unwrap();
    let missing = Program::flexnbd("serve --config").args([&config]).run();
    assert_fatal(&missing, &["cannot read the configuration file /", "it does not exist"]);
    let directory = Program::flexnbd("serve --config").args([dir.path()]).run();
    assert_fatal(&directory, &["cannot read the configuration file /", "it is a directory"]);
}

#[test]
fn options_override_the_configuration_file() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let config = dir.path().join("disk.conf");
    let text =
        format!("FILE={}/other\nADDR=192.0.2.1\nPORT=1\nREAD_ONLY=yes\n", dir.path().display());
    std::fs::write(&config, text).unwrap();
    let server = Builder::serve(&image).args(["--config"]).args([&config]).start();
    let flags = flags_of(&server);
    read(&flags, 0, 512).run().succeeded();
    crate::write(&flags, 0, b"x").run().refused(1, &["EPERM"]);
}

#[test]
fn create_makes_a_sparse_disk_only_once() {
    let dir = temp_dir();
    let image = dir.path().join("new");
    let create = |size: &str| Builder::serve(&image).args(["--create", size]).start();
    let server = create("1G");
    assert_eq!((image.metadata().unwrap().len(), allocated(&image)), (1 << 30, 0));
    crate::write(&flags_of(&server), 0, b"precious").run().succeeded();
    drop(server);
    let server = create("2G");
    assert_eq!(image.metadata().unwrap().len(), 1 << 30, "unchanged");
    assert_eq!(read(&flags_of(&server), 0, 8).run().stdout, b"precious");
    assert_eq!(read_at(&image, 0, 8), b"precious");
    assert_image_refused(&dir.path().join("none/new"), &["/none/new"]);
}

//! What an operator can get wrong when starting a server: status 78, a fatal log line that names
//! the thing and the way out, and nothing left behind.

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

/// `serve` of this image on a free port, refused with all of these words.
#[track_caller]
fn refused(image: &Path, parts: &[&str]) {
    let serve = Program::flexnbd("serve").words(&Endpoint::localhost(free_port()).flags());
    is_fatal(&serve.args(["--file"]).args([image]).run(), parts);
}

#[track_caller]
fn is_fatal(outcome: &Outcome, parts: &[&str]) {
    outcome.refused(EXIT_CONFIG, parts);
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one line: {lines:?}");
    assert!(lines[0].contains(":F:"), "a fatal one: {lines:?}");
    assert_eq!(outcome.text(), "");
}

#[test]
fn what_is_no_disk_is_refused_by_its_name() {
    let dir = temp_dir();
    refused(&dir.path().join("none"), &["/none does not exist", "--create"]);
    refused(dir.path(), &[" is a directory"]);
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    refused(&pipe, &["/pipe is neither a regular file nor a block device"]);
    refused(Path::new("/dev/null"), &["/dev/null is neither"]);
    refused(&sparse_image(dir.path(), "small", 511), &["/small of 511 bytes is too small", "512"]);
    refused(&sparse_image(dir.path(), "empty", 0), &["/empty of 0 bytes is too small"]);
    refused(&dir.path().join("small/er"), &["/small/er"]);
}

#[test]
fn a_configuration_that_is_no_regular_file_is_refused() {
    let dir = temp_dir();
    let pipe = dir.path().join("pipe");
    nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
    for config in [&*pipe, Path::new("/dev/zero")] {
        let serve = Program::flexnbd("serve --config").args([config]);
        is_fatal(&serve.run(), &[config.to_str().unwrap(), "it is not a regular file"]);
        let status = Program::flexnbd("status --config").args([config]);
        let outcome = status.run();
        assert!(outcome.stderr.contains("it is not a regular file"), "{}", outcome.stderr);
    }
}

#[test]
fn one_sector_is_enough() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 512);
    let served = Served::existing(dir, image, Transport::Tcp, Style::New, &[]);
    assert_eq!(read(&flags_of(&served.server), 0, 512).run().succeeded().stdout, [0; 512]);
    assert_eq!(served.server.stderr(), "");
}

#[test]
fn a_tail_beyond_the_last_sector_is_not_served_and_warned_of_once() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096 + 511);
    let served = Served::existing(dir, image, Transport::Tcp, Style::New, &[]);
    let place = flags_of(&served.server);
    read(&place, 4095, 1).run().succeeded();
    read(&place, 4096, 1).run().refused(1, &["4096"]);
    let said = served.server.stderr();
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains(":W:") && said.contains("not serving its last 511 bytes,"), "{said}");
}

#[test]
fn permissions_are_told_apart() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve = |flags: &str| {
        let nobody = as_nobody(dir.path())?.words("serve").words(flags).args(["--file"]);
        Some(nobody.args([&image]).words(&Endpoint::localhost(free_port()).flags()))
    };
    permit(&image, 0o600);
    let Some(unreadable) = serve("") else { return };
    is_fatal(&unreadable.run(), &["/image may not be read by user id 65534"]);
    is_fatal(&serve("--read-only").unwrap().run(), &["/image may not be read by user id 65534"]);
    permit(&image, 0o644);
    is_fatal(&serve("").unwrap().run(), &["/image may be read but not written", "--read-only"]);
    let port = free_port();
    let reader = as_nobody(dir.path()).unwrap().words("serve --read-only --file").args([&image]);
    let peer = reader.words(&Endpoint::localhost(port).flags()).serve_at(Endpoint::localhost(port));
    read(&peer.endpoint.flags(), 0, 512).run().succeeded();
}

#[test]
fn a_disk_is_served_by_one_server_only() {
    let served = Served::with(&[]);
    refused(&served.image, &["/image is in use", "(flexnbd) has locked it"]);
    read(&flags_of(&served.server), 0, 512).run().succeeded();
}

#[test]
fn an_address_that_cannot_be_had_is_named_with_the_reason() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve = |place: &str| Program::flexnbd("serve --file").args([&image]).words(place).run();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let here = format!("cannot listen on 127.0.0.1:{port}");
    is_fatal(&serve(&Endpoint::localhost(port).flags()), &[&here, "another program has this port"]);
    let elsewhere = serve(&format!("--addr 192.0.2.1 --port {port}"));
    is_fatal(&elsewhere, &["cannot listen on 192.0.2.1:", "no interface of this host"]);
    let nowhere = serve("");
    assert_eq!(nowhere.status.code(), Some(2));
    assert!(nowhere.stderr.contains("no address to listen on: give --addr and --port"));
    let image = image.display();
    is_fatal(&serve(&format!("--addr {image}")), &["cannot listen on /", "is not a socket"]);
    is_fatal(&serve(&format!("--addr {image}.d/sock")), &["directory does not exist"]);
    let long = format!("--addr /tmp/{}", "x".repeat(103));
    is_fatal(&serve(&long), &["cannot listen on /tmp/xxx", "at most 107 bytes"]);
}

#[test]
fn a_privileged_port_is_not_for_everybody() {
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
    is_fatal(&outcome, &["cannot listen on 127.0.0.1:1023", "below 1024", "CAP_NET_BIND_SERVICE"]);
}

#[test]
fn a_control_socket_takes_no_place_that_is_taken() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let serve = |sock: &Path| {
        let serve = Program::flexnbd("serve --sock").args([sock]).args(["--file"]).args([&image]);
        serve.words(&Endpoint::localhost(free_port()).flags()).run()
    };
    let file = dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    is_fatal(&serve(&file), &["control socket /", "/file: something that is not a socket"]);
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let live = dir.path().join("live.sock");
    let owner = UnixListener::bind(&live).unwrap();
    is_fatal(&serve(&live), &["control socket /", "/live.sock: ", "another"]);
    drop(owner);
    let missing = dir.path().join("none/x.sock");
    is_fatal(&serve(&missing), &["/none/x.sock: its directory does not exist"]);
    let long = dir.path().join("x".repeat(107));
    is_fatal(&serve(&long), &["where 107 are possible"]);
}

#[test]
fn a_stale_control_socket_is_replaced_and_removed_at_the_end() {
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
fn a_configuration_is_refused_by_file_line_and_key() {
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
        is_fatal(&serve(text), &parts);
    }
    std::fs::remove_file(&config).unwrap();
    let missing = Program::flexnbd("serve --config").args([&config]).run();
    is_fatal(&missing, &["cannot read the configuration file /", "it does not exist"]);
    let directory = Program::flexnbd("serve --config").args([dir.path()]).run();
    is_fatal(&directory, &["cannot read the configuration file /", "it is a directory"]);
}

#[test]
fn a_configuration_is_served_and_flags_win_over_it() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 4096);
    let config = dir.path().join("disk.conf");
    let text =
        format!("FILE={}/other\nADDR=192.0.2.1\nPORT=1\nREAD_ONLY=yes\n", dir.path().display());
    std::fs::write(&config, text).unwrap();
    let server = Builder::serve(&image).args(["--config"]).args([&config]).start();
    let place = flags_of(&server);
    read(&place, 0, 512).run().succeeded();
    crate::write(&place, 0, b"x").run().refused(1, &["EPERM"]);
}

#[test]
fn create_makes_a_sparse_disk_only_where_there_is_none() {
    let dir = temp_dir();
    let image = dir.path().join("new");
    let create = |size: &str| Builder::serve(&image).args(["--create", size]).start();
    let server = create("1G");
    assert_eq!((image.metadata().unwrap().len(), allocated(&image)), (1 << 30, 0));
    crate::write(&flags_of(&server), 0, b"precious").run().succeeded();
    drop(server);
    let server = create("2G");
    assert_eq!(image.metadata().unwrap().len(), 1 << 30, "it stays as it is");
    assert_eq!(read(&flags_of(&server), 0, 8).run().stdout, b"precious");
    assert_eq!(read_at(&image, 0, 8), b"precious");
    refused(&dir.path().join("none/new"), &["/none/new"]);
}

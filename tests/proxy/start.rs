//! The start of a proxy: what it refuses, with which message and exit status, and its names.

use crate::{builder_of, proxy_of};
use harness::manager::{Inherited, ServiceManager};
use harness::raw::READ;
use harness::session::{Mode, Request, Session};
use harness::{
    Builder, Endpoint, MIB, Program, flexnbd, free_port, sparse_image, temp_dir, write_at,
};
use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::symlink;

#[test]
fn proxy_without_any_upstream_exits_with_1() {
    let (first, second) = (free_port(), free_port());
    let to = format!("--to nbd://127.0.0.1:{first} --to nbd://127.0.0.1:{second}/disk");
    let outcome = Program::flexnbd(&format!("proxy {to} -l 127.0.0.1 -p 0")).run();
    let named = [format!("127.0.0.1:{first}: "), format!("127.0.0.1:{second} (disk): ")];
    outcome.refused(1, &[&named[0], &named[1], "refused"]);
}

#[test]
fn the_originals_options_name_the_upstream() {
    let port = free_port();
    let line = format!("proxy -l 127.0.0.1 -p 0 -C 127.0.0.1 -P {port} -q");
    Program::flexnbd(&line).run().refused(1, &[&format!("127.0.0.1:{port}: ")]);
}

#[test]
fn upstream_of_an_unknown_export_is_refused() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "disk", MIB);
    let upstream = Builder::serve(&image).args(["--export", "disk"]).start();
    let uri = upstream.endpoint().uri_of("other");
    let outcome = Program::flexnbd("proxy -l 127.0.0.1 -p 0 --to").args([uri]).run();
    outcome.refused(1, &["(other): "]);
}

#[test]
fn incomplete_command_lines_exit_with_2() {
    for (line, why) in [
        ("proxy -l 127.0.0.1 -p 0", "the upstream is missing: give --to URI, or --conn-addr"),
        ("proxy --to 192.0.2.1 -l ::1 -p 0", "begins neither with nbd:// nor nbd+unix://"),
        ("proxy --to nbd://h -p 7", "--port needs --addr as well"),
    ] {
        Program::flexnbd(line).run().refused(2, &[why, "Usage: flexnbd proxy --to URI"]);
    }
}

#[test]
fn proxy_without_an_address_exits_with_2() {
    let dir = temp_dir();
    let upstream = Builder::serve(&sparse_image(dir.path(), "disk", MIB)).start();
    let outcome = Program::flexnbd("proxy --to").args([upstream.uri()]).run();
    outcome.refused(2, &["no address to listen on", "Usage: flexnbd proxy"]);
}

#[test]
fn configuration_of_an_image_is_refused_with_78() {
    let dir = temp_dir();
    let file = dir.path().join("disk.conf");
    fs::write(&file, "FILE=/a\nADDR=::1\nPORT=0\n").unwrap();
    let outcome = Program::flexnbd("proxy --config").args([&file]).run();
    outcome.refused(78, &["FILE is a key for `flexnbd serve`"]);
    fs::write(&file, "TO=nbd://a\nADDR=::1\nPORT=0\n").unwrap();
    let outcome = Program::flexnbd("serve --config").args([&file]).run();
    outcome.refused(78, &["TO is a key for `flexnbd proxy`"]);
}

#[test]
fn status_of_a_configuration_names_the_upstreams() {
    let dir = temp_dir();
    let file = dir.path().join("disk.conf");
    fs::write(&file, "TO=nbd://192.0.2.1/a nbd+unix:///?socket=/run/x\n").unwrap();
    let status = Program::flexnbd("status --config").args([&file]).ok();
    assert_eq!(status, "upstream=192.0.2.1:10809%20(a),/run/x\n");
    fs::write(&file, "TO=nbd://192.0.2.1\nMAX_CLIENTS=0\n").unwrap();
    let outcome = Program::flexnbd("status --config").args([&file]).run();
    outcome.refused(1, &["MAX_CLIENTS: `0` is not a number"]);
}

#[test]
fn a_configuration_file_sets_everything() {
    let dir = temp_dir();
    let upstream = Builder::serve(&sparse_image(dir.path(), "disk", MIB)).start();
    let file = dir.path().join("disk.conf");
    let text = format!("TO={}\nEXPORT=mine\nREAD_ONLY=yes\nCACHE=4K\n", upstream.uri());
    fs::write(&file, text).unwrap();
    let proxy = Builder::proxy().args(["--config"]).args([&file]).start();
    let session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    assert_eq!((session.size, session.flags & 2), (MIB, 2), "a read-only disk");
}

#[test]
fn clients_wait_in_the_socket_for_the_upstream() {
    let manager = ServiceManager::new();
    let mut waiting = TcpStream::connect(manager.address()).unwrap();
    let to = format!("proxy --to nbd://127.0.0.1:{}", free_port());
    let mut service = manager.start(Inherited::NbdAndControl, &to, &[]);
    assert_eq!(service.wait_for_exit().code(), Some(1), "the service manager tries again");
    let messages = manager.messages().concat();
    assert!(!messages.contains("READY=1") && messages.contains("refused"), "{messages}");
    // With the upstream there, the same client is served.
    let upstream = Builder::serve(&sparse_image(manager.dir.path(), "disk", MIB)).start();
    let to = format!("proxy --to {}", upstream.uri());
    let _service = manager.start(Inherited::NbdAndControl, &to, &[]);
    waiting.set_read_timeout(Some(harness::TIMEOUT)).unwrap();
    let mut greeting = [0; 8];
    std::io::Read::read_exact(&mut waiting, &mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGIC");
}

#[test]
fn the_link_flexnbd_proxy_is_the_mode() {
    let dir = temp_dir();
    let link = dir.path().join("flexnbd-proxy");
    symlink(flexnbd(), &link).unwrap();
    let help = Program::new(&link).words("--help").ok();
    assert!(help.contains("--conn-addr"), "{help}");
    assert_eq!(help, Program::flexnbd("help proxy").ok());
    assert!(Program::new(&link).words("--version").ok().starts_with("flexnbd "));
    let image = sparse_image(dir.path(), "disk", MIB);
    write_at(&image, 4096, b"hello");
    let upstream = Builder::serve(&image).start();
    let port = upstream.port().to_string();
    let proxy = Builder::proxy_by_name(&link).args(["-C", "127.0.0.1", "-P", &port, "-c"]).start();
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    assert_eq!(session.read(4096, 5), b"hello");
}

#[test]
fn a_variable_sets_the_timeout() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "disk", MIB);
    let upstream = Builder::serve(&image).start();
    let variable = "FLEXNBD_UPSTREAM_TIMEOUT";
    let builder = builder_of(&[upstream.endpoint()], "").env(variable, "soon");
    let mut proxy = builder.at(Endpoint::localhost(free_port())).spawn();
    assert_eq!(proxy.wait_for_end().code(), Some(2));
    assert!(proxy.stderr().contains("FLEXNBD_UPSTREAM_TIMEOUT: `soon` is not a number"));
    let proxy = builder_of(&[upstream.endpoint()], "").env(variable, "5").start();
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.ok(Request::new(READ, 0, 512));
}

#[test]
fn signals_end_a_proxy_with_0() {
    let dir = temp_dir();
    let upstream = Builder::serve(&sparse_image(dir.path(), "disk", MIB)).start();
    let mut proxy = proxy_of(&[upstream.endpoint()], "");
    let mut session = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
    session.assert_in_sync();
    assert_eq!(proxy.stop().code(), Some(0));
    session.wire.expect_closed("the proxy has ended");
}

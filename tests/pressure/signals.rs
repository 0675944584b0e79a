//! The effect of each signal on a server (flexnbd(1), "SIGNALS").

use harness::session::{Mode, Request, Session};
use harness::{Builder, KIB, Server, TempDir, restore_default_signals, sparse_image, temp_dir};
use nix::libc;
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::process::ExitStatusExt as _;

/// A verbose server, whose log shows each signal that it handled, and its directory.
fn server(config: Option<&str>) -> (Server, TempDir) {
    restore_default_signals();
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    let mut builder = Builder::serve(&image).args(["--verbose"]);
    if let Some(text) = config {
        let path = dir.path().join("config");
        fs::write(&path, text).unwrap();
        builder = builder.args(["--config".as_ref(), path.as_os_str()]);
    }
    // A server that listens may still install its signal handlers; this line comes after that.
    let server = builder.start();
    server.wait_for_stderr("serving ");
    (server, dir)
}

#[test]
fn stopping_signals_end_the_server_cleanly() {
    use Signal::*;
    for signal in [SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGXCPU, SIGPWR, SIGALRM, SIGVTALRM, SIGPROF] {
        let (mut server, _dir) = server(None);
        server.signal(signal);
        let status = server.wait_for_end();
        assert_eq!((status.code(), status.signal()), (Some(0), None), "{signal}");
        server.wait_for_stderr(&format!("stopping: received {signal}"));
    }
}

#[test]
fn unused_signals_leave_sessions_open() {
    use Signal::*;
    let (server, _dir) = server(None);
    let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    for signal in [SIGUSR1, SIGUSR2, SIGIO, SIGSTKFLT] {
        server.signal(signal);
        server.wait_for_stderr(&format!("received {signal}, which has no meaning here"));
    }
    for number in [libc::SIGRTMIN(), libc::SIGRTMAX(), libc::SIGXFSZ, libc::SIGPIPE] {
        // SAFETY: kill takes two integers; the first is the pid of a child that is not reaped yet.
        assert_eq!(unsafe { libc::kill(server.pid().cast_signed(), number) }, 0);
        session.ok(Request::write(0, &[1; 512]));
    }
}

#[test]
fn sighup_reloads_the_configuration() {
    let (server, dir) = server(Some("MAX_CLIENTS=2\n"));
    let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_for_stderr("received SIGHUP: reloaded");
    fs::write(dir.path().join("config"), "ACL=nonsense\n").unwrap();
    server.signal(Signal::SIGHUP);
    server.wait_for_stderr("received SIGHUP, but cannot reload: ");
    session.ok(Request::write(0, &[1; 512]));
    fs::write(dir.path().join("config"), "ACL=192.0.2.1\n").unwrap();
    server.signal(Signal::SIGHUP);
    session.wire.expect_closed("the reloaded ACL excludes the client");
}

#[test]
fn sighup_under_nohup_is_ignored() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", 64 * KIB);
    let server = Builder::serve(&image).args(["--verbose"]).through(["nohup"]).start();
    server.wait_for_stderr("serving ");
    server.signal(Signal::SIGHUP);
    server.wait_for_stderr("received SIGHUP, which has no meaning here");
    Session::open(server.endpoint(), Mode::Simple).unwrap().ok(Request::write(0, &[1; 512]));
}

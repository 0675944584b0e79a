//! Tests of `sockets.rs`.

use super::super::child;
use super::*;
use nix::fcntl::{FcntlArg, fcntl};
use std::net::TcpStream;
use std::os::fd::RawFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;

#[test]
fn only_the_socket_named_control_is_for_operators() {
    assert_eq!(SocketRole::of("control"), SocketRole::Control);
    for name in ["nbd", "unknown", "LISTEN_FD", "flexnbd@disk.socket", "control.socket"] {
        assert_eq!(SocketRole::of(name), SocketRole::Nbd { is_familiar: true }, "{name}");
    }
    for name in ["Control", "controls", "http", "socket"] {
        assert_eq!(SocketRole::of(name), SocketRole::Nbd { is_familiar: false }, "{name}");
    }
}

#[test]
fn every_descriptor_has_one_name() {
    assert_eq!(names_of("nbd:control", 2), ["nbd", "control"]);
    assert_eq!(names_of("nbd:control", 1), ["nbd"]);
    assert_eq!(names_of("nbd", 3), ["nbd", "unknown", "unknown"]);
    assert_eq!(names_of("nbd::control", 3), ["nbd", "unknown", "control"]);
    assert_eq!(names_of("", 1), ["unknown"]);
    assert_eq!(names_of("nbd", 0), [] as [&str; 0]);
}

/// Descriptors from `first` on that a child inherits; closed when dropped.
struct Handed {
    first: RawFd,
    count: usize,
}

impl Handed {
    /// Each test has its own `first`.
    fn from(first: RawFd, sockets: &[&dyn AsFd]) -> Self {
        for (place, socket) in (first..).zip(sockets) {
            let copy = fcntl(socket.as_fd(), FcntlArg::F_DUPFD(first)).unwrap();
            assert_eq!(copy, place, "this place must be free for the test to mean anything");
        }
        Self { first, count: sockets.len() }
    }

    /// The sockets that a child process finds.
    fn as_seen(&self, names: &str) -> Vec<String> {
        self.as_promised(&self.count.to_string(), names)
    }

    /// The same with this `LISTEN_FDS`.
    fn as_promised(&self, count: &str, names: &str) -> Vec<String> {
        let mut command = child::running("systemd::sockets::tests::a_child_that_inherits");
        command.env("LISTEN_FDS", count);
        command.env("LISTEN_FDS_FIRST_FD", self.first.to_string());
        command.env("LISTEN_FDNAMES", names);
        child::output_of(&command.output().unwrap())
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        for descriptor in (self.first..).take(self.count) {
            nix::unistd::close(descriptor).unwrap();
        }
    }
}

#[test]
#[ignore = "a part of other tests, which run it in a process of its own"]
fn a_child_that_inherits() {
    let inherited = InheritedSockets::from_env();
    for error in &inherited.bad {
        child::say(&error.to_string());
    }
    for listener in &inherited.nbd {
        child::say(&match listener {
            InheritedListener::Tcp(tcp) => format!("nbd {}", tcp.local_addr().unwrap()),
            InheritedListener::Unix(unix) => format!("nbd {}", path_of(unix)),
        });
    }
    if let Some(unix) = &inherited.control {
        child::say(&format!("control {}", path_of(unix)));
    }
    child::say(&format!("unfamiliar {:?}", inherited.unfamiliar));
}

fn path_of(listener: &UnixListener) -> String {
    listener.local_addr().unwrap().as_pathname().unwrap().display().to_string()
}

fn unix(directory: &tempfile::TempDir, name: &str) -> (UnixListener, PathBuf) {
    let path = directory.path().join(name);
    (UnixListener::bind(&path).unwrap(), path)
}

#[test]
fn sockets_are_found_by_name_in_any_order() {
    let directory = tempfile::tempdir().unwrap();
    let (control, control_path) = unix(&directory, "control.sock");
    let (local, local_path) = unix(&directory, "nbd.sock");
    let (v4, v6) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("[::1]:0"));
    let mut sockets: Vec<&dyn AsFd> = vec![&v4, &control, &local];
    let mut names = "nbd:control:disk.socket".to_owned();
    let mut expected =
        vec![format!("nbd {}", v4.local_addr().unwrap()), format!("nbd {}", local_path.display())];
    // Not every host has IPv6.
    if let Ok(v6) = &v6 {
        sockets.push(v6);
        names.push_str(":web");
        expected.push(format!("nbd {}", v6.local_addr().unwrap()));
    }
    expected.push(format!("control {}", control_path.display()));
    expected.push(if v6.is_ok() { r#"unfamiliar ["web"]"# } else { "unfamiliar []" }.to_owned());
    assert_eq!(Handed::from(300, &sockets).as_seen(&names), expected);
}

#[test]
fn without_a_service_manager_there_are_no_sockets() {
    assert_eq!(Handed::from(320, &[]).as_seen(""), ["unfamiliar []"]);
}

#[test]
fn the_error_names_a_bad_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let (control, path) = unix(&directory, "control.sock");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let connection = TcpStream::connect(tcp.local_addr().unwrap()).unwrap();
    let datagram = UnixDatagram::bind(directory.path().join("datagram")).unwrap();
    let file = std::fs::File::open(path.parent().unwrap()).unwrap();
    let cases: [(&[&dyn AsFd], &str, &str); 5] = [
        (&[&file], "nbd", "neither a TCP nor a unix stream socket"),
        (&[&datagram], "nbd", "neither a TCP nor a unix stream socket"),
        (&[&connection], "nbd", "does not take connections"),
        (&[&tcp], "control", "must be a unix stream socket"),
        (&[&control, &control], "control:control", "only one control socket"),
    ];
    for (sockets, names, complaint) in cases {
        let said = Handed::from(340, sockets).as_seen(names);
        let beginning = format!("inherited socket {:?} ", names.split(':').next().unwrap());
        assert!(said[0].starts_with(&beginning) && said[0].contains(complaint), "{said:?}");
    }
}

#[test]
fn a_bad_descriptor_does_not_affect_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let (control, path) = unix(&directory, "control.sock");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let file = std::fs::File::open(directory.path()).unwrap();
    let good =
        [format!("nbd {}", tcp.local_addr().unwrap()), format!("control {}", path.display())];
    let handed = Handed::from(380, &[&file, &tcp, &control]);
    for (count, bad) in [("3", 1), ("4", 2)] {
        let said = handed.as_promised(count, "nbd:nbd:control:nbd");
        assert_eq!((said.len(), &said[bad..bad + 2]), (bad + 3, &good[..]), "{said:?}");
    }
}

#[test]
fn a_closed_descriptor_is_an_error() {
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let handed = Handed::from(360, &[&tcp]);
    for count in ["2", "2147483647", "18446744073709551615"] {
        let said = handed.as_promised(count, "nbd:more");
        let expected = format!(
            "inherited socket \"more\" (number 1 of LISTEN_FDS): it is not open, though \
             LISTEN_FDS={count} promises it"
        );
        assert!(said[0].starts_with(&expected), "{said:?}");
    }
}

//! Tests of encrypted streams over TCP and unix sockets: the same promises as those of plain ones.

use super::*;
use crate::net::tls::{TlsClient, TlsFile, TlsFiles, TlsMode, TlsTarget};
use crate::net::{Remote, tls::ServerTls};
use harness::pki::{Pki, Request};
use std::io::ErrorKind;
use std::net::TcpListener;
use std::sync::{Arc, LazyLock};
use std::thread;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);
const READ: Interest = Interest { readable: true, writable: false };
const WRITE: Interest = Interest { readable: false, writable: true };

/// Roles of a server and of a client that trusts it.
static ROLES: LazyLock<[TlsRole; 2]> = LazyLock::new(|| {
    let pki = Pki::new();
    let file = |path: &std::path::Path| Some(TlsFile::Path(path.to_owned()));
    let identity = pki.issue("server", &Request::server());
    let files = TlsFiles { cert: file(&identity.cert), key: file(&identity.key), ca: None };
    let server = ServerTls::load(TlsMode::Require, &files, &[]).unwrap();
    let files = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
    let target = TlsTarget { mode: TlsMode::Require, hostname: Some("localhost".to_owned()) };
    let client = TlsClient::load(&files).unwrap();
    let client = client.for_remote(&target, &Remote::Unix("/nowhere".into())).unwrap().unwrap();
    let (config, name) = (Arc::clone(client.config()), client.server_name().clone());
    [
        TlsRole::Server { config: Arc::clone(server.config()), kernel: false },
        TlsRole::Client { config, name },
    ]
});

fn wait(stream: &Stream, interest: Interest) -> io::Result<()> {
    let timed_out = stream.wait(interest, None, Some(Instant::now() + LONG))?.timed_out;
    if timed_out { Err(ErrorKind::TimedOut.into()) } else { Ok(()) }
}

fn plain_kinds() -> [(Stream, Stream); 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let (unix_near, unix_far) = UnixStream::pair().unwrap();
    [(Stream::Tcp(near), Stream::Tcp(far)), (Stream::Unix(unix_near), Stream::Unix(unix_far))]
}

/// The server's and the client's end of an encrypted connection of each kind.
fn both_kinds() -> [(Stream, Stream); 2] {
    plain_kinds().map(|(near, far)| {
        let server = thread::spawn(|| near.start_tls(&ROLES[0], &mut wait).unwrap());
        let far = far.start_tls(&ROLES[1], &mut wait).unwrap();
        (server.join().unwrap(), far)
    })
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

#[test]
fn bytes_arrive_in_order_in_both_directions() {
    for (near, far) in both_kinds() {
        assert!(near.is_tls() && !near.is_transferable() && !near.sends_references());
        for (from, to) in [(&near, &far), (&far, &near)] {
            let data = pattern(3_000_000);
            thread::scope(|scope| {
                scope.spawn(|| from.send_all(&data, LONG).unwrap());
                let mut received = vec![0; data.len()];
                to.recv_exact(&mut received, LONG).unwrap();
                assert!(received == data);
            });
        }
    }
}

#[test]
fn records_are_not_the_plain_bytes() {
    let (near, far) = UnixStream::pair().unwrap();
    let (near, spy) = (Stream::Unix(near), far.try_clone().unwrap());
    let server = thread::spawn(|| near.start_tls(&ROLES[0], &mut wait).unwrap());
    let _far = Stream::Unix(far).start_tls(&ROLES[1], &mut wait).unwrap();
    let near = server.join().unwrap();
    near.send_all(b"secret secret secret", LONG).unwrap();
    let mut seen = vec![0; 1000];
    let count = Stream::Unix(spy).try_recv(&mut seen).unwrap();
    assert!(count > 20);
    assert!(!seen[..count].windows(6).any(|window| window == b"secret"));
}

#[test]
fn a_wait_sees_bytes_that_are_decrypted_already() {
    for (near, far) in both_kinds() {
        far.send_all(b"hello", LONG).unwrap();
        for expected in b"hello" {
            let wake = Wake::new().unwrap();
            wake.wake();
            wait(&near, READ).unwrap();
            let ready = near.wait(READ, Some(&wake), Some(Instant::now() + LONG)).unwrap();
            assert!(ready.readable && ready.woken && !ready.timed_out);
            let mut byte = [0];
            assert_eq!(near.try_recv(&mut byte).unwrap(), 1);
            assert_eq!(byte[0], *expected);
        }
        assert_eq!(near.try_recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        assert!(near.wait(READ, None, Some(Instant::now() + SHORT)).unwrap().timed_out);
    }
}

#[test]
fn a_receive_returns_all_records_that_fit() {
    for (near, far) in both_kinds() {
        // So few that they fit into the buffer of a unix socket.
        let data = pattern(40_000);
        for piece in data.chunks(1000) {
            far.send_all(piece, LONG).unwrap();
        }
        let mut received = Vec::new();
        while received.len() < data.len() {
            wait(&near, READ).unwrap();
            let mut into = vec![0; data.len()];
            let count = near.try_recv(&mut into).unwrap();
            received.extend_from_slice(&into[..count]);
            assert_eq!(count % 1000, 0, "a part of a record");
        }
        assert!(received == data);
    }
}

#[test]
fn bytes_count_as_sent_when_the_socket_has_them() {
    for (near, far) in both_kinds() {
        let data = pattern(8 << 20);
        let mut sent = 0;
        // Until the socket is full.
        loop {
            match near.try_send(&data[sent..], false) {
                Ok(count) => sent += count,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    if near.wait(WRITE, None, Some(Instant::now() + SHORT)).unwrap().timed_out {
                        break;
                    }
                }
            }
        }
        assert!(sent < data.len());
        // A call with other data is refused, instead of sending a part of each.
        assert_ne!(near.try_send(b"", false).map_err(|error| error.kind()), Ok(0));
        thread::scope(|scope| {
            scope.spawn(|| near.send_all(&data[sent..], LONG).unwrap());
            let mut received = vec![0; data.len()];
            far.recv_exact(&mut received, LONG).unwrap();
            assert!(received == data);
        });
    }
}

#[test]
fn pieces_share_records_and_keep_their_order() {
    for (near, far) in both_kinds() {
        let pieces = [IoSlice::new(b"l"), IoSlice::new(b""), IoSlice::new(b"lo")];
        near.send_all(b"he", LONG).unwrap();
        assert_eq!(near.try_send_vectored(&pieces).unwrap(), 3);
        let mut into = [0; 5];
        far.recv_exact(&mut into, LONG).unwrap();
        assert_eq!(&into, b"hello");
    }
}

#[test]
fn the_end_of_a_stream_is_received() {
    for (near, far) in both_kinds() {
        far.send_all(b"last", LONG).unwrap();
        far.shutdown_write().unwrap();
        let mut into = [0; 16];
        wait(&near, READ).unwrap();
        assert_eq!(near.try_recv(&mut into).unwrap(), 4);
        wait(&near, READ).unwrap();
        assert_eq!(near.try_recv(&mut into).unwrap(), 0);
        near.announce_end();
        drop(near);
    }
}

#[test]
fn a_record_that_is_not_genuine_ends_the_stream() {
    let (near, far) = UnixStream::pair().unwrap();
    let (near, attacker) = (Stream::Unix(near), Stream::Unix(far.try_clone().unwrap()));
    let server = thread::spawn(|| near.start_tls(&ROLES[0], &mut wait).unwrap());
    let far = Stream::Unix(far).start_tls(&ROLES[1], &mut wait).unwrap();
    let near = server.join().unwrap();
    far.send_all(b"genuine", LONG).unwrap();
    attacker.send_all(&[[23, 3, 3, 0, 32].to_vec(), vec![7; 32]].concat(), LONG).unwrap();
    let mut into = [0; 64];
    assert_eq!(near.try_recv(&mut into).unwrap(), 7);
    for _ in 0..2 {
        let error = near.try_recv(&mut into).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    }
    // The peer gets an alert.
    wait(&far, READ).unwrap();
    assert_eq!(far.try_recv(&mut into).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn a_client_refuses_a_server_of_another_name() {
    let TlsRole::Client { config, .. } = &ROLES[1] else { panic!("it is a client") };
    let name = "elsewhere.example".try_into().unwrap();
    let role = TlsRole::Client { config: Arc::clone(config), name };
    let (near, far) = UnixStream::pair().unwrap();
    let server = thread::spawn(|| Stream::Unix(near).start_tls(&ROLES[0], &mut wait).map(drop));
    let refused = Stream::Unix(far).start_tls(&role, &mut wait).map(drop);
    assert!(matches!(refused, Err(TlsFailure::Session(_))), "{refused:?}");
    // The client says why.
    let told = server.join().unwrap();
    assert!(matches!(told, Err(TlsFailure::Session(_))), "{told:?}");
}

#[test]
fn garbage_instead_of_a_handshake_is_refused() {
    for (near, far) in plain_kinds() {
        let server = thread::spawn(|| near.start_tls(&ROLES[0], &mut wait).map(drop));
        far.send_all(&[7; 5], LONG).unwrap();
        far.shutdown_write().unwrap();
        let refused = server.join().unwrap();
        assert!(refused.is_err());
    }
}

#[test]
fn a_handshake_in_countless_records_is_refused() {
    for (near, far) in plain_kinds() {
        let server = thread::spawn(|| near.start_tls(&ROLES[0], &mut wait).map(drop));
        // The begin of a long ClientHello, one byte in each record.
        let hello = [1, 0, 0xff, 0xff].into_iter().chain(std::iter::repeat_n(0, 0xffff));
        let records: Vec<u8> = hello.flat_map(|byte| [22, 3, 1, 0, 1, byte]).collect();
        // The server may have closed the connection.
        let _ = far.send_all(&records, LONG);
        let _ = far.shutdown_write();
        let refused = server.join().expect("no panic").unwrap_err().to_string();
        assert!(refused.contains("in too many records"), "{refused}");
    }
}

#[test]
fn idle_streams_free_their_buffers() {
    for (near, far) in both_kinds() {
        far.send_all(b"hello", LONG).unwrap();
        near.recv_exact(&mut [0; 2], LONG).unwrap();
        near.shrink();
        let mut rest = [0; 3];
        near.recv_exact(&mut rest, LONG).unwrap();
        assert_eq!(&rest, b"llo");
        near.shrink();
        near.send_all(b"x", LONG).unwrap();
        far.recv_exact(&mut [0; 1], LONG).unwrap();
    }
}

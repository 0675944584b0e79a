//! Tests of a server whose sessions are encrypted by this process, over loopback connections.

use super::test_support::{TIMEOUT, connect_tcp, listen, wait_for_clients, wait_until};
use super::{Server, ServerConfig, SessionSettings};
use crate::client::{ClientError, Connection};
use crate::disk::{Access, Disk, FileBackend};
use crate::nbd::handshake::option::encode_option;
use crate::nbd::wire::OptionKind;
use crate::net::tls::{ClientTls, ServerTls, TlsClient, TlsFile, TlsFiles, TlsMode, TlsTarget};
use crate::net::{Address, connect};
use harness::pki::{Pki, Request};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const SIZE: u64 = 16 << 20;

struct Fixture {
    server: Server,
    address: Address,
    tls: Arc<ServerTls>,
    client: ClientTls,
    disk: Arc<Disk>,
    _file: tempfile::NamedTempFile,
    _pki: Pki,
}

fn serve(mode: TlsMode, settings: SessionSettings) -> Fixture {
    let pki = Pki::new();
    let file = |path: &Path| Some(TlsFile::Path(path.to_owned()));
    let identity = pki.issue("server", &Request::server());
    let files = TlsFiles { cert: file(&identity.cert), key: file(&identity.key), ca: None };
    let tls = Arc::new(ServerTls::load(mode, &files, &[]).unwrap());
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    let backend = FileBackend::open(image.path(), Access { read_only: false }).unwrap();
    let disk = Arc::new(Disk::new(Box::new(backend), false));
    let (listener, address) = listen();
    let allow_all = ServerConfig::allow_all(vec![listener], &disk);
    let offered = Some(Arc::clone(&tls));
    let server = Server::start(ServerConfig { settings, tls: offered, ..allow_all }).unwrap();
    let files = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
    let target = TlsTarget { mode: TlsMode::Require, hostname: None };
    let client = TlsClient::load(&files).unwrap().for_address(&target, &address);
    let client = client.unwrap().unwrap();
    Fixture { server, address, tls, client, disk, _file: image, _pki: pki }
}

impl Fixture {
    fn connect(&self, tls: bool) -> Result<Connection, ClientError> {
        let stream = connect(&self.address, None, TIMEOUT).unwrap();
        Connection::open(stream, "", tls.then_some(&self.client), TIMEOUT)
    }
}

fn read(connection: &mut Connection, offset: u64, length: u32) -> Vec<u8> {
    let mut data = Vec::new();
    let sink = &mut |part: &[u8]| {
        data.extend_from_slice(part);
        Ok(())
    };
    connection.read(offset, length, sink).unwrap();
    data
}

#[test]
fn reads_of_all_lengths_return_written_bytes() {
    let fixture = serve(TlsMode::Require, SessionSettings::default());
    let mut client = fixture.connect(true).unwrap();
    let data: Vec<u8> = (0..8 << 20).map(|at: u32| (at % 251) as u8).collect();
    for piece in 0..8 {
        let at = piece << 20;
        client.write(at as u64, &data[at..at + (1 << 20)]).unwrap();
    }
    client.flush().unwrap();
    // Short ones, those that a plain connection would send by reference, and a hole.
    for length in [1, 512, 4096, 65_536, 262_144, 1 << 20, 3 << 20, 8 << 20] {
        for offset in [0, 3, 4096] {
            let length = length.min(data.len() - offset);
            let got = read(&mut client, offset as u64, length as u32);
            assert!(got == data[offset..offset + length], "{length} bytes at {offset}");
        }
    }
    assert!(read(&mut client, 9 << 20, 1 << 20).iter().all(|byte| *byte == 0));
    client.close();
    wait_for_clients(&fixture.server, 0);
}

#[test]
fn a_client_without_tls_is_refused_only_where_it_is_required() {
    let required = serve(TlsMode::Require, SessionSettings::default());
    let error = required.connect(false).map(drop).unwrap_err().to_string();
    assert!(error.contains("the server requires TLS"), "{error}");
    let optional = serve(TlsMode::On, SessionSettings::default());
    optional.connect(false).unwrap().write(0, b"plain").unwrap();
    let mut client = optional.connect(true).unwrap();
    assert_eq!(read(&mut client, 0, 5), b"plain");
}

#[test]
fn sessions_end_where_a_restart_would_suspend_them() {
    let mut fixture = serve(TlsMode::Require, SessionSettings::default());
    let mut client = fixture.connect(true).unwrap();
    client.write(0, b"kept").unwrap();
    let stored = fixture.server.suspend(9, TIMEOUT);
    assert!(stored.streams.is_empty(), "{stored:?}");
    assert!(client.write(0, b"late").is_err());
    let mut kept = [0; 4];
    fixture.disk.enter(&|| false).unwrap().read(0, &mut kept).unwrap();
    assert_eq!(&kept, b"kept");
}

#[test]
fn plain_sessions_go_on_after_a_restart_unless_tls_is_required() {
    for (mode, goes_on) in [(TlsMode::On, true), (TlsMode::Require, false)] {
        let mut fixture = serve(TlsMode::On, SessionSettings::default());
        let mut client = fixture.connect(false).unwrap();
        client.write(0, b"plain").unwrap();
        let stored = fixture.server.suspend(9, TIMEOUT);
        assert_eq!(stored.streams.len(), 1);
        let next = serve(mode, SessionSettings::default());
        let allow_all = ServerConfig::allow_all(vec![listen().0], &fixture.disk);
        let tls = Some(Arc::clone(&next.tls));
        let _next = Server::start(ServerConfig { tls, stored, ..allow_all }).unwrap();
        assert_eq!(client.write(0, b"later").is_ok(), goes_on, "{mode:?}");
    }
}

/// The bytes up to the reply to STARTTLS, and then `more`, either at once or after the reply.
fn start_tls(address: &Address, more: &[u8], at_once: bool) -> std::net::TcpStream {
    let mut stream = connect_tcp(address);
    let mut bytes = 3u32.to_be_bytes().to_vec();
    encode_option(OptionKind::StartTls.number(), &[], &mut bytes);
    stream.read_exact(&mut [0; 18]).unwrap();
    if at_once {
        bytes.extend_from_slice(more);
    }
    stream.write_all(&bytes).unwrap();
    if !at_once {
        stream.read_exact(&mut [0; 20]).unwrap();
        stream.write_all(more).unwrap();
    }
    stream
}

#[test]
fn data_sent_with_the_request_for_tls_ends_the_session() {
    let fixture = serve(TlsMode::On, SessionSettings::default());
    let mut injected = Vec::new();
    encode_option(OptionKind::List.number(), &[], &mut injected);
    let mut stream = start_tls(&fixture.address, &injected, true);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    // At most the reply to STARTTLS.
    assert!(rest.len() <= 20, "{rest:?}");
    wait_for_clients(&fixture.server, 0);
}

#[test]
fn plain_bytes_instead_of_tls_end_the_session() {
    let fixture = serve(TlsMode::On, SessionSettings::default());
    let mut plain = Vec::new();
    encode_option(OptionKind::Go.number(), &[0; 6], &mut plain);
    let mut stream = start_tls(&fixture.address, &plain, false);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.first().is_none_or(|first| *first == 21), "no alert: {rest:?}");
    wait_for_clients(&fixture.server, 0);
}

#[test]
fn a_silent_tls_handshake_times_out() {
    let settings = SessionSettings {
        handshake_timeout: Duration::from_millis(300),
        ..SessionSettings::default()
    };
    let fixture = serve(TlsMode::On, settings);
    // The header of a record that never comes.
    let mut stream = start_tls(&fixture.address, &[22, 3, 1], false);
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    wait_for_clients(&fixture.server, 0);
}

#[test]
fn a_stop_ends_a_session_in_its_tls_handshake() {
    let mut fixture = serve(TlsMode::On, SessionSettings::default());
    let mut stream = start_tls(&fixture.address, &[22, 3, 1], false);
    wait_until("no session", || fixture.server.client_count() == 1);
    let stopping = thread::spawn(move || fixture.server.stop(TIMEOUT));
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    stopping.join().unwrap();
}

#[test]
fn a_changed_certificate_is_for_new_sessions() {
    let fixture = serve(TlsMode::Require, SessionSettings::default());
    let mut old = fixture.connect(true).unwrap();
    let other = serve(TlsMode::Require, SessionSettings::default());
    fixture.server.set_tls(Some(Arc::clone(&other.tls)));
    old.write(0, b"goes on").unwrap();
    let error = fixture.connect(true).map(drop).unwrap_err();
    assert!(matches!(error, ClientError::Tls(_)), "{error}");
}

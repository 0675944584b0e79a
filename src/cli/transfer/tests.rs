//! Transfers from and to a real server with a disk in memory, and the messages of failed transfers.

use super::*;
use crate::disk::Disk;
use crate::disk::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
use crate::nbd::wire::PAYLOAD_LENGTH_DEFAULT;
use crate::net::{Address, Listener};
use crate::server::{Server, ServerConfig, SessionSettings, Style};
use nix::libc::EIO;
use std::sync::Arc;

const DISK_SIZE: u64 = 40 << 20;

struct Fixture {
    server: Server,
    remote: Remote,
    memory: MemoryBackend,
    faults: Arc<Faults>,
}

fn serve(style: Style) -> Fixture {
    let (memory, faults) = (MemoryBackend::new(DISK_SIZE), Arc::new(Faults::default()));
    let image = FailingBackend::new(memory.clone(), Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let listener = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let Address::Tcp(address) = listener.local_address().unwrap() else { panic!("not TCP") };
    let settings = SessionSettings { style, ..SessionSettings::default() };
    let config = ServerConfig { settings, ..ServerConfig::allow_all(vec![listener], &disk) };
    let server = Server::start(config).unwrap();
    let remote = Remote::Host { host: address.ip().to_string(), port: address.port() };
    Fixture { server, remote, memory, faults }
}

impl Fixture {
    fn transfer(&self, from: u64, size: u64) -> Transfer {
        let (remote, export) = (self.remote.clone(), String::new());
        let (tls, tls_files) = (TlsTarget::default(), TlsFiles::default());
        Transfer { remote, export, from, size, bind: None, tls, tls_files }
    }

    fn stop(mut self) {
        self.server.stop(IO_TIMEOUT);
    }
}

/// The message of a failed transfer.
fn error_text<T>(transfer: &Transfer, outcome: Result<T, TransferError>) -> String {
    match outcome {
        Ok(_) => panic!("it worked"),
        Err(error) => describe(transfer, &error),
    }
}

fn noise(size: usize) -> Vec<u8> {
    let mut noise = (0..251).collect::<Vec<u8>>().repeat(size / 251 + 1);
    noise.truncate(size);
    noise
}

#[test]
fn written_data_is_read_back_in_either_style() {
    for style in [Style::Newstyle, Style::Oldstyle] {
        let fixture = serve(style);
        // More than one request, at an unaligned offset.
        let data = noise(PAYLOAD_LENGTH_DEFAULT as usize + 12345);
        let transfer = fixture.transfer(777, data.len() as u64);
        transfer.write(&mut data.as_slice()).unwrap();
        assert!(fixture.memory.contents()[777..777 + data.len()] == data, "the disk differs");
        let mut read = Vec::new();
        transfer.read(&mut read).unwrap();
        assert!(read == data, "what was read differs");
        fixture.stop();
    }
}

#[test]
fn a_range_is_split_at_the_maximum_payload() {
    let fixture = serve(Style::Newstyle);
    let most = u64::from(PAYLOAD_LENGTH_DEFAULT);
    let requests = |size| fixture.transfer(5, size).requests(PAYLOAD_LENGTH_DEFAULT).count();
    assert_eq!(requests(1), 1);
    assert_eq!(requests(most), 1);
    assert_eq!(requests(most + 1), 2);
    let all: Vec<_> = fixture.transfer(5, 25).requests(10).collect();
    assert_eq!(all, [(5, 10), (15, 10), (25, 5)]);
    fixture.stop();
}

#[test]
fn write_succeeds_only_after_a_flush() {
    let fixture = serve(Style::Newstyle);
    fixture.transfer(0, 3).write(&mut b"abc".as_slice()).unwrap();
    assert!(fixture.faults.count(BackendCall::Flush) > 0, "nothing was flushed");
    fixture.faults.fail_every(BackendCall::Flush, EIO);
    let transfer = fixture.transfer(0, 3);
    let text = error_text(&transfer, transfer.write(&mut b"abc".as_slice()));
    assert!(text.ends_with("the server answered: input/output error (EIO)"), "{text}");
    fixture.stop();
}

#[test]
fn input_beyond_the_size_is_not_read() {
    let fixture = serve(Style::Newstyle);
    let mut input = b"abcdef".as_slice();
    fixture.transfer(0, 4).write(&mut input).unwrap();
    assert_eq!(input, b"ef");
    assert_eq!(&fixture.memory.contents()[..5], b"abcd\0");
    fixture.stop();
}

#[test]
fn early_end_of_input_reports_the_bytes_written() {
    let fixture = serve(Style::Newstyle);
    let data = noise(PAYLOAD_LENGTH_DEFAULT as usize + 9);
    let transfer = fixture.transfer(0, data.len() as u64 + 1);
    let text = error_text(&transfer, transfer.write(&mut data.as_slice()));
    assert_eq!(
        text,
        "standard input ended after 33554441 of 33554442 bytes; the first 33554432 were written"
    );
    let contents = fixture.memory.contents();
    assert!(contents[..33_554_432] == data[..33_554_432], "the disk differs");
    assert_eq!(contents[33_554_432..33_554_442], [0; 10]);
    fixture.stop();
}

#[test]
fn a_range_beyond_the_end_reports_the_size() {
    let fixture = serve(Style::Newstyle);
    fixture.transfer(DISK_SIZE - 1, 1).read(&mut Vec::new()).unwrap();
    let transfer = fixture.transfer(DISK_SIZE, 1);
    let text = error_text(&transfer, transfer.read(&mut Vec::new()));
    assert!(text.ends_with("1 byte from 41943040 on does not lie within its 41943040 bytes"));
    let text = error_text(&transfer, transfer.write(&mut b"x".as_slice()));
    assert!(text.ends_with("does not lie within its 41943040 bytes"), "{text}");
    fixture.stop();
}

#[test]
fn a_disk_error_is_reported_as_the_servers_reply() {
    let fixture = serve(Style::Newstyle);
    fixture.faults.fail_every(BackendCall::Write, EIO);
    let transfer = fixture.transfer(0, 1);
    let text = error_text(&transfer, transfer.write(&mut b"x".as_slice()));
    let expected = format!("{}: the server answered: input/output error (EIO)", fixture.remote);
    assert_eq!(text, expected);
    fixture.stop();
}

#[test]
fn a_missing_export_is_reported_by_the_server() {
    let fixture = serve(Style::Newstyle);
    let transfer = Transfer { export: "none".to_owned(), ..fixture.transfer(0, 1) };
    let text = error_text(&transfer, transfer.read(&mut Vec::new()));
    assert!(text.contains("the server has no export of that name"), "{text}");
    fixture.stop();
}

#[test]
fn a_failed_output_is_reported() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let fixture = serve(Style::Newstyle);
    let transfer = fixture.transfer(0, 1);
    let text = error_text(&transfer, transfer.read(&mut Full));
    assert!(text.starts_with("cannot write to standard output: "), "{text}");
    fixture.stop();
}

#[test]
fn an_unreachable_server_is_named_once() {
    let unused = Listener::bind(&Address::parse("127.0.0.1", Some(0)).unwrap()).unwrap();
    let Address::Tcp(address) = unused.local_address().unwrap() else { panic!("not TCP") };
    drop(unused);
    let remote = Remote::Host { host: "127.0.0.1".to_owned(), port: address.port() };
    let (tls, tls_files) = (TlsTarget::default(), TlsFiles::default());
    let export = String::new();
    let transfer = Transfer { remote, export, from: 0, size: 1, bind: None, tls, tls_files };
    let text = error_text(&transfer, transfer.read(&mut Vec::new()));
    assert!(text.starts_with(&format!("cannot connect to {address}: ")), "{text}");
    assert_eq!(text.matches("cannot connect").count(), 1, "{text}");
}

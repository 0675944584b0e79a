//! TLS records by the kernel: encrypted sessions over restarts, and records that are not data.

use crate::machine::{KernelLog, ok};
use crate::session::with_kernel;
use harness::fio::Fio;
use harness::manager::{Inherited, Service, ServiceManager};
use harness::nested::report;
use harness::pki::{Pki, Request};
use harness::raw::*;
use harness::{MIB, TIMEOUT, noise, sparse_image, wait_until};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::{TLS12, TLS13};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion,
};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

const RESTARTS: usize = 10;
/// The part of the disk of each client of ours; fio has the rest.
const PART: u64 = 4 * MIB;
const SIZE: u64 = 64 * MIB;
/// Rounds of each client under each process.
const ROUNDS: u64 = 2;
/// Bytes of a round, and of each write in it; few, because the processor is emulated.
const ROUND: usize = 300 << 10;
const PIECE: usize = 132 << 10;

/// A server with a fd store whose clients must use TLS.
struct Fixture {
    manager: ServiceManager,
    image: PathBuf,
    pki: Pki,
}

impl Fixture {
    fn new() -> Self {
        let manager = ServiceManager::new().env("FDSTORE", "9");
        let image = sparse_image(manager.dir.path(), "disk.img", SIZE);
        Self { manager, image, pki: Pki::new() }
    }

    fn serve(&self) -> Service {
        let identity = self.pki.issue("server", &Request::server());
        let paths = [&identity.cert, &identity.key].map(|path| path.display().to_string());
        let [cert, key] = paths;
        let line =
            format!("serve --verbose --tls require --tls-cert {cert} --tls-key {key} --file");
        let service = self.manager.start(Inherited::Nbd, &line, &[&self.image]);
        self.manager.wait_for("READY=1");
        service
    }

    fn client(&self, version: &'static SupportedProtocolVersion) -> Client {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.pki.ca()).unwrap()).unwrap();
        let provider = rustls::crypto::ring::default_provider();
        let config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Client::connect(self.manager.address(), config)
    }
}

/// Sessions whose records are the kernel's, in both directions.
fn kernel_sessions() -> u64 {
    let counters = ok("cat /proc/net/tls_stat");
    let count = |name: &str| {
        let line = counters.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().last().unwrap().parse::<u64>().unwrap()
    };
    let [tx, rx] = ["TlsCurrTxSw", "TlsCurrRxSw"].map(count);
    assert_eq!(tx, rx, "{counters}");
    tx
}

/// A client with TLS by rustls, which verifies all that it reads.
struct Client {
    tls: StreamOwned<ClientConnection, TcpStream>,
    cookie: u64,
}

impl Client {
    #[track_caller]
    fn connect(address: std::net::SocketAddr, config: ClientConfig) -> Self {
        let mut plain = TcpStream::connect(address).unwrap();
        plain.set_read_timeout(Some(TIMEOUT)).unwrap();
        plain.read_exact(&mut [0; GREETING_LENGTH]).unwrap();
        let flags = (FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes();
        plain.write_all(&[&flags[..], &option(OPT_STARTTLS, &[])].concat()).unwrap();
        assert_eq!(option_reply(&mut plain), REP_ACK);
        let name = ServerName::try_from("localhost").unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut tls = StreamOwned::new(connection, plain);
        // In one piece with the end of the TLS handshake, so that the server's kernel has it before the keys.
        tls.write_all(&option(OPT_GO, &[0; 6])).unwrap();
        tls.flush().unwrap();
        while option_reply(&mut tls) != REP_ACK {}
        Self { tls, cookie: 0 }
    }

    fn send(&mut self, command: u16, offset: u64, length: u32, data: &[u8]) {
        self.cookie += 1;
        let mut bytes = REQUEST.to_be_bytes().to_vec();
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(data);
        self.tls.write_all(&bytes).unwrap();
        self.tls.flush().unwrap();
    }

    #[track_caller]
    fn reply(&mut self) {
        let mut reply = [0; 16];
        self.tls.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..8], [&SIMPLE_REPLY.to_be_bytes()[..], &[0; 4]].concat());
        assert_eq!(reply[8..], self.cookie.to_be_bytes());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.send(WRITE, offset, data.len() as u32, data);
        self.reply();
    }

    fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        self.send(READ, offset, length as u32, &[]);
        self.reply();
        let mut data = vec![0; length];
        self.tls.read_exact(&mut data).unwrap();
        data
    }

    /// Writes and reads back, in short and long requests: long replies are sent by reference.
    #[track_caller]
    fn round(&mut self, part: u64, round: u64) {
        let data = noise(ROUND, part * 1000 + round);
        let begin = part * PART;
        for (index, piece) in data.chunks(PIECE).enumerate() {
            self.write(begin + (index * PIECE) as u64, piece);
        }
        assert!(self.read(begin, data.len()) == data, "part {part}, round {round}");
        assert!(self.read(begin + 4095, 3) == data[4095..4098], "part {part}, round {round}");
    }

    /// What comes until the end of the stream: `None` if its end was not announced.
    fn end(mut self) -> Option<usize> {
        let mut rest = Vec::new();
        match self.tls.read_to_end(&mut rest) {
            Ok(count) => Some(count),
            Err(error) => {
                let kinds = [ErrorKind::UnexpectedEof, ErrorKind::ConnectionReset];
                assert!(kinds.contains(&error.kind()), "{error}");
                None
            }
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = I_HAVE_OPT.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Receives a reply to an option; returns its kind.
fn option_reply(from: &mut impl Read) -> u32 {
    let mut header = [0; 20];
    from.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_be_bytes(*header[at..].first_chunk().unwrap());
    from.read_exact(&mut vec![0; word(16) as usize]).unwrap();
    word(12)
}

#[test]
fn encrypted_clients_live_through_ten_restarts() {
    with_kernel(|| {
        let fixture = Fixture::new();
        let log = KernelLog::from_now();
        let mut service = fixture.serve();
        let clients = [fixture.client(&TLS13), fixture.client(&TLS12), fixture.client(&TLS13)];
        assert_eq!(kernel_sessions(), 3);
        // A client with GnuTLS.
        trust(&fixture.pki);
        let uri = format!("nbds://127.0.0.1:{}", fixture.manager.address().port());
        let mut fio = Fio::start(
            format!(
                "--ioengine=nbd --uri={uri} --iodepth=8 --verify_backlog=16 --bsrange=4k-64k --offset={} --size=16m",
                3 * PART
            )
            .split_whitespace(),
        );
        // fio connects twice, the first time for the size.
        wait_until("fio to connect", || {
            fio.assert_running();
            service.stderr().matches(" connected").count() == 5 && kernel_sessions() == 4
        });
        let (stop, rounds) = (AtomicBool::new(false), [0; 3].map(AtomicU64::new));
        thread::scope(|scope| {
            for (part, mut client) in (0..).zip(clients) {
                let (stop, rounds) = (&stop, &rounds[part as usize]);
                scope.spawn(move || {
                    let mut round = 0;
                    while !stop.load(Ordering::Relaxed) {
                        client.round(part, round);
                        round += 1;
                        rounds.store(round, Ordering::Relaxed);
                    }
                    client.send(DISC, 0, 0, &[]);
                });
            }
            let progress = || {
                let before = rounds.each_ref().map(|count| count.load(Ordering::Relaxed));
                wait_until("each client to go on", || {
                    let now = rounds.each_ref().map(|count| count.load(Ordering::Relaxed));
                    now.iter().zip(before).all(|(now, before)| *now >= before + ROUNDS)
                });
            };
            for restart in 0..RESTARTS {
                progress();
                fio.assert_running();
                assert!(service.stop().success(), "{}", service.stderr());
                // And the snapshot.
                assert_eq!(fixture.manager.stored().len(), 5, "restart {restart}");
                service = fixture.serve();
            }
            progress();
            stop.store(true, Ordering::Relaxed);
        });
        report(&fio.stop());
        wait_until("no session", || kernel_sessions() == 0);
        log.assert_no_error();
    });
}

/// Makes clients with libnbd trust the authority: fio permits no other directory.
fn trust(pki: &Pki) {
    let directory = Path::new("/etc/pki/libnbd");
    std::fs::create_dir_all(directory).unwrap();
    std::fs::copy(pki.ca(), directory.join("ca-cert.pem")).unwrap();
}

#[test]
fn records_of_other_types_have_their_meaning() {
    with_kernel(|| {
        let fixture = Fixture::new();
        let service = fixture.serve();
        let ends = |count: usize| {
            wait_until("an end in the log", || {
                service.stderr().matches("the session of").count() == count
            });
        };
        let mut honest = fixture.client(&TLS13);
        honest.round(0, 0);
        for version in [&TLS13, &TLS12] {
            // Both sides announce their ends.
            let mut client = fixture.client(version);
            client.round(1, 1);
            client.send(DISC, 0, 0, &[]);
            assert_eq!(client.end(), Some(0));
            // The client announces its end instead of a request.
            let mut client = fixture.client(version);
            client.tls.conn.send_close_notify();
            client.tls.conn.complete_io(&mut client.tls.sock).unwrap();
            assert_eq!(client.end(), Some(0));
            // It does not, and the session ends all the same.
            let client = fixture.client(version);
            client.tls.sock.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client.end(), Some(0));
        }
        ends(6);
        assert_eq!(service.stderr().matches("the client closed the connection").count(), 4);

        // Other keys.
        let mut client = fixture.client(&TLS13);
        client.tls.conn.refresh_traffic_keys().unwrap();
        client.send(READ, 0, 512, &[]);
        client.end();
        ends(7);
        let refusal = "the peer changes its TLS keys, which the kernel cannot follow";
        assert!(service.stderr().contains(refusal), "{}", service.stderr());

        // An attacker's bytes among the records.
        let mut client = fixture.client(&TLS13);
        let forged = [&[23, 3, 3, 0, 64][..], &[7; 64]].concat();
        client.tls.sock.write_all(&forged).unwrap();
        client.end();
        ends(8);
        assert!(service.stderr().contains("a TLS record is not genuine"), "{}", service.stderr());

        honest.round(0, 1);
        honest.send(DISC, 0, 0, &[]);
        assert_eq!(honest.end(), Some(0));
        wait_until("no session", || kernel_sessions() == 0);
    });
}

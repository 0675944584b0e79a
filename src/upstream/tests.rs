//! The link with real sockets: a small server on a unix socket, which can be stopped and started.

use super::connecting::connect_to_any;
use super::terms::ServerTerms;
use super::{UpstreamBackend, UpstreamError, UpstreamEvents, UpstreamHandle, UpstreamOptions};
use super::{UpstreamTarget, connect};
use crate::disk::inflight::InFlight;
use crate::disk::{Backend, Buffer, Disk, FeatureFlags, Notifier, Op};
use crate::nbd::handshake::server::{Export, ServerHandshake, ServerStep};
use crate::nbd::handshake::{Agreement, BlockSizes};
use crate::nbd::reply::{Dialect, ReplyTo};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode, TransmissionFlags};
use crate::net::tls::TlsTarget;
use crate::net::{Address, Remote, Wake, wait_readable};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

mod stress;

const SIZE: usize = 1 << 20;
/// Longest time for what a test waits for.
const DEADLINE: Duration = Duration::from_secs(20);

/// What a server does with a request before it executes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Serve,
    /// Replies to nothing.
    Silent,
    /// Replies to everything but flushes.
    SlowFlush,
    Refuse(ErrorCode),
    /// Refuses one request, and is silent then.
    RefuseOne(ErrorCode),
}

/// A server with a disk in memory.
#[derive(Debug)]
struct SmallServer {
    path: PathBuf,
    shared: Arc<ServerParts>,
}

#[derive(Debug)]
struct ServerParts {
    export: Export,
    disk: Mutex<Vec<u8>>,
    mood: Mutex<Mood>,
    streams: Mutex<Vec<UnixStream>>,
    /// Commands that have arrived.
    commands: Mutex<Vec<u16>>,
    arrived: Condvar,
}

impl SmallServer {
    fn start(dir: &Path, name: &str, size: usize) -> Self {
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::CAN_MULTI_CONN;
        let export = Export {
            name: String::new(),
            description: String::new(),
            size: size as u64,
            flags,
            block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 1 << 16 },
        };
        let shared = Arc::new(ServerParts {
            export,
            disk: Mutex::new(vec![0; size]),
            mood: Mutex::new(Mood::Serve),
            streams: Mutex::default(),
            commands: Mutex::default(),
            arrived: Condvar::new(),
        });
        let server = Self { path: dir.join(name), shared };
        server.listen();
        server
    }

    fn listen(&self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        let parts = Arc::clone(&self.shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                parts.streams.lock().unwrap().push(stream.try_clone().unwrap());
                let parts = Arc::clone(&parts);
                thread::spawn(move || parts.serve(&mut stream));
            }
        });
    }

    /// Ends all connections, and accepts none.
    fn stop(&self) {
        std::fs::remove_file(&self.path).unwrap();
        self.cut();
    }

    fn cut(&self) {
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn set_mood(&self, mood: Mood) {
        *self.shared.mood.lock().unwrap() = mood;
    }

    fn wait_for_command(&self, kind: CommandKind) {
        let commands = self.shared.commands.lock().unwrap();
        let is_missing = |commands: &mut Vec<u16>| !commands.contains(&kind.number());
        let waited = self.shared.arrived.wait_timeout_while(commands, DEADLINE, is_missing);
        assert!(!waited.unwrap().1.timed_out(), "no {kind:?} has arrived");
    }

    fn target(&self) -> UpstreamTarget {
        UpstreamTarget {
            remote: Remote::Unix(self.path.clone()),
            export: String::new(),
            tls: TlsTarget::default(),
        }
    }
}

impl ServerParts {
    fn serve<S: Read + Write>(&self, stream: &mut S) -> Option<()> {
        let (agreement, mut input) = agree(stream, &self.export)?;
        loop {
            let (header, payload) = next_request(stream, &agreement, &mut input)?;
            self.commands.lock().unwrap().push(header.kind);
            self.arrived.notify_all();
            let reply = self.execute(&agreement, header, &payload);
            stream.write_all(&reply).ok()?;
        }
    }

    fn execute(&self, agreement: &Agreement, header: RequestHeader, payload: &[u8]) -> Vec<u8> {
        let (dialect, mut out) = (agreement.dialect, Vec::new());
        let kind = CommandKind::try_from(header.kind).unwrap();
        let chunked = kind == CommandKind::Read && dialect != Dialect::Simple;
        let to = ReplyTo { cookie: header.cookie, offset: header.offset, chunked };
        let place = header.offset as usize..(header.offset + header.length) as usize;
        let mut disk = self.disk.lock().unwrap();
        let mut mood = self.mood.lock().unwrap();
        let current = *mood;
        match current {
            Mood::Silent => {}
            Mood::SlowFlush if kind == CommandKind::Flush => {}
            Mood::Refuse(code) => dialect.failure(to, code, None, "", &mut out),
            Mood::RefuseOne(code) => {
                *mood = Mood::Silent;
                dialect.failure(to, code, None, "", &mut out);
            }
            Mood::Serve | Mood::SlowFlush if kind == CommandKind::Read => {
                dialect.data_header(to, header.offset, header.length as u32, true, &mut out);
                out.extend_from_slice(&disk[place]);
            }
            Mood::Serve | Mood::SlowFlush => {
                if kind == CommandKind::Write {
                    disk[place].copy_from_slice(payload);
                }
                dialect.success(to, &mut out);
            }
        }
        out
    }
}

/// The server's side of a handshake. Returns also the bytes behind it.
fn agree<S: Read + Write>(stream: &mut S, export: &Export) -> Option<(Agreement, Vec<u8>)> {
    let mut handshake = ServerHandshake::new(export.clone());
    let (mut out, mut input) = (Vec::new(), Vec::new());
    handshake.greet(&mut out);
    let agreement = loop {
        stream.write_all(&out).ok()?;
        out.clear();
        let (used, next) = handshake.advance(&input, &mut out).ok()?;
        input.drain(..used);
        match next {
            ServerStep::Transmission(agreement) => break agreement,
            ServerStep::NeedInput if out.is_empty() => receive(stream, &mut input).ok()?,
            _ => {}
        }
    };
    stream.write_all(&out).ok()?;
    Some((agreement, input))
}

/// The next request and its payload.
fn next_request(
    stream: &mut impl Read,
    agreement: &Agreement,
    input: &mut Vec<u8>,
) -> Option<(RequestHeader, Vec<u8>)> {
    loop {
        if let Some((header, used)) = RequestHeader::decode(agreement.dialect, input).ok()? {
            let is_write = header.kind == CommandKind::Write.number();
            let end = used + if is_write { header.length as usize } else { 0 };
            while input.len() < end {
                receive(stream, input).ok()?;
            }
            let payload = input[used..end].to_vec();
            input.drain(..end);
            return Some((header, payload));
        }
        receive(stream, input).ok()?;
    }
}

fn receive(stream: &mut impl Read, input: &mut Vec<u8>) -> io::Result<()> {
    let mut some = [0; 4096];
    match stream.read(&mut some)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        count => {
            input.extend_from_slice(&some[..count]);
            Ok(())
        }
    }
}

/// Reports every change of the connection.
#[derive(Debug)]
struct Changes(Mutex<mpsc::Sender<()>>);

impl UpstreamEvents for Changes {
    fn changed(&self) {
        let _ = self.0.lock().unwrap().send(());
    }
}

#[derive(Debug)]
struct Upstream {
    backend: Arc<UpstreamBackend>,
    handle: UpstreamHandle,
    changes: mpsc::Receiver<()>,
}

impl Upstream {
    fn try_connect(targets: Vec<UpstreamTarget>, timeout: Duration) -> Result<Self, UpstreamError> {
        let (sender, changes) = mpsc::channel();
        let options = UpstreamOptions { timeout, ..UpstreamOptions::default() };
        let (backend, handle) = connect(targets, options, Arc::new(Changes(Mutex::new(sender))))?;
        Ok(Self { backend: Arc::new(backend), handle, changes })
    }

    fn connect(targets: Vec<UpstreamTarget>) -> Self {
        Self::try_connect(targets, DEADLINE).unwrap()
    }

    fn wait_for(&self, connected: bool) {
        while self.handle.state().connected != connected {
            self.changes.recv_timeout(DEADLINE).expect("the state of the connection");
        }
    }

    fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0xEE; length];
        self.backend.read(offset, &mut bytes).map(|()| bytes)
    }

    /// Executes an operation on a thread of its own.
    fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce(&UpstreamBackend) -> io::Result<T> + Send + 'static,
    ) -> mpsc::Receiver<io::Result<T>> {
        let (backend, (sender, outcome)) = (Arc::clone(&self.backend), mpsc::channel());
        thread::spawn(move || sender.send(work(&backend)));
        outcome
    }
}

fn dir() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn bytes_go_to_the_server_and_back() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream = Upstream::connect(vec![server.target()]);
    // Longer than the longest payload.
    let bytes: Vec<u8> = (0..300_000_u32).map(|at| (at * 7) as u8).collect();
    upstream.backend.write(1001, &bytes, false).unwrap();
    assert!(server.shared.disk.lock().unwrap()[1001..301_001] == bytes);
    assert!(upstream.read(1001, bytes.len()).unwrap() == bytes);
    assert!(upstream.handle.state().unflushed_bytes >= 300_000);
    upstream.backend.write(0, b"durable", true).unwrap();
    upstream.backend.flush().unwrap();
    assert_eq!(upstream.handle.state().unflushed_bytes, 0);
    let flags = upstream.backend.features().flags;
    let expected = FeatureFlags::FLUSH | FeatureFlags::DURABLE | FeatureFlags::MULTI_CONN;
    assert_eq!(flags, expected);
}

#[test]
fn requests_wait_until_the_server_is_back() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream = Upstream::connect(vec![server.target()]);
    upstream.backend.write(0, b"kept", false).unwrap();
    server.stop();
    upstream.wait_for(false);
    // What was not flushed is lost.
    server.shared.disk.lock().unwrap().fill(0);
    let reads = upstream.spawn(|backend| {
        let mut bytes = [0; 4];
        backend.read(0, &mut bytes).map(|()| bytes)
    });
    let writes = upstream.spawn(|backend| backend.write(100, b"new", true));
    server.listen();
    assert_eq!(&reads.recv_timeout(DEADLINE).unwrap().unwrap(), b"kept");
    writes.recv_timeout(DEADLINE).unwrap().unwrap();
    let disk = server.shared.disk.lock().unwrap();
    assert_eq!((&disk[..4], &disk[100..103]), (&b"kept"[..], &b"new"[..]));
    assert_eq!(upstream.handle.state().reconnects, 1);
}

#[test]
fn the_disk_is_followed_to_another_address() {
    let dir = dir();
    let first = SmallServer::start(dir.path(), "a", SIZE);
    let second = SmallServer::start(dir.path(), "b", SIZE);
    let other_disk = SmallServer::start(dir.path(), "c", 2 * SIZE);
    let targets = vec![first.target(), other_disk.target(), second.target()];
    let upstream = Upstream::connect(targets);
    upstream.backend.write(0, b"moved", false).unwrap();
    // A server that hands its disk over answers so.
    first.set_mood(Mood::Refuse(ErrorCode::Shutdown));
    let writes = upstream.spawn(|backend| backend.write(5, b"!", false));
    first.wait_for_command(CommandKind::Write);
    first.stop();
    writes.recv_timeout(DEADLINE).unwrap().unwrap();
    assert_eq!(&second.shared.disk.lock().unwrap()[..6], b"moved!");
    assert!(other_disk.shared.commands.lock().unwrap().is_empty());
    assert_eq!(upstream.handle.state().target, second.target().to_string());
}

#[test]
fn another_disk_at_one_address_of_a_name_is_passed_over() {
    let dir = dir();
    let first = SmallServer::start(dir.path(), "a", SIZE);
    let other_disk = SmallServer::start(dir.path(), "b", 2 * SIZE);
    let options = UpstreamOptions::default();
    let addresses = |servers: &[&SmallServer]| -> Vec<Address> {
        servers.iter().map(|server| Address::Unix(server.path.clone())).collect()
    };
    let connect = |servers: &[&SmallServer], promised: Option<&ServerTerms>| {
        connect_to_any(&addresses(servers), &first.target(), &options, (0, promised))
    };
    let promised = connect(&[&first], None).unwrap().terms;
    assert_eq!(connect(&[&other_disk, &first], Some(&promised)).unwrap().terms, promised);
    let error = connect(&[&other_disk], Some(&promised)).unwrap_err().to_string();
    assert!(error.contains("another disk"), "{error}");
}

#[test]
fn a_server_that_leaves_further_connections_waiting_is_used() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = dir();
    let parts = Arc::clone(&SmallServer::start(dir.path(), "a", SIZE).shared);
    let target = tcp_target(&listener);
    let (_end, ended) = mpsc::channel::<()>();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        parts.serve(&mut stream);
        let _ = ended.recv();
    });
    let upstream = Upstream::connect(vec![target]);
    assert_eq!(upstream.read(0, 3).unwrap(), [0; 3]);
}

/// Until its socket is closed, the kernel would go on to send to the old server, which would execute it late.
#[test]
fn a_lost_connection_is_reset_although_a_session_waits_for_it() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dir = dir();
    let parts = Arc::clone(&SmallServer::start(dir.path(), "a", SIZE).shared);
    let target = tcp_target(&listener);
    let (sender, outcome) = mpsc::channel();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (agreement, mut input) = agree(&mut stream, &parts.export).unwrap();
        // The further connections, and then the target, are refused.
        drop(listener);
        while next_request(&mut stream, &agreement, &mut input).is_some() {}
        sender.send(stream.take_error())
    });
    let upstream = Upstream::try_connect(vec![target], Duration::from_millis(200)).unwrap();
    let notifier = nix::sys::eventfd::EventFd::new().unwrap();
    let mut queue = upstream.backend.queue(notifier.as_fd()).unwrap();
    queue.push(1.into(), Op::Flush).unwrap();
    queue.submit();
    assert!(queue.descriptor().is_some(), "the session receives from the connection itself");
    outcome.recv_timeout(DEADLINE).expect("the end of the connection").unwrap();
    assert!(queue.descriptor().is_none(), "it is lost");
}

fn tcp_target(listener: &TcpListener) -> UpstreamTarget {
    let address = listener.local_addr().unwrap();
    let remote = Remote::Host { host: address.ip().to_string(), port: address.port() };
    UpstreamTarget { remote, export: String::new(), tls: TlsTarget::default() }
}

#[test]
fn no_server_at_the_start_is_an_error_that_names_each_target() {
    let dir = dir();
    let missing = UpstreamTarget {
        remote: Remote::Unix(dir.path().join("no")),
        export: "x".into(),
        tls: TlsTarget::default(),
    };
    let error = Upstream::try_connect(vec![missing], DEADLINE).unwrap_err().to_string();
    assert!(error.contains("/no (x): ") && error.contains("No such file"), "{error}");
}

#[test]
fn closing_completes_everything_with_an_error() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream = Upstream::connect(vec![server.target()]);
    server.set_mood(Mood::Silent);
    let reads = upstream.spawn(|backend| backend.read(0, &mut [0; 512]));
    server.wait_for_command(CommandKind::Read);
    upstream.handle.close();
    let error = reads.recv_timeout(DEADLINE).unwrap().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::ESHUTDOWN));
    let error = upstream.backend.flush().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(nix::libc::ESHUTDOWN));
}

#[test]
fn a_silent_server_counts_as_lost() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream =
        Upstream::try_connect(vec![server.target()], Duration::from_millis(400)).unwrap();
    server.set_mood(Mood::Silent);
    let reads = upstream.spawn(|backend| backend.read(0, &mut [0; 512]));
    server.wait_for_command(CommandKind::Read);
    upstream.wait_for(false);
    server.set_mood(Mood::Serve);
    reads.recv_timeout(DEADLINE).unwrap().unwrap();
}

#[test]
fn a_server_that_flushes_for_long_is_not_lost() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let timeout = Duration::from_millis(200);
    let upstream = Upstream::try_connect(vec![server.target()], timeout).unwrap();
    server.set_mood(Mood::SlowFlush);
    let flushes = upstream.spawn(|backend| backend.flush());
    server.wait_for_command(CommandKind::Flush);
    // The probe is a read.
    for _ in 0..4 {
        server.shared.commands.lock().unwrap().clear();
        server.wait_for_command(CommandKind::Read);
    }
    assert_eq!(upstream.handle.state().reconnects, 0);
    server.set_mood(Mood::Serve);
    server.cut();
    flushes.recv_timeout(DEADLINE).unwrap().unwrap();
}

/// A session's queue, as `disk/inflight` uses it.
#[test]
fn the_queue_of_an_ended_session_does_not_wait_for_a_lost_server() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream = Upstream::connect(vec![server.target()]);
    server.set_mood(Mood::Silent);
    let backend = Arc::clone(&upstream.backend);
    let (done, ended) = mpsc::channel();
    thread::spawn(move || {
        let notifier = nix::sys::eventfd::EventFd::new().unwrap();
        let mut queue = backend.queue(notifier.as_fd()).unwrap();
        queue.push(1.into(), Op::Flush).unwrap();
        queue.submit();
        drop(queue);
        done.send(())
    });
    server.wait_for_command(CommandKind::Flush);
    server.stop();
    ended.recv_timeout(DEADLINE).expect("the end of the queue");
    server.set_mood(Mood::Serve);
    server.listen();
    upstream.backend.flush().unwrap();
}

#[test]
fn the_disk_takes_an_upstream() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let (backend, handle) = connect(
        vec![server.target()],
        UpstreamOptions::default(),
        Arc::new(Changes(Mutex::new(mpsc::channel().0))),
    )
    .unwrap();
    assert!(!handle.read_only());
    let disk = Disk::new(Box::new(backend), handle.read_only());
    assert_eq!((disk.size(), disk.has_page_cache()), (SIZE as u64, false));
    drop(disk);
    assert!(!handle.state().connected);
}

#[derive(Debug)]
struct WakeNotifier(Wake);

impl Notifier for WakeNotifier {
    fn notify(&self) {
        self.0.wake();
    }

    fn as_eventfd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// It is written again to tell a failed write from a failed flush.
#[test]
fn a_session_with_a_failed_durable_write_does_not_block() {
    let dir = dir();
    let server = SmallServer::start(dir.path(), "a", SIZE);
    let upstream = Upstream::connect(vec![server.target()]);
    server.set_mood(Mood::RefuseOne(ErrorCode::Io));
    let (done, ended) = mpsc::channel();
    let Upstream { backend, handle, .. } = upstream;
    let backend = Arc::into_inner(backend).unwrap();
    thread::spawn(move || {
        let disk = Disk::new(Box::new(backend), false);
        let notifier = Arc::new(WakeNotifier(Wake::new().unwrap()));
        let mut in_flight = InFlight::new(&disk, Arc::clone(&notifier) as _, Instant::now);
        let data = Buffer::zeroed(512, 1).unwrap();
        let write = Op::Write { offset: 0, data, durable: true };
        in_flight.begin(disk.enter_if_open().unwrap().unwrap(), write, ());
        in_flight.submit();
        assert!(wait_readable(&[notifier.as_eventfd()], None).unwrap()[0]);
        assert!(in_flight.next_completed().is_none());
        in_flight.submit();
        done.send("at work").unwrap();
        drop(in_flight);
        done.send("ended")
    });
    assert_eq!(ended.recv_timeout(DEADLINE), Ok("at work"));
    // The session ends with its connection.
    server.stop();
    assert_eq!(ended.recv_timeout(DEADLINE), Ok("ended"));
    drop(handle);
}

//! Tests of a whole server over real sockets, on a memory disk with injected faults.

use super::acl::Acl;
use super::client_limits::ClientLimits;
use super::session::WHOLE_READ_MAX;

use super::test_support::{
    TIMEOUT, connect_tcp, let_others_run, listen, wait_for_clients, wait_until,
};
use super::{Server, ServerConfig, SessionSettings, Style, export_policy};
use crate::client::{ClientError, Connection};
use crate::disk::Disk;
use crate::disk::memory_backend::{FailingBackend, Faults, MemoryBackend};
use crate::nbd::handshake::client::{ClientHandshake, ClientOffer, ClientStep};
use crate::nbd::reply::{Chunk, Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode};
use crate::net::{Address, Stream, connect};
use crate::server::export_policy::{
    ExportPolicy, GoReply, ProbeReply, RecordingPolicy, SessionId, SessionsView,
};
use nix::libc::{EIO, ENOSPC};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

const SIZE: u64 = 8 << 20;

struct Fixture {
    server: Server,
    address: Address,
    disk: Arc<Disk>,
    memory: MemoryBackend,
    faults: Arc<Faults>,
}

fn serve(settings: SessionSettings, clients_max: usize) -> Fixture {
    serve_with(Arc::new(export_policy::AllowAll), settings, clients_max)
}

fn serve_with(
    policy: Arc<dyn ExportPolicy>,
    settings: SessionSettings,
    clients_max: usize,
) -> Fixture {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let image = FailingBackend::new(memory.clone(), Arc::clone(&faults));
    let disk = Arc::new(Disk::new(Box::new(image), false));
    let (listener, address) = listen();
    let allow_all = ServerConfig::allow_all(vec![listener], &disk);
    let limits = ClientLimits::of(clients_max);
    let config = ServerConfig { policy, limits, settings, ..allow_all };
    let server = Server::start(config).unwrap();
    Fixture { server, address, disk, memory, faults }
}

fn fixture() -> Fixture {
    serve(SessionSettings::default(), 4)
}

impl Fixture {
    fn stream(&self) -> Stream {
        connect(&self.address, None, TIMEOUT).unwrap()
    }

    fn client(&self) -> Connection {
        Connection::open(self.stream(), "", None, TIMEOUT).unwrap()
    }

    fn raw(&self) -> TcpStream {
        connect_tcp(&self.address)
    }

    fn chunked(&self, extended: bool) -> Chunked {
        let mut stream = self.raw();
        let offer =
            ClientOffer { structured: true, extended, allocation: true, ..ClientOffer::default() };
        let mut handshake = ClientHandshake::new(offer);
        let mut input = Vec::new();
        loop {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap();
            input.push(byte[0]);
            let mut out = Vec::new();
            let (used, next) = handshake.advance(&input, &mut out).unwrap();
            input.drain(..used);
            stream.write_all(&out).unwrap();
            if let ClientStep::Transmission(agreement) = next {
                return Chunked { stream, dialect: agreement.dialect };
            }
        }
    }

    fn wait_for_clients(&self, count: usize) {
        wait_for_clients(&self.server, count);
    }
}

/// A raw client with structured or extended replies.
struct Chunked {
    stream: TcpStream,
    dialect: Dialect,
}

impl Chunked {
    fn ask(&mut self, kind: CommandKind, flags: CommandFlags, offset: u64, length: u64) {
        let header =
            RequestHeader { flags: flags.bits(), kind: kind.number(), cookie: 7, offset, length };
        let mut bytes = Vec::new();
        header.encode(self.dialect, &mut bytes);
        self.stream.write_all(&bytes).unwrap();
    }

    fn head(&mut self) -> ReplyHeader {
        let mut bytes = Vec::new();
        loop {
            if let Some((head, _)) = ReplyHeader::decode(&bytes).unwrap() {
                return head;
            }
            let mut byte = [0];
            self.stream.read_exact(&mut byte).unwrap();
            bytes.push(byte[0]);
        }
    }

    /// The chunks of the next reply with their data.
    fn reply(&mut self) -> Vec<(Chunk, Vec<u8>)> {
        let mut all = Vec::new();
        loop {
            let ReplyHeader::Chunk { done, kind, length, .. } = self.head() else {
                panic!("no chunk")
            };
            let needed = Chunk::needed(kind, length) as usize;
            let mut payload = vec![0; length as usize];
            self.stream.read_exact(&mut payload).unwrap();
            let chunk = Chunk::decode(kind, length, &payload[..needed]).unwrap();
            all.push((chunk, payload.split_off(needed)));
            if done {
                return all;
            }
        }
    }
}

fn read(client: &mut Connection, offset: u64, length: u32) -> Result<Vec<u8>, ClientError> {
    let mut all = Vec::new();
    client.read(offset, length, &mut |data| {
        all.extend_from_slice(data);
        Ok(())
    })?;
    Ok(all)
}

#[test]
fn written_data_is_read_back_at_any_offset_and_length() {
    let fixture = fixture();
    let mut client = fixture.client();
    for (offset, length) in
        [(0, 1), (511, 4097), (4096, 300_000), (1 << 20, 3 << 20), (SIZE - 1, 1)]
    {
        let data: Vec<u8> = (0..length).map(|n: u32| (n % 251) as u8 + 1).collect();
        client.write(offset, &data).unwrap();
        assert!(read(&mut client, offset, length).unwrap() == data, "{length} at {offset}");
    }
    client.flush().unwrap();
    client.close();
    fixture.wait_for_clients(0);
}

#[test]
fn zeros_written_into_holes_allocate_nothing() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.write(4096, &vec![0; 1 << 20]).unwrap();
    assert_eq!(fixture.memory.allocated_blocks(), 0);
    client.write(4096, &[1; 4096]).unwrap();
    assert_eq!(fixture.memory.allocated_blocks(), 1);
}

#[test]
fn a_failed_operation_is_an_error_reply_in_a_live_session() {
    for n in 1..=4u64 {
        let fixture = fixture();
        let mut client = fixture.client();
        fixture.faults.fail_nth(n, ENOSPC);
        let outcomes = [
            client.write(0, &[1; 4096]),
            read(&mut client, 0, 4096).map(drop),
            client.write(8192, &[2; 100]),
            client.flush(),
        ];
        for (index, outcome) in outcomes.iter().enumerate() {
            let fails = index as u64 + 1 == n;
            let refused = matches!(outcome, Err(ClientError::Refused(ErrorCode::NoSpace)));
            assert_eq!(refused, fails, "operation {index} with fault {n}: {outcome:?}");
        }
        assert!(read(&mut client, 0, 512).is_ok());
    }
}

#[test]
fn every_flush_fails_after_a_failed_one() {
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.faults.fail_nth(1, EIO);
    for _ in 0..3 {
        assert!(matches!(client.flush(), Err(ClientError::Refused(ErrorCode::Io))));
    }
    assert!(matches!(fixture.client().flush(), Err(ClientError::Refused(ErrorCode::Io))));
}

#[test]
fn the_policy_learns_of_failed_writes_and_flushes() {
    let recorder = Arc::new(RecordingPolicy::default());
    let fixture = serve_with(Arc::clone(&recorder) as _, SessionSettings::default(), 4);
    let mut client = fixture.client();
    fixture.faults.fail_nth(1, ENOSPC);
    client.write(0, &[1; 4096]).unwrap_err();
    assert_eq!(recorder.calls().len(), 1);
    fixture.faults.fail_nth(1, EIO);
    client.flush().unwrap_err();
    assert_eq!(recorder.calls().len(), 2);
    fixture.faults.fail_nth(1, EIO);
    read(&mut client, 0, 4096).unwrap_err();
    assert_eq!(recorder.calls().len(), 2, "a read changes nothing");
}

#[test]
fn requests_before_end_of_stream_are_answered() {
    let fixture = fixture();
    let mut client = fixture.chunked(false);
    const READS: usize = 6;
    for _ in 0..READS {
        client.ask(CommandKind::Read, CommandFlags::DF, 0, WHOLE_READ_MAX);
    }
    client.ask(CommandKind::Flush, CommandFlags::empty(), 0, 0);
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = Vec::new();
    client.stream.read_to_end(&mut all).unwrap();
    let (chunk, simple) = (20 + 8 + (1 << 20), 16);
    assert_eq!(all.len(), READS * chunk + simple);
}

#[test]
fn a_failing_simple_read_is_an_error_reply() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.write(0, &vec![1; 3 << 20]).unwrap();
    // A single piece; several that are buffered together; more than that.
    for (length, pieces) in
        [(4096, 1), (256 << 10, 1), (1 << 20, 1), ((1 << 20) + 1, 5), (3 << 20, 12)]
    {
        for nth in 1..=pieces {
            fixture.faults.fail_nth(nth, EIO);
            let failed = read(&mut client, 0, length);
            let refused = matches!(&failed, Err(ClientError::Refused(ErrorCode::Io)));
            assert!(refused, "{length} bytes, read {nth} of the disk: {:?}", failed.map(|_| ()));
        }
        let read = read(&mut client, 0, length).unwrap();
        assert!(read == vec![1; length as usize], "{length} bytes");
    }
}

#[test]
fn a_long_simple_read_failing_after_its_header_ends_the_session() {
    let fixture = fixture();
    fixture.client().write(0, &vec![1; 3 << 20]).unwrap();
    fixture.faults.fail_nth(12 + 2, EIO);
    let simple = read(&mut fixture.client(), 0, 3 << 20);
    assert!(matches!(simple, Err(ClientError::Connection(_))), "{:?}", simple.map(|_| ()));
}

#[test]
fn a_partly_answered_structured_read_fails_with_an_offset() {
    let fixture = fixture();
    let length = 1u32 << 20;
    fixture.client().write(0, &vec![1; length as usize]).unwrap();
    for extended in [false, true] {
        let mut client = fixture.chunked(extended);
        // The first operation asks for the extent, the second and third read two pieces.
        fixture.faults.fail_nth(3, EIO);
        client.ask(CommandKind::Read, CommandFlags::empty(), 0, u64::from(length));
        let reply = client.reply();
        let at = Some(u64::try_from(reply[0].1.len()).unwrap());
        let error = Chunk::Error { code: ErrorCode::Io, message: String::new(), at };
        assert_eq!(reply.last().unwrap().0, error);
        client.ask(CommandKind::Read, CommandFlags::empty(), 0, 512);
        assert_eq!(client.reply()[0].1, [1; 512]);
    }
}

#[test]
fn structured_reads_send_hole_chunks_except_with_df() {
    let fixture = fixture();
    fixture.client().write(1 << 20, &[9; 4096]).unwrap();
    for extended in [false, true] {
        let mut client = fixture.chunked(extended);
        client.ask(CommandKind::Read, CommandFlags::empty(), 0, 2 << 20);
        let reply = client.reply();
        assert!(matches!(reply[0].0, Chunk::Hole { offset: 0, .. }));
        assert!(reply.iter().all(|(_, bytes)| bytes.len() <= 2 * 4096), "holes sent as data");
        let mut data = vec![0; 2 << 20];
        for (chunk, bytes) in reply {
            if let Chunk::Data { offset } = chunk {
                data[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        assert!(data[1 << 20..][..4096] == [9; 4096]);
        client.ask(CommandKind::Read, CommandFlags::DF, 512 << 10, WHOLE_READ_MAX);
        let reply = client.reply();
        assert_eq!((reply.len(), reply[0].1.len()), (1, 1 << 20));
        client.ask(CommandKind::Read, CommandFlags::DF, 0, WHOLE_READ_MAX + 1);
        assert!(matches!(client.reply()[0].0, Chunk::Error { code: ErrorCode::Overflow, .. }));
    }
}

#[test]
fn req_one_limits_block_status_to_one_extent() {
    let fixture = fixture();
    fixture.client().write(1 << 20, &[9; 4096]).unwrap();
    for extended in [false, true] {
        let mut client = fixture.chunked(extended);
        client.ask(CommandKind::BlockStatus, CommandFlags::REQ_ONE, 512, 1 << 20);
        let one = Chunk::Status { context: 1, extents: vec![((1 << 20) - 512, 3)] };
        assert_eq!(client.reply()[0].0, one);
        client.ask(CommandKind::BlockStatus, CommandFlags::empty(), 0, SIZE);
        let tail = SIZE - (1 << 20) - 4096;
        let all = vec![(1 << 20, 3), (4096, 0), (tail, 3)];
        assert_eq!(client.reply()[0].0, Chunk::Status { context: 1, extents: all });
        client.ask(CommandKind::BlockStatus, CommandFlags::empty(), 0, 0);
        assert_eq!(client.reply()[0].0, Chunk::None);
    }
}

#[test]
fn pipelining_two_hundred_requests_does_not_deadlock() {
    let fixture = fixture();
    let mut client = fixture.raw();
    // `NBD_OPT_EXPORT_NAME` with the default export.
    client.read_exact(&mut [0; 18]).unwrap();
    client.write_all(&[0, 0, 0, 3]).unwrap();
    client.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
    client.read_exact(&mut [0; 10]).unwrap();
    let ask = |kind: CommandKind, cookie, length| {
        let header = RequestHeader { flags: 0, kind: kind.number(), cookie, offset: 0, length };
        let mut bytes = Vec::new();
        header.encode(Dialect::Simple, &mut bytes);
        bytes
    };
    for cookie in 0..100 {
        client.write_all(&ask(CommandKind::Read, cookie, 1 << 20)).unwrap();
        client.write_all(&ask(CommandKind::Write, 1000 + cookie, 64 << 10)).unwrap();
        client.write_all(&vec![1; 64 << 10]).unwrap();
    }
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..200 {
        let mut head = [0; 16];
        client.read_exact(&mut head).unwrap();
        let Some((ReplyHeader::Simple { cookie, error: 0 }, _)) =
            ReplyHeader::decode(&head).unwrap()
        else {
            panic!("not a success: {head:?}")
        };
        if cookie < 1000 {
            client.read_exact(&mut vec![0; 1 << 20]).unwrap();
        }
        assert!(answered.insert(cookie));
    }
    assert_eq!(answered.len(), 200);
}

#[test]
fn a_client_beyond_the_limit_is_closed_without_greeting() {
    let fixture = serve(SessionSettings::default(), 3);
    let clients: Vec<_> = (0..3).map(|_| fixture.client()).collect();
    let mut received = Vec::new();
    fixture.raw().read_to_end(&mut received).unwrap();
    assert!(received.is_empty());
    drop(clients);
    fixture.wait_for_clients(0);
    read(&mut fixture.client(), 0, 512).unwrap();
}

#[test]
fn a_handshake_times_out() {
    let handshake_timeout = Duration::from_millis(50);
    let fixture = serve(SessionSettings { handshake_timeout, ..SessionSettings::default() }, 3);
    let mut received = Vec::new();
    fixture.raw().read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 18);
    fixture.wait_for_clients(0);
}

#[test]
fn the_killswitch_ends_a_stalled_request_but_no_idle_client() {
    let stall_limit = Some(Duration::from_millis(50));
    let fixture = serve(SessionSettings { stall_limit, ..SessionSettings::default() }, 3);
    let mut idle = fixture.client();
    let mut stalled = fixture.chunked(false);
    stalled.ask(CommandKind::Write, CommandFlags::empty(), 0, 4096);
    stalled.stream.write_all(&[1; 100]).unwrap();
    let mut rest = Vec::new();
    stalled.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
    read(&mut idle, 0, 512).unwrap();
}

#[test]
fn a_new_acl_disconnects_clients_it_does_not_admit() {
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.server.set_acl(&["127.0.0.1"]).unwrap();
    read(&mut client, 0, 512).unwrap();
    fixture.server.set_acl(&["192.0.2.1"]).unwrap();
    assert!(matches!(read(&mut client, 0, 512), Err(ClientError::Connection(_))));
    fixture.wait_for_clients(0);
}

#[test]
fn a_new_acl_ends_sessions_that_wait_at_the_gate() {
    for reload in [false, true] {
        let fixture = fixture();
        let mut client = fixture.chunked(false);
        fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
        client.ask(CommandKind::Read, CommandFlags::empty(), 0, 512);
        // Usually the session then waits at the gate; it has to end in any case.
        let_others_run();
        if reload {
            fixture
                .server
                .set_admission(Acl::parse(&["192.0.2.1"], false).unwrap(), ClientLimits::of(4));
        } else {
            fixture.server.set_acl(&["192.0.2.1"]).unwrap();
        }
        fixture.wait_for_clients(0);
    }
}

#[test]
fn a_closed_gate_delays_requests_until_the_server_stops() {
    let mut fixture = fixture();
    let mut client = fixture.client();
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    let waiting = thread::spawn(move || (read(&mut client, 0, 512).is_ok(), client));
    let mut other = fixture.chunked(false);
    fixture.wait_for_clients(2);
    fixture.disk.gate().reopen();
    let (answered, _client) = waiting.join().unwrap();
    assert!(answered);
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    other.ask(CommandKind::Read, CommandFlags::empty(), 0, 512);
    fixture.server.stop(TIMEOUT);
    let mut rest = Vec::new();
    other.stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn stopping_answers_received_requests_and_sends_no_error() {
    let mut fixture = fixture();
    let mut client = fixture.chunked(false);
    for _ in 0..50 {
        client.ask(CommandKind::Read, CommandFlags::empty(), 0, 512);
    }
    client.reply();
    fixture.server.stop(TIMEOUT);
    let mut rest = Vec::new();
    client.stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() % (20 + 8 + 512), 0);
    let Address::Tcp(address) = fixture.address else { panic!("not TCP") };
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_retired_gate_closes_sessions_without_a_reply() {
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.disk.gate().retire();
    assert!(matches!(client.flush(), Err(ClientError::Connection(_))));
    fixture.wait_for_clients(0);
}

#[test]
fn the_acceptor_answers_heartbeats() {
    let fixture = fixture();
    let acceptor = fixture.server.acceptor_handle();
    assert_eq!(acceptor.answered(), 0);
    for number in [1, 2] {
        acceptor.probe(number);
        wait_until("no answer", || acceptor.answered() == number);
    }
}

#[test]
fn close_if_empty_fails_while_a_client_is_connected() {
    let fixture = fixture();
    let client = fixture.client();
    let acceptor = fixture.server.acceptor_handle();
    assert!(!acceptor.close_if_empty());
    drop(client);
    wait_until("the server keeps accepting", || acceptor.close_if_empty());
    assert_eq!(fixture.server.client_count(), 0);
    acceptor.probe(4711);
    assert_eq!(acceptor.answered(), 4711);
}

/// Admits one client at a time: the latest one.
#[derive(Debug, Default)]
struct LatestClient(Mutex<Vec<SessionId>>);

impl ExportPolicy for LatestClient {
    fn probe(&self, _: SessionId, _: &[u8], _: &dyn SessionsView) -> ProbeReply {
        ProbeReply::Answer { data: Vec::new(), displaced: Vec::new(), is_source: false }
    }

    fn go(&self, session: SessionId, enters: bool, _: &dyn SessionsView) -> GoReply {
        let mut admitted = self.0.lock().unwrap();
        GoReply::Allow(if enters {
            std::mem::replace(&mut admitted, vec![session])
        } else {
            vec![]
        })
    }
}

#[test]
fn a_client_is_admitted_after_the_end_of_the_one_it_displaces() {
    for style in [Style::Newstyle, Style::Oldstyle] {
        let settings = SessionSettings { style, ..SessionSettings::default() };
        let fixture = serve_with(Arc::new(LatestClient::default()), settings, 4);
        let mut displaced = fixture.client();
        read(&mut displaced, 0, 512).unwrap();
        let mut latest = fixture.client();
        assert_eq!(fixture.server.client_count(), 1, "{style:?}");
        read(&mut latest, 0, 512).unwrap();
        assert!(matches!(read(&mut displaced, 0, 512), Err(ClientError::Connection(_))));
    }
}

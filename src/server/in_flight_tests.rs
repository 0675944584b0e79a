//! Tests of requests in flight, on a disk that completes each operation when the test says so.

use super::test_support::{
    TIMEOUT, connect_tcp, let_others_run, listen, wait_for_clients, wait_until,
};
use super::{Grace, Server, ServerConfig, SessionSettings, StoredSessions};
use crate::disk::Disk;
use crate::disk::inflight::{BYTES_MAX, IN_FLIGHT_MAX};
use crate::disk::memory_backend::{BackendCall, FailingBackend, Faults, MemoryBackend};
use crate::disk::slow_backend::{Slow, SlowBackend};
use crate::disk::{Backend, StillBusy};
use crate::nbd::handshake::option::encode_option;
use crate::nbd::reply::{Dialect, ReplyHeader};
use crate::nbd::request::RequestHeader;
use crate::nbd::wire::{CommandFlags, CommandKind, ErrorCode, PRIVATE_COMMAND, PRIVATE_OPTION};
use crate::net::Address;
use crate::server::export_policy::{ExportPolicy, RecordingPolicy};
use nix::libc::ENOSPC;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

mod order_tests;
mod stopping_tests;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
const FUA: CommandFlags = CommandFlags::FUA;
const PLAIN: CommandFlags = CommandFlags::empty();

struct Fixture {
    server: Server,
    address: Address,
    disk: Arc<Disk>,
    image: FailingBackend,
    memory: MemoryBackend,
    faults: Arc<Faults>,
    slow: Arc<Slow>,
    recorder: Arc<RecordingPolicy>,
}

fn fixture_with(settings: SessionSettings) -> Fixture {
    let (memory, faults) = (MemoryBackend::new(SIZE), Arc::new(Faults::default()));
    let (slow, recorder) = (Arc::new(Slow::default()), Arc::new(RecordingPolicy::default()));
    let image = || FailingBackend::new(memory.clone(), Arc::clone(&faults));
    let backend = Box::new(SlowBackend::new(image(), Arc::clone(&slow)));
    let disk = Arc::new(Disk::new(backend, false));
    let (server, address) = open(&disk, &recorder, settings, StoredSessions::default());
    Fixture { server, address, disk, image: image(), memory, faults, slow, recorder }
}

fn open(
    disk: &Arc<Disk>,
    recorder: &Arc<RecordingPolicy>,
    settings: SessionSettings,
    stored: StoredSessions,
) -> (Server, Address) {
    let (listener, address) = listen();
    let allow_all = ServerConfig::allow_all(vec![listener], disk);
    let policy = Arc::clone(recorder) as Arc<dyn ExportPolicy>;
    (Server::start(ServerConfig { policy, settings, stored, ..allow_all }).unwrap(), address)
}

fn fixture() -> Fixture {
    fixture_with(SessionSettings::default())
}

impl Fixture {
    /// A client of the default export, with simple replies.
    fn client(&self) -> Client {
        self.client_after(&[])
    }

    /// A client that has sent the private option.
    fn client_with_private_command(&self) -> Client {
        let mut option = Vec::new();
        encode_option(PRIVATE_OPTION, &[], &mut option);
        self.client_after(&option)
    }

    /// A client that has sent an option with two replies without data, or no option.
    fn client_after(&self, option: &[u8]) -> Client {
        let mut stream = connect_tcp(&self.address);
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(b"\0\0\0\x03").unwrap();
        if !option.is_empty() {
            stream.write_all(option).unwrap();
            stream.read_exact(&mut [0; 40]).unwrap();
        }
        stream.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0").unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Client(stream)
    }

    /// Completes the operation with this index.
    fn complete(&self, nth: usize) {
        self.slow.complete(nth, &self.image);
    }

    /// Completes the first operation of this kind, once it is in flight.
    fn complete_one(&self, kind: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let calls = self.slow.wait_for(0);
            if let Some(nth) = calls.iter().position(|call| call.starts_with(kind)) {
                return self.complete(nth);
            }
            assert!(Instant::now() < deadline, "no {kind} among {calls:?}");
            thread::yield_now();
        }
    }

    /// Completes all operations, including later ones.
    fn complete_all(&self) {
        self.slow.complete_all(&self.image);
    }

    fn wait_for_clients(&self, count: usize) {
        wait_for_clients(&self.server, count);
    }
}

struct Client(TcpStream);

impl Client {
    fn ask(&mut self, kind: CommandKind, flags: CommandFlags, at: u64, length: u64, cookie: u64) {
        let (flags, kind) = (flags.bits(), kind.number());
        let header = RequestHeader { flags, kind, cookie, offset: at, length };
        let mut bytes = Vec::new();
        header.encode(Dialect::Simple, &mut bytes);
        self.0.write_all(&bytes).unwrap();
    }

    fn write(&mut self, flags: CommandFlags, at: u64, data: &[u8], cookie: u64) {
        self.ask(CommandKind::Write, flags, at, data.len() as u64, cookie);
        self.0.write_all(data).unwrap();
    }

    fn read(&mut self, at: u64, length: u64, cookie: u64) {
        self.ask(CommandKind::Read, PLAIN, at, length, cookie);
    }

    fn flush(&mut self, cookie: u64) {
        self.ask(CommandKind::Flush, PLAIN, 0, 0, cookie);
    }

    fn cache(&mut self, cookie: u64) {
        self.ask(CommandKind::Cache, PLAIN, 0, 4096, cookie);
    }

    /// Cookie and error of the next reply.
    fn reply(&mut self) -> (u64, u32) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        let Some((ReplyHeader::Simple { cookie, error }, _)) = ReplyHeader::decode(&head).unwrap()
        else {
            panic!("no simple reply: {head:?}")
        };
        (cookie, error)
    }

    fn data(&mut self, length: u64) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    /// Reads data in memory, and asserts that no other request is answered before.
    fn assert_read_is_answered_first(&mut self) {
        self.read(8 * MIB, 512, 9999);
        assert_eq!(self.reply(), (9999, 0));
        self.data(512);
    }

    fn is_closed(&mut self) -> bool {
        matches!(self.0.read(&mut [0]), Ok(0) | Err(_))
    }
}

#[test]
fn slow_requests_do_not_delay_later_ones() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.flush(1);
    fixture.slow.wait_for(1);
    client.write(FUA, 0, &[1; 4096], 2);
    client.ask(CommandKind::Trim, PLAIN, MIB, MIB, 3);
    client.ask(CommandKind::WriteZeroes, FUA, 2 * MIB, MIB, 4);
    client.cache(5);
    fixture.slow.wait_for(5);
    client.assert_read_is_answered_first();
    for (kind, cookie) in [("Cache", 5), ("Trim", 3)] {
        fixture.complete_one(kind);
        assert_eq!(client.reply(), (cookie, 0));
    }
    // Their replies wait for each other: the kernel may report an error of either to the other.
    fixture.complete_one("Write");
    client.assert_read_is_answered_first();
    fixture.complete_one("Flush");
    let both = [client.reply(), client.reply()];
    assert!(both.contains(&(1, 0)) && both.contains(&(2, 0)), "{both:?}");
    // The durable zeroing is followed by a flush.
    fixture.complete_one("Zero");
    fixture.slow.wait_for(1);
    client.assert_read_is_answered_first();
    fixture.complete_one("Flush");
    assert_eq!(client.reply(), (4, 0));
}

#[test]
fn cold_reads_are_answered_as_their_data_arrives() {
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.memory.write(0, &[1; 4096], false).unwrap();
    fixture.memory.write(MIB, &[2; 100_000], false).unwrap();
    fixture.slow.evict_all();
    client.read(0, 4096, 1);
    client.read(MIB, 100_000, 2);
    client.write(PLAIN, 4 * MIB, &[3; 4096], 3);
    assert_eq!(client.reply(), (3, 0));
    let loads = fixture.slow.wait_for(2);
    assert!(loads.iter().all(|load| load.starts_with("Read")), "{loads:?}");
    fixture.complete(1);
    assert_eq!(client.reply(), (2, 0));
    assert!(client.data(100_000) == [2; 100_000]);
    fixture.complete(0);
    assert_eq!(client.reply(), (1, 0));
    assert!(client.data(4096) == [1; 4096]);
}

#[test]
fn writes_with_cold_edges_do_not_delay_others() {
    let fixture = fixture();
    let mut client = fixture.client();
    fixture.slow.evict_all();
    client.write(PLAIN, 100, &[1; 100], 1);
    client.write(PLAIN, 4096, &[2; 4096], 2);
    assert_eq!(client.reply(), (2, 0));
    fixture.slow.wait_for(1);
    fixture.complete(0);
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(fixture.memory.contents()[199..201], [1, 0]);
}

#[test]
fn overlapping_changes_keep_their_order() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 8192], 1);
    client.write(PLAIN, 4096, &[2; 4096], 2);
    client.write(PLAIN, 8000, &[3; 96], 3);
    client.assert_read_is_answered_first();
    assert_eq!(fixture.slow.wait_for(1).len(), 1);
    fixture.complete(0);
    assert_eq!((client.reply(), client.reply(), client.reply()), ((1, 0), (2, 0), (3, 0)));
    assert_eq!(fixture.memory.contents()[4095..4097], [1, 2]);
    assert_eq!(fixture.memory.contents()[7999..8001], [2, 3]);
}

#[test]
fn concurrent_durable_requests_share_flushes() {
    let fixture = fixture();
    let mut client = fixture.client();
    // A read at the closed gate first, so that all requests have arrived when they are parsed.
    let mut sent = Client(client.0.try_clone().unwrap());
    fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT).unwrap();
    sent.read(0, 512, 0);
    for cookie in 1..=20 {
        sent.write(FUA, cookie * 4096, &[1; 4096], cookie);
        sent.flush(100 + cookie);
    }
    fixture.disk.gate().reopen();
    assert_eq!(client.reply(), (0, 0));
    client.data(512);
    let mut answered = std::collections::BTreeSet::new();
    let mut flushes = 0;
    while answered.len() < 40 {
        flushes += fixture.slow.wait_for(1).len();
        fixture.complete(0);
        client.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        while client.0.peek(&mut [0; 16]).is_ok_and(|count| count == 16) {
            let (cookie, error) = client.reply();
            assert!(error == 0 && answered.insert(cookie));
        }
    }
    assert!(flushes < 10, "{flushes} calls for 40 requests");
    assert_eq!(fixture.memory.contents()[4096..][..20 * 4096], [1; 20 * 4096]);
}

#[test]
fn failed_operations_are_error_replies_in_a_live_session() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.ask(CommandKind::WriteZeroes, PLAIN, 0, 4096, 1);
    client.write(FUA, 4096, &[1; 4096], 2);
    fixture.slow.wait_for(2);
    fixture.slow.fail(0, ENOSPC);
    assert_eq!(client.reply(), (1, ErrorCode::NoSpace.number()));
    fixture.slow.fail(0, ENOSPC);
    // Without durability, to find out which of the two has failed.
    fixture.slow.wait_for(1);
    fixture.slow.fail(0, ENOSPC);
    assert_eq!(client.reply(), (2, ErrorCode::NoSpace.number()));
    assert_eq!(fixture.recorder.calls(), ["on_write_failure", "on_write_failure"]);
    client.assert_read_is_answered_first();
}

#[test]
fn the_closing_gate_drains_io_and_delays_later_requests() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    fixture.slow.wait_for(1);
    let soon = Instant::now() + Duration::from_millis(20);
    let busy = fixture.disk.gate().close_and_drain(soon);
    assert_eq!(busy, Err(StillBusy { visits: 1 }));
    thread::scope(|scope| {
        let closing = scope.spawn(|| fixture.disk.gate().close_and_drain(Instant::now() + TIMEOUT));
        // Requests that arrive meanwhile must not keep the session from seeing the completion.
        for cookie in 2..40 {
            client.read(0, 4096, cookie);
            client.flush(100 + cookie);
        }
        fixture.complete(0);
        // Flushes that passed the gate before it closed have to complete, too.
        fixture.complete_all();
        assert_eq!(closing.join().unwrap(), Ok(()));
    });
    fixture.disk.gate().reopen();
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..77 {
        let (cookie, error) = client.reply();
        assert!(error == 0 && answered.insert(cookie));
        if (2..40).contains(&cookie) {
            client.data(4096);
        }
    }
}

#[test]
fn disconnect_and_handover_wait_for_earlier_requests() {
    let fixture = fixture();
    let mut client = fixture.client_with_private_command();
    client.write(FUA, 0, &[1; 4096], 1);
    let header = RequestHeader { flags: 0, kind: PRIVATE_COMMAND, cookie: 2, offset: 0, length: 4 };
    let mut bytes = Vec::new();
    header.encode(Dialect::Simple, &mut bytes);
    client.0.write_all(&bytes).unwrap();
    client.0.write_all(b"over").unwrap();
    fixture.slow.wait_for(1);
    assert_eq!(fixture.recorder.calls(), <[&str; 0]>::default());
    fixture.complete(0);
    assert_eq!((client.reply(), client.reply()), ((1, 0), (2, 0)));
    client.write(FUA, 0, &[1; 4096], 3);
    client.ask(CommandKind::Disconnect, PLAIN, 0, 0, 4);
    fixture.slow.wait_for(1);
    assert_eq!(fixture.recorder.calls(), ["handover"]);
    fixture.complete(0);
    assert_eq!(client.reply(), (3, 0));
    fixture.wait_for_clients(0);
    assert_eq!(fixture.recorder.calls(), ["handover", "on_disconnect", "on_session_end"]);
}

#[test]
fn requests_before_end_of_stream_are_answered_on_completion() {
    let fixture = fixture();
    let mut client = fixture.client();
    // More than can be in flight, so that some are not begun when the end of the stream arrives.
    let count = 2 * IN_FLIGHT_MAX as u64;
    for cookie in 0..count {
        client.cache(cookie);
    }
    client.0.shutdown(Shutdown::Write).unwrap();
    fixture.slow.wait_for(IN_FLIGHT_MAX);
    fixture.complete_all();
    for _ in 0..count {
        assert_eq!(client.reply().1, 0);
    }
    assert!(client.is_closed());
}

#[test]
fn io_in_flight_stays_within_its_limits() {
    let fixture = fixture();
    let mut client = fixture.client();
    const EACH: u64 = 128 << 10;
    let mut sending = Client(client.0.try_clone().unwrap());
    let asked = 3 * BYTES_MAX as u64 / EACH;
    fixture.slow.evict_all();
    let sender = thread::spawn(move || {
        for cookie in 0..asked {
            sending.write(PLAIN, cookie * EACH + 1, &vec![1; EACH as usize - 1], cookie);
        }
        for cookie in 0..2 * IN_FLIGHT_MAX as u64 {
            sending.cache(cookie);
        }
    });
    // The blocks at the edges are read first; until then the session keeps all of the data.
    let most = BYTES_MAX / EACH as usize;
    fixture.slow.wait_for(most);
    let_others_run();
    assert_eq!(fixture.slow.count(), most);
    for _ in 0..asked {
        fixture.slow.wait_for(1);
        fixture.complete(0);
        assert_eq!(client.reply().1, 0);
    }
    fixture.slow.wait_for(IN_FLIGHT_MAX);
    let_others_run();
    assert_eq!(fixture.slow.count(), IN_FLIGHT_MAX);
    fixture.complete_all();
    for _ in 0..2 * IN_FLIGHT_MAX {
        assert_eq!(client.reply().1, 0);
    }
    sender.join().unwrap();
}

#[test]
fn the_killswitch_ignores_time_spent_on_the_disk() {
    let stall_limit = Some(Duration::from_millis(50));
    let fixture = fixture_with(SessionSettings { stall_limit, ..SessionSettings::default() });
    let mut client = fixture.client();
    client.write(FUA, 0, &[1; 4096], 1);
    // This one cannot be begun yet.
    client.write(PLAIN, 0, &[2; 4096], 2);
    fixture.slow.wait_for(1);
    // There is no event to wait for: the session must not end.
    thread::sleep(Duration::from_millis(200));
    fixture.complete(0);
    assert_eq!((client.reply(), client.reply()), ((1, 0), (2, 0)));
}

#[test]
fn a_reconnected_client_overwrites_its_lost_changes() {
    let fixture = fixture();
    let mut old = fixture.client();
    for cookie in 0..24 {
        old.ask(CommandKind::WriteZeroes, PLAIN, cookie * 4096, 4096, cookie);
    }
    old.assert_read_is_answered_first();
    let begun = fixture.slow.count();
    drop(old);
    let mut new = fixture.client();
    // Over a change that the old session has begun, over one that waits, and over both.
    new.write(PLAIN, 0, &[1; 4096], 1);
    new.write(FUA, 23 * 4096, &[2; 4096], 2);
    new.write(PLAIN, 4096, &[3; 300 << 10], 3);
    new.0.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(new.0.peek(&mut [0]).is_err(), "no write may be made yet");
    new.0.set_read_timeout(Some(TIMEOUT)).unwrap();
    fixture.complete_all();
    let mut answered: Vec<_> = (0..3).map(|_| new.reply()).collect();
    answered.sort_unstable();
    assert_eq!(answered, [(1, 0), (2, 0), (3, 0)]);
    fixture.wait_for_clients(1);
    let contents = fixture.memory.contents();
    assert!(contents[..4096] == [1; 4096], "{begun} were begun");
    assert!(contents[4096..][..300 << 10].iter().all(|byte| *byte == 3));
}

#[test]
fn a_reset_connection_ends_a_long_zeroing() {
    let fixture = fixture();
    let mut client = fixture.client();
    client.ask(CommandKind::WriteZeroes, PLAIN, 0, SIZE, 1);
    fixture.slow.wait_for(1);
    // More than may be in flight, so that the session does not receive.
    for cookie in 0..2 * IN_FLIGHT_MAX as u64 {
        client.cache(cookie + 10);
    }
    fixture.slow.wait_for(IN_FLIGHT_MAX);
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&client.0, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    drop(client);
    // The session ends after the part of the zeroing that is being made, or the next if it has checked
    // the connection just before.
    fixture.complete_one("Zero");
    fixture.complete_all();
    fixture.wait_for_clients(0);
    assert!(
        fixture.faults.count(BackendCall::Zero) < 3,
        "{} parts",
        fixture.faults.count(BackendCall::Zero)
    );
}

#[test]
fn write_back_starts_after_a_step_of_writes() {
    let fixture = fixture();
    let mut client = fixture.client();
    let step = crate::disk::write_behind::STEP_BYTES;
    for at in 0..step / MIB {
        assert_eq!(fixture.faults.count(BackendCall::WriteBack), 0, "{at} MiB");
        client.write(PLAIN, at * MIB, &[1; MIB as usize], at);
        assert_eq!(client.reply(), (at, 0));
    }
    wait_until("it never starts", || fixture.faults.count(BackendCall::WriteBack) > 0);
    assert_eq!(fixture.faults.count(BackendCall::Flush), 0, "write-back is no flush");
}

#[test]
fn a_backlog_of_a_disconnected_client_changes_nothing() {
    let fixture = fixture();
    let mut old = fixture.client();
    for cookie in 0..IN_FLIGHT_MAX as u64 {
        old.cache(cookie);
    }
    fixture.slow.wait_for(IN_FLIGHT_MAX);
    // The in-flight I/O is at its limit: these wait in the socket and the inbox.
    old.write(PLAIN, 0, &[1; 4096], 1000);
    old.ask(CommandKind::WriteZeroes, PLAIN, 4096, 4096, 1001);
    old.0.shutdown(Shutdown::Write).unwrap();
    let mut new = fixture.client();
    new.write(PLAIN, 0, &[2; 8192], 1);
    assert_eq!(new.reply(), (1, 0));
    fixture.complete_all();
    fixture.wait_for_clients(1);
    assert!(fixture.memory.contents()[..8192] == [2; 8192]);
}

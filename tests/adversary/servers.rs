//! The adversary as a server: of `read` and `write`, which fail; of `mirror`, which fails or retries, while
//! the source serves on; and of a proxy, which goes on to the next server of its list.

use crate::requests::SIZE;
use harness::raw::*;
use harness::session::{Mode, Request, Session};
use harness::{
    Builder, MIB, Program, TIMEOUT, noise, poll_until, sparse_image, temp_dir, write_at,
};
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

/// What a hostile server does on every connection.
#[derive(Clone, Debug)]
enum Malice {
    /// Sends these bytes at once.
    Greets(Vec<u8>),
    /// Greets, and answers the first option so many times with these bytes; the number of the option comes
    /// behind the first eight.
    AnswersOption(Vec<u8>, usize),
    /// Completes the handshake, and answers the first request so many times with these bytes; where they have
    /// [`COOKIE`], with its cookie.
    AnswersRequest(Vec<u8>, usize),
}

const COOKIE: [u8; 8] = *b"COOKIE__";
/// How many replies stand for an endless number of them.
const ENDLESS: usize = 20_000;

/// A hostile server. Dropping it stops it.
struct HostileServer {
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

impl HostileServer {
    fn start(malice: &Malice) -> HostileServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, is_over) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let (malice, ends) = (malice.clone(), Arc::clone(&is_over));
        let acceptor = thread::spawn(move || {
            for stream in listener.incoming() {
                if ends.load(Ordering::SeqCst) {
                    return;
                }
                // Clients may leave at any time.
                let _ = malice.act(stream.unwrap());
            }
        });
        HostileServer { address, is_over, acceptor: Some(acceptor) }
    }

    fn uri(&self) -> String {
        format!("nbd://{}", self.address)
    }
}

impl Drop for HostileServer {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        self.acceptor.take().unwrap().join().unwrap();
    }
}

fn receive(stream: &mut TcpStream, length: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Receives an option; returns its number.
fn receive_option(stream: &mut TcpStream) -> io::Result<u32> {
    let head = receive(stream, 16)?;
    receive(stream, number_at(&head, 12) as usize)?;
    Ok(number_at(&head, 8))
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let words = [option, kind, data.len() as u32].map(u32::to_be_bytes).concat();
    [&OPTION_REPLY.to_be_bytes()[..], &words, data].concat()
}

impl Malice {
    fn act(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        if let Self::Greets(bytes) = self {
            return stream.write_all(bytes);
        }
        let mut greeting = [GREETING, I_HAVE_OPT].map(u64::to_be_bytes).concat();
        greeting.extend((FIXED_NEWSTYLE as u16 | NO_ZEROES as u16).to_be_bytes());
        stream.write_all(&greeting)?;
        receive(&mut stream, 4)?;
        if let Self::AnswersOption(bytes, times) = self {
            let option = receive_option(&mut stream)?.to_be_bytes();
            let mut answer = bytes.clone();
            if let Some(number) = answer.get_mut(8..12) {
                number.copy_from_slice(&option);
            }
            return (0..*times).try_for_each(|_| stream.write_all(&answer));
        }
        loop {
            let option = receive_option(&mut stream)?;
            let mut reply = Vec::new();
            if option == OPT_GO {
                let flags = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;
                let info = [
                    &INFO_EXPORT.to_be_bytes()[..],
                    &SIZE.to_be_bytes(),
                    &(flags | SEND_CACHE | SEND_FAST_ZERO).to_be_bytes(),
                ];
                reply.extend(option_reply(option, REP_INFO, &info.concat()));
                reply.extend(option_reply(option, REP_ACK, b""));
                stream.write_all(&reply)?;
                break;
            }
            let is_structured = option == OPT_STRUCTURED_REPLY;
            let kind = if is_structured { REP_ACK } else { REP_ERR_UNSUP };
            stream.write_all(&option_reply(option, kind, b""))?;
        }
        let head = receive(&mut stream, 28)?;
        if let Self::AnswersRequest(bytes, times) = self {
            let mut answer = bytes.clone();
            while let Some(at) = answer.windows(8).position(|part| part == COOKIE) {
                answer[at..at + 8].copy_from_slice(&head[8..16]);
            }
            (0..*times).try_for_each(|_| stream.write_all(&answer))?;
        }
        Ok(())
    }
}

fn greetings() -> Vec<(String, Malice)> {
    let newstyle = [GREETING, I_HAVE_OPT].map(u64::to_be_bytes).concat();
    let oldstyle = |size: u64, flags: u32| {
        let numbers = [GREETING, OLD_STYLE, size].map(u64::to_be_bytes).concat();
        [&numbers[..], &flags.to_be_bytes(), &[0; ZEROES]].concat()
    };
    let mut all = Vec::new();
    for at in [0, 1, 7, 8, 9, 15, 16, 17] {
        all.push((format!("{at} bytes of a greeting"), newstyle[..at.min(16)].to_vec()));
    }
    for at in [16, 24, 28, 151] {
        all.push((format!("{at} bytes of an old greeting"), oldstyle(SIZE, 1)[..at].to_vec()));
    }
    for bit in [0, 63, 64, 127] {
        let mut bytes = newstyle.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        all.push((format!("bit {bit} of the greeting"), bytes));
    }
    for size in [0, 1, u64::MAX, 1 << 63] {
        all.push((format!("an old greeting with size {size}"), oldstyle(size, 1)));
    }
    all.push(("an old greeting with all flags".to_owned(), oldstyle(SIZE, u32::MAX)));
    all.push(("an HTTP reply".to_owned(), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()));
    all.push(("8 MiB of zeros".to_owned(), vec![0; 8 << 20]));
    all.into_iter().map(|(name, bytes)| (name, Malice::Greets(bytes))).collect()
}

fn option_answers() -> Vec<(String, Malice)> {
    let reply = |kind, data: &[u8]| option_reply(0, kind, data);
    let of_length = |kind: u32, length: u32| {
        let mut bytes = option_reply(0, kind, b"");
        bytes[16..20].copy_from_slice(&length.to_be_bytes());
        bytes
    };
    let mut broken = reply(REP_ACK, b"");
    broken[0] ^= 1;
    let all = [
        ("nothing", vec![]),
        ("half a reply", reply(REP_ACK, b"")[..11].to_vec()),
        ("a reply with a broken magic", broken),
        ("an error of 2^32-1 bytes", of_length(REP_ERR_POLICY, u32::MAX)),
        ("information of 2^31 bytes", of_length(REP_INFO, 1 << 31)),
        ("an error that is not UTF-8", reply(REP_ERR_POLICY, b"\xff\xfe")),
        ("an error with control characters", reply(REP_ERR_POLICY, b"\x1b[2J\n\0")),
        ("an error of 65536 bytes", reply(REP_ERR_INVALID, &[b'e'; 65_536])),
        ("an unknown reply", reply(77, b"what")),
        ("an ACK with data", reply(REP_ACK, b"data")),
        ("information of one byte", reply(REP_INFO, &[0])),
        ("an export cut short", reply(REP_INFO, &[0, 0, 1])),
        ("a private answer cut short", reply(REP_PRIVATE, &[0, 0, 0, 1, 2])),
        ("a context without a name", reply(REP_META_CONTEXT, &[0; 3])),
    ];
    let once = all.map(|(name, bytes)| (name.to_owned(), Malice::AnswersOption(bytes, 1)));
    let endless = Malice::AnswersOption(reply(REP_INFO, &[0, 9, 1, 2]), ENDLESS);
    once.into_iter().chain([("information without end".to_owned(), endless)]).collect()
}

fn request_answers() -> Vec<(String, Malice)> {
    let simple = |magic: u32, error: u32, cookie: &[u8; 8]| {
        [&[magic, error].map(u32::to_be_bytes).concat()[..], cookie].concat()
    };
    let chunk = |flags: u16, kind: u16, length: u32, data: &[u8]| {
        let numbers = [flags, kind].map(u16::to_be_bytes).concat();
        let magic = STRUCTURED_REPLY.to_be_bytes();
        [&magic[..], &numbers, &COOKIE, &length.to_be_bytes(), data].concat()
    };
    let at = |offset: u64, data: &[u8]| [&offset.to_be_bytes()[..], data].concat();
    let all = [
        ("nothing", vec![]),
        ("half a reply", simple(SIMPLE_REPLY, 0, &COOKIE)[..9].to_vec()),
        ("an unknown magic", simple(0x6744_6699, 0, &COOKIE)),
        ("an extended reply", simple(EXTENDED_REPLY, 0, &COOKIE).repeat(4)),
        ("a reply to another cookie", simple(SIMPLE_REPLY, 0, b"another!")),
        ("a reply, cut short", [simple(SIMPLE_REPLY, 0, &COOKIE), vec![1; 100]].concat()),
        ("a chunk of an unknown kind", chunk(CHUNK_DONE, 77, 4, b"what")),
        ("a chunk of 2^32-1 bytes", chunk(0, CHUNK_DATA, u32::MAX, &at(0, b"x"))),
        ("a chunk of 7 bytes", chunk(0, CHUNK_DATA, 7, &[0; 7])),
        ("a chunk beyond the end", chunk(0, CHUNK_DATA, 520, &at(u64::MAX - 5, &[1; 512]))),
        ("a chunk before the read", chunk(0, CHUNK_DATA, 520, &at(SIZE - 512, &[1; 512]))),
        ("a hole of 2^32-1 bytes", chunk(0, CHUNK_HOLE, 12, &at(0, &[0xff; 4]))),
        ("no chunk with data", chunk(0, CHUNK_NONE, 9, b"something")),
        ("an error without a number", chunk(CHUNK_DONE, CHUNK_ERROR, 1, b"e")),
        (
            "an error with a longer message",
            chunk(CHUNK_DONE, CHUNK_ERROR, 6, &[0, 0, 0, 5, 0xff, 0xff]),
        ),
        ("zeros", vec![0; 4096]),
    ];
    let once = all.map(|(name, bytes)| (name.to_owned(), Malice::AnswersRequest(bytes, 1)));
    let endless = Malice::AnswersRequest(chunk(0, CHUNK_NONE, 0, b""), ENDLESS);
    once.into_iter().chain([("empty chunks without end".to_owned(), endless)]).collect()
}

fn all_malice() -> Vec<(String, Malice)> {
    [greetings(), option_answers(), request_answers()].concat()
}

#[test]
fn read_and_write_fail_at_a_hostile_server() {
    for (name, malice) in all_malice() {
        let server = HostileServer::start(&malice);
        for mode in ["read", "write"] {
            let arguments = format!("{mode} --uri {} --from 0 --size 65536", server.uri());
            let outcome = Program::flexnbd(&arguments).input(&noise(65_536, 1)).run();
            let error = outcome.stderr.clone();
            assert_eq!(outcome.status.code(), Some(1), "{mode} from {name}: {error}");
            assert!(
                !error.contains("panicked") && error.len() < 1000,
                "{mode} from {name}: {error}"
            );
            assert!(!error.contains('\x1b'), "{mode} from {name} prints control characters");
        }
    }
}

#[test]
fn a_source_survives_hostile_destinations() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", SIZE);
    let content = noise(MIB as usize, 2);
    write_at(&image, 0, &content);
    let control = dir.path().join("control.sock");
    let mut source = Builder::serve(&image).args(["--sock"]).args([&control]).start();
    source.wait_for_control(&control);
    let command = |words: &str| Program::flexnbd(words).args(["--sock"]).args([&control]).run();
    let mut honest = Session::open(source.endpoint(), Mode::Structured).unwrap();
    let before = source.settled_resources();
    for (name, malice) in all_malice() {
        let server = HostileServer::start(&malice);
        let (ip, port) = (server.address.ip(), server.address.port());
        let mirror = command(&format!("mirror --addr {ip} --port {port}"));
        assert!(mirror.status.code().is_some_and(|code| code <= 1), "{name}: {}", mirror.stderr);
        assert!(honest.read(0, MIB) == content, "{name}");
        honest.ok(Request::write(2 * MIB, &content[..4096]));
        let stopped = command("break");
        let is_over = || command("status").text().contains("is_mirroring=false");
        let (text, log) = (stopped.text() + &stopped.stderr, source.stderr());
        assert!(poll_until(TIMEOUT, is_over), "{name}: still mirroring after {text}: {log}");
    }
    assert!(honest.read(0, MIB) == content);
    // The last migration is kept for `status`, with one descriptor.
    let mut now = before;
    let released = poll_until(TIMEOUT, || {
        now = source.resources();
        now.threads <= before.threads && now.descriptors <= before.descriptors + 1
    });
    assert!(released, "before: {before:?}\nafter: {now:?}");
    drop(honest);
    assert!(source.stop().success());
    assert!(!source.stderr().contains("panicked"));
}

#[test]
fn a_proxy_goes_on_from_hostile_servers() {
    let dir = temp_dir();
    let image = sparse_image(dir.path(), "image", SIZE);
    let content = noise(MIB as usize, 3);
    write_at(&image, 0, &content);
    let upstream = Builder::serve(&image).start();
    // A server may have a disk of any size.
    let is_plausible = |name: &str| name.starts_with("an old greeting with");
    for (name, malice) in all_malice().into_iter().filter(|(name, _)| !is_plausible(name)) {
        let server = HostileServer::start(&malice);
        let targets = format!("--to {} --to {}", server.uri(), upstream.uri());
        let mut proxy = Builder::proxy().args(targets.split(' ')).start();
        let mut honest = Session::open(proxy.endpoint(), Mode::Structured).unwrap();
        assert!(honest.read(0, MIB) == content, "{name}");
        honest.ok(Request::write(2 * MIB, &content[..4096]));
        assert!(honest.read(2 * MIB, 4096) == content[..4096], "{name}");
        honest.ok(Request::new(FLUSH, 0, 0));
        drop(honest);
        assert!(proxy.stop().success(), "{name}: {}", proxy.stderr());
        assert!(!proxy.stderr().contains("panicked"), "{name}");
    }
}

//! The transmission phase from the side of a client, with simple replies, structured replies and
//! extended headers. Checks the form of every reply against the specification, in every test.
//! Never uses the library under test.

use crate::Endpoint;
use crate::raw::*;
use std::collections::HashMap;
use std::ops::Range;

/// The form of replies and requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Simple replies, 32-bit lengths.
    Simple,
    /// Structured replies, 32-bit lengths.
    Structured,
    /// Extended headers: 64-bit lengths in requests and replies.
    Extended,
}

/// All three.
pub const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A request, independent of the form of its header.
#[derive(Clone, Debug)]
pub struct Request {
    /// The request type, such as `WRITE`.
    pub command: u16,
    /// Command flags.
    pub flags: u16,
    /// In bytes.
    pub offset: u64,
    /// In bytes, of the range; the payload has a length of its own.
    pub length: u64,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Request {
    /// Any command; a WRITE gets a payload of zeroes.
    pub fn new(command: u16, offset: u64, length: u64) -> Request {
        let payload = if command == WRITE { vec![0; length as usize] } else { Vec::new() };
        Request { command, flags: 0, offset, length, payload }
    }

    /// A WRITE of `data`.
    pub fn write(offset: u64, data: &[u8]) -> Request {
        let payload = data.to_vec();
        Request { command: WRITE, flags: 0, offset, length: data.len() as u64, payload }
    }

    /// With these command flags.
    pub fn flags(mut self, flags: u16) -> Request {
        self.flags = flags;
        self
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// One chunk of a structured or extended reply.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// Whether it is the last of its reply.
    pub done: bool,
    /// The chunk type, such as `CHUNK_DATA`.
    pub kind: u16,
    /// What follows the header.
    pub payload: Vec<u8>,
}

impl Chunk {
    /// Whether it describes content of the disk.
    pub fn is_content(&self) -> bool {
        self.kind == CHUNK_DATA || self.kind == CHUNK_HOLE
    }

    fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }

    fn u64_at(&self, at: usize) -> u64 {
        u64::from_be_bytes(self.payload[at..at + 8].try_into().unwrap())
    }
}

/// A complete reply.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// Zero for success.
    pub error: u32,
    /// The data of a READ, assembled from all chunks.
    pub data: Vec<u8>,
    /// The extents of BLOCK_STATUS: length in bytes and flags.
    pub extents: Vec<(u64, u64)>,
    /// Empty for a simple reply.
    pub chunks: Vec<Chunk>,
}

/// One connection in the transmission phase.
pub struct Session {
    /// The connection, for bytes that no request of this type describes.
    pub wire: Wire,
    /// What was negotiated.
    pub mode: Mode,
    /// Size of the export in bytes.
    pub size: u64,
    /// The transmission flags.
    pub flags: u16,
    /// The id of `base:allocation`, if the server granted it.
    pub context: Option<u32>,
    requests: u64,
    unfinished: HashMap<u64, Vec<Chunk>>,
}

impl Session {
    /// Connects to the default export. `None` if the server does not support this mode.
    #[track_caller]
    pub fn open(endpoint: &Endpoint, mode: Mode) -> Option<Session> {
        let mut wire = Wire::haggle(endpoint, FIXED_NEWSTYLE | NO_ZEROES);
        let option = match mode {
            Mode::Simple => return Some(Session::go(wire, mode, None, b"")),
            Mode::Structured => OPT_STRUCTURED_REPLY,
            Mode::Extended => OPT_EXTENDED_HEADERS,
        };
        if wire.ask_final(option, &[]) != REP_ACK {
            return None;
        }
        let query = encode_meta(b"", &[ALLOCATION.as_bytes()]);
        let (contexts, _) = wire.ask(OPT_SET_META_CONTEXT, &query);
        let id = contexts.first().map(|c| u32::from_be_bytes(c.data[..4].try_into().unwrap()));
        Some(Session::go(wire, mode, id, b""))
    }

    /// Ends option haggling with GO.
    #[track_caller]
    pub fn go(mut wire: Wire, mode: Mode, context: Option<u32>, name: &[u8]) -> Session {
        let (infos, last) = wire.ask(OPT_GO, &encode_go(name, &[]));
        assert_eq!(last, REP_ACK, "GO succeeds");
        let export = infos.iter().find(|i| i.data[..2] == INFO_EXPORT.to_be_bytes());
        let data = &export.expect("GO always gives INFO_EXPORT").data;
        let size = u64::from_be_bytes(data[2..10].try_into().unwrap());
        let flags = u16::from_be_bytes(data[10..12].try_into().unwrap());
        Session::after_handshake(wire, mode, context, size, flags)
    }

    /// Connects to an oldstyle server, which has no options.
    #[track_caller]
    pub fn open_old_style(endpoint: &Endpoint) -> Session {
        let mut wire = Wire::connect(endpoint);
        assert_eq!(wire.recv_u64(), GREETING, "the greeting begins with NBDMAGIC");
        assert_eq!(wire.recv_u64(), OLD_STYLE, "an old style greeting goes on with its magic");
        let size = wire.recv_u64();
        let flags = wire.recv_u32();
        assert_eq!(flags >> 16, 0, "old style has no handshake flags");
        assert_eq!(wire.recv(ZEROES), [0; ZEROES], "the reserved bytes are zero");
        Session::after_handshake(wire, Mode::Simple, None, size, flags as u16)
    }

    /// Wraps a connection whose transmission phase has just begun.
    pub fn after_handshake(
        wire: Wire,
        mode: Mode,
        context: Option<u32>,
        size: u64,
        flags: u16,
    ) -> Session {
        Session { wire, mode, size, flags, context, requests: 0, unfinished: HashMap::new() }
    }

    /// Whether the server has announced this command, by transmission flags or by a context.
    pub fn offers(&self, command: u16) -> bool {
        match command {
            FLUSH => self.flags & SEND_FLUSH != 0,
            TRIM => self.flags & SEND_TRIM != 0,
            CACHE => self.flags & SEND_CACHE != 0,
            WRITE_ZEROES => self.flags & SEND_WRITE_ZEROES != 0,
            BLOCK_STATUS => self.context.is_some(),
            _ => true,
        }
    }

    /// The bytes of a request with its payload, and its cookie. An extended WRITE gets the flag
    /// that announces its payload.
    pub fn encode(&mut self, request: &Request) -> (u64, Vec<u8>) {
        let extended = self.mode == Mode::Extended;
        let announced = if extended && request.command == WRITE { PAYLOAD_LEN } else { 0 };
        let flags = request.flags | announced;
        let (cookie, mut bytes) =
            self.encode_header(request.command, flags, request.offset, request.length);
        bytes.extend(&request.payload);
        (cookie, bytes)
    }

    /// Exactly this header, in the form of the session, and its cookie.
    pub fn encode_header(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u64,
    ) -> (u64, Vec<u8>) {
        self.requests += 1;
        let cookie = self.requests.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let bytes = match self.mode {
            Mode::Extended => encode_extended_request(command, flags, cookie, offset, length),
            _ => encode_request(command, flags, cookie, offset, length.try_into().unwrap()),
        };
        (cookie, bytes)
    }

    /// Sends a request; its cookie.
    #[track_caller]
    pub fn send(&mut self, request: &Request) -> u64 {
        let (cookie, bytes) = self.encode(request);
        self.wire.send(&bytes);
        cookie
    }

    /// Sends one request and receives its whole reply.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Reply {
        let cookie = self.send(&request);
        self.recv_reply(&HashMap::from([(cookie, request)])).1
    }

    /// The same for a request that must succeed.
    #[track_caller]
    pub fn ok(&mut self, request: Request) -> Reply {
        let shown = show(self.mode, &request);
        let answer = self.ask(request);
        assert_eq!(answer.error, 0, "error of {shown}");
        answer
    }

    /// The same for a request that must fail with one of these errors and leave the session usable.
    #[track_caller]
    pub fn refused(&mut self, request: Request, errors: &[u32]) {
        let shown = show(self.mode, &request);
        let answer = self.ask(request);
        assert!(errors.contains(&answer.error), "{shown}: {} is not of {errors:?}", answer.error);
        assert!(!answer.chunks.iter().any(Chunk::is_content), "{shown}: content of a refusal");
        self.assert_in_sync();
    }

    /// Sends all requests before it receives the first reply, then calls `check` with each reply.
    #[track_caller]
    pub fn pipeline(
        &mut self,
        requests: impl IntoIterator<Item = Request>,
        mut check: impl FnMut(&Request, &Reply),
    ) {
        let mut pending = HashMap::new();
        for request in requests {
            let cookie = self.send(&request);
            pending.insert(cookie, request);
        }
        while !pending.is_empty() {
            let (cookie, answer) = self.recv_reply(&pending);
            check(&pending.remove(&cookie).unwrap(), &answer);
        }
    }

    /// The data of a READ that must succeed.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.ok(Request::new(READ, offset, length)).data
    }

    /// Fails unless the server still parses requests correctly: it must answer a READ.
    #[track_caller]
    pub fn assert_in_sync(&mut self) {
        self.read(0, 1);
    }

    /// Receives the next reply that becomes complete, to any of the pending requests.
    #[track_caller]
    pub fn recv_reply(&mut self, pending: &HashMap<u64, Request>) -> (u64, Reply) {
        loop {
            let magic = self.wire.recv_u32();
            let (cookie, answer) = match (self.mode, magic) {
                (Mode::Simple | Mode::Structured, SIMPLE_REPLY) => self.recv_simple(pending),
                (Mode::Structured, STRUCTURED_REPLY) => self.recv_chunk(pending),
                (Mode::Extended, EXTENDED_REPLY) => self.recv_chunk(pending),
                (mode, magic) => panic!("a reply of magic {magic:#x} in a {mode:?} session"),
            };
            if let Some(answer) = answer {
                let known = answer.error == 0 || LISTED_ERRORS.contains(&answer.error);
                assert!(known, "error {} is not for the wire", answer.error);
                return (cookie, answer);
            }
        }
    }

    #[track_caller]
    fn recv_simple(&mut self, pending: &HashMap<u64, Request>) -> (u64, Option<Reply>) {
        let error = self.wire.recv_u32();
        let cookie = self.wire.recv_u64();
        let request = request_of(pending, cookie);
        let mut answer = Reply { error, ..Reply::default() };
        if self.mode != Mode::Simple {
            assert_ne!(request.command, READ, "a READ is always answered with chunks here");
            assert!(request.command != BLOCK_STATUS || error != 0, "no extents came");
        } else if request.command == READ && error == 0 {
            answer.data = self.wire.recv(request.length as usize);
        }
        (cookie, Some(answer))
    }

    #[track_caller]
    fn recv_chunk(&mut self, pending: &HashMap<u64, Request>) -> (u64, Option<Reply>) {
        let flags = self.wire.recv_u16();
        assert_eq!(flags & !CHUNK_DONE, 0, "unknown chunk flags {flags:#x}");
        let kind = self.wire.recv_u16();
        let cookie = self.wire.recv_u64();
        let request = request_of(pending, cookie);
        let length = if self.mode == Mode::Extended {
            assert_eq!(self.wire.recv_u64(), request.offset, "a chunk repeats the offset");
            self.wire.recv_u64()
        } else {
            u64::from(self.wire.recv_u32())
        };
        assert!(length <= 128 << 20, "a chunk of {length} bytes");
        let payload = self.wire.recv(length as usize);
        let done = flags & CHUNK_DONE != 0;
        self.unfinished.entry(cookie).or_default().push(Chunk { done, kind, payload });
        let complete = done.then(|| self.unfinished.remove(&cookie).unwrap());
        (cookie, complete.map(|chunks| assemble(self.mode, self.context, request, chunks)))
    }
}

#[track_caller]
fn request_of(pending: &HashMap<u64, Request>, cookie: u64) -> &Request {
    pending
        .get(&cookie)
        .unwrap_or_else(|| panic!("a reply to {cookie:#x}, which is no pending request"))
}

fn show(mode: Mode, r: &Request) -> String {
    let (command, flags, offset, length) = (r.command, r.flags, r.offset, r.length);
    format!("command {command} flags {flags:#x} offset {offset:#x} length {length:#x} ({mode:?})")
}

/// Checks the chunks of one reply against each other and the request, and joins them.
#[track_caller]
fn assemble(mode: Mode, context: Option<u32>, request: &Request, chunks: Vec<Chunk>) -> Reply {
    let mut answer = Reply::default();
    let mut covered: Vec<Range<u64>> = Vec::new();
    for chunk in &chunks {
        match chunk.kind {
            CHUNK_NONE => {
                assert!(chunk.done && chunk.payload.is_empty(), "NONE is empty and last");
            }
            CHUNK_DATA | CHUNK_HOLE => place(request, chunk, &mut answer.data, &mut covered),
            CHUNK_BLOCK_STATUS | CHUNK_BLOCK_STATUS_EXT => {
                assert!(answer.extents.is_empty(), "one chunk for one context");
                answer.extents = extents(mode, context, request, chunk);
            }
            kind if kind >> 15 == 1 => answer.error = error_of(request, chunk),
            kind => panic!("unknown chunk type {kind:#x}"),
        }
    }
    if answer.error == 0 && request.command == READ {
        let sum: u64 = covered.iter().map(|r| r.end - r.start).sum();
        assert_eq!(sum, request.length, "a READ that succeeds is covered entirely");
    }
    if request.flags & DF != 0 {
        let content = chunks.iter().filter(|c| c.is_content()).count();
        assert!(content <= 1, "{content} content chunks in spite of DF");
    }
    answer.chunks = chunks;
    answer
}

/// Copies a content chunk into the data of the reply.
#[track_caller]
fn place(request: &Request, chunk: &Chunk, data: &mut Vec<u8>, covered: &mut Vec<Range<u64>>) {
    assert_eq!(request.command, READ, "only a READ has content");
    let start = chunk.u64_at(0);
    let length = if chunk.kind == CHUNK_HOLE {
        assert_eq!(chunk.payload.len(), 12, "length of a hole chunk");
        u64::from(chunk.u32_at(8))
    } else {
        chunk.payload.len() as u64 - 8
    };
    let span = start..start.checked_add(length).expect("a chunk's end does not wrap");
    assert!(length > 0, "a content chunk is not empty");
    assert!(
        span.start >= request.offset && span.end <= request.end(),
        "{span:?} is outside of the request"
    );
    let apart = covered.iter().all(|c| c.end <= span.start || span.end <= c.start);
    assert!(apart, "{span:?} overlaps one of {covered:?}");
    covered.push(span);
    data.resize(request.length as usize, 0);
    if chunk.kind == CHUNK_DATA {
        let at = (start - request.offset) as usize;
        data[at..at + length as usize].copy_from_slice(&chunk.payload[8..]);
    }
}

/// The extents of a BLOCK_STATUS chunk, as lengths and flags.
#[track_caller]
fn extents(mode: Mode, context: Option<u32>, request: &Request, chunk: &Chunk) -> Vec<(u64, u64)> {
    assert_eq!(request.command, BLOCK_STATUS, "only BLOCK_STATUS has extents");
    assert_eq!(Some(chunk.u32_at(0)), context, "the context that was granted");
    let (head, width, kind) = match mode {
        Mode::Extended => (8, 16, CHUNK_BLOCK_STATUS_EXT),
        _ => (4, 8, CHUNK_BLOCK_STATUS),
    };
    assert_eq!(chunk.kind, kind, "the form of BLOCK_STATUS that belongs to {mode:?}");
    let count = (chunk.payload.len() - head) / width;
    assert_eq!(chunk.payload.len(), head + count * width, "whole descriptors");
    let all: Vec<(u64, u64)> = (0..count)
        .map(|i| head + i * width)
        .map(|at| match mode {
            Mode::Extended => (chunk.u64_at(at), chunk.u64_at(at + 8)),
            _ => (u64::from(chunk.u32_at(at)), u64::from(chunk.u32_at(at + 4))),
        })
        .collect();
    if mode == Mode::Extended {
        assert_eq!(chunk.u32_at(4) as usize, count, "the count of descriptors");
    }
    check_extents(request, &all);
    all
}

#[track_caller]
fn check_extents(request: &Request, extents: &[(u64, u64)]) {
    let (last, others) = extents.split_last().expect("at least one extent");
    assert!(extents.len() <= 1 << 20, "{} extents", extents.len());
    assert!(extents.iter().all(|(length, _)| *length > 0), "no extent is empty: {extents:?}");
    let before: u64 = others.iter().map(|(length, _)| length).sum();
    assert!(before < request.length, "only the last extent may run past the request");
    if request.flags & REQ_ONE != 0 {
        assert!(others.is_empty(), "REQ_ONE: one extent");
        assert!(last.0 <= request.length, "REQ_ONE: not longer than asked");
    }
}

/// The error of an error chunk.
#[track_caller]
fn error_of(request: &Request, chunk: &Chunk) -> u32 {
    let tail = match chunk.kind {
        CHUNK_ERROR => 0,
        CHUNK_ERROR_OFFSET => 8,
        kind => panic!("unknown error chunk {kind:#x}"),
    };
    let error = chunk.u32_at(0);
    assert_ne!(error, 0, "an error chunk holds an error");
    let message = usize::from(u16::from_be_bytes(chunk.payload[4..6].try_into().unwrap()));
    assert!(message <= STRING_MAX, "an error message of {message} bytes");
    assert_eq!(chunk.payload.len(), 6 + message + tail, "the length of an error chunk");
    assert!(std::str::from_utf8(&chunk.payload[6..6 + message]).is_ok(), "a message is UTF-8");
    if chunk.kind == CHUNK_ERROR_OFFSET {
        let offset = chunk.u64_at(6 + message);
        assert!(request.offset <= offset && offset < request.end(), "an offset that was asked");
    }
    error
}

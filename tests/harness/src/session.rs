//! The client of a transmission phase, with simple replies, structured replies or extended headers.
//! Checks the format of every reply against the specification.
//! Never uses the library under test.

use crate::Endpoint;
use crate::raw::*;
use std::collections::HashMap;
use std::io;
use std::ops::Range;

/// The format of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Simple replies, 32-bit lengths.
    Simple,
    /// Structured replies, 32-bit lengths.
    Structured,
    /// Extended headers: 64-bit lengths in requests and replies.
    Extended,
}

/// All modes.
pub const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// A request, independent of the format of its header.
#[derive(Clone, Debug)]
pub struct Request {
    /// The request type, such as `WRITE`.
    pub command: u16,
    /// Command flags.
    pub flags: u16,
    /// Offset in bytes.
    pub offset: u64,
    /// Length of the range in bytes, independent of that of the payload.
    pub length: u64,
    /// The bytes after the header.
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

    /// Sets the command flags.
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
    /// The bytes after the header.
    pub payload: Vec<u8>,
}

impl Chunk {
    /// Whether it holds or describes content of the disk.
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
    /// The NBD error, zero for success.
    pub error: u32,
    /// The data of a READ, assembled from all chunks.
    pub data: Vec<u8>,
    /// The extents of BLOCK_STATUS: length in bytes and flags.
    pub extents: Vec<(u64, u64)>,
    /// The chunks; none in a simple reply.
    pub chunks: Vec<Chunk>,
}

/// One connection in the transmission phase.
pub struct Session {
    /// The connection, for bytes that [`Request`] cannot express.
    pub wire: Wire,
    /// The negotiated mode.
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
    /// Connects to the default export. `None` if the server does not support the mode.
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
    pub fn open_oldstyle(endpoint: &Endpoint) -> Session {
        let mut wire = Wire::connect(endpoint);
        assert_eq!(wire.recv_u64(), GREETING, "the greeting begins with NBDMAGIC");
        assert_eq!(wire.recv_u64(), OLD_STYLE, "the magic of oldstyle");
        let size = wire.recv_u64();
        let flags = wire.recv_u32();
        assert_eq!(flags >> 16, 0, "oldstyle has no handshake flags");
        assert_eq!(wire.recv(ZEROES), [0; ZEROES], "the reserved bytes are zero");
        Session::after_handshake(wire, Mode::Simple, None, size, flags as u16)
    }

    /// A session on a connection that has completed its handshake.
    pub fn after_handshake(
        wire: Wire,
        mode: Mode,
        context: Option<u32>,
        size: u64,
        flags: u16,
    ) -> Session {
        Session { wire, mode, size, flags, context, requests: 0, unfinished: HashMap::new() }
    }

    /// Whether the server announced this command, by transmission flags or a metadata context.
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

    /// The cookie of a request, and its bytes with payload. Adds the flag PAYLOAD_LEN to an
    /// extended WRITE.
    pub fn encode(&mut self, request: &Request) -> (u64, Vec<u8>) {
        let extended = self.mode == Mode::Extended;
        let announced = if extended && request.command == WRITE { PAYLOAD_LEN } else { 0 };
        let flags = request.flags | announced;
        let (cookie, mut bytes) =
            self.encode_header(request.command, flags, request.offset, request.length);
        bytes.extend(&request.payload);
        (cookie, bytes)
    }

    /// The cookie of a request, and its header in the format of the session. Adds no flags.
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

    /// Sends a request and returns its cookie.
    #[track_caller]
    pub fn send(&mut self, request: &Request) -> u64 {
        let (cookie, bytes) = self.encode(request);
        self.wire.send(&bytes);
        cookie
    }

    /// Sends one request and receives its complete reply.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Reply {
        let cookie = self.send(&request);
        self.recv_reply(&HashMap::from([(cookie, request)])).1
    }

    /// Sends one request, which must succeed.
    #[track_caller]
    pub fn ok(&mut self, request: Request) -> Reply {
        let shown = describe(self.mode, &request);
        let reply = self.ask(request);
        assert_eq!(reply.error, 0, "error of {shown}");
        reply
    }

    /// Sends one request, which must fail with one of these errors and leave the session usable.
    #[track_caller]
    pub fn refused(&mut self, request: Request, errors: &[u32]) {
        let shown = describe(self.mode, &request);
        let reply = self.ask(request);
        assert!(errors.contains(&reply.error), "{shown}: {} is not of {errors:?}", reply.error);
        assert!(!reply.chunks.iter().any(Chunk::is_content), "{shown}: content in an error reply");
        self.assert_in_sync();
    }

    /// Sends all requests, then receives all replies and calls `check` with each.
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
            let (cookie, reply) = self.recv_reply(&pending);
            check(&pending.remove(&cookie).unwrap(), &reply);
        }
    }

    /// Sends a READ, which must succeed, and returns its data.
    #[track_caller]
    pub fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.ok(Request::new(READ, offset, length)).data
    }

    /// Fails unless the server still parses requests correctly: it must reply a READ.
    #[track_caller]
    pub fn assert_in_sync(&mut self) {
        self.read(0, 1);
    }

    /// Receives the next complete reply to one of the pending requests, and returns its cookie.
    #[track_caller]
    pub fn recv_reply(&mut self, pending: &HashMap<u64, Request>) -> (u64, Reply) {
        self.try_recv_reply(pending).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Receives the next complete reply from a server that may close the connection at any byte.
    #[track_caller]
    pub fn try_recv_reply(&mut self, pending: &HashMap<u64, Request>) -> io::Result<(u64, Reply)> {
        loop {
            let magic = u32::from_be_bytes(self.recv_array()?);
            let (cookie, reply) = match (self.mode, magic) {
                (Mode::Simple | Mode::Structured, SIMPLE_REPLY) => self.recv_simple(pending)?,
                (Mode::Structured, STRUCTURED_REPLY) => self.recv_chunk(pending)?,
                (Mode::Extended, EXTENDED_REPLY) => self.recv_chunk(pending)?,
                (mode, magic) => panic!("a reply with magic {magic:#x} in a {mode:?} session"),
            };
            if let Some(reply) = reply {
                let known = reply.error == 0 || LISTED_ERRORS.contains(&reply.error);
                assert!(known, "error {} is not an NBD error", reply.error);
                return Ok((cookie, reply));
            }
        }
    }

    fn recv_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        Ok(self.wire.try_recv_exact(N)?.try_into().unwrap())
    }

    #[track_caller]
    fn recv_simple(&mut self, pending: &HashMap<u64, Request>) -> io::Result<(u64, Option<Reply>)> {
        let error = u32::from_be_bytes(self.recv_array()?);
        let cookie = u64::from_be_bytes(self.recv_array()?);
        let request = request_of(pending, cookie);
        let mut reply = Reply { error, ..Reply::default() };
        if self.mode != Mode::Simple {
            assert_ne!(request.command, READ, "a simple reply to a READ");
            assert!(
                request.command != BLOCK_STATUS || error != 0,
                "a simple reply to BLOCK_STATUS"
            );
        } else if request.command == READ && error == 0 {
            reply.data = self.wire.try_recv_exact(request.length as usize)?;
        }
        Ok((cookie, Some(reply)))
    }

    #[track_caller]
    fn recv_chunk(&mut self, pending: &HashMap<u64, Request>) -> io::Result<(u64, Option<Reply>)> {
        let flags = u16::from_be_bytes(self.recv_array()?);
        assert_eq!(flags & !CHUNK_DONE, 0, "unknown chunk flags {flags:#x}");
        let kind = u16::from_be_bytes(self.recv_array()?);
        let cookie = u64::from_be_bytes(self.recv_array()?);
        let request = request_of(pending, cookie);
        let length = if self.mode == Mode::Extended {
            let offset = u64::from_be_bytes(self.recv_array()?);
            assert_eq!(offset, request.offset, "a chunk repeats the offset");
            u64::from_be_bytes(self.recv_array()?)
        } else {
            u64::from(u32::from_be_bytes(self.recv_array()?))
        };
        assert!(length <= 128 << 20, "a chunk of {length} bytes");
        let payload = self.wire.try_recv_exact(length as usize)?;
        let done = flags & CHUNK_DONE != 0;
        self.unfinished.entry(cookie).or_default().push(Chunk { done, kind, payload });
        let complete = done.then(|| self.unfinished.remove(&cookie).unwrap());
        Ok((cookie, complete.map(|chunks| assemble(self.mode, self.context, request, chunks))))
    }
}

#[track_caller]
fn request_of(pending: &HashMap<u64, Request>, cookie: u64) -> &Request {
    pending
        .get(&cookie)
        .unwrap_or_else(|| panic!("a reply to cookie {cookie:#x}, which is not in flight"))
}

fn describe(mode: Mode, r: &Request) -> String {
    let (command, flags, offset, length) = (r.command, r.flags, r.offset, r.length);
    format!("command {command} flags {flags:#x} offset {offset:#x} length {length:#x} ({mode:?})")
}

/// Assembles a reply from its chunks, and checks them against each other and the request.
#[track_caller]
fn assemble(mode: Mode, context: Option<u32>, request: &Request, chunks: Vec<Chunk>) -> Reply {
    let mut reply = Reply::default();
    let mut covered: Vec<Range<u64>> = Vec::new();
    for chunk in &chunks {
        match chunk.kind {
            CHUNK_NONE => {
                assert!(chunk.done && chunk.payload.is_empty(), "NONE is empty and last");
            }
            CHUNK_DATA | CHUNK_HOLE => copy_content(request, chunk, &mut reply.data, &mut covered),
            CHUNK_BLOCK_STATUS | CHUNK_BLOCK_STATUS_EXT => {
                assert!(reply.extents.is_empty(), "one BLOCK_STATUS chunk for each context");
                reply.extents = extents(mode, context, request, chunk);
            }
            kind if kind >> 15 == 1 => reply.error = error_of(request, chunk),
            kind => panic!("unknown chunk type {kind:#x}"),
        }
    }
    if reply.error == 0 && request.command == READ {
        let sum: u64 = covered.iter().map(|r| r.end - r.start).sum();
        assert_eq!(sum, request.length, "the chunks of a READ cover its range");
    }
    if request.flags & DF != 0 {
        let content = chunks.iter().filter(|c| c.is_content()).count();
        assert!(content <= 1, "{content} content chunks despite DF");
    }
    reply.chunks = chunks;
    reply
}

/// Copies a content chunk into the data of the reply.
#[track_caller]
fn copy_content(
    request: &Request,
    chunk: &Chunk,
    data: &mut Vec<u8>,
    covered: &mut Vec<Range<u64>>,
) {
    assert_eq!(request.command, READ, "content chunks belong to READ");
    let start = chunk.u64_at(0);
    let length = if chunk.kind == CHUNK_HOLE {
        assert_eq!(chunk.payload.len(), 12, "length of a hole chunk");
        u64::from(chunk.u32_at(8))
    } else {
        chunk.payload.len() as u64 - 8
    };
    let range = start..start.checked_add(length).expect("a chunk's end does not overflow");
    assert!(length > 0, "a content chunk is not empty");
    assert!(
        range.start >= request.offset && range.end <= request.end(),
        "{range:?} is outside the request"
    );
    let disjoint = covered.iter().all(|c| c.end <= range.start || range.end <= c.start);
    assert!(disjoint, "{range:?} overlaps one of {covered:?}");
    covered.push(range);
    data.resize(request.length as usize, 0);
    if chunk.kind == CHUNK_DATA {
        let at = (start - request.offset) as usize;
        data[at..at + length as usize].copy_from_slice(&chunk.payload[8..]);
    }
}

/// The extents of a BLOCK_STATUS chunk, as lengths and flags.
#[track_caller]
fn extents(mode: Mode, context: Option<u32>, request: &Request, chunk: &Chunk) -> Vec<(u64, u64)> {
    assert_eq!(request.command, BLOCK_STATUS, "extents belong to BLOCK_STATUS");
    assert_eq!(Some(chunk.u32_at(0)), context, "the id of the negotiated context");
    let (head, width, kind) = match mode {
        Mode::Extended => (8, 16, CHUNK_BLOCK_STATUS_EXT),
        _ => (4, 8, CHUNK_BLOCK_STATUS),
    };
    assert_eq!(chunk.kind, kind, "the type of a BLOCK_STATUS chunk in a {mode:?} session");
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
    assert!(before < request.length, "only the last extent may exceed the request");
    if request.flags & REQ_ONE != 0 {
        assert!(others.is_empty(), "REQ_ONE: one extent");
        assert!(last.0 <= request.length, "REQ_ONE: not longer than the request");
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
    assert_ne!(error, 0, "the error of an error chunk is not zero");
    let message = usize::from(u16::from_be_bytes(chunk.payload[4..6].try_into().unwrap()));
    assert!(message <= STRING_MAX, "an error message of {message} bytes");
    assert_eq!(chunk.payload.len(), 6 + message + tail, "the length of an error chunk");
    assert!(std::str::from_utf8(&chunk.payload[6..6 + message]).is_ok(), "a message is UTF-8");
    if chunk.kind == CHUNK_ERROR_OFFSET {
        let offset = chunk.u64_at(6 + message);
        assert!(
            request.offset <= offset && offset < request.end(),
            "the offset of an error lies in the request"
        );
    }
    error
}

//! Minimal NBD servers, which the benchmark runs by executing itself: what remains of a server when
//! nothing but the protocol and the sending of data is left. They answer every read and write with
//! success, discard the data of writes, and check nothing.
//!
//! `null` touches no disk: it is the limit that others are compared with. The rest send the image,
//! each by another method ([`Method`]); the benchmark `sending` compares these.

mod method;

use crate::report::Error;
use clap::Parser;
use flexnbd::nbd::handshake::server::{Export, ServerHandshake, ServerStep};
use flexnbd::nbd::handshake::{Agreement, BlockSizes};
use flexnbd::nbd::reply::{Dialect, ReplyTo};
use flexnbd::nbd::request::RequestHeader;
use flexnbd::nbd::wire::{CommandKind, ErrorCode, TransmissionFlags};
use flexnbd::net::Stream;
pub(crate) use method::Method;
use method::{Sender, Socket};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;

/// The first argument of the benchmark when it executes itself as such a server.
pub(crate) const WORD: &str = "minimal-server";
/// The program to execute: the one that runs. It has no installed path of its own.
pub(crate) const PROGRAM: &str = "/proc/self/exe";

/// Replies are sent when so many bytes have accumulated, or no request is left.
const BATCH: usize = 32 << 10;
/// The most that one call receives, in bytes.
const RECEIVE_MAX: usize = 256 << 10;

/// An NBD server without a disk
#[derive(Debug, Parser)]
pub(crate) struct Options {
    #[arg(long)]
    addr: Option<IpAddr>,
    #[arg(long)]
    port: Option<u16>,
    #[arg(long)]
    socket: Option<PathBuf>,
    #[arg(long)]
    method: Method,
    #[arg(long)]
    file: PathBuf,
}

/// Serves until the process is killed.
pub(crate) fn run(options: &Options) -> Result<(), Error> {
    if let Some(path) = &options.socket {
        accept(UnixListener::bind(path)?.incoming(), options)
    } else if let (Some(host), Some(port)) = (options.addr, options.port) {
        let listener = TcpListener::bind((host, port))?;
        accept(listener.incoming().map(|stream| stream.and_then(tuned)), options)
    } else {
        Err("no address to listen on".into())
    }
}

/// With the options that flexnbd sets.
fn tuned(stream: TcpStream) -> io::Result<TcpStream> {
    let tuned = Stream::Tcp(stream.try_clone()?);
    tuned.tune()?;
    tuned.limit_unsent()?;
    Ok(stream)
}

/// Serves each connection in a thread of its own.
fn accept<S: Socket>(
    connections: impl Iterator<Item = io::Result<S>>,
    options: &Options,
) -> Result<(), Error> {
    let size = options.file.metadata()?.len();
    for stream in connections {
        let (stream, sender) = (stream?, Sender::open(options.method, &options.file)?);
        thread::spawn(move || {
            if let Err(error) = serve(stream, sender, size) {
                eprintln!("{WORD}: a session ended: {error}");
            }
        });
    }
    Ok(())
}

/// One session, in blocking calls.
#[derive(Debug)]
struct Session<S> {
    stream: S,
    sender: Sender,
    /// Received bytes that are not processed: `input[start..end]`.
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Replies that are not sent.
    output: Vec<u8>,
}

/// Serves one connection until the client disconnects.
fn serve<S: Socket>(stream: S, sender: Sender, size: u64) -> Result<(), Error> {
    let input = vec![0; RECEIVE_MAX];
    let mut session = Session { stream, sender, input, start: 0, end: 0, output: Vec::new() };
    let Some(agreement) = session.shake_hands(size)? else { return Ok(()) };
    while session.answer(agreement.dialect)? {
        session.send()?;
        if !session.receive()? {
            break;
        }
    }
    Ok(())
}

impl<S: Socket> Session<S> {
    /// The terms; `None` if the client leaves.
    fn shake_hands(&mut self, size: u64) -> Result<Option<Agreement>, Error> {
        let flags = TransmissionFlags::HAS_FLAGS
            | TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::CAN_MULTI_CONN;
        let mut handshake = ServerHandshake::new(Export {
            name: String::new(),
            description: String::new(),
            size,
            flags,
            block_sizes: BlockSizes { minimum: 1, preferred: 4096, maximum: 32 << 20 },
        });
        handshake.greet(&mut self.output);
        loop {
            let received = &self.input[self.start..self.end];
            let (used, step) = handshake.advance(received, &mut self.output)?;
            self.start += used;
            self.send()?;
            match step {
                ServerStep::Transmission(agreement) => return Ok(Some(agreement)),
                ServerStep::NeedInput if self.receive()? => {}
                _ => return Ok(None),
            }
        }
    }

    /// Receives the bytes that have arrived, or waits for some; false at the end of the stream.
    fn receive(&mut self) -> io::Result<bool> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let count = self.stream.read(&mut self.input[self.end..])?;
        self.end += count;
        Ok(count > 0)
    }

    fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.output)?;
        self.output.clear();
        Ok(())
    }

    /// Answers all requests that have arrived; false if the client disconnects.
    fn answer(&mut self, dialect: Dialect) -> Result<bool, Error> {
        let received = |session: &Self| {
            RequestHeader::decode(dialect, &session.input[session.start..session.end])
        };
        while let Some((header, used)) = received(self)? {
            self.start += used;
            let RequestHeader { kind, cookie, offset, length, .. } = header;
            let kind = CommandKind::try_from(kind).ok();
            let chunked = kind == Some(CommandKind::Read);
            let to = ReplyTo { cookie, offset, chunked };
            match kind {
                Some(CommandKind::Disconnect) => return Ok(false),
                Some(CommandKind::Read) => {
                    // It fits: without extended headers the length has 32 bits; this server is asked
                    // for no longer read with them.
                    let length = u32::try_from(length)?;
                    dialect.data_header(to, offset, length, true, &mut self.output);
                    self.sender.reply(&mut self.stream, &mut self.output, offset, length)?;
                }
                Some(CommandKind::Write) => {
                    self.discard(length)?;
                    dialect.success(to, &mut self.output);
                }
                Some(CommandKind::Flush) => dialect.success(to, &mut self.output),
                _ => dialect.failure(to, ErrorCode::Invalid, None, "", &mut self.output),
            }
            if self.output.len() >= BATCH {
                self.send()?;
            }
        }
        Ok(true)
    }

    /// Receives so many bytes and drops them.
    fn discard(&mut self, mut length: u64) -> io::Result<()> {
        loop {
            let here = length.min((self.end - self.start) as u64);
            // It fits: at most the length of the buffer.
            self.start += here as usize;
            length -= here;
            if length == 0 {
                return Ok(());
            }
            if !self.receive()? {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

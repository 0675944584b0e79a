//! The ways to send a part of the image, to compare how much each costs.

use clap::ValueEnum;
use memmap2::{Mmap, MmapOptions};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::libc;
use nix::sys::sendfile::sendfile;
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::pipe2;
use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A connection in blocking calls.
pub(crate) trait Socket: Read + Write + AsFd + Send + 'static {}
impl<S: Read + Write + AsFd + Send + 'static> Socket for S {}

/// Data of at most this length is copied behind the reply's header, in bytes; only `null` has data at
/// hand, so that only it does so.
const COPIED_MAX: u32 = 64 << 10;
/// Size of the pipe in bytes: what an unprivileged process may set.
const PIPE_SIZE: usize = 1 << 20;
/// Length of the data of `null`, in bytes; longer reads repeat it.
const DATA_LENGTH: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Method {
    /// No disk: the same bytes again and again.
    Null,
    /// `pread(2)` into a buffer of this size, and `send(2)`.
    #[value(name = "copy-64k")]
    Copy64k,
    #[value(name = "copy-256k")]
    Copy256k,
    #[value(name = "copy-1m")]
    Copy1m,
    /// `splice(2)` into a pipe and from there to the socket, in pieces of this length.
    #[value(name = "splice-256k")]
    Splice256k,
    #[value(name = "splice-1m")]
    Splice1m,
    /// `sendfile(2)`.
    Sendfile,
    /// `send(2)` from a mapping of the image, which only the kernel touches.
    Mapping,
}

/// What a method needs.
#[derive(Debug)]
pub(crate) enum Sender {
    Null(Vec<u8>),
    Copy(File, Vec<u8>),
    Splice { file: File, pipe: (OwnedFd, OwnedFd), piece: usize },
    Sendfile(File),
    Mapping(Mmap),
}

impl Sender {
    pub(crate) fn open(method: Method, image: &Path) -> io::Result<Self> {
        let file = File::open(image)?;
        Ok(match method {
            Method::Null => Self::null(),
            Method::Copy64k => Self::Copy(file, vec![0; 64 << 10]),
            Method::Copy256k => Self::Copy(file, vec![0; 256 << 10]),
            Method::Copy1m => Self::Copy(file, vec![0; 1 << 20]),
            Method::Splice256k => Self::splice(file, 256 << 10)?,
            Method::Splice1m => Self::splice(file, PIPE_SIZE)?,
            Method::Sendfile => Self::Sendfile(file),
            // SAFETY: only the kernel reads the mapped bytes, so other processes may change them.
            Method::Mapping => Self::Mapping(unsafe { MmapOptions::new().map(&file)? }),
        })
    }

    pub(crate) fn null() -> Self {
        // No zeros, which a client might treat in another way.
        Self::Null(vec![7; DATA_LENGTH])
    }

    fn splice(file: File, piece: usize) -> io::Result<Self> {
        let pipe = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE as i32))?;
        Ok(Self::Splice { file, pipe, piece })
    }

    /// Replies to a read whose header ends `output`. Short data of `null` is appended; otherwise
    /// sends `output` and the data.
    pub(crate) fn reply(
        &mut self,
        stream: &mut impl Socket,
        output: &mut Vec<u8>,
        offset: u64,
        length: u32,
    ) -> io::Result<()> {
        match self {
            Self::Null(data) if length <= COPIED_MAX => {
                output.extend_from_slice(&data[..length as usize]);
                return Ok(());
            }
            Self::Null(data) => return send_repeated(stream, output, data, length as usize),
            _ => send_header(stream, output)?,
        }
        output.clear();
        self.send(stream, offset, length as usize)
    }

    fn send(&mut self, stream: &mut impl Socket, mut offset: u64, length: usize) -> io::Result<()> {
        let mut left = length;
        while left > 0 {
            let count = match self {
                Self::Null(data) => stream.write(&data[..left.min(data.len())])?,
                Self::Copy(file, buffer) => {
                    let piece = left.min(buffer.len());
                    file.read_exact_at(&mut buffer[..piece], offset)?;
                    stream.write_all(&buffer[..piece])?;
                    piece
                }
                Self::Splice { file, pipe, piece } => {
                    let piece = left.min(*piece);
                    let mut from = to_off_t(offset)?;
                    splice_all(file.as_fd(), Some(&mut from), pipe.1.as_fd(), piece)?;
                    splice_all(pipe.0.as_fd(), None, stream.as_fd(), piece)?;
                    piece
                }
                Self::Sendfile(file) => {
                    let mut from = to_off_t(offset)?;
                    sendfile(stream.as_fd(), file.as_fd(), Some(&mut from), left)?
                }
                Self::Mapping(map) => {
                    let start = usize::try_from(offset).map_err(io::Error::other)?;
                    let part = map.get(start..start + left).ok_or(ErrorKind::UnexpectedEof)?;
                    stream.write(part)?
                }
            };
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            left -= count;
            offset += count as u64;
        }
        Ok(())
    }
}

/// Sends a header whose data follows at once.
fn send_header(stream: &impl Socket, mut header: &[u8]) -> io::Result<()> {
    while !header.is_empty() {
        let flags = MsgFlags::from_bits_retain(libc::MSG_MORE) | MsgFlags::MSG_NOSIGNAL;
        let count = send(stream.as_fd().as_raw_fd(), header, flags)?;
        header = &header[count..];
    }
    Ok(())
}

/// Sends `output` and behind it `length` bytes of `data`, which repeats.
fn send_repeated(
    stream: &mut impl Socket,
    output: &mut Vec<u8>,
    data: &[u8],
    length: usize,
) -> io::Result<()> {
    let (mut sent, all) = (0, output.len() + length);
    while sent < all {
        let header = &output[sent.min(output.len())..];
        let piece = &data[..(all - sent - header.len()).min(data.len())];
        match stream.write_vectored(&[IoSlice::new(header), IoSlice::new(piece)])? {
            0 => return Err(ErrorKind::WriteZero.into()),
            count => sent += count,
        }
    }
    output.clear();
    Ok(())
}

fn splice_all(
    from: impl AsFd,
    mut offset: Option<&mut i64>,
    to: impl AsFd,
    length: usize,
) -> io::Result<()> {
    let mut left = length;
    while left > 0 {
        let flags = SpliceFFlags::empty();
        match splice(&from, offset.as_deref_mut(), &to, None, left, flags) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => left -= count,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn to_off_t(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(io::Error::other)
}

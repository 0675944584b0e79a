//! TLS records by the kernel (Documentation/networking/tls.rst of Linux): after the handshake the socket encrypts
//! and decrypts by itself. Its keys live in the socket, so that a session survives a restart of the server,
//! and pages of the image can be sent by reference.
//!
//! Records that are not data arrive as errors of a plain `recv(2)`; `receive_now` interprets them. A peer that
//! changes its keys (`KeyUpdate`, RFC 8446 section 4.6.3) is refused: Linux can follow only since 6.14, and the
//! process after a restart does not know the secrets to derive the next keys from. Peers that limit the use of
//! a key of AES-GCM do so after some 2^24 records, which are 256 GiB of full ones, in one session.

use super::super::transfer;
use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::sockopt::{TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, TlsGetRecordType, recvmsg, setsockopt};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};
use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;

/// Name of the protocol layer.
const LAYER: &str = "tls";
/// Type of the message `KeyUpdate`.
const KEY_UPDATE: u8 = 24;
/// A warning that ends the stream (`close_notify`): level and description.
const CLOSE_NOTIFY: [u8; 2] = [1, 0];
/// Type of a record that has an alert.
const ALERT: u8 = 21;

/// Whether the kernel already does TLS on this socket, such as on one from the previous process.
pub(in crate::net) fn is_enabled(socket: BorrowedFd<'_>) -> bool {
    let mut name = [0_u8; 16];
    let mut length = name.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes into `name`, which outlives the call.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_ULP,
            name.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    result == 0 && name.starts_with(LAYER.as_bytes())
}

/// Whether the kernel can do TLS with AES-GCM. Tried once, on a connection of its own: a session that has given
/// its keys away cannot go on without the kernel. A process that restricts itself calls it before.
pub fn is_usable() -> bool {
    static USABLE: OnceLock<bool> = OnceLock::new();
    *USABLE.get_or_init(|| try_keys().is_ok())
}

fn try_keys() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    for key in [&[0; 16][..], &[0; 32]] {
        let stream = TcpStream::connect(listener.local_addr()?)?;
        attach(stream.as_fd())?;
        let keys = aes_gcm(ProtocolVersion::TLSv1_3, 0, key, &[0; 12])?;
        setsockopt(&stream, TcpTlsTx, &keys)?;
        setsockopt(&stream, TcpTlsRx, &keys)?;
    }
    Ok(())
}

/// Adds the layer to a TCP socket. Without keys it changes nothing yet.
///
/// # Errors
/// `NotFound` where the kernel has no TLS, or its module is not loaded.
pub(in crate::net) fn attach(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, TcpUlp::default(), &LAYER.as_bytes())?)
}

/// Gives the kernel the keys. After an error the connection cannot be used.
///
/// # Errors
/// The kernel does not support the version or the cipher.
pub(in crate::net) fn set_keys(
    socket: BorrowedFd<'_>,
    version: ProtocolVersion,
    secrets: &ExtractedSecrets,
) -> io::Result<()> {
    let keys = |(sequence, secrets): &(u64, ConnectionTrafficSecrets)| match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv } => {
            aes_gcm(version, *sequence, key.as_ref(), iv.as_ref())
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    };
    setsockopt(&socket, TcpTlsTx, &keys(&secrets.tx)?)?;
    setsockopt(&socket, TcpTlsRx, &keys(&secrets.rx)?)?;
    Ok(())
}

/// Keys of AES-GCM as the kernel takes them (`linux/tls.h`), of 16 or 32 bytes. The initialization vector of 12
/// bytes is split: the first 4 are the salt.
fn aes_gcm(
    version: ProtocolVersion,
    sequence: u64,
    key: &[u8],
    iv: &[u8],
) -> io::Result<TlsCryptoInfo> {
    let unsupported = || io::Error::from(io::ErrorKind::Unsupported);
    let (salt, iv) = iv.split_first_chunk().ok_or_else(unsupported)?;
    let (salt, iv) = (*salt, iv.try_into().map_err(|_| unsupported())?);
    let (version, rec_seq) = (version.into(), sequence.to_be_bytes());
    Ok(if let Ok(key) = key.try_into() {
        let cipher_type = libc::TLS_CIPHER_AES_GCM_128;
        let info = libc::tls_crypto_info { version, cipher_type };
        let keys = libc::tls12_crypto_info_aes_gcm_128 { info, iv, key, salt, rec_seq };
        TlsCryptoInfo::Aes128Gcm(keys)
    } else {
        let key = key.try_into().map_err(|_| unsupported())?;
        let cipher_type = libc::TLS_CIPHER_AES_GCM_256;
        let info = libc::tls_crypto_info { version, cipher_type };
        let keys = libc::tls12_crypto_info_aes_gcm_256 { info, iv, key, salt, rec_seq };
        TlsCryptoInfo::Aes256Gcm(keys)
    })
}

/// Receives data that has arrived; 0 at the end of the stream.
///
/// # Errors
/// `WouldBlock` when nothing has arrived; otherwise the connection is broken, or the peer reports an error or
/// wants to change its keys.
pub(in crate::net) fn receive_now(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match transfer::receive_now(socket, into) {
            // The kernel has no place to say that the next record is not data.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                if let Some(count) = receive_other(socket, into)? {
                    return Ok(count);
                }
            }
            Err(error) => return Err(describe(error)),
            outcome => return outcome,
        }
    }
}

/// Receives a record that is not data. `None` if it has no meaning; 0 if it ends the stream.
fn receive_other(socket: BorrowedFd<'_>, into: &mut [u8]) -> io::Result<Option<usize>> {
    let mut control = cmsg_space!(u8);
    let (count, kind) = {
        let mut pieces = [IoSliceMut::new(into)];
        let flags = MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags)
            .map_err(|error| describe(error.into()))?;
        let kind = message.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::TlsGetRecordType(kind) => Some(kind),
            _ => None,
        });
        (message.bytes, kind)
    };
    match interpret(kind, &into[..count]) {
        Other::Data => Ok(Some(count)),
        Other::Nothing => Ok(None),
        Other::End => Ok(Some(0)),
        Other::Error(text) => Err(io::Error::other(text)),
    }
}

/// The meaning of a record.
#[derive(Debug, PartialEq, Eq)]
enum Other {
    Data,
    Nothing,
    End,
    Error(String),
}

fn interpret(kind: Option<TlsGetRecordType>, record: &[u8]) -> Other {
    match (kind, record) {
        (None | Some(TlsGetRecordType::ApplicationData), _) => Other::Data,
        (Some(TlsGetRecordType::Alert), &[_, 0]) => Other::End,
        (Some(TlsGetRecordType::Alert), &[_, description]) => {
            Other::Error(format!("the peer sent TLS alert {description}"))
        }
        (Some(TlsGetRecordType::Handshake), [KEY_UPDATE, ..]) => {
            Other::Error("the peer changes its TLS keys, which the kernel cannot follow".to_owned())
        }
        // As in TLS 1.3 for compatibility (RFC 8446, appendix D.4).
        (Some(TlsGetRecordType::ChangeCipherSpec), _) => Other::Nothing,
        _ => Other::Error("the peer sent a TLS record that is not permitted here".to_owned()),
    }
}

/// Sends the message by which TLS ends a stream, if the socket takes it.
pub(in crate::net) fn close(socket: BorrowedFd<'_>) {
    let _ = send_record(socket, ALERT, &CLOSE_NOTIFY);
}

/// Sends a record of another type than data.
fn send_record(socket: BorrowedFd<'_>, kind: u8, record: &[u8]) -> io::Result<()> {
    let mut control = [0_u64; 4];
    let mut piece =
        libc::iovec { iov_base: record.as_ptr().cast_mut().cast(), iov_len: record.len() };
    // SAFETY: `msghdr` is a structure of integers and pointers, which may all be zero.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (&raw mut piece, 1);
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a number.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(1) } as usize;
    debug_assert!(message.msg_controllen <= size_of_val(&control));
    // SAFETY: the control buffer is aligned and has space for one header with one byte of data, which are
    // written within it; `sendmsg` reads the structures and the record, which outlive the call.
    let result = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_TLS;
        (*header).cmsg_type = libc::TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as usize;
        *libc::CMSG_DATA(header) = kind;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        libc::sendmsg(socket.as_raw_fd(), &raw const message, flags)
    };
    if result >= 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Explains the errors of the kernel's records.
fn describe(error: io::Error) -> io::Error {
    let text = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBADMSG) => "a TLS record is not genuine",
        Some(Errno::EMSGSIZE) => "a TLS record is too long",
        Some(Errno::EKEYEXPIRED) => "the peer changes its TLS keys, which the kernel cannot follow",
        _ => return error,
    };
    io::Error::new(error.kind(), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_type_of_record_has_its_meaning() {
        let meaning = |kind, record: &[u8]| interpret(Some(kind), record);
        assert_eq!(meaning(TlsGetRecordType::ApplicationData, b"x"), Other::Data);
        assert_eq!(meaning(TlsGetRecordType::Alert, &CLOSE_NOTIFY), Other::End);
        assert_eq!(meaning(TlsGetRecordType::ChangeCipherSpec, &[1]), Other::Nothing);
        for (kind, record, text) in [
            (TlsGetRecordType::Alert, &[2, 42][..], "alert 42"),
            (TlsGetRecordType::Handshake, &[KEY_UPDATE, 0, 0, 1, 0][..], "changes its TLS keys"),
            (TlsGetRecordType::Handshake, &[4, 0][..], "not permitted"),
            (TlsGetRecordType::Alert, &[][..], "not permitted"),
            (TlsGetRecordType::Unknown(99), &[1][..], "not permitted"),
        ] {
            let Other::Error(why) = meaning(kind, record) else { panic!("{record:?} is accepted") };
            assert!(why.contains(text), "{why}");
        }
    }

    #[test]
    fn a_plain_socket_has_no_kernel_tls() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!is_enabled(stream.as_fd()));
    }
}

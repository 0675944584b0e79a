//! Fuzz target of a connection (`tests/fuzz`): arbitrary bytes from the server, over a socket.
//! A read passes on exactly the requested bytes or fails, and nothing waits after the end of the stream.

use super::Connection;
use crate::nbd::wire::PAYLOAD_LENGTH_DEFAULT;
use crate::net::Stream;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Time limit for each message. No step waits: all bytes and the end of the stream have arrived.
const TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a server; they fit into the buffer of a socket.
const BYTES_MAX: usize = 16 << 10;

/// A handshake, a read, a write and a flush. The first byte is the length of the read and the name of the
/// export; the others are the server's.
pub(crate) fn connection(bytes: &[u8]) {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let Ok((mut server, client)) = UnixStream::pair() else { return };
    let sent = server.write_all(&bytes[..bytes.len().min(BYTES_MAX)]);
    if sent.and_then(|()| server.shutdown(Shutdown::Write)).is_err() {
        return;
    }
    let export = if first & 1 == 0 { "disk" } else { "" };
    let Ok(mut connection) = Connection::open(Stream::Unix(client), export, None, TIMEOUT) else {
        return;
    };
    assert!((1..=PAYLOAD_LENGTH_DEFAULT).contains(&connection.payload_length_max()));
    let length = u32::from(*first) * 17;
    let mut received = 0;
    let read = connection.read(0, length, &mut |bytes| {
        received += bytes.len();
        Ok(())
    });
    assert!(received <= length as usize, "{received} bytes");
    assert!(read.is_err() || received == length as usize, "{received} of {length} bytes");
    let changed = connection.write(0, &[1; 9]).and_then(|()| connection.flush());
    if changed.is_ok() {
        let _ = connection.check_alignment(u64::from(length), 1);
    }
    connection.close();
}

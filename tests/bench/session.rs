//! One connection of the generator: the handshake, then as many requests under way as it may have.
//! Never waits in transmission; the generator waits for all its sessions at once.

use super::Trouble;
use super::grid::{Cell, Work};
use super::replies::Replies;
use flexnbd::nbd::wire::{
    ClientFlags, CommandKind, GREETING_MAGIC, HandshakeFlags, OPTION_MAGIC, OptionKind,
    REQUEST_MAGIC, RESERVED_ZEROES,
};
use flexnbd::net::Stream;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// How long a server may take for one step before it counts as dead.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
/// Length of a compact request without data, in bytes.
const REQUEST_LENGTH: usize = 28;

/// Where an export is to be found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) address: Address,
    pub(super) export: &'static str,
}

/// What to connect to.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Address {
    /// Connects.
    ///
    /// # Errors
    /// As `connect(2)`; refused as long as the server does not listen.
    pub(super) fn connect(&self) -> io::Result<Stream> {
        let stream = match self {
            Self::Tcp(address) => Stream::Tcp(TcpStream::connect(address)?),
            Self::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        stream.tune()?;
        Ok(stream)
    }
}

/// Connects and does the newstyle handshake in its shortest form, `NBD_OPT_EXPORT_NAME`, which
/// every server knows. Returns the size of the export in bytes, too.
///
/// # Errors
/// When the connection breaks or the server speaks something else.
pub(super) fn open(place: &Place) -> Result<(Stream, u64), Trouble> {
    let stream = place.address.connect()?;
    let mut greeting = [0; 18];
    stream.recv_exact(&mut greeting, PATIENCE)?;
    let [magic @ .., flags_high, flags_low] = greeting;
    let expected = [GREETING_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
    if magic[..] != expected {
        return Err("the server does not speak newstyle".into());
    }
    let offered = HandshakeFlags::from_bits_truncate(u16::from_be_bytes([flags_high, flags_low]));
    let mut chosen = ClientFlags::FIXED_NEWSTYLE;
    chosen.set(ClientFlags::NO_ZEROES, offered.contains(HandshakeFlags::NO_ZEROES));
    let mut choice = chosen.bits().to_be_bytes().to_vec();
    choice.extend(OPTION_MAGIC.to_be_bytes());
    choice.extend(OptionKind::ExportName.number().to_be_bytes());
    choice.extend((place.export.len() as u32).to_be_bytes());
    choice.extend(place.export.as_bytes());
    stream.send_all(&choice, PATIENCE)?;
    let mut about = [0; 10];
    stream.recv_exact(&mut about, PATIENCE)?;
    if !chosen.contains(ClientFlags::NO_ZEROES) {
        stream.recv_exact(&mut [0; RESERVED_ZEROES], PATIENCE)?;
    }
    let [size @ .., _, _] = about;
    Ok((stream, u64::from_be_bytes(size)))
}

/// What a request in a slot is; the slot's number is its cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Read,
    Write,
}

/// A session and its requests.
#[derive(Debug)]
pub(super) struct Session {
    stream: Stream,
    block: usize,
    picker: Picker,
    slots: Vec<Slot>,
    heads: Vec<[u8; REQUEST_LENGTH]>,
    free: Vec<usize>,
    /// Made but not, or not completely, sent.
    unsent: VecDeque<usize>,
    sent_of_first: usize,
    replies: Replies,
    answered: Vec<usize>,
}

impl Session {
    /// Connects the session with this number under the load of `cell`.
    ///
    /// # Errors
    /// As [`open`]; an export smaller than one request.
    pub(super) fn connect(place: &Place, cell: &Cell, number: usize) -> Result<Self, Trouble> {
        let (stream, size) = open(place)?;
        let blocks = size / u64::from(cell.block);
        if blocks == 0 {
            return Err(format!("the export has only {size} bytes").into());
        }
        Ok(Self {
            stream,
            block: cell.block as usize,
            picker: Picker::new(cell, blocks, number),
            slots: vec![Slot::Free; cell.depth],
            heads: vec![[0; REQUEST_LENGTH]; cell.depth],
            free: (0..cell.depth).collect(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            replies: Replies::default(),
            answered: Vec::new(),
        })
    }

    /// The connection, to wait for.
    pub(super) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Whether there is something to send when the server takes it.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Whether every request has been answered.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Makes as many requests as may be under way, and sends what the server takes now. `payload`
    /// is what writes write: at least one block.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn ask(&mut self, payload: &[u8]) -> io::Result<()> {
        while let Some(slot) = self.free.pop() {
            let (block, writes) = self.picker.next();
            let kind = if writes { CommandKind::Write } else { CommandKind::Read };
            self.slots[slot] = if writes { Slot::Write } else { Slot::Read };
            self.heads[slot] = encode(kind, slot, block * self.block as u64, self.block);
            self.unsent.push_back(slot);
        }
        self.send(payload)
    }

    /// Sends what the server takes now of the requests that have been made.
    ///
    /// # Errors
    /// When the connection is broken.
    pub(super) fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        while self.has_unsent() {
            match self.stream.try_send_vectored(&self.slices(payload)) {
                Ok(count) => self.sent(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes what has arrived, by way of `buffer`, and returns how many requests it answered.
    ///
    /// # Errors
    /// When the connection is broken, or a request failed.
    pub(super) fn listen(&mut self, buffer: &mut [u8]) -> Result<usize, Trouble> {
        let count = match self.stream.try_recv(buffer) {
            Ok(0) => return Err("the server closed the connection".into()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let (slots, block, answered) = (&self.slots, self.block, &mut self.answered);
        let data_length = |cookie: usize| match slots.get(cookie)? {
            Slot::Free => None,
            Slot::Read => Some(block),
            Slot::Write => Some(0),
        };
        self.replies.feed(&buffer[..count], data_length, |cookie| answered.push(cookie))?;
        for slot in &self.answered {
            self.slots[*slot] = Slot::Free;
        }
        let answered = self.answered.len();
        self.free.append(&mut self.answered);
        Ok(answered)
    }

    /// What is to be sent, without a copy.
    fn slices<'a>(&'a self, payload: &'a [u8]) -> Vec<IoSlice<'a>> {
        let mut skip = self.sent_of_first;
        let mut slices = Vec::with_capacity(2 * self.unsent.len());
        for slot in &self.unsent {
            let head = &self.heads[*slot][skip.min(REQUEST_LENGTH)..];
            let data = &payload[..self.data_length(*slot)][skip.saturating_sub(REQUEST_LENGTH)..];
            slices.extend([head, data].into_iter().filter(|s| !s.is_empty()).map(IoSlice::new));
            skip = 0;
        }
        slices
    }

    fn sent(&mut self, count: usize) {
        self.sent_of_first += count;
        while let Some(slot) = self.unsent.front() {
            let length = REQUEST_LENGTH + self.data_length(*slot);
            if self.sent_of_first < length {
                return;
            }
            self.sent_of_first -= length;
            self.unsent.pop_front();
        }
    }

    /// How many bytes follow the head of the request in this slot.
    fn data_length(&self, slot: usize) -> usize {
        if self.slots[slot] == Slot::Write { self.block } else { 0 }
    }
}

/// A compact request; the cookie comes back in its reply.
pub(super) fn encode(
    kind: CommandKind,
    cookie: usize,
    offset: u64,
    length: usize,
) -> [u8; REQUEST_LENGTH] {
    let mut head = [0; REQUEST_LENGTH];
    head[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    head[6..8].copy_from_slice(&kind.number().to_be_bytes());
    head[8..16].copy_from_slice(&(cookie as u64).to_be_bytes());
    head[16..24].copy_from_slice(&offset.to_be_bytes());
    head[24..28].copy_from_slice(&(length as u32).to_be_bytes());
    head
}

/// Chooses what to ask next; the same choices for every server.
#[derive(Debug)]
struct Picker {
    random: u64,
    blocks: u64,
    /// The next one, when they are taken in order.
    next: Option<u64>,
    work: Work,
}

impl Picker {
    /// In order, the sessions begin at equal distances.
    fn new(cell: &Cell, blocks: u64, number: usize) -> Self {
        let start = number as u64 * blocks / cell.sessions.max(1) as u64;
        let random = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(number as u64 + 1);
        Self { random, blocks, next: cell.is_sequential().then_some(start), work: cell.work }
    }

    /// The number of a block, and whether to write it.
    fn next(&mut self) -> (u64, bool) {
        let drawn = self.draw();
        let block = match &mut self.next {
            None => drawn % self.blocks,
            Some(next) => {
                let block = *next % self.blocks;
                *next = block + 1;
                block
            }
        };
        let writes = match self.work {
            Work::Read => false,
            Work::Write => true,
            Work::Mixed => drawn >> 63 == 1,
        };
        (block, writes)
    }

    /// The generator called xorshift64*.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

#[cfg(test)]
#[allow(unused)] // See peers.rs.
mod tests {
    use super::super::grid::Set;
    use super::*;
    use std::io::Read;

    fn cell(block: u32, work: Work) -> Cell {
        Cell { block, work, depth: 3, ..Set::Default.cells()[0] }
    }

    fn session(cell: &Cell) -> (Session, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let session = Session {
            stream: Stream::Unix(ours),
            block: cell.block as usize,
            picker: Picker::new(cell, 8, 0),
            slots: vec![Slot::Free; cell.depth],
            heads: vec![[0; REQUEST_LENGTH]; cell.depth],
            free: (0..cell.depth).collect(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            replies: Replies::default(),
            answered: Vec::new(),
        };
        (session, theirs)
    }

    #[test]
    fn writes_arrive_whole_although_the_socket_takes_them_in_parts() {
        let block = 1 << 20;
        let payload: Vec<u8> = (0..block).map(|i: u32| (i % 251) as u8).collect();
        let (mut session, mut server) = session(&cell(block, Work::Write));
        let reader = std::thread::spawn(move || {
            let mut all = vec![0; 3 * (REQUEST_LENGTH + block as usize)];
            server.read_exact(&mut all).unwrap();
            all
        });
        session.ask(&payload).unwrap();
        while session.has_unsent() {
            let interest = flexnbd::net::Interest { readable: false, writable: true };
            session.stream.wait(interest, None, None).unwrap();
            session.ask(&payload).unwrap();
        }
        let all = reader.join().unwrap();
        for (at, request) in all.chunks(REQUEST_LENGTH + block as usize).enumerate() {
            assert_eq!(request[..4], REQUEST_MAGIC.to_be_bytes());
            assert_eq!(request[23], 0);
            assert!(request[REQUEST_LENGTH..] == payload[..], "the data of request {at} differs");
        }
    }

    #[test]
    fn blocks_in_order_start_over_at_the_end() {
        let mut picker = Picker::new(&cell(1 << 20, Work::Read), 3, 0);
        let picked: Vec<(u64, bool)> = (0..4).map(|_| picker.next()).collect();
        assert_eq!(picked, [(0, false), (1, false), (2, false), (0, false)]);
    }

    #[test]
    fn random_blocks_cover_the_disk_and_half_of_mixed_requests_write() {
        let mut picker = Picker::new(&cell(4096, Work::Mixed), 16, 0);
        let (mut seen, mut writes) = ([0; 16], 0);
        for _ in 0..16_000 {
            let (block, write) = picker.next();
            seen[block as usize] += 1;
            writes += usize::from(write);
        }
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
        assert!((7000..9000).contains(&writes), "{writes}");
    }
}

//! Reads beside changes: a byte that nobody changes is read as it is, at every moment.

use crate::common::{Builder, KIB, MIB, noise, raw::*, session::*, temp_dir};
use crate::more::Transport;
use crate::mounted::{KINDS, Kind, Mounted};

const SIZE: u64 = 4 * MIB;

/// Where a change begins, and how long it is: inside a page, in the middle of a large folio, across
/// several of them; a whole number of pages last.
const CHANGES: [(u64, u64); 7] = [
    (5000, 512),
    (8000, 10_000),
    (8192 - 512, 1024),
    (20_480, 30_000),
    (33_000, 100_000),
    (1, 65_535),
    (16_384, 32_768),
];
const COMMANDS: [(u16, u16); 3] = [(TRIM, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, NO_HOLE)];
/// Around the length from which data is sent without a copy, and beyond.
const LENGTHS: [u64; 3] = [64 * KIB, 200 * KIB, MIB];

/// A reply lies in the socket while a neighbour's change is made, and is taken afterwards.
fn unchanged_bytes_are_read_beside_changes(kind: Kind, transport: Transport) {
    let Some(mounted) = Mounted::new(kind) else { return };
    let content = noise(SIZE as usize, 11);
    let image = mounted.path().join("image");
    std::fs::write(&image, &content).unwrap();
    let sockets = temp_dir();
    let mut builder = Builder::serve(&image);
    if transport == Transport::Unix {
        builder = builder.unix(&sockets.path().join("nbd.sock"));
    }
    let server = builder.start();
    let mut changer = Session::open(server.target(), Mode::Simple).unwrap();
    for mode in [Mode::Simple, Mode::Structured] {
        let mut reader = Session::open(server.target(), mode).unwrap();
        let mut commands = COMMANDS.iter().cycle();
        for length in LENGTHS {
            for (offset, changed) in CHANGES {
                let (command, flags) = *commands.next().unwrap();
                let read = Request::new(READ, 0, length);
                let cookie = reader.send(&read);
                // What a unix socket holds at once.
                reader.wire.wait_for_bytes(30_000);
                changer.ok(Request::new(command, offset, changed).flags(flags));
                let asked = [(cookie, read)].into();
                let data = reader.recv_answer(&asked).1.data;
                let what = format!(
                    "{} {transport:?} {mode:?}: {length} bytes, command {command} flags {flags} at \
                     {offset} of {changed}",
                    kind.name
                );
                check(&data, &content, (offset, changed), &what);
                let old = &content[offset as usize..][..changed as usize];
                changer.ok(Request::write(offset, old));
            }
        }
    }
    assert!(changer.read(0, SIZE) == content, "{}: all was written again", kind.name);
}

/// Every byte is the old one, or zero where that was asked for.
#[track_caller]
fn check(found: &[u8], content: &[u8], (offset, length): (u64, u64), what: &str) {
    let changed = offset as usize..(offset + length) as usize;
    let may_be = |at: usize| found[at] == content[at] || (found[at] == 0 && changed.contains(&at));
    let wrong = (0..found.len()).find(|at| !may_be(*at));
    assert_eq!(wrong, None, "the first wrong byte, {what}");
}

#[test]
fn unchanged_bytes_are_read_beside_changes_over_tcp() {
    KINDS.iter().for_each(|kind| unchanged_bytes_are_read_beside_changes(*kind, Transport::Tcp));
}

#[test]
fn unchanged_bytes_are_read_beside_changes_over_unix() {
    KINDS.iter().for_each(|kind| unchanged_bytes_are_read_beside_changes(*kind, Transport::Unix));
}

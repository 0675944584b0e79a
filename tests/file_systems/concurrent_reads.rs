//! Reads concurrent with changes: a byte that no request changes always has its old value.

use crate::mounted::{KINDS, Kind, Mounted};
use harness::host::Host;
use harness::raw::*;
use harness::session::*;
use harness::{Builder, KIB, MIB, Transport, noise, sparse_image, temp_dir};

const SIZE: u64 = 4 * MIB;
/// Size of the disk that is migrated.
const MIGRATED_SIZE: u64 = 16 * MIB;
/// The first rate of the migration, in bytes per second: slow enough to last longer than all changes.
const RATE: u64 = MIB;

/// Offset and length of the changes: inside a page, in the middle of a large folio, across several
/// folios, and last a whole number of pages.
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
/// Lengths of reads: around the threshold for sending with sendfile(2), and above it.
const LENGTHS: [u64; 3] = [64 * KIB, 200 * KIB, MIB];

/// Another client changes a part of the range of a reply that is still in the socket; the reader
/// receives the rest afterwards.
fn reads_return_unchanged_bytes(kind: Kind, transport: Transport) {
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
    let mut changer = Session::open(server.endpoint(), Mode::Simple).unwrap();
    for mode in [Mode::Simple, Mode::Structured] {
        let mut reader = Session::open(server.endpoint(), mode).unwrap();
        let mut commands = COMMANDS.iter().cycle();
        for length in LENGTHS {
            for (offset, changed) in CHANGES {
                let (command, flags) = *commands.next().unwrap();
                let read = Request::new(READ, 0, length);
                let cookie = reader.send(&read);
                // A unix socket buffers this much at once.
                reader.wire.wait_for_bytes(30_000);
                changer.ok(Request::new(command, offset, changed).flags(flags));
                let requests = [(cookie, read)].into();
                let data = reader.recv_reply(&requests).1.data;
                let context = format!(
                    "{} {transport:?} {mode:?}: {length} bytes, command {command} flags {flags} at \
                     {offset} of {changed}",
                    kind.name
                );
                assert_unchanged_outside(&data, &content, (offset, changed), &context);
                let old = &content[offset as usize..][..changed as usize];
                changer.ok(Request::write(offset, old));
            }
        }
    }
    assert!(changer.read(0, SIZE) == content, "{}: the old bytes were written back", kind.name);
}

/// Asserts that every byte has its old value, or is zero within the changed range.
#[track_caller]
fn assert_unchanged_outside(
    data: &[u8],
    content: &[u8],
    (offset, length): (u64, u64),
    context: &str,
) {
    let changed = offset as usize..(offset + length) as usize;
    let may_be = |at: usize| data[at] == content[at] || (data[at] == 0 && changed.contains(&at));
    let wrong = (0..data.len()).find(|at| !may_be(*at));
    assert_eq!(wrong, None, "the first wrong byte, {context}");
}

#[test]
fn concurrent_changes_leave_other_bytes_over_tcp() {
    KINDS.iter().for_each(|kind| reads_return_unchanged_bytes(*kind, Transport::Tcp));
}

#[test]
fn concurrent_changes_leave_other_bytes_over_unix() {
    KINDS.iter().for_each(|kind| reads_return_unchanged_bytes(*kind, Transport::Unix));
}

/// The disk migrates at a low rate while a client changes it, and then without a limit.
fn a_migration_copies_unchanged_bytes(kind: Kind) {
    let Some(mounted) = Mounted::new(kind) else { return };
    let content = noise(MIGRATED_SIZE as usize, 12);
    let source = Host::new(mounted.path(), "source");
    let destination = Host::new(mounted.path(), "destination");
    std::fs::write(&source.image, &content).unwrap();
    sparse_image(mounted.path(), "destination.img", MIGRATED_SIZE);
    let (mut listener, mut server) = (destination.listen(), source.serve());
    let mut changer = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let rate = RATE.to_string();
    let reply =
        source.mirror_to(destination.address, &["exit", &source.address.ip().to_string(), &rate]);
    assert!(reply.starts_with("0:"), "{reply}");
    let mut commands = COMMANDS.iter().cycle();
    for part in 0..MIGRATED_SIZE / MIB {
        for (offset, changed) in CHANGES {
            let (command, flags) = *commands.next().unwrap();
            let offset = part * MIB + offset;
            changer.ok(Request::new(command, offset, changed).flags(flags));
            let old = &content[offset as usize..][..changed as usize];
            changer.ok(Request::write(offset, old));
        }
    }
    drop(changer);
    source.command(&["mirror_max_bps", "0"]);
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    let copy = std::fs::read(&destination.image).unwrap();
    let wrong = (0..copy.len()).find(|at| copy[*at] != content[*at]);
    assert_eq!(
        (copy.len() as u64, wrong),
        (MIGRATED_SIZE, None),
        "the first wrong byte, {}",
        kind.name
    );
}

#[test]
fn a_migration_with_concurrent_changes_copies_other_bytes() {
    KINDS.iter().for_each(|kind| a_migration_copies_unchanged_bytes(*kind));
}

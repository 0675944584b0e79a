//! Direct I/O (`--direct`) on common file systems: every request is exact at every offset, whatever the
//! file system aligns, the page cache stays empty, and a file system without direct I/O is refused.

use crate::mounted::{KINDS, Kind, Mounted, RAMFS, SECTORS_OF_4096};
use harness::host::Host;
use harness::raw::*;
use harness::session::*;
use harness::{
    Builder, Endpoint, KIB, MIB, Program, free_port, noise, read_at, require_tool, sparse_image,
    temp_dir,
};
use std::fs::File;
use std::ops::Range;
use std::path::Path;

/// Neither a multiple of a page nor, with the unserved bytes, of a sector.
const SIZE: u64 = 4 * MIB + 1536;
const UNSERVED: [u8; 100] = [0xEE; 100];
/// Requests in each reply mode.
const STEPS: usize = 60;
/// The file is compared after each of so many requests.
const COMPARED: usize = 5;

fn all_kinds() -> impl Iterator<Item = Kind> {
    KINDS.into_iter().chain(SECTORS_OF_4096)
}

/// A random range, often of whole blocks, and as often at the end of the disk.
fn range(random: &mut fastrand::Rng) -> (u64, u64) {
    let longest = [600, 9000, 300 * KIB, MIB + 40_000][random.usize(..4)];
    let (offset, length) = (random.u64(..SIZE), random.u64(1..=longest));
    let (offset, length) = match random.usize(..4) {
        0 => (offset - offset % 4096, length.next_multiple_of(4096)),
        1 => (offset - offset % 512, length.next_multiple_of(512)),
        2 => (SIZE - length, length),
        _ => (offset, length),
    };
    (offset, length.min(SIZE - offset))
}

/// Executes a random request, and updates the expected content.
fn step(session: &mut Session, random: &mut fastrand::Rng, content: &mut [u8]) {
    let (offset, length) = range(random);
    let place = offset as usize..(offset + length) as usize;
    let flags = [0, FUA][random.usize(..2)];
    match random.usize(..10) {
        0..4 => {
            let mut data = noise(length as usize, random.u64(..));
            if random.bool() {
                data[length as usize / 3..].fill(0);
            }
            session.ok(Request::write(offset, &data).flags(flags));
            content[place].copy_from_slice(&data);
        }
        4..6 => {
            let flags = flags | [0, NO_HOLE][random.usize(..2)];
            session.ok(Request::new(WRITE_ZEROES, offset, length).flags(flags));
            content[place].fill(0);
        }
        6 => {
            session.ok(Request::new(TRIM, offset, length).flags(flags));
            // Trimmed bytes may read as anything, but must not change again.
            content[place].copy_from_slice(&session.read(offset, length));
        }
        7 => drop(session.ok(Request::new([FLUSH, CACHE][random.usize(..2)], 0, 0))),
        _ => assert!(session.read(offset, length) == content[place], "{length} at {offset}"),
    }
}

fn every_request_is_exact(kind: Kind) {
    let Some(mounted) = Mounted::new(kind) else { return };
    let image = mounted.path().join("image");
    let mut content = noise(SIZE as usize, 21);
    std::fs::write(&image, [&content[..], &UNSERVED].concat()).unwrap();
    let mut server = Builder::serve(&image).args(["--direct"]).start();
    let mut random = fastrand::Rng::with_seed(7);
    for mode in MODES {
        let mut session = Session::open(server.endpoint(), mode).unwrap();
        for at in 0..STEPS {
            step(&mut session, &mut random, &mut content);
            if at % COMPARED == 0 {
                let file = read_at(&image, 0, SIZE as usize + UNSERVED.len());
                let same = file[..SIZE as usize] == content && file[SIZE as usize..] == UNSERVED;
                assert!(same, "{}, {mode:?}, step {at}", kind.name);
            }
        }
        assert!(session.read(0, SIZE) == content, "{}, {mode:?}", kind.name);
    }
    assert!(server.stop().success(), "{}: {}", kind.name, server.stderr());
    let length = image.metadata().unwrap().len();
    assert_eq!(length, SIZE + UNSERVED.len() as u64, "{}: the size stays", kind.name);
}

#[test]
fn direct_requests_are_exact_at_every_offset() {
    all_kinds().for_each(every_request_is_exact);
}

/// Two clients keep many short writes in flight, each with its own bytes of the same units.
fn concurrent_writes_to_one_unit_are_kept(kind: Kind) {
    const PIECE: usize = 100;
    const PIECES: usize = 160;
    let Some(mounted) = Mounted::new(kind) else { return };
    let image = sparse_image(mounted.path(), "image", MIB);
    let server = Builder::serve(&image).args(["--direct"]).start();
    let content = noise(PIECE * PIECES, 22);
    std::thread::scope(|scope| {
        for client in 0..2 {
            let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
            let content = &content;
            scope.spawn(move || {
                let piece = |at| at * PIECE..(at + 1) * PIECE;
                let write =
                    |place: Range<usize>| Request::write(place.start as u64, &content[place]);
                let requests = (client..PIECES).step_by(2).map(|at| write(piece(at)));
                let sent: Vec<_> =
                    requests.map(|request| (session.send(&request), request)).collect();
                let mut pending = sent.into_iter().collect::<std::collections::HashMap<_, _>>();
                while !pending.is_empty() {
                    let (cookie, reply) = session.recv_reply(&pending);
                    assert_eq!(reply.error, 0);
                    pending.remove(&cookie);
                }
            });
        }
    });
    let mut session = Session::open(server.endpoint(), Mode::Structured).unwrap();
    assert!(session.read(0, content.len() as u64) == content, "{}", kind.name);
}

#[test]
fn concurrent_direct_writes_to_one_unit_are_kept() {
    all_kinds().for_each(concurrent_writes_to_one_unit_are_kept);
}

/// Bytes of the file in the page cache.
fn resident(image: &Path) -> u64 {
    let fincore = Program::new("fincore").words("--bytes --noheadings --output RES");
    fincore.args([image]).ok().trim().parse().unwrap()
}

/// The page cache after a copy in and out, and a request to load everything.
fn resident_after_use(image: &Path, arguments: &[&str]) -> u64 {
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
    const SIZE: u64 = 16 * MIB + 512;
    let content = noise(SIZE as usize, 23);
    std::fs::write(image, &content).unwrap();
    let file = File::open(image).unwrap();
    file.sync_all().unwrap();
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    assert_eq!(resident(image), 0, "evicted before the test");
    let mut server = Builder::serve(image).args(arguments).start();
    for mode in MODES {
        let mut session = Session::open(server.endpoint(), mode).unwrap();
        assert!(session.read(0, SIZE) == content);
        session.ok(Request::write(SIZE - 600, &content[SIZE as usize - 600..]));
        for offset in (0..SIZE - 512).step_by(MIB as usize) {
            let piece = &content[offset as usize..][..MIB as usize];
            session.ok(Request::write(offset, piece));
            session.ok(Request::write(offset + 100, &piece[100..700]).flags(FUA));
            session.ok(Request::new(CACHE, offset, MIB));
        }
        session.ok(Request::new(FLUSH, 0, 0));
    }
    assert!(server.stop().success());
    resident(image)
}

#[test]
fn direct_io_leaves_the_page_cache_empty() {
    if !require_tool("fincore") {
        return;
    }
    // Btrfs writes files with checksums through the page cache, and tmpfs is nothing else.
    let bypasses = |kind: &Kind| kind.name.contains("xfs") || kind.name.contains("ext4");
    for kind in all_kinds().filter(bypasses) {
        let Some(mounted) = Mounted::new(kind) else { continue };
        let image = mounted.path().join("image");
        assert_eq!(resident_after_use(&image, &["--direct"]), 0, "{}", kind.name);
        assert_ne!(resident_after_use(&image, &[]), 0, "{}: fincore sees no pages", kind.name);
    }
}

/// Both sides use direct I/O, and a client changes the disk meanwhile.
fn a_migration_is_exact(kind: Kind) {
    let Some(mounted) = Mounted::new(kind) else { return };
    let mut content = noise(16 * MIB as usize + 512, 24);
    content[4 * MIB as usize..8 * MIB as usize].fill(0);
    let source = Host::new(mounted.path(), "source");
    let destination = Host::new(mounted.path(), "destination");
    let image = sparse_image(mounted.path(), "source.img", content.len() as u64);
    harness::write_at(&image, 0, &content[..4 * MIB as usize]);
    harness::write_at(&image, 8 * MIB, &content[8 * MIB as usize..]);
    sparse_image(mounted.path(), "destination.img", content.len() as u64);
    let mut listener = destination.mode("listen").args(["--direct"]).start();
    let mut server = source.mode("serve").args(["--direct"]).start();
    let mut changer = Session::open(server.endpoint(), Mode::Simple).unwrap();
    let (bind, rate) = (source.address.ip().to_string(), (2 * MIB).to_string());
    let reply = source.mirror_to(destination.address, &["exit", &bind, &rate]);
    assert!(reply.starts_with("0:"), "{reply}");
    let mut random = fastrand::Rng::with_seed(8);
    for _ in 0..60 {
        let length = random.usize(1..50_000);
        let offset = random.usize(..content.len() - length);
        let data = noise(length, random.u64(..));
        changer.ok(Request::write(offset as u64, &data));
        content[offset..][..length].copy_from_slice(&data);
    }
    drop(changer);
    source.command(&["mirror_max_bps", "0"]);
    assert!(server.wait_for_end().success() && listener.wait_for_end().success());
    let copy = std::fs::read(&destination.image).unwrap();
    assert!(copy == content, "{}", kind.name);
}

#[test]
fn a_direct_migration_copies_every_change() {
    all_kinds().for_each(a_migration_is_exact);
}

#[test]
fn a_read_only_direct_disk_is_read() {
    let dir = temp_dir();
    let (image, content) = (dir.path().join("image"), noise(MIB as usize + 512, 25));
    std::fs::write(&image, &content).unwrap();
    let server = Builder::serve(&image).args(["--direct", "--read-only"]).start();
    for mode in MODES {
        let mut session = Session::open(server.endpoint(), mode).unwrap();
        assert!(session.read(0, content.len() as u64) == content, "{mode:?}");
        session.refused(Request::write(0, &[1]), &[EPERM]);
    }
}

#[test]
fn a_file_system_without_direct_io_is_refused() {
    let Some(mounted) = Mounted::new(RAMFS) else { return };
    let image = sparse_image(mounted.path(), "image", MIB);
    let config = mounted.path().join("disk.conf");
    std::fs::write(&config, "DIRECT=yes\n").unwrap();
    let serve = |image: &Path, arguments: &[&str]| {
        let serve = Program::flexnbd("serve").words(&Endpoint::localhost(free_port()).flags());
        serve.args(["--file"]).args([image]).args(arguments).run()
    };
    let cannot = "image with O_DIRECT: the file system does not support it; ";
    serve(&image, &["--direct"]).refused(78, &[cannot, "; start without --direct"]);
    let config = config.to_str().unwrap();
    serve(&image, &["--config", config]).refused(78, &[cannot, "; set DIRECT=no in ", config]);
    let new = mounted.path().join("new image");
    serve(&new, &["--direct", "--create", "1M"]).refused(78, &[cannot]);
    assert!(!new.exists(), "it could be taken for an empty disk");
    drop(Builder::serve(&image).start());
}

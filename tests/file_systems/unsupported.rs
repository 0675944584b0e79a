//! File systems that never or temporarily refuse to punch holes or zero ranges: the server writes
//! zeros instead, and a TRIM without effect succeeds.

use crate::mounted::{KINDS, Kind, Mounted};
use harness::raw::*;
use harness::session::*;
use harness::{Builder, MIB, Program, Server, allocated, compile, noise, require_tool};
use nix::errno::Errno;
use std::path::{Path, PathBuf};

const SIZE: u64 = 4 * MIB;
/// Offset and length of the changes: whole blocks, and ranges with partial blocks at the edges.
const CHANGES: [(u64, u64); 3] = [(64 << 10, 128 << 10), (5000, 100_000), (MIB + 100, 300)];

/// A server of an image filled with noise.
struct Subject {
    server: Server,
    image: PathBuf,
    content: Vec<u8>,
}

impl Subject {
    fn new(directory: &Path, environment: &[(&str, &str)]) -> Subject {
        let (image, content) = (directory.join("image"), noise(SIZE as usize, 5));
        std::fs::write(&image, &content).unwrap();
        let builder = Builder::serve(&image);
        let builder =
            environment.iter().fold(builder, |builder, (name, value)| builder.env(name, value));
        Subject { server: builder.start(), image, content }
    }

    fn session(&self, mode: Mode) -> Session {
        Session::open(self.server.endpoint(), mode).unwrap()
    }

    /// Asserts that TRIM has no effect, WRITE_ZEROES writes zeros, and a fast zero is refused.
    fn assert_zeroes_by_writing(&self, context: &str) {
        for mode in [Mode::Simple, Mode::Structured] {
            let mut session = self.session(mode);
            for (offset, length) in CHANGES {
                let (start, end) = (offset as usize, (offset + length) as usize);
                let mut zeroed = self.content.clone();
                zeroed[start..end].fill(0);
                session.ok(Request::new(TRIM, offset, length));
                assert!(session.read(0, SIZE) == self.content, "{context}: TRIM has no effect");
                for flags in [0, NO_HOLE, FUA] {
                    session.ok(Request::new(WRITE_ZEROES, offset, length).flags(flags));
                    assert!(
                        session.read(0, SIZE) == zeroed,
                        "{context}: zeroed at {offset}, {flags}"
                    );
                    session.ok(Request::write(offset, &self.content[start..end]));
                }
            }
            let fast = Request::new(WRITE_ZEROES, 64 << 10, 128 << 10).flags(FAST_ZERO);
            session.refused(fast, &[ENOTSUP]);
            assert!(session.read(0, SIZE) == self.content, "{context}: refused without an effect");
        }
    }
}

#[test]
fn zeros_are_written_where_fallocate_is_unsupported() {
    if !require_tool("cc") {
        return;
    }
    let dir = harness::temp_dir();
    let library = compile(dir.path(), "tests/file_systems/quirks.c", &["-shared", "-fPIC", "-ldl"]);
    let unsupported = [
        Errno::EOPNOTSUPP as i32,
        Errno::ENOSYS as i32,
        Errno::ENOTTY as i32,
        Errno::EINVAL as i32,
        Errno::ENODEV as i32,
        Errno::EPERM as i32,
        Errno::EACCES as i32,
        Errno::ESPIPE as i32,
        // ENOTSUPP, which has no name outside the kernel.
        524,
    ];
    for number in unsupported {
        let number = number.to_string();
        let quirks = [("LD_PRELOAD", library.to_str().unwrap()), ("QUIRK_FALLOCATE", &number)];
        let subject = Subject::new(dir.path(), &quirks);
        subject.assert_zeroes_by_writing(&format!("error {number}"));
    }
}

#[test]
fn other_fallocate_errors_reach_the_client() {
    if !require_tool("cc") {
        return;
    }
    let dir = harness::temp_dir();
    let library = compile(dir.path(), "tests/file_systems/quirks.c", &["-shared", "-fPIC", "-ldl"]);
    for (errno, error) in [(Errno::ENOSPC, ENOSPC), (Errno::EIO, EIO), (Errno::EDQUOT, ENOSPC)] {
        let number = (errno as i32).to_string();
        let quirks = [("LD_PRELOAD", library.to_str().unwrap()), ("QUIRK_FALLOCATE", &number)];
        let subject = Subject::new(dir.path(), &quirks);
        let mut session = subject.session(Mode::Simple);
        for command in [TRIM, WRITE_ZEROES] {
            session.refused(Request::new(command, 0, MIB), &[error]);
        }
        assert!(session.read(0, SIZE) == subject.content, "{errno}");
    }
}

/// With io_uring where the kernel has it. Punching an append-only file fails with EPERM; descriptors
/// that are already open can still write to it.
fn punching_resumes_after_append_only(kind: Kind) {
    let Some(mounted) = Mounted::new(kind) else { return };
    let subject = Subject::new(mounted.path(), &[]);
    let chattr = |mode| Program::new("chattr").words(mode).args([&subject.image]).ok();
    chattr("+a");
    subject.assert_zeroes_by_writing(kind.name);
    chattr("-a");
    let before = allocated(&subject.image);
    let mut session = subject.session(Mode::Simple);
    session.ok(Request::new(TRIM, 0, MIB).flags(FUA));
    session.ok(Request::new(WRITE_ZEROES, 2 * MIB, MIB).flags(FUA));
    session.ok(Request::new(WRITE_ZEROES, MIB, 64 << 10).flags(FAST_ZERO));
    let after = allocated(&subject.image);
    assert!(after <= before - 2 * MIB, "{}: {before} bytes became {after}", kind.name);
}

#[test]
fn punching_works_again_once_it_is_permitted() {
    if !require_tool("chattr") {
        return;
    }
    let can_append_only = |kind: &&Kind| ["xfs", "btrfs", "ext4"].contains(&kind.name);
    KINDS.iter().filter(can_append_only).for_each(|kind| punching_resumes_after_append_only(*kind));
}

/// A sealed memory file can be neither punched nor written; TRIM is advisory and succeeds.
#[test]
fn trim_of_a_sealed_file_succeeds_without_effect() {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;
    let content = noise(MIB as usize, 6);
    let memory = memfd_create("disk", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let mut memory = std::fs::File::from(memory);
    memory.write_all(&content).unwrap();
    fcntl(&memory, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd()));
    let server = Builder::serve(&path).start();
    let mut session = Session::open(server.endpoint(), Mode::Simple).unwrap();
    session.ok(Request::new(TRIM, 0, MIB));
    session.refused(Request::new(WRITE_ZEROES, 0, MIB), &[EPERM]);
    session.refused(Request::new(WRITE_ZEROES, 0, MIB).flags(FAST_ZERO), &[ENOTSUP]);
    assert!(session.read(0, MIB) == content);
}

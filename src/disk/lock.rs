//! Locks on an image, of both kinds that other programs check: flock(2), and the byte-range locks
//! of QEMU's file driver. Never waits for a process that holds a lock.
//!
//! The kernel releases the locks of a killed process with its last reference to the file, and io_uring drops
//! such references after the process has gone. So a lock that no process holds is waited for, for a moment.
//!
//! QEMU (block/file-posix.c) puts read locks, which any number of processes can hold, on single
//! bytes: byte 100 + n means that the holder uses permission n, byte 200 + n that it does not share
//! permission n. A process gives up if another one has locked a byte that conflicts with its own.
//! Both kinds belong to an open file description (`F_OFD_SETLK` of fcntl(2)) and last until its last
//! descriptor is closed. The bytes need not exist.

use super::syscalls;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::statfs::{FsType, fstatfs};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// First byte for permissions in use (`RAW_LOCK_PERM_BASE`).
const USED: libc::off_t = 100;
/// First byte for permissions that are not shared (`RAW_LOCK_SHARED_BASE`).
const NOT_SHARED: libc::off_t = 200;

/// The permissions, as bit numbers (`BLK_PERM_*` of QEMU's block layer).
const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const WRITE_UNCHANGED: libc::off_t = 2;
const RESIZE: libc::off_t = 3;

/// SMB implements both kinds with one lock, so the second would conflict with the first; flock(2)
/// alone keeps QEMU out there.
const SINGLE_LOCK_FILE_SYSTEMS: [FsType; 3] =
    [FsType(0x517B), FsType(0xFF53_4D42), FsType(0xFE53_4D42)];

/// How long to wait for a lock without a holder. (Up to 0.1 s were seen after `kill -9` under load.)
const ORPHANED_LOCK_WAIT: Duration = Duration::from_secs(2);
/// Delay between two attempts.
const ORPHANED_LOCK_RETRY: Duration = Duration::from_millis(10);

/// How a process uses an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LockMode {
    /// It reads; other readers are welcome.
    Shared,
    /// It writes, alone.
    Exclusive,
}

/// Why an image is not locked.
#[derive(Debug)]
pub(super) enum LockError {
    /// Other processes hold a conflicting lock.
    Held(Holders),
    /// The system call failed, as on a file system without this kind of lock.
    Failed { kind: LockKind, source: io::Error },
}

/// The permissions that a server uses, and those that it does not share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permissions {
    used: &'static [libc::off_t],
    not_shared: &'static [libc::off_t],
}

impl Permissions {
    /// The permissions that QEMU takes for the disk of a virtual machine: others may neither write
    /// nor resize. A reader states in its own locks whether it tolerates our writes.
    fn of(mode: LockMode) -> Self {
        let used: &[_] = match mode {
            LockMode::Shared => &[CONSISTENT_READ],
            LockMode::Exclusive => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED],
        };
        Self { used, not_shared: &[WRITE, RESIZE] }
    }

    /// The bytes to lock.
    fn locks(self) -> impl Iterator<Item = libc::off_t> {
        let used = self.used.iter().map(|bit| USED + bit);
        used.chain(self.not_shared.iter().map(|bit| NOT_SHARED + bit))
    }

    /// The bytes that no other process may have locked.
    fn conflicting(self) -> impl Iterator<Item = libc::off_t> {
        let used = self.used.iter().map(|bit| NOT_SHARED + bit);
        used.chain(self.not_shared.iter().map(|bit| USED + bit))
    }
}

/// A kind of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// A byte-range lock of an open file description.
    Range,
}

impl fmt::Display for LockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flock => "flock(2)",
            Self::Range => "F_OFD_SETLK of fcntl(2)",
        })
    }
}

/// The processes that have locked an image, as far as `/proc` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders(Vec<Holder>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((Holder { pid, name }, others)) = self.0.split_first() else {
            return f.write_str("another process has locked it");
        };
        write!(f, "process {pid} ({name})")?;
        match others.len() {
            0 => f.write_str(" has locked it"),
            1 => f.write_str(" and 1 other process have locked it"),
            more => write!(f, " and {more} other processes have locked it"),
        }
    }
}

/// Takes both locks on an open image.
pub(super) fn acquire(file: &File, mode: LockMode) -> Result<(), LockError> {
    let deadline = Instant::now() + ORPHANED_LOCK_WAIT;
    loop {
        match try_acquire(file, mode) {
            Err(LockError::Held(holders)) if holders.0.is_empty() && Instant::now() < deadline => {
                thread::sleep(ORPHANED_LOCK_RETRY);
            }
            outcome => return outcome,
        }
    }
}

fn try_acquire(file: &File, mode: LockMode) -> Result<(), LockError> {
    let failed = |kind, source: io::Error| match source.raw_os_error().map(Errno::from_raw) {
        // For a held range lock fcntl(2) returns either.
        Some(Errno::EAGAIN | Errno::EACCES) => LockError::Held(holders(file)),
        _ => LockError::Failed { kind, source },
    };
    syscalls::lock(file, mode == LockMode::Exclusive)
        .map_err(|error| failed(LockKind::Flock, error))?;
    let kind = fstatfs(file).map(|found| found.filesystem_type());
    if kind.is_ok_and(|kind| SINGLE_LOCK_FILE_SYSTEMS.contains(&kind)) {
        return Ok(());
    }
    lock_ranges(file, Permissions::of(mode)).map_err(|errno| failed(LockKind::Range, errno.into()))
}

/// Takes our locks before it checks for foreign ones: of two processes that start at the same time,
/// at least one sees the other.
fn lock_ranges(file: &File, permissions: Permissions) -> nix::Result<()> {
    for byte in permissions.locks() {
        fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte)))?;
    }
    for byte in permissions.conflicting() {
        // A write lock would conflict with every foreign lock, so this query finds any.
        let mut found = range(libc::F_WRLCK, byte);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
        if i32::from(found.l_type) != libc::F_UNLCK {
            return Err(Errno::EAGAIN);
        }
    }
    Ok(())
}

fn range(kind: i32, byte: libc::off_t) -> libc::flock {
    libc::flock {
        // `F_RDLCK`, `F_WRLCK` and `F_UNLCK` fit.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // fcntl(2) demands 0 for locks of an open file description.
        l_pid: 0,
    }
}

/// The processes that have locked the file, except through this descriptor. fcntl(2) does not
/// report the holder of such a range lock, but proc_pid_fdinfo(5) lists the locks of each descriptor.
fn holders(file: &File) -> Holders {
    let Ok(wanted) = file.metadata() else { return Holders::default() };
    let (own, own_descriptor) = (std::process::id(), file.as_raw_fd());
    let is_same = |link: &Path| {
        fs::metadata(link).is_ok_and(|it| (it.dev(), it.ino()) == (wanted.dev(), wanted.ino()))
    };
    let holds = |pid: u32| {
        let Ok(descriptors) = fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
        descriptors.flatten().any(|entry| {
            let number = entry.file_name();
            let is_ours = pid == own && number.to_string_lossy() == own_descriptor.to_string();
            let shown = fs::read_to_string(entry.path()).unwrap_or_default();
            !is_ours
                && shows_lock(&shown, wanted.ino())
                && is_same(&Path::new("/proc").join(format!("{pid}/fd")).join(number))
        })
    };
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let holder = |pid| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Holder { pid, name: name.trim_end().to_owned() }
    };
    Holders(pids.filter(|pid| holds(*pid)).map(holder).collect())
}

/// Whether the `fdinfo` of a descriptor lists a lock on a file with this inode number.
fn shows_lock(fdinfo: &str, inode: u64) -> bool {
    let suffix = format!(":{inode}");
    let locks = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    let mut words = locks.flat_map(str::split_whitespace);
    words.any(|word| word.matches(':').count() == 2 && word.ends_with(&suffix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    use std::io::IoSlice;
    use std::os::unix::net::UnixStream;

    #[test]
    fn locked_bytes_are_those_of_qemu() {
        let bytes = |mode| {
            let permissions = Permissions::of(mode);
            (permissions.locks().collect::<Vec<_>>(), permissions.conflicting().collect::<Vec<_>>())
        };
        assert_eq!(
            bytes(LockMode::Exclusive),
            (vec![100, 101, 102, 201, 203], vec![200, 201, 202, 101, 103])
        );
        assert_eq!(bytes(LockMode::Shared), (vec![100, 201, 203], vec![200, 101, 103]));
    }

    #[test]
    fn range_locks_alone_keep_out_a_writer() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second, third) = (open(), open(), open());
        lock_ranges(&first, Permissions::of(LockMode::Shared)).unwrap();
        lock_ranges(&second, Permissions::of(LockMode::Shared)).unwrap();
        assert_eq!(lock_ranges(&third, Permissions::of(LockMode::Exclusive)), Err(Errno::EAGAIN));
        drop((first, second, third));
        let (first, second) = (open(), open());
        lock_ranges(&first, Permissions::of(LockMode::Exclusive)).unwrap();
        assert_eq!(lock_ranges(&second, Permissions::of(LockMode::Shared)), Err(Errno::EAGAIN));
    }

    /// A lock on a file that no descriptor of a process refers to: one is in transit in a socket. A killed
    /// process leaves such locks for a moment.
    fn orphaned_lock(file: &tempfile::NamedTempFile) -> (UnixStream, UnixStream) {
        let (sender, receiver) = UnixStream::pair().unwrap();
        let locked = file.reopen().unwrap();
        acquire(&locked, LockMode::Exclusive).unwrap();
        let descriptors = [locked.as_raw_fd()];
        let message = [ControlMessage::ScmRights(&descriptors)];
        let data = [IoSlice::new(b"x")];
        sendmsg::<()>(sender.as_raw_fd(), &data, &message, MsgFlags::empty(), None).unwrap();
        (sender, receiver)
    }

    #[test]
    fn a_lock_without_a_holder_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let orphan = orphaned_lock(&file);
        assert_eq!(holders(file.as_file()), Holders::default());
        thread::scope(|scope| {
            let waits = scope.spawn(|| acquire(&file.reopen().unwrap(), LockMode::Exclusive));
            thread::sleep(3 * ORPHANED_LOCK_RETRY);
            drop(orphan);
            waits.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_lock_that_stays_without_a_holder_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let orphan = orphaned_lock(&file);
        let refused = acquire(&file.reopen().unwrap(), LockMode::Exclusive);
        assert!(matches!(refused, Err(LockError::Held(holders)) if holders.0.is_empty()));
        drop(orphan);
    }

    #[test]
    fn holder_of_a_lock_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (file.reopen().unwrap(), file.reopen().unwrap());
        acquire(&first, LockMode::Exclusive).unwrap();
        assert_eq!(holders(&first), Holders::default(), "its own locks are listed");
        let [holder] = &holders(&second).0[..] else { panic!("not found") };
        assert_eq!(holder.pid, std::process::id());
    }

    #[test]
    fn lock_is_matched_by_its_inode() {
        let shown = "pos:\t0\nlock:\t1: OFDLCK ADVISORY  READ -1 08:01:131 100 100\n";
        assert!(shows_lock(shown, 131));
        for (text, inode) in [(shown, 31), (shown, 100), ("ino:\t08:01:131\n", 131)] {
            assert!(!shows_lock(text, inode), "{text} {inode}");
        }
    }

    #[test]
    fn holders_are_listed_with_pid_and_name() {
        let holder = |pid| Holder { pid, name: "qemu".to_owned() };
        let text = |count| Holders((1..=count).map(holder).collect()).to_string();
        assert_eq!(text(0), "another process has locked it");
        assert_eq!(text(1), "process 1 (qemu) has locked it");
        assert_eq!(text(2), "process 1 (qemu) and 1 other process have locked it");
        assert_eq!(text(3), "process 1 (qemu) and 2 other processes have locked it");
    }
}

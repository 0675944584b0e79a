//! Locks on an image, of both kinds that other programs look for: flock(2), and the byte-range
//! locks of QEMU's file driver. Never waits for a lock.
//!
//! QEMU (block/file-posix.c) puts read locks, which any number of processes can have, on single
//! bytes: byte 100 + n says that permission n is used, byte 200 + n that it is not left to others.
//! Whoever then finds somebody else's lock on a byte that contradicts its own gives up. The locks
//! are those of an open file description (`F_OFD_SETLK` of fcntl(2)), as flock's are: they last
//! until the last descriptor of this opening is closed. The bytes need not exist.

use super::open::{Access, OpenError};
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

/// Where the bytes for permissions in use begin (`RAW_LOCK_PERM_BASE`).
const USED: libc::off_t = 100;
/// Where those for permissions that are not shared begin (`RAW_LOCK_SHARED_BASE`).
const NOT_SHARED: libc::off_t = 200;

/// The permissions, as numbers of bits (`BLK_PERM_*` of QEMU's block layer).
const CONSISTENT_READ: libc::off_t = 0;
const WRITE: libc::off_t = 1;
const WRITE_UNCHANGED: libc::off_t = 2;
const RESIZE: libc::off_t = 3;

/// SMB: there both kinds are one, so that they would contradict each other, and the first holds
/// QEMU off by itself.
const ONE_KIND: [FsType; 3] = [FsType(0x517B), FsType(0xFF53_4D42), FsType(0xFE53_4D42)];

/// Which permissions a server uses, and which it leaves to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Permissions {
    used: &'static [libc::off_t],
    not_shared: &'static [libc::off_t],
}

impl Permissions {
    /// As QEMU does for a virtual machine's disk: others may neither write nor resize, and they may
    /// read only if they put up with writers. That is for themselves to say, in their own locks.
    fn of(access: Access) -> Self {
        let not_shared = &[WRITE, RESIZE];
        if access.read_only {
            Self { used: &[CONSISTENT_READ], not_shared }
        } else {
            Self { used: &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED], not_shared }
        }
    }

    /// The bytes to lock.
    fn locks(self) -> impl Iterator<Item = libc::off_t> {
        let used = self.used.iter().map(|bit| USED + bit);
        used.chain(self.not_shared.iter().map(|bit| NOT_SHARED + bit))
    }

    /// The bytes that must not be locked by others.
    fn contradicting(self) -> impl Iterator<Item = libc::off_t> {
        let used = self.used.iter().map(|bit| NOT_SHARED + bit);
        used.chain(self.not_shared.iter().map(|bit| USED + bit))
    }
}

/// A kind of lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// A lock on a range of bytes, of an open file description.
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

/// The processes that have locked an image, as far as that can be seen.
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

/// Locks the image that is open there, against writers or, for writing, against everybody.
pub(super) fn take(path: &Path, file: &File, access: Access) -> Result<(), OpenError> {
    let failed = |kind, source: io::Error| match source.raw_os_error().map(Errno::from_raw) {
        // For range locks the kernel may say either.
        Some(Errno::EAGAIN | Errno::EACCES) => {
            OpenError::AlreadyServed { path: path.to_owned(), by: holders(file) }
        }
        _ => OpenError::NotLocked { path: path.to_owned(), kind, source },
    };
    syscalls::lock(file, !access.read_only).map_err(|error| failed(LockKind::Flock, error))?;
    let kind = fstatfs(file).map(|found| found.filesystem_type());
    if kind.is_ok_and(|kind| ONE_KIND.contains(&kind)) {
        return Ok(());
    }
    lock_ranges(file, Permissions::of(access))
        .map_err(|errno| failed(LockKind::Range, errno.into()))
}

/// First the locks, then the look at those of others: of two that begin at the same time at least
/// one sees the other.
fn lock_ranges(file: &File, permissions: Permissions) -> nix::Result<()> {
    for byte in permissions.locks() {
        fcntl(file, FcntlArg::F_OFD_SETLK(&range(libc::F_RDLCK, byte)))?;
    }
    for byte in permissions.contradicting() {
        // What a write lock would meet is any lock of somebody else.
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
        // One of three small numbers.
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: byte,
        l_len: 1,
        // As it has to be for locks of an open file description.
        l_pid: 0,
    }
}

/// Whoever has locked the file, but for this opening of it. The kernel does not tell who has a
/// range lock; but it shows the locks of each descriptor (proc_pid_fdinfo(5)).
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

/// Whether the `fdinfo` of a descriptor shows a lock on a file of that inode number.
fn shows_lock(fdinfo: &str, inode: u64) -> bool {
    let place = format!(":{inode}");
    let locks = fdinfo.lines().filter_map(|line| line.strip_prefix("lock:"));
    let mut places = locks.flat_map(str::split_whitespace);
    places.any(|word| word.matches(':').count() == 2 && word.ends_with(&place))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRITING: Access = Access { read_only: false };
    const READING: Access = Access { read_only: true };

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let bytes = |access| {
            let permissions = Permissions::of(access);
            (
                permissions.locks().collect::<Vec<_>>(),
                permissions.contradicting().collect::<Vec<_>>(),
            )
        };
        assert_eq!(bytes(WRITING), (vec![100, 101, 102, 201, 203], vec![200, 201, 202, 101, 103]));
        assert_eq!(bytes(READING), (vec![100, 201, 203], vec![200, 101, 103]));
    }

    #[test]
    fn range_locks_alone_keep_a_writer_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (first, second, third) = (open(), open(), open());
        lock_ranges(&first, Permissions::of(READING)).unwrap();
        lock_ranges(&second, Permissions::of(READING)).unwrap();
        assert_eq!(lock_ranges(&third, Permissions::of(WRITING)), Err(Errno::EAGAIN));
        drop((first, second, third));
        let (first, second) = (open(), open());
        lock_ranges(&first, Permissions::of(WRITING)).unwrap();
        assert_eq!(lock_ranges(&second, Permissions::of(READING)), Err(Errno::EAGAIN));
    }

    #[test]
    fn whoever_holds_a_lock_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (file.reopen().unwrap(), file.reopen().unwrap());
        take(file.path(), &first, WRITING).unwrap();
        assert_eq!(holders(&first), Holders::default(), "its own locks do not count");
        let [holder] = &holders(&second).0[..] else { panic!("not found") };
        assert_eq!(holder.pid, std::process::id());
    }

    #[test]
    fn a_lock_is_told_by_the_inode_it_is_on() {
        let shown = "pos:\t0\nlock:\t1: OFDLCK ADVISORY  READ -1 08:01:131 100 100\n";
        assert!(shows_lock(shown, 131));
        for (text, inode) in [(shown, 31), (shown, 100), ("ino:\t08:01:131\n", 131)] {
            assert!(!shows_lock(text, inode), "{text} {inode}");
        }
    }

    #[test]
    fn holders_are_named_for_people() {
        let holder = |pid| Holder { pid, name: "qemu".to_owned() };
        let told = |count| Holders((1..=count).map(holder).collect()).to_string();
        assert_eq!(told(0), "another process has locked it");
        assert_eq!(told(1), "process 1 (qemu) has locked it");
        assert_eq!(told(2), "process 1 (qemu) and 1 other process have locked it");
        assert_eq!(told(3), "process 1 (qemu) and 2 other processes have locked it");
    }
}

//! The service manager's store of descriptors: what is put in there outlives this process, and is
//! handed to the next one (`FDSTORE=1` of sd_notify(3), "File descriptor store" of systemd.service(5)).
//! Knows nothing of what the descriptors are: a note tells that, from one process to the next.
//!
//! Everything that is put in together has a generation in its name, a random number, so that what
//! one process left behind is never taken for another one's. Whoever takes something out removes it
//! from the store, and makes sure of that before using it: after a crash it must not come out again,
//! when it is not any more what the note says.

use super::ServiceManager;
use memmap2::Mmap;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::libc::MFD_NOEXEC_SEAL;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// Most descriptors that are put in beside the note. Their names come back in one variable of the
/// environment, which may not be longer than 128 KiB (execve(2)).
pub const DESCRIPTORS_MAX: usize = 2048;
/// How long the service manager may take to confirm.
const CONFIRMATION: Duration = Duration::from_secs(5);
/// The variable that says how many descriptors there is room for. systemd sets it since version
/// 254; before, the unit has to (`Environment=FDSTORE=`).
const ROOM_VARIABLE: &str = "FDSTORE";
/// What the names begin with.
const PREFIX: &str = "carry-";

/// The store, as somewhere to put things.
#[derive(Debug)]
pub struct FdStore {
    notifier: ServiceManager,
    room: usize,
}

impl FdStore {
    /// Reads from the environment how much room there is.
    #[must_use]
    pub fn from_env(notifier: &ServiceManager) -> Self {
        let variable = std::env::var(ROOM_VARIABLE).ok();
        let room = if notifier.is_connected() { room(variable.as_deref()) } else { 0 };
        Self { notifier: notifier.clone(), room }
    }

    /// How many descriptors it takes, not counting the note.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Puts in a note and what it is about, each under its number. They may be closed here
    /// afterwards; `generation` is a random number.
    ///
    /// # Errors
    /// When the service manager did not confirm it; a part of it may be in the store all the same.
    pub fn put(
        &self,
        generation: u64,
        note: &[u8],
        descriptors: &BTreeMap<u64, BorrowedFd<'_>>,
    ) -> io::Result<()> {
        // The note first: without it nothing else is of use.
        self.notifier
            .store(&StoredName { generation, number: None }.to_string(), sealed(note)?.as_fd())?;
        for (&number, descriptor) in descriptors {
            let name = StoredName { generation, number: Some(number) };
            self.notifier.store(&name.to_string(), *descriptor)?;
        }
        self.notifier.barrier(CONFIRMATION)
    }
}

/// What was in the store when this process was started.
#[derive(Debug, Default)]
pub struct StoredDescriptors(Vec<(String, OwnedFd)>);

/// What an earlier process has left for this one.
#[derive(Debug, Default)]
pub struct RestoredDescriptors {
    /// What it says about the rest; empty if there is nothing.
    pub note: Vec<u8>,
    /// Each under its number.
    pub descriptors: BTreeMap<u64, OwnedFd>,
}

/// Why what was in the store cannot be used. It is closed.
#[derive(Debug)]
pub enum FdStoreError {
    /// The service manager does not confirm that it is out of the store.
    NotRemoved(io::Error),
    /// There is no note, or more than one.
    Notes(usize),
    /// The note cannot be read.
    Unreadable(io::Error),
}

impl fmt::Display for FdStoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRemoved(error) => {
                write!(f, "the service manager does not give them up: {error}")
            }
            Self::Notes(count) => write!(f, "{count} notes came with them instead of one"),
            Self::Unreadable(error) => write!(f, "the note that came with them: {error}"),
        }
    }
}

impl StoredDescriptors {
    /// Whether a descriptor of this name comes from the store.
    pub(super) fn owns(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    pub(super) fn add(&mut self, name: String, descriptor: OwnedFd) {
        self.0.push((name, descriptor));
    }

    /// How many descriptors there are, notes included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Removes everything from the store and hands out what belongs to the one note in there.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn take_out(self, notifier: &ServiceManager) -> Result<RestoredDescriptors, FdStoreError> {
        if self.0.is_empty() {
            return Ok(RestoredDescriptors::default());
        }
        let removed = self.0.iter().try_for_each(|(name, _)| notifier.remove(name));
        removed.and_then(|()| notifier.barrier(CONFIRMATION)).map_err(FdStoreError::NotRemoved)?;
        let named =
            self.0.into_iter().filter_map(|(name, fd)| Some((StoredName::parse(&name)?, fd)));
        let (mut notes, rest): (Vec<_>, Vec<_>) =
            named.partition(|(name, _)| name.number.is_none());
        let count = notes.len();
        let Some((StoredName { generation, .. }, note)) = notes.pop().filter(|_| count == 1) else {
            return Err(FdStoreError::Notes(count));
        };
        let ours = rest.into_iter().filter(|(name, _)| name.generation == generation);
        let descriptors = ours.filter_map(|(name, fd)| Some((name.number?, fd))).collect();
        let note = read(note).map_err(FdStoreError::Unreadable)?;
        Ok(RestoredDescriptors { note, descriptors })
    }
}

/// The name of a descriptor in the store: `carry-GENERATION` is a note, `carry-GENERATION-NUMBER`
/// what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct StoredName {
    generation: u64,
    number: Option<u64>,
}

impl fmt::Display for StoredName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{:016x}", self.generation)?;
        self.number.map_or(Ok(()), |number| write!(f, "-{number}"))
    }
}

impl StoredName {
    fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(PREFIX)?;
        let (generation, number) = match rest.split_once('-') {
            Some((generation, number)) => (generation, Some(number.parse().ok()?)),
            None => (rest, None),
        };
        Some(Self { generation: u64::from_str_radix(generation, 16).ok()?, number })
    }
}

/// What the variable allows, one being for the note.
fn room(variable: Option<&str>) -> usize {
    let most: usize = variable.and_then(|number| number.parse().ok()).unwrap_or(0);
    most.saturating_sub(1).min(DESCRIPTORS_MAX)
}

/// A file in memory that holds `bytes` and never changes.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let descriptor = without_execute(|flags| memfd_create(c"flexnbd-carry", flags))?;
    let mut file = File::from(descriptor);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals()))?;
    Ok(file.into())
}

/// Creates a sealable file in memory that can never be executed: the sysctl vm.memfd_noexec=2
/// refuses any other with EACCES. Linux before 6.3 does not know the flag, nor the sysctl.
fn without_execute<T>(create: impl Fn(MFdFlags) -> nix::Result<T>) -> nix::Result<T> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    match create(flags | MFdFlags::from_bits_retain(MFD_NOEXEC_SEAL)) {
        Err(Errno::EINVAL) => create(flags),
        created => created,
    }
}

fn read(note: OwnedFd) -> io::Result<Vec<u8>> {
    let found = SealFlag::from_bits_retain(fcntl(&note, FcntlArg::F_GET_SEALS)?);
    if !found.contains(seals()) {
        return Err(io::Error::other("it is not sealed"));
    }
    // SAFETY: the seals keep everybody, us included, from changing the file or cutting it short
    // while it is mapped (F_ADD_SEALS of fcntl(2)).
    let mapped = unsafe { Mmap::map(&note) }?;
    Ok(mapped.to_vec())
}

fn seals() -> SealFlag {
    SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn stored(named: Vec<(&str, OwnedFd)>) -> Result<RestoredDescriptors, FdStoreError> {
        let mut stored = StoredDescriptors::default();
        for (name, descriptor) in named {
            assert!(StoredDescriptors::owns(name));
            stored.add(name.to_owned(), descriptor);
        }
        stored.take_out(&ServiceManager::silent())
    }

    #[test]
    fn what_is_taken_out_is_what_the_one_note_is_about() {
        let (one, mut other) = UnixStream::pair().unwrap();
        let (stale, mut closed) = UnixStream::pair().unwrap();
        let note = sealed(b"about 7").unwrap();
        let kept = stored(vec![
            ("carry-00000000000000ff-7", one.into()),
            ("carry-00000000000000fe-7", stale.into()),
            ("carry-00000000000000ff", note),
        ])
        .unwrap();
        assert_eq!(kept.note, b"about 7");
        assert_eq!(kept.descriptors.keys().collect::<Vec<_>>(), [&7]);
        assert_eq!(closed.read(&mut [0]).unwrap(), 0);
        let seven = kept.descriptors.into_values().next().unwrap();
        UnixStream::from(seven).write_all(b"x").unwrap();
        assert_eq!(other.read(&mut [0]).unwrap(), 1);
    }

    #[test]
    fn without_exactly_one_note_nothing_is_taken_out() {
        let pair = || OwnedFd::from(UnixStream::pair().unwrap().0);
        assert!(matches!(stored(vec![("carry-ff-7", pair())]), Err(FdStoreError::Notes(0))));
        let note = || sealed(b"x").unwrap();
        let two = stored(vec![("carry-ff", note()), ("carry-fe", note()), ("carry-ff-7", pair())]);
        assert!(matches!(two, Err(FdStoreError::Notes(2))));
        assert!(stored(Vec::new()).unwrap().note.is_empty());
    }

    #[test]
    fn a_note_that_can_change_or_is_none_is_not_read() {
        let open = memfd_create(c"open", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert!(matches!(stored(vec![("carry-ff", open)]), Err(FdStoreError::Unreadable(_))));
        let socket = UnixStream::pair().unwrap().0.into();
        assert!(matches!(stored(vec![("carry-ff", socket)]), Err(FdStoreError::Unreadable(_))));
    }

    /// `F_SEAL_EXEC` of fcntl(2), of which libc does not know.
    const SEAL_EXEC: i32 = 0x20;

    #[test]
    fn notes_cannot_be_executed_where_the_kernel_knows_that() {
        // Of sysctl/vm in the kernel's documentation: it came along with the flag.
        let is_known = std::path::Path::new("/proc/sys/vm/memfd_noexec").exists();
        let seals = fcntl(sealed(b"x").unwrap(), FcntlArg::F_GET_SEALS).unwrap();
        assert_eq!(seals & SEAL_EXEC != 0, is_known);
        let strict = |flags: MFdFlags| match flags.bits() & MFD_NOEXEC_SEAL {
            0 => Err(Errno::EACCES),
            _ => Ok(()),
        };
        assert_eq!(without_execute(strict), Ok(()), "vm.memfd_noexec=2");
    }

    #[test]
    fn kernels_without_the_noexec_flag_make_notes_without_it() {
        let old = |flags: MFdFlags| match flags.bits() & MFD_NOEXEC_SEAL {
            0 => Ok(()),
            _ => Err(Errno::EINVAL),
        };
        assert_eq!(without_execute(old), Ok(()));
        assert_eq!(without_execute(|_| Err::<(), _>(Errno::EMFILE)), Err(Errno::EMFILE));
    }

    #[test]
    fn names_come_back_as_they_were() {
        for name in [
            StoredName { generation: 0, number: None },
            StoredName { generation: u64::MAX, number: Some(u64::MAX) },
        ] {
            assert_eq!(StoredName::parse(&name.to_string()), Some(name));
        }
        for other in ["nbd", "carry-", "carry-x", "carry-ff-", "carry-ff-x", "carry-ff-1-1"] {
            assert_eq!(StoredName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn there_is_room_for_as_many_as_the_unit_allows_less_the_note() {
        for (variable, expected) in [
            (None, 0),
            (Some(""), 0),
            (Some("many"), 0),
            (Some("0"), 0),
            (Some("1"), 0),
            (Some("2"), 1),
            (Some("2049"), DESCRIPTORS_MAX),
            (Some("2050"), DESCRIPTORS_MAX),
        ] {
            assert_eq!(room(variable), expected, "{variable:?}");
        }
    }

    #[test]
    fn the_longest_names_fit_into_the_environment() {
        const VARIABLE_MAX: usize = 128 << 10;
        let name = StoredName { generation: u64::MAX, number: Some(1 << 40) };
        assert!((name.to_string().len() + 1) * (DESCRIPTORS_MAX + 1) < VARIABLE_MAX);
    }
}

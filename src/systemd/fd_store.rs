//! The service manager's file descriptor store: descriptors stored there outlive this process, and the
//! next one gets them (`FDSTORE=1` of sd_notify(3), "File descriptor store" of systemd.service(5)).
//! Never interprets the descriptors: a *note*, a sealed memfd beside them, describes them to the next
//! process.
//!
//! The names of all descriptors that were stored together contain a generation, a random number, so
//! that those of different processes are never mixed. [`StoredDescriptors::take`] removes all from the
//! store, and waits for the confirmation, before they are used: after a crash they must not come back
//! with a note that is no longer true.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;

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

/// Most descriptors beside the note. Their names come back in one environment variable, which has at
/// most 128 KiB (execve(2)).
pub const DESCRIPTORS_MAX: usize = 2048;
/// Time limit for the service manager to confirm.
const BARRIER_TIMEOUT: Duration = Duration::from_secs(5);
/// The variable with the capacity of the store. systemd sets it since version 254; with an older one
/// the unit must (`Environment=FDSTORE=`).
const CAPACITY_VARIABLE: &str = "FDSTORE";
/// Prefix of the names.
const PREFIX: &str = "carry-";

/// The store, to put descriptors into.
#[derive(Debug)]
pub struct FdStore {
    notifier: ServiceManager,
    capacity: usize,
}

impl FdStore {
    /// Reads the capacity from the environment.
    #[must_use]
    pub fn from_env(notifier: &ServiceManager) -> Self {
        let variable = std::env::var(CAPACITY_VARIABLE).ok();
        let capacity = if notifier.is_connected() { capacity(variable.as_deref()) } else { 0 };
        Self { notifier: notifier.clone(), capacity }
    }

    /// The number of descriptors that fit beside the note.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Stores a note and the descriptors that it describes, each under its number. The caller may
    /// close them afterwards. `generation` is a random number.
    ///
    /// # Errors
    /// When the service manager does not confirm; some of them may be stored nevertheless.
    pub fn put(
        &self,
        generation: u64,
        note: &[u8],
        descriptors: &BTreeMap<u64, BorrowedFd<'_>>,
    ) -> io::Result<()> {
        // The note first: without it the descriptors are useless.
        self.notifier
            .store(&StoredName { generation, number: None }.to_string(), sealed(note)?.as_fd())?;
        for (&number, descriptor) in descriptors {
            let name = StoredName { generation, number: Some(number) };
            self.notifier.store(&name.to_string(), *descriptor)?;
        }
        self.notifier.barrier(BARRIER_TIMEOUT)
    }
}

/// The descriptors from the store that this process inherited, under their names.
#[derive(Debug, Default)]
pub struct StoredDescriptors(Vec<(String, OwnedFd)>);

/// The descriptors that the last process stored.
#[derive(Debug, Default)]
pub struct RestoredDescriptors {
    /// Describes them; empty if there are none.
    pub note: Vec<u8>,
    /// Each under its number.
    pub descriptors: BTreeMap<u64, OwnedFd>,
}

/// Why the stored descriptors cannot be used. They are closed.
#[derive(Debug, thiserror::Error)]
pub enum FdStoreError {
    /// The service manager does not confirm their removal.
    #[error("the service manager does not give them up: {0}")]
    NotRemoved(io::Error),
    /// Number of notes, if it is not one.
    #[error("{0} notes came with them instead of one")]
    Notes(usize),
    /// The note cannot be read.
    #[error("the note that came with them: {0}")]
    Unreadable(io::Error),
}

impl StoredDescriptors {
    /// Whether a descriptor of this name comes from the store.
    pub(super) fn is_stored_name(name: &str) -> bool {
        name.starts_with(PREFIX)
    }

    pub(super) fn add(&mut self, name: String, descriptor: OwnedFd) {
        self.0.push((name, descriptor));
    }

    /// The number of descriptors, notes included.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Removes all descriptors from the store, and returns the note with those of its generation.
    ///
    /// # Errors
    /// [`FdStoreError`].
    pub fn take(self, notifier: &ServiceManager) -> Result<RestoredDescriptors, FdStoreError> {
        if self.0.is_empty() {
            return Ok(RestoredDescriptors::default());
        }
        let removed = self.0.iter().try_for_each(|(name, _)| notifier.remove(name));
        removed
            .and_then(|()| notifier.barrier(BARRIER_TIMEOUT))
            .map_err(FdStoreError::NotRemoved)?;
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

/// The name of a descriptor in the store: `carry-GENERATION` of a note, `carry-GENERATION-NUMBER` of
/// the descriptors that it describes.
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

/// The capacity according to the variable, less one for the note.
fn capacity(variable: Option<&str>) -> usize {
    let most: usize = variable.and_then(|number| number.parse().ok()).unwrap_or(0);
    most.saturating_sub(1).min(DESCRIPTORS_MAX)
}

/// Creates a file in memory that holds `bytes` and can never change.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let descriptor = without_execute(|flags| memfd_create(c"flexnbd-carry", flags))?;
    let mut file = File::from(descriptor);
    file.write_all(bytes)?;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals()))?;
    Ok(file.into())
}

/// Creates a sealable file in memory that can never be executed: with the sysctl vm.memfd_noexec=2
/// any other fails with EACCES. Linux before 6.3 has neither the flag nor the sysctl.
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
    // SAFETY: the seals prevent every process, including ours, from changing or truncating the file
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
            assert!(StoredDescriptors::is_stored_name(name));
            stored.add(name.to_owned(), descriptor);
        }
        stored.take(&ServiceManager::silent())
    }

    #[test]
    fn only_the_generation_of_the_note_is_returned() {
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
    fn anything_but_one_note_is_an_error() {
        let pair = || OwnedFd::from(UnixStream::pair().unwrap().0);
        assert!(matches!(stored(vec![("carry-ff-7", pair())]), Err(FdStoreError::Notes(0))));
        let note = || sealed(b"x").unwrap();
        let two = stored(vec![("carry-ff", note()), ("carry-fe", note()), ("carry-ff-7", pair())]);
        assert!(matches!(two, Err(FdStoreError::Notes(2))));
        assert!(stored(Vec::new()).unwrap().note.is_empty());
    }

    #[test]
    fn a_note_without_seals_is_refused() {
        let open = memfd_create(c"open", MFdFlags::MFD_ALLOW_SEALING).unwrap();
        assert!(matches!(stored(vec![("carry-ff", open)]), Err(FdStoreError::Unreadable(_))));
        let socket = UnixStream::pair().unwrap().0.into();
        assert!(matches!(stored(vec![("carry-ff", socket)]), Err(FdStoreError::Unreadable(_))));
    }

    /// `F_SEAL_EXEC` of fcntl(2), which libc lacks.
    const SEAL_EXEC: i32 = 0x20;

    #[test]
    fn notes_are_not_executable_if_the_kernel_supports_that() {
        // The sysctl came with the flag (sysctl/vm of the kernel's documentation).
        let is_supported = std::path::Path::new("/proc/sys/vm/memfd_noexec").exists();
        let seals = fcntl(sealed(b"x").unwrap(), FcntlArg::F_GET_SEALS).unwrap();
        assert_eq!(seals & SEAL_EXEC != 0, is_supported);
        let strict = |flags: MFdFlags| match flags.bits() & MFD_NOEXEC_SEAL {
            0 => Err(Errno::EACCES),
            _ => Ok(()),
        };
        assert_eq!(without_execute(strict), Ok(()), "vm.memfd_noexec=2");
    }

    #[test]
    fn old_kernels_create_notes_without_the_noexec_flag() {
        let old = |flags: MFdFlags| match flags.bits() & MFD_NOEXEC_SEAL {
            0 => Ok(()),
            _ => Err(Errno::EINVAL),
        };
        assert_eq!(without_execute(old), Ok(()));
        assert_eq!(without_execute(|_| Err::<(), _>(Errno::EMFILE)), Err(Errno::EMFILE));
    }

    #[test]
    fn names_round_trip() {
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
    fn the_capacity_is_that_of_the_unit_less_the_note() {
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
            assert_eq!(capacity(variable), expected, "{variable:?}");
        }
    }

    #[test]
    fn the_longest_names_fit_into_the_environment() {
        const VARIABLE_MAX: usize = 128 << 10;
        let name = StoredName { generation: u64::MAX, number: Some(1 << 40) };
        assert!((name.to_string().len() + 1) * (DESCRIPTORS_MAX + 1) < VARIABLE_MAX);
    }
}

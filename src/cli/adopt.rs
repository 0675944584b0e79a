//! `flexnbd adopt`: declares this copy of a disk the canonical one, in its ownership record.
//! Never changes the disk's bytes, and fails while another process has the image locked.

use super::output;
use crate::disk::ownership::{BadRecord, Provenance, Record, for_adopt};
use crate::disk::record_store::{RecordStore, RecordStoreError};
use crate::disk::{Access, FileBackend, OpenError};
use crate::human::utc;
use crate::ids::DiskId;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The flags of `adopt`.
#[derive(clap::Args, Clone, Debug, PartialEq, Eq)]
pub struct Adopt {
    /// File or block device that holds the copy
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,

    /// Adopt it even if it is incomplete, or may have moved to another host
    #[arg(long)]
    pub force: bool,
}

/// Why a copy was not adopted; holds a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
enum AdoptError {
    /// The copy cannot be adopted, or only with `--force`.
    Refused(String),
    /// A system call failed.
    Io(String),
}

/// Adopts the copy, and prints its old and new record.
#[must_use]
pub fn run(adopt: &Adopt) -> ExitCode {
    match adopt.execute() {
        Ok(text) => output::print(&text),
        Err(AdoptError::Refused(why)) => {
            output::print_error(&format!("flexnbd adopt: {why}"), output::EXIT_CONFIG)
        }
        Err(AdoptError::Io(why)) => {
            output::print_error(&format!("flexnbd adopt: {why}"), output::EXIT_FAILURE)
        }
    }
}

impl Adopt {
    fn execute(&self) -> Result<String, AdoptError> {
        // Holds the image's lock until the record is written, so that no server starts from the old
        // one.
        let image = FileBackend::open(&self.file, Access { read_only: false })
            .map_err(|error| open_error(&self.file, error))?;
        let store = RecordStore::of(&image).map_err(io_error)?;
        let found = match store.read() {
            Ok(record) => ExistingRecord::Valid(record),
            Err(RecordStoreError::Bad { why: BadRecord::Garbage(_), .. }) if self.force => {
                ExistingRecord::Damaged
            }
            Err(RecordStoreError::Contradiction { .. }) if self.force => ExistingRecord::Damaged,
            Err(
                error @ (RecordStoreError::Bad { .. } | RecordStoreError::Contradiction { .. }),
            ) => {
                return Err(AdoptError::Refused(error.to_string()));
            }
            Err(error) => return Err(io_error(error)),
        };
        let record = self.record_to_write(&found)?;
        let image = self.file.display();
        if found == ExistingRecord::Valid(Some(record.clone())) {
            return Ok(format!("{image} is {} already; nothing changed", describe(&record)));
        }
        let disk_id = disk_id(&store, &found)?;
        if let Err(error) = store.write_disk_id(disk_id, Provenance::Adopted) {
            tracing::warn!("proxies cannot recognize the disk by an id: {error}");
        }
        store.write(Some(&record)).map_err(io_error)?;
        Ok(format!("{image} was {} and is now {}", found.describe(), describe(&record)))
    }

    fn record_to_write(&self, found: &ExistingRecord) -> Result<Record, AdoptError> {
        match found {
            ExistingRecord::Damaged => Ok(Record::Ours(Provenance::Adopted)),
            ExistingRecord::Valid(record) => {
                for_adopt(record.as_ref(), self.force).map_err(|refusal| {
                    AdoptError::Refused(refusal.explain(&self.file.display().to_string()))
                })
            }
        }
    }
}

/// The id that the disk keeps, or a new one: proxies that run must not go on with a copy which may differ from
/// what their clients have seen.
fn disk_id(store: &RecordStore, found: &ExistingRecord) -> Result<DiskId, AdoptError> {
    let kept = match found {
        ExistingRecord::Valid(None) => store.disk_id(Provenance::Native).map_err(io_error)?,
        _ => None,
    };
    let mut new = [0; 16];
    getrandom::fill(&mut new).map_err(|error| AdoptError::Io(error.to_string()))?;
    Ok(kept.unwrap_or(DiskId(new)))
}

/// The record that the image has.
#[derive(Clone, Debug, PartialEq, Eq)]
enum ExistingRecord {
    Valid(Option<Record>),
    /// A record that cannot be parsed, or two records that contradict each other.
    Damaged,
}

impl ExistingRecord {
    fn describe(&self) -> String {
        match self {
            Self::Valid(Some(record)) => describe(record),
            Self::Valid(None) => "without a record".to_owned(),
            Self::Damaged => "with a damaged record".to_owned(),
        }
    }
}

/// Formats a record for the operator: its name and its details.
fn describe(record: &Record) -> String {
    let details = match record {
        Record::Incoming { id: None } => {
            "from a source without a name, or from nobody yet".to_owned()
        }
        Record::Incoming { id: Some(id) } => format!("migration {id}"),
        Record::Ours(Provenance::Native) => "never moved".to_owned(),
        Record::Ours(Provenance::Adopted) => "adopted".to_owned(),
        Record::Ours(Provenance::Received) => "received from a source without a name".to_owned(),
        Record::Ours(Provenance::Arrived(id)) => format!("arrived with migration {id}"),
        Record::FlushFailed { provenance, since } => {
            let ours = provenance
                .record()
                .map_or_else(|| "ours (never moved)".to_owned(), |ours| describe(&ours));
            return format!("{ours}, of which a flush failed at {}", utc(*since));
        }
        Record::Departing { id, to, .. } | Record::Departed { id, to, .. } => {
            format!("to {to}, migration {id}")
        }
    };
    format!("{} ({details})", record.name())
}

fn open_error(file: &Path, error: OpenError) -> AdoptError {
    match error {
        OpenError::Missing { .. } => {
            AdoptError::Refused(format!("{} does not exist", file.display()))
        }
        OpenError::AlreadyServed { by, .. } => {
            AdoptError::Refused(format!("{} is in use: {by}; stop that first", file.display()))
        }
        OpenError::Other { .. } => AdoptError::Io(error.to_string()),
        _ => AdoptError::Refused(error.to_string()),
    }
}

fn io_error(error: RecordStoreError) -> AdoptError {
    AdoptError::Io(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, RemoteAddress};
    use crate::disk::record_store::ATTRIBUTE;
    use std::fs;

    const ID: Id = Id([7; 16]);

    /// An image in a directory of its own, on a file system with extended attributes.
    struct Copy {
        _directory: tempfile::TempDir,
        file: PathBuf,
    }

    fn copy(record: Option<&Record>) -> Copy {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = directory.path().join("disk.img");
        fs::write(&file, [0; 4096]).unwrap();
        let copy = Copy { _directory: directory, file };
        copy.store().write(record).unwrap();
        copy
    }

    impl Copy {
        fn store(&self) -> RecordStore {
            RecordStore::at(&self.file).unwrap()
        }

        /// Adopts it; returns the message without the path.
        fn adopt(&self, force: bool) -> Result<String, AdoptError> {
            let adopt = Adopt { file: self.file.clone(), force };
            let outcome = adopt.execute();
            outcome.map(|text| text.replace(&format!("{} ", self.file.display()), ""))
        }
    }

    fn departed() -> Record {
        Record::Departed { id: ID, when: 1, to: RemoteAddress::new("[::1]:7").unwrap() }
    }

    const ADOPTED: Record = Record::Ours(Provenance::Adopted);

    #[test]
    fn a_copy_without_a_record_is_adopted() {
        let copy = copy(None);
        assert_eq!(copy.adopt(false), Ok("was without a record and is now ours (adopted)".into()));
        assert_eq!(copy.store().read().unwrap(), Some(ADOPTED));
    }

    #[test]
    fn a_departed_disk_is_adopted_only_by_force() {
        let copy = copy(Some(&departed()));
        let Err(AdoptError::Refused(why)) = copy.adopt(false) else { panic!("adopted") };
        assert!(why.contains("has moved to [::1]:7") && why.contains("adopt --force"), "{why}");
        assert_eq!(copy.store().read().unwrap(), Some(departed()));
        let expected =
            format!("was departed (to [::1]:7, migration {ID}) and is now ours (adopted)");
        assert_eq!(copy.adopt(true), Ok(expected));
        assert_eq!(copy.store().read().unwrap(), Some(ADOPTED));
    }

    #[test]
    fn an_incomplete_copy_is_adopted_only_by_force() {
        let copy = copy(Some(&Record::Incoming { id: None }));
        assert!(matches!(copy.adopt(false), Err(AdoptError::Refused(_))));
        assert!(copy.adopt(true).unwrap().starts_with("was incoming (from a source without"));
    }

    #[test]
    fn adopting_an_arrived_disk_keeps_its_record() {
        let record = Record::Ours(Provenance::Arrived(ID));
        let copy = copy(Some(&record));
        let expected = format!("is ours (arrived with migration {ID}) already; nothing changed");
        assert_eq!(copy.adopt(true), Ok(expected));
        assert_eq!(copy.store().read().unwrap(), Some(record));
    }

    #[test]
    fn force_replaces_a_damaged_but_no_newer_record() {
        let copy = copy(None);
        xattr::set(&copy.file, ATTRIBUTE, b"nonsense").unwrap();
        assert!(matches!(copy.adopt(false), Err(AdoptError::Refused(_))));
        let expected = "was with a damaged record and is now ours (adopted)";
        assert_eq!(copy.adopt(true), Ok(expected.into()));
        xattr::set(&copy.file, ATTRIBUTE, b"flexnbd 2 ours\n").unwrap();
        for force in [false, true] {
            let Err(AdoptError::Refused(why)) = copy.adopt(force) else { panic!("adopted") };
            assert!(why.contains("use the flexnbd that wrote it"), "{why}");
        }
    }

    #[test]
    fn an_image_in_use_is_left_alone() {
        let copy = copy(Some(&departed()));
        let server = FileBackend::open(&copy.file, Access { read_only: true }).unwrap();
        let Err(AdoptError::Refused(why)) = copy.adopt(true) else { panic!("adopted") };
        assert!(why.contains("in use"), "{why}");
        assert_eq!(copy.store().read().unwrap(), Some(departed()));
        drop(server);
        assert!(copy.adopt(true).is_ok());
    }

    #[test]
    fn a_missing_file_or_directory_is_refused() {
        let nothing = Adopt { file: "/nowhere/disk.img".into(), force: true };
        let refused = nothing.execute();
        assert_eq!(refused, Err(AdoptError::Refused("/nowhere/disk.img does not exist".into())));
        let directory = Adopt { file: "/".into(), force: true };
        let refused = directory.execute();
        assert!(matches!(refused, Err(AdoptError::Refused(why)) if why.contains("directory")));
    }
}

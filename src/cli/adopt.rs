//! `flexnbd adopt`: declares this copy of a disk the canonical one, in its ownership record.
//! Never touches the disk's bytes, and nothing at all while somebody uses the image.

use super::output;
use crate::disk::ownership::{BadRecord, Provenance, Record, for_adopt};
use crate::disk::record_store::{RecordStore, RecordStoreError};
use crate::disk::{Access, FileBackend, OpenError};
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

/// Why a copy was not adopted; each holds a sentence for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
enum AdoptError {
    /// It is not fit to be, or not without `--force`.
    Refused(String),
    /// The system failed us.
    Io(String),
}

/// Adopts the copy, and tells what it was and is.
#[must_use]
pub fn run(adopt: &Adopt) -> ExitCode {
    match adopt.carry_out() {
        Ok(told) => output::say(&told),
        Err(AdoptError::Refused(why)) => {
            output::complain(&format!("flexnbd adopt: {why}"), output::EXIT_CONFIG)
        }
        Err(AdoptError::Io(why)) => {
            output::complain(&format!("flexnbd adopt: {why}"), output::EXIT_FAILURE)
        }
    }
}

impl Adopt {
    fn carry_out(&self) -> Result<String, AdoptError> {
        // Locked until the record is written, so that nobody serves it by the old one meanwhile.
        let image = FileBackend::open(&self.file, Access { read_only: false })
            .map_err(|error| unfit(&self.file, error))?;
        let ledger = RecordStore::of(&image).map_err(io)?;
        let found = match ledger.read() {
            Ok(found) => BesideImage::Record(found),
            Err(RecordStoreError::Bad { why: BadRecord::Garbage(_), .. }) if self.force => {
                BesideImage::Damaged
            }
            Err(RecordStoreError::Contradiction { .. }) if self.force => BesideImage::Damaged,
            Err(
                error @ (RecordStoreError::Bad { .. } | RecordStoreError::Contradiction { .. }),
            ) => {
                return Err(AdoptError::Refused(error.to_string()));
            }
            Err(error) => return Err(io(error)),
        };
        let record = self.judge(&found)?;
        let image = self.file.display();
        if found == BesideImage::Record(Some(record.clone())) {
            return Ok(format!("{image} is {} already; nothing changed", describe(&record)));
        }
        ledger.write(Some(&record)).map_err(io)?;
        Ok(format!("{image} was {} and is now {}", found.describe(), describe(&record)))
    }

    /// The record to write.
    fn judge(&self, found: &BesideImage) -> Result<Record, AdoptError> {
        match found {
            BesideImage::Damaged => Ok(Record::Ours(Provenance::Adopted)),
            BesideImage::Record(record) => {
                for_adopt(record.as_ref(), self.force).map_err(|refusal| {
                    AdoptError::Refused(refusal.explain(&self.file.display().to_string()))
                })
            }
        }
    }
}

/// What lies beside the image.
#[derive(Clone, Debug, PartialEq, Eq)]
enum BesideImage {
    Record(Option<Record>),
    /// Something that is no record.
    Damaged,
}

impl BesideImage {
    fn describe(&self) -> String {
        match self {
            Self::Record(Some(record)) => describe(record),
            Self::Record(None) => "without a record".to_owned(),
            Self::Damaged => "with a damaged record".to_owned(),
        }
    }
}

/// A record for people: its name, and what there is to know of it.
fn describe(record: &Record) -> String {
    let more = match record {
        Record::Incoming { id: None } => {
            "from a source without a name, or from nobody yet".to_owned()
        }
        Record::Incoming { id: Some(id) } => format!("migration {id}"),
        Record::Ours(Provenance::Native) => "never moved".to_owned(),
        Record::Ours(Provenance::Adopted) => "adopted".to_owned(),
        Record::Ours(Provenance::Received) => "received from a source without a name".to_owned(),
        Record::Ours(Provenance::Arrived(id)) => format!("arrived with migration {id}"),
        Record::Departing { id, to, .. } | Record::Departed { id, to, .. } => {
            format!("to {to}, migration {id}")
        }
    };
    format!("{} ({more})", record.name())
}

fn unfit(file: &Path, error: OpenError) -> AdoptError {
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

fn io(error: RecordStoreError) -> AdoptError {
    AdoptError::Io(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::ownership::{Id, RemoteAddress};
    use crate::disk::record_store::ATTRIBUTE;
    use std::fs;

    const ID: Id = Id([7; 16]);

    /// An image in a directory of its own, on a file system that has attributes.
    struct Copy {
        _directory: tempfile::TempDir,
        file: PathBuf,
    }

    fn copy(record: Option<&Record>) -> Copy {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let file = directory.path().join("disk.img");
        fs::write(&file, [0; 4096]).unwrap();
        let copy = Copy { _directory: directory, file };
        copy.ledger().write(record).unwrap();
        copy
    }

    impl Copy {
        fn ledger(&self) -> RecordStore {
            RecordStore::at(&self.file).unwrap()
        }

        /// What adopting it says, without the path.
        fn adopt(&self, force: bool) -> Result<String, AdoptError> {
            let adopt = Adopt { file: self.file.clone(), force };
            let told = adopt.carry_out();
            told.map(|told| told.replace(&format!("{} ", self.file.display()), ""))
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
        assert_eq!(copy.ledger().read().unwrap(), Some(ADOPTED));
    }

    #[test]
    fn a_copy_that_may_be_elsewhere_is_adopted_by_force_only() {
        let copy = copy(Some(&departed()));
        let Err(AdoptError::Refused(why)) = copy.adopt(false) else { panic!("adopted") };
        assert!(why.contains("has moved to [::1]:7") && why.contains("adopt --force"), "{why}");
        assert_eq!(copy.ledger().read().unwrap(), Some(departed()));
        let told = format!("was departed (to [::1]:7, migration {ID}) and is now ours (adopted)");
        assert_eq!(copy.adopt(true), Ok(told));
        assert_eq!(copy.ledger().read().unwrap(), Some(ADOPTED));
    }

    #[test]
    fn an_incomplete_copy_is_adopted_by_force_only() {
        let copy = copy(Some(&Record::Incoming { id: None }));
        assert!(matches!(copy.adopt(false), Err(AdoptError::Refused(_))));
        assert!(copy.adopt(true).unwrap().starts_with("was incoming (from a source without"));
    }

    #[test]
    fn a_disk_that_has_arrived_keeps_the_migration_it_came_with() {
        let record = Record::Ours(Provenance::Arrived(ID));
        let copy = copy(Some(&record));
        let told = format!("is ours (arrived with migration {ID}) already; nothing changed");
        assert_eq!(copy.adopt(true), Ok(told));
        assert_eq!(copy.ledger().read().unwrap(), Some(record));
    }

    #[test]
    fn a_damaged_record_is_replaced_by_force_and_that_of_a_newer_flexnbd_never() {
        let copy = copy(None);
        xattr::set(&copy.file, ATTRIBUTE, b"nonsense").unwrap();
        assert!(matches!(copy.adopt(false), Err(AdoptError::Refused(_))));
        let told = "was with a damaged record and is now ours (adopted)";
        assert_eq!(copy.adopt(true), Ok(told.into()));
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
        assert_eq!(copy.ledger().read().unwrap(), Some(departed()));
        drop(server);
        assert!(copy.adopt(true).is_ok());
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let nothing = Adopt { file: "/nowhere/disk.img".into(), force: true };
        let refused = nothing.carry_out();
        assert_eq!(refused, Err(AdoptError::Refused("/nowhere/disk.img does not exist".into())));
        let directory = Adopt { file: "/".into(), force: true };
        let refused = directory.carry_out();
        assert!(matches!(refused, Err(AdoptError::Refused(why)) if why.contains("directory")));
    }
}

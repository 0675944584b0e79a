//! Fuzz target of ownership records (`tests/fuzz`): arbitrary bytes as a record, as the attribute of an image,
//! and as its entry in the state directory.
//!
//! A record has one spelling, every location returns the same record for the same bytes, and damaged bytes
//! are never taken for "no record".

use super::ownership::disk_id::StoredDiskId;
use super::ownership::{RECORD_MAX, Record, for_adopt, for_listen, for_serve};
use super::record_store::{ATTRIBUTE, RecordStore, RecordStoreError};
use super::state_entries;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use xattr::FileExt;

/// An image and its state directory, in the directory for temporary files.
#[derive(Debug)]
struct ImageFiles {
    image: PathBuf,
    state: PathBuf,
    file: File,
    /// Whether the file system stores attributes.
    has_attributes: bool,
}

/// The directory of the files of this process, which are left there: libFuzzer ends by exit(3).
pub(crate) fn directory() -> PathBuf {
    std::env::temp_dir().join(format!("flexnbd-fuzz-{}", std::process::id()))
}

impl ImageFiles {
    fn create() -> io::Result<Self> {
        let directory = directory();
        let (image, state) = (directory.join("disk.img"), directory.join("state"));
        fs::create_dir_all(&state)?;
        fs::write(&image, [0; 512])?;
        let file = File::open(&image)?;
        let has_attributes = file.set_xattr(ATTRIBUTE, b"").is_ok();
        Ok(Self { image, state, file, has_attributes })
    }

    fn get() -> Option<&'static Self> {
        static FILES: OnceLock<Option<ImageFiles>> = OnceLock::new();
        FILES.get_or_init(|| Self::create().ok()).as_ref()
    }
}

/// A record. The first byte chooses where it is: nowhere but in memory, in the attribute, or in the entry.
pub(crate) fn record(bytes: &[u8]) {
    let Some((place, bytes)) = bytes.split_first() else { return };
    let decoded = Record::decode(bytes);
    if let Ok(record) = &decoded {
        assert_eq!(record.encode().as_bytes(), bytes, "a second spelling");
        assert!(bytes.len() <= RECORD_MAX, "{} bytes", bytes.len());
        decide(record);
    }
    if let Some(stored) = StoredDiskId::decode(bytes) {
        assert_eq!(stored.encode().as_bytes(), bytes, "a second spelling");
    }
    let Some(files) = ImageFiles::get() else { return };
    match place % 3 {
        0 => {}
        1 if files.has_attributes && bytes.len() <= RECORD_MAX => {
            if files.file.set_xattr(ATTRIBUTE, bytes).is_ok() {
                check_store(files, &decoded.ok());
            }
            let _ = files.file.remove_xattr(ATTRIBUTE);
        }
        _ => entry(files, bytes),
    }
}

/// The decisions that follow from a record, with all options.
fn decide(record: &Record) {
    let (_, name) = (for_serve(Some(record)), record.name());
    for option in [false, true] {
        let _ = for_listen(Some(record), option);
        let adopted = for_adopt(Some(record), option);
        assert!(adopted.is_ok() || !option, "{name} cannot be adopted with --force");
    }
}

/// The store returns this record, or an error if the bytes are none.
fn check_store(files: &ImageFiles, expected: &Option<Record>) {
    let Ok(store) = RecordStore::open(&files.image, Some(&files.state)) else { return };
    match store.peek() {
        Ok(found) => assert_eq!((&found, found.is_some()), (expected, true)),
        Err(RecordStoreError::Bad { .. }) => assert_eq!(expected, &None),
        // The image has no attribute then, or the file system fails.
        Err(_) => {}
    }
}

/// The bytes as an entry: a line with a record, and perhaps a line with the id of an image.
fn entry(files: &ImageFiles, bytes: &[u8]) {
    let _ = files.file.remove_xattr(ATTRIBUTE);
    let path = state_entries::default_path(&files.state, &files.image);
    if fs::write(&path, bytes).is_err() {
        return;
    }
    if let Ok(Some(found)) = state_entries::read(&path) {
        let is_damaged = found.line.len() > RECORD_MAX;
        assert!(is_damaged || bytes.starts_with(&found.line), "{:?}", found.line);
        let expected = Record::decode(&found.line).ok();
        let Ok(store) = RecordStore::open(&files.image, Some(&files.state)) else { return };
        match store.peek() {
            // None if it is the entry of another file.
            Ok(None) => assert_ne!(found.line, bytes, "a damaged entry counts as none"),
            Ok(record) => assert_eq!(record, expected),
            Err(RecordStoreError::Bad { .. }) => assert_eq!(expected, None),
            Err(_) => {}
        }
    }
    let _ = fs::remove_file(path);
}

//! Records of real files, on a file system with extended attributes, and a state directory.

use super::*;
use crate::disk::Access;
use crate::disk::ownership::{Id, Provenance, RemoteAddress};

const OURS: Record = Record::Ours(Provenance::Adopted);
const INCOMING: Record = Record::Incoming { id: None };
const SIZE: u64 = 4096;

struct Fixture {
    directory: tempfile::TempDir,
    path: PathBuf,
    state: PathBuf,
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("disk.img");
    fs::write(&path, [0; SIZE as usize]).unwrap();
    let state = directory.path().join("state");
    Fixture { directory, path, state }
}

impl Fixture {
    fn store(&self) -> RecordStore {
        RecordStore::open(&self.path, Some(&self.state)).unwrap()
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn entries(&self) -> usize {
        fs::read_dir(&self.state).map_or(0, Iterator::count)
    }
}

#[test]
fn record_is_read_back_after_reopening_the_image() {
    let fixture = fixture();
    let store = fixture.store();
    assert_eq!(store.read().unwrap(), None);
    for record in [Some(&OURS), Some(&INCOMING), None] {
        store.write(record).unwrap();
        assert_eq!(fixture.store().read().unwrap().as_ref(), record);
    }
}

#[test]
fn record_belongs_to_the_open_file() {
    let fixture = fixture();
    let image = FileBackend::open(&fixture.path, Access { read_only: false }).unwrap();
    let store = RecordStore::of(&image).unwrap();
    let moved = fixture.beside("moved");
    fs::rename(&fixture.path, &moved).unwrap();
    fs::write(&fixture.path, [1; SIZE as usize]).unwrap();
    store.reopen().unwrap().write(Some(&OURS)).unwrap();
    assert_eq!(fixture.store().read().unwrap(), None);
    assert_eq!(
        RecordStore::open(&moved, Some(&fixture.state)).unwrap().read().unwrap(),
        Some(OURS)
    );
}

#[test]
fn record_moves_between_its_two_locations() {
    let fixture = fixture();
    let store = fixture.store();
    store.write(Some(&OURS)).unwrap();
    // As if the attribute could be neither written nor removed.
    store.write_entry(&INCOMING).unwrap();
    assert_eq!(store.read().unwrap(), Some(INCOMING), "the attribute is older");
    store.write(Some(&OURS)).unwrap();
    assert_eq!((store.read().unwrap(), fixture.entries()), (Some(OURS), 0));
    store.write_entry(&INCOMING).unwrap();
    store.write(None).unwrap();
    assert_eq!((store.read().unwrap(), fixture.entries()), (None, 0));
}

#[test]
fn matching_or_only_record_is_chosen() {
    let (a, b) = (&b"a"[..], &b"b"[..]);
    assert_eq!(choose_location(None, None), Ok(None));
    assert_eq!(choose_location(Some(a), None), Ok(Some(a)));
    for id_matches in [true, false] {
        assert_eq!(choose_location(None, Some((b, id_matches))), Ok(Some(b)));
        assert_eq!(choose_location(Some(b), Some((b, id_matches))), Ok(Some(b)));
    }
    assert_eq!(choose_location(Some(a), Some((b, true))), Ok(Some(b)));
    assert_eq!(choose_location(Some(a), Some((b, false))), Err(Disagreement));
}

#[test]
fn contradictory_records_are_an_error() {
    let fixture = fixture();
    let store = fixture.store();
    store.write(Some(&OURS)).unwrap();
    fs::create_dir(&fixture.state).unwrap();
    // Without a file id, as an older flexnbd has written it.
    fs::write(&store.default_path, INCOMING.encode()).unwrap();
    let error = store.read().unwrap_err();
    assert!(error.to_string().contains("adopt --force"), "{error}");
    store.write(Some(&OURS)).unwrap();
    assert_eq!(store.read().unwrap(), Some(OURS));
}

#[test]
fn record_follows_its_file_not_its_path() {
    let fixture = fixture();
    let moved = fixture.beside("moved");
    fixture.store().write_entry(&OURS).unwrap();
    fs::rename(&fixture.path, &moved).unwrap();
    fs::write(&fixture.path, [1; SIZE as usize]).unwrap();
    let (next, first) = (fixture.store(), RecordStore::open(&moved, Some(&fixture.state)).unwrap());
    assert_eq!(next.read().unwrap(), None);
    assert_eq!(next.foreign_record(), Some(next.default_path.clone()));
    assert_eq!(first.read().unwrap(), Some(OURS));
    next.write_entry(&INCOMING).unwrap();
    assert_eq!((next.read().unwrap(), first.read().unwrap()), (Some(INCOMING), Some(OURS)));
    first.write(None).unwrap();
    assert_eq!((next.read().unwrap(), first.read().unwrap()), (Some(INCOMING), None));
}

#[test]
fn damaged_entry_is_an_error() {
    let fixture = fixture();
    let store = fixture.store();
    fs::create_dir(&fixture.state).unwrap();
    for nonsense in ["nonsense", &"x".repeat(RECORD_MAX + 900), ""] {
        fs::write(&store.default_path, nonsense).unwrap();
        assert!(matches!(store.read(), Err(RecordStoreError::Bad { .. })), "{nonsense}");
    }
}

#[test]
fn reserving_leaves_no_record() {
    let fixture = fixture();
    let store = fixture.store();
    store.reserve().unwrap();
    assert_eq!(fixture.entries(), 0, "created a state directory without need");
    fs::create_dir(&fixture.state).unwrap();
    store.reserve().unwrap();
    assert_eq!((store.read().unwrap(), fixture.entries()), (None, 0));
    assert!(store.spare().is_some());
    assert_eq!(store.image.list_xattr().unwrap().count(), 0);
    store.write_entry(&OURS).unwrap();
    assert!(store.spare().is_some(), "no spare file for the next record");
    assert_eq!(fixture.entries(), 1);
    assert_eq!(fixture.store().read().unwrap(), Some(OURS));
}

/// A store as on a full file system: it can remove records, but not write any.
fn full(fixture: &Fixture) -> RecordStore {
    let mut store = fixture.store();
    // procfs has no extended attributes, and the temporary name of the entry is a directory that is
    // not empty.
    store.image = File::open("/proc/self/status").unwrap();
    let temporary = state_entries::with_suffix(&store.default_path, "~new");
    fs::create_dir_all(temporary.join("taken")).unwrap();
    store
}

#[test]
fn unrecorded_move_stores_a_record_that_fits() {
    let fixture = fixture();
    let mut store = fixture.store();
    store.write(Some(&INCOMING)).unwrap();
    store.allow_unrecorded();
    store.reopen().unwrap().write(Some(&OURS)).unwrap();
    assert_eq!(fixture.store().read().unwrap(), Some(OURS));
}

#[test]
fn unrecorded_move_removes_an_invalid_record() {
    let fixture = fixture();
    fixture.store().write_entry(&INCOMING).unwrap();
    let mut store = full(&fixture);
    assert!(store.write(Some(&OURS)).is_err(), "a full file system stored a record");
    assert_eq!(store.peek().unwrap(), Some(INCOMING));
    store.allow_unrecorded();
    store.write(Some(&OURS)).unwrap();
    assert_eq!(fixture.store().read().unwrap(), None);
}

#[test]
fn unrecorded_move_fails_if_an_old_record_stays() {
    let fixture = fixture();
    let mut store = full(&fixture);
    store.allow_unrecorded();
    // An entry that cannot be read cannot be removed, either.
    fs::create_dir(&store.default_path).unwrap();
    assert!(store.write(Some(&OURS)).is_err());
}

#[test]
fn unrecorded_departure_leaves_departing_in_place() {
    let fixture = fixture();
    let (id, to) = (Id([1; 16]), RemoteAddress::new("192.0.2.1:10809").unwrap());
    let leaving =
        |id| Record::Departing { id, before: Provenance::Native, to: to.clone(), from: None };
    fixture.store().write_entry(&leaving(id)).unwrap();
    let mut store = full(&fixture);
    store.allow_unrecorded();
    store.write(Some(&Record::Departed { id, when: 0, to: to.clone() })).unwrap();
    assert_eq!(store.peek().unwrap(), Some(leaving(id)));
    store.write(Some(&Record::Departed { id: id.next(), when: 0, to: to.clone() })).unwrap();
    assert_eq!(store.peek().unwrap(), None);
}

#[test]
fn image_without_id_keeps_the_next_files_record() {
    let fixture = fixture();
    let mut store = fixture.store();
    store.id = None;
    store.write_entry(&OURS).unwrap();
    fs::rename(&fixture.path, fixture.beside("moved")).unwrap();
    fs::write(&fixture.path, [1; SIZE as usize]).unwrap();
    let error = store.write(None).unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
    assert_eq!(fixture.entries(), 1);
    fs::remove_file(&fixture.path).unwrap();
    store.write(None).unwrap();
    assert_eq!(fixture.entries(), 0, "no file has the path");
}

/// Files in a snapshot of a btrfs subvolume have the inode numbers of the originals.
#[test]
fn adopting_a_snapshot_keeps_the_originals_record() {
    let fixture = fixture();
    let original = fixture.store();
    original.write_entry(&INCOMING).unwrap();
    let copy = fixture.beside("before.img");
    fs::write(&copy, [0; SIZE as usize]).unwrap();
    let mut snapshot = RecordStore::open(&copy, Some(&fixture.state)).unwrap();
    snapshot.id = original.id.clone();
    assert_eq!(
        snapshot.read().unwrap(),
        Some(INCOMING),
        "the copy of an incomplete disk is incomplete"
    );
    assert!(snapshot.write(None).is_err(), "removed the record of the original");
    snapshot.write(Some(&OURS)).unwrap();
    assert_eq!(snapshot.read().unwrap(), Some(OURS));
    assert_eq!(original.read().unwrap(), Some(INCOMING));
    snapshot.write(Some(&INCOMING)).unwrap();
    assert_eq!(snapshot.read().unwrap(), Some(INCOMING));
    original.write(Some(&OURS)).unwrap();
    assert_eq!(original.read().unwrap(), Some(OURS));
}

#[test]
fn renamed_snapshot_does_not_get_its_originals_record() {
    let fixture = fixture();
    // The search finds its entry before that of the snapshot.
    let original = fixture.beside("before.img");
    fs::write(&original, [0; SIZE as usize]).unwrap();
    let original = RecordStore::open(&original, Some(&fixture.state)).unwrap();
    original.write_entry(&OURS).unwrap();
    let mut snapshot = fixture.store();
    snapshot.id = original.id.clone();
    snapshot.write(Some(&INCOMING)).unwrap();
    let moved = fixture.beside("moved");
    fs::rename(&fixture.path, &moved).unwrap();
    let mut snapshot = RecordStore::open(&moved, Some(&fixture.state)).unwrap();
    snapshot.id = original.id.clone();
    assert_eq!(snapshot.read().unwrap(), Some(INCOMING));
    snapshot.write(None).unwrap();
    assert_eq!(original.read().unwrap(), Some(OURS));
}

#[test]
fn device_record_is_stored_by_path() {
    let fixture = fixture();
    let node = fixture.beside("node");
    std::os::unix::fs::symlink("/dev/null", &node).unwrap();
    let mut store = RecordStore::open(&node, Some(&fixture.state)).unwrap();
    store.id = None;
    // `read` would sync the image, and /dev/null does not support that.
    store.write(Some(&OURS)).unwrap();
    assert_eq!(store.peek().unwrap(), Some(OURS));
    fs::remove_file(&node).unwrap();
    fs::write(&node, "").unwrap();
    let error = store.write(Some(&INCOMING)).unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
    let error = store.reserve().unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
}

#[test]
fn deleting_an_image_removes_its_record() {
    let fixture = fixture();
    let store = fixture.store();
    store.write_entry(&OURS).unwrap();
    store.delete_image(Some(&OURS), SIZE).unwrap();
    assert!(!fixture.path.exists() && fixture.entries() == 0);
    store.delete_image(Some(&OURS), SIZE).unwrap();
    assert_eq!(
        read_tombstone_in(&fixture.path, &fixture.state).unwrap(),
        None,
        "left a tombstone unasked"
    );
}

#[test]
fn image_with_an_unserved_tail_is_not_deleted() {
    let fixture = fixture();
    let store = fixture.store();
    let error = store.delete_image(None, SIZE - 512).unwrap_err();
    assert!(error.to_string().contains("the last 512 bytes of it do not move"), "{error}");
    assert!(fixture.path.exists());
    assert_eq!((store.bytes_beyond(SIZE).unwrap(), store.bytes_beyond(SIZE - 1).unwrap()), (0, 1));
    store.delete_image(None, SIZE).unwrap();
}

#[test]
fn tombstone_is_no_record_of_the_next_image() {
    let fixture = fixture();
    let mut store = fixture.store();
    store.leave_tombstone();
    store.delete_image(Some(&OURS), SIZE).unwrap();
    assert_eq!(read_tombstone_in(&fixture.path, &fixture.state).unwrap(), Some(OURS));
    fs::write(&fixture.path, [0; SIZE as usize]).unwrap();
    let next = fixture.store();
    assert_eq!(next.read().unwrap(), None);
    next.remove_tombstone().unwrap();
    assert_eq!(read_tombstone_in(&fixture.path, &fixture.state).unwrap(), None);
    next.remove_tombstone().unwrap();
}

#[test]
fn path_too_long_for_an_entry_has_no_record() {
    let fixture = fixture();
    let long = fixture.beside(&"d".repeat(250));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("disk.img"), [0; 4096]).unwrap();
    let store = RecordStore::open(&long.join("disk.img"), Some(&fixture.state)).unwrap();
    assert_eq!(store.read().unwrap(), None);
    assert!(store.write_entry(&OURS).is_err());
}

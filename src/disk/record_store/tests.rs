//! Records of real files, on a file system that has attributes, with a state directory beside.

use super::*;
use crate::disk::Access;
use crate::disk::ownership::{Id, Provenance, RemoteAddress};

const OURS: Record = Record::Ours(Provenance::Adopted);
const INCOMING: Record = Record::Incoming { id: None };
const SIZE: u64 = 4096;

struct Setting {
    directory: tempfile::TempDir,
    path: PathBuf,
    state: PathBuf,
}

fn setting() -> Setting {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("disk.img");
    fs::write(&path, [0; SIZE as usize]).unwrap();
    let state = directory.path().join("state");
    Setting { directory, path, state }
}

impl Setting {
    fn ledger(&self) -> RecordStore {
        RecordStore::open(&self.path, Some(&self.state)).unwrap()
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn kept(&self) -> usize {
        fs::read_dir(&self.state).map_or(0, Iterator::count)
    }
}

#[test]
fn a_record_is_read_back_by_whoever_opens_the_image_next() {
    let setting = setting();
    let ledger = setting.ledger();
    assert_eq!(ledger.read().unwrap(), None);
    for record in [Some(&OURS), Some(&INCOMING), None] {
        ledger.write(record).unwrap();
        assert_eq!(setting.ledger().read().unwrap().as_ref(), record);
    }
}

#[test]
fn the_record_is_that_of_the_open_file() {
    let setting = setting();
    let image = FileBackend::open(&setting.path, Access { read_only: false }).unwrap();
    let ledger = RecordStore::of(&image).unwrap();
    let moved = setting.beside("moved");
    fs::rename(&setting.path, &moved).unwrap();
    fs::write(&setting.path, [1; SIZE as usize]).unwrap();
    ledger.reopen().unwrap().write(Some(&OURS)).unwrap();
    assert_eq!(setting.ledger().read().unwrap(), None);
    assert_eq!(
        RecordStore::open(&moved, Some(&setting.state)).unwrap().read().unwrap(),
        Some(OURS)
    );
}

#[test]
fn a_record_moves_between_its_two_places() {
    let setting = setting();
    let ledger = setting.ledger();
    ledger.write(Some(&OURS)).unwrap();
    // As if the attribute could not be written, and not removed either.
    ledger.write_entry(&INCOMING).unwrap();
    assert_eq!(ledger.read().unwrap(), Some(INCOMING), "the attribute is older");
    ledger.write(Some(&OURS)).unwrap();
    assert_eq!((ledger.read().unwrap(), setting.kept()), (Some(OURS), 0));
    ledger.write_entry(&INCOMING).unwrap();
    ledger.write(None).unwrap();
    assert_eq!((ledger.read().unwrap(), setting.kept()), (None, 0));
}

#[test]
fn of_two_records_the_certain_or_the_only_one_counts() {
    let (a, b) = (&b"a"[..], &b"b"[..]);
    assert_eq!(which(None, None), Ok(None));
    assert_eq!(which(Some(a), None), Ok(Some(a)));
    for certain in [true, false] {
        assert_eq!(which(None, Some((b, certain))), Ok(Some(b)));
        assert_eq!(which(Some(b), Some((b, certain))), Ok(Some(b)));
    }
    assert_eq!(which(Some(a), Some((b, true))), Ok(Some(b)));
    assert_eq!(which(Some(a), Some((b, false))), Err(Disagreement));
}

#[test]
fn records_that_contradict_each_other_are_an_error() {
    let setting = setting();
    let ledger = setting.ledger();
    ledger.write(Some(&OURS)).unwrap();
    fs::create_dir(&setting.state).unwrap();
    // Without a lasting name, as an older flexnbd has written it.
    fs::write(&ledger.usual, INCOMING.encode()).unwrap();
    let error = ledger.read().unwrap_err();
    assert!(error.to_string().contains("adopt --force"), "{error}");
    ledger.write(Some(&OURS)).unwrap();
    assert_eq!(ledger.read().unwrap(), Some(OURS));
}

#[test]
fn a_record_follows_its_file_and_not_its_path() {
    let setting = setting();
    let moved = setting.beside("moved");
    setting.ledger().write_entry(&OURS).unwrap();
    fs::rename(&setting.path, &moved).unwrap();
    fs::write(&setting.path, [1; SIZE as usize]).unwrap();
    let (next, first) =
        (setting.ledger(), RecordStore::open(&moved, Some(&setting.state)).unwrap());
    assert_eq!(next.read().unwrap(), None);
    assert_eq!(next.foreign_record(), Some(next.usual.clone()));
    assert_eq!(first.read().unwrap(), Some(OURS));
    next.write_entry(&INCOMING).unwrap();
    assert_eq!((next.read().unwrap(), first.read().unwrap()), (Some(INCOMING), Some(OURS)));
    first.write(None).unwrap();
    assert_eq!((next.read().unwrap(), first.read().unwrap()), (Some(INCOMING), None));
}

#[test]
fn what_is_no_record_is_an_error_and_not_none() {
    let setting = setting();
    let ledger = setting.ledger();
    fs::create_dir(&setting.state).unwrap();
    for nonsense in ["nonsense", &"x".repeat(RECORD_MAX + 900), ""] {
        fs::write(&ledger.usual, nonsense).unwrap();
        assert!(matches!(ledger.read(), Err(RecordStoreError::Bad { .. })), "{nonsense}");
    }
}

#[test]
fn room_for_a_record_is_found_without_leaving_one() {
    let setting = setting();
    let ledger = setting.ledger();
    ledger.reserve().unwrap();
    assert_eq!(setting.kept(), 0, "a state directory that is not needed is not made");
    fs::create_dir(&setting.state).unwrap();
    ledger.reserve().unwrap();
    assert_eq!((ledger.read().unwrap(), setting.kept()), (None, 0));
    assert!(ledger.spare().is_some());
    assert_eq!(ledger.image.list_xattr().unwrap().count(), 0);
    ledger.write_entry(&OURS).unwrap();
    assert!(ledger.spare().is_some(), "room for the next");
    assert_eq!(setting.kept(), 1);
    assert_eq!(setting.ledger().read().unwrap(), Some(OURS));
}

/// As on a full file system: a record can be removed, and none be written.
fn without_room(setting: &Setting) -> RecordStore {
    let mut ledger = setting.ledger();
    // Neither as an attribute, which procfs does not have, nor as an entry, whose temporary name is
    // a directory that is not empty.
    ledger.image = File::open("/proc/self/status").unwrap();
    let temporary = beside(&ledger.usual, "~new");
    fs::create_dir_all(temporary.join("taken")).unwrap();
    ledger
}

#[test]
fn an_unrecorded_move_keeps_what_record_fits() {
    let setting = setting();
    let mut ledger = setting.ledger();
    ledger.write(Some(&INCOMING)).unwrap();
    ledger.allow_unrecorded();
    ledger.reopen().unwrap().write(Some(&OURS)).unwrap();
    assert_eq!(setting.ledger().read().unwrap(), Some(OURS));
}

#[test]
fn an_unrecorded_move_removes_a_record_that_became_wrong() {
    let setting = setting();
    setting.ledger().write_entry(&INCOMING).unwrap();
    let mut ledger = without_room(&setting);
    assert!(ledger.write(Some(&OURS)).is_err(), "there is room");
    assert_eq!(ledger.peek().unwrap(), Some(INCOMING));
    ledger.allow_unrecorded();
    ledger.write(Some(&OURS)).unwrap();
    assert_eq!(setting.ledger().read().unwrap(), None);
}

#[test]
fn an_unrecorded_move_fails_if_an_old_record_stays() {
    let setting = setting();
    let mut ledger = without_room(&setting);
    ledger.allow_unrecorded();
    // What cannot be read cannot be removed, either.
    fs::create_dir(&ledger.usual).unwrap();
    assert!(ledger.write(Some(&OURS)).is_err());
}

#[test]
fn an_unrecorded_departure_leaves_departing_in_place() {
    let setting = setting();
    let (id, to) = (Id([1; 16]), RemoteAddress::new("192.0.2.1:10809").unwrap());
    let leaving =
        |id| Record::Departing { id, before: Provenance::Native, to: to.clone(), from: None };
    setting.ledger().write_entry(&leaving(id)).unwrap();
    let mut ledger = without_room(&setting);
    ledger.allow_unrecorded();
    ledger.write(Some(&Record::Departed { id, when: 0, to: to.clone() })).unwrap();
    assert_eq!(ledger.peek().unwrap(), Some(leaving(id)));
    ledger.write(Some(&Record::Departed { id: id.next(), when: 0, to: to.clone() })).unwrap();
    assert_eq!(ledger.peek().unwrap(), None);
}

#[test]
fn a_file_without_id_keeps_the_next_files_record() {
    let setting = setting();
    let mut ledger = setting.ledger();
    ledger.id = None;
    ledger.write_entry(&OURS).unwrap();
    fs::rename(&setting.path, setting.beside("moved")).unwrap();
    fs::write(&setting.path, [1; SIZE as usize]).unwrap();
    let error = ledger.write(None).unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
    assert_eq!(setting.kept(), 1);
    fs::remove_file(&setting.path).unwrap();
    ledger.write(None).unwrap();
    assert_eq!(setting.kept(), 0, "no file has the path");
}

/// A snapshot of a btrfs subvolume holds files with the inode numbers of the original's.
#[test]
fn adopting_a_snapshot_keeps_the_originals_record() {
    let setting = setting();
    let original = setting.ledger();
    original.write_entry(&INCOMING).unwrap();
    let copy = setting.beside("before.img");
    fs::write(&copy, [0; SIZE as usize]).unwrap();
    let mut snapshot = RecordStore::open(&copy, Some(&setting.state)).unwrap();
    snapshot.id = original.id.clone();
    assert_eq!(snapshot.read().unwrap(), Some(INCOMING), "a copy of an incomplete disk");
    assert!(snapshot.write(None).is_err(), "the record of the original");
    snapshot.write(Some(&OURS)).unwrap();
    assert_eq!(snapshot.read().unwrap(), Some(OURS));
    assert_eq!(original.read().unwrap(), Some(INCOMING));
    snapshot.write(Some(&INCOMING)).unwrap();
    assert_eq!(snapshot.read().unwrap(), Some(INCOMING));
    original.write(Some(&OURS)).unwrap();
    assert_eq!(original.read().unwrap(), Some(OURS));
}

#[test]
fn a_renamed_snapshot_does_not_bear_its_originals_record() {
    let setting = setting();
    // Its entry is found before that of the snapshot.
    let original = setting.beside("before.img");
    fs::write(&original, [0; SIZE as usize]).unwrap();
    let original = RecordStore::open(&original, Some(&setting.state)).unwrap();
    original.write_entry(&OURS).unwrap();
    let mut snapshot = setting.ledger();
    snapshot.id = original.id.clone();
    snapshot.write(Some(&INCOMING)).unwrap();
    let moved = setting.beside("moved");
    fs::rename(&setting.path, &moved).unwrap();
    let mut snapshot = RecordStore::open(&moved, Some(&setting.state)).unwrap();
    snapshot.id = original.id.clone();
    assert_eq!(snapshot.read().unwrap(), Some(INCOMING));
    snapshot.write(None).unwrap();
    assert_eq!(original.read().unwrap(), Some(OURS));
}

#[test]
fn a_device_has_its_record_in_the_state_directory_by_path() {
    let setting = setting();
    let node = setting.beside("node");
    std::os::unix::fs::symlink("/dev/null", &node).unwrap();
    let mut ledger = RecordStore::open(&node, Some(&setting.state)).unwrap();
    ledger.id = None;
    // It cannot be flushed, as reading would.
    ledger.write(Some(&OURS)).unwrap();
    assert_eq!(ledger.peek().unwrap(), Some(OURS));
    fs::remove_file(&node).unwrap();
    fs::write(&node, "").unwrap();
    let error = ledger.write(Some(&INCOMING)).unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
    let error = ledger.reserve().unwrap_err();
    assert!(error.to_string().contains("names another file now"), "{error}");
}

#[test]
fn a_deleted_image_is_gone_with_its_record() {
    let setting = setting();
    let ledger = setting.ledger();
    ledger.write_entry(&OURS).unwrap();
    ledger.delete_image(Some(&OURS), SIZE).unwrap();
    assert!(!setting.path.exists() && setting.kept() == 0);
    ledger.delete_image(Some(&OURS), SIZE).unwrap();
    assert_eq!(
        read_tombstone_in(&setting.path, &setting.state).unwrap(),
        None,
        "nobody wanted a note"
    );
}

#[test]
fn an_image_is_deleted_only_if_all_of_it_was_served() {
    let setting = setting();
    let ledger = setting.ledger();
    let error = ledger.delete_image(None, SIZE - 512).unwrap_err();
    assert!(error.to_string().contains("the last 512 bytes of it do not move"), "{error}");
    assert!(setting.path.exists());
    assert_eq!(
        (ledger.bytes_beyond(SIZE).unwrap(), ledger.bytes_beyond(SIZE - 1).unwrap()),
        (0, 1)
    );
    ledger.delete_image(None, SIZE).unwrap();
}

#[test]
fn a_deleted_image_can_leave_a_note_that_is_no_record_of_the_next_one() {
    let setting = setting();
    let mut ledger = setting.ledger();
    ledger.leave_tombstone();
    ledger.delete_image(Some(&OURS), SIZE).unwrap();
    assert_eq!(read_tombstone_in(&setting.path, &setting.state).unwrap(), Some(OURS));
    fs::write(&setting.path, [0; SIZE as usize]).unwrap();
    let next = setting.ledger();
    assert_eq!(next.read().unwrap(), None);
    next.remove_tombstone().unwrap();
    assert_eq!(read_tombstone_in(&setting.path, &setting.state).unwrap(), None);
    next.remove_tombstone().unwrap();
}

#[test]
fn a_path_too_long_for_a_record_has_none() {
    let setting = setting();
    let long = setting.beside(&"d".repeat(250));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("disk.img"), [0; 4096]).unwrap();
    let ledger = RecordStore::open(&long.join("disk.img"), Some(&setting.state)).unwrap();
    assert_eq!(ledger.read().unwrap(), None);
    assert!(ledger.write_entry(&OURS).is_err());
}

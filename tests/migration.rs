//! A disk moves from one process to another while clients use it: what is there afterwards.
//! Never kills or cuts anything; that is for `handover.rs`.

mod common;
#[path = "migration/mod.rs"]
mod fixture;

use common::{GIB, MIB};
use fixture::image::{
    assert_as_sparse, assert_same, empty_image, stamped_image, used_image,
};
use fixture::{Door, Host, NO_PAUSE, PLACES, Writers, directory};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

const STARTED: &str = "0: Mirror started";

/// A disk of 256 MiB, a quarter of it data, moves under four writers to where old bytes lie.
fn moves_under_writers(place: &str) {
    const SIZE: u64 = 256 * MIB;
    let dir = directory(place);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    stamped_image(&source.image, SIZE);
    used_image(&destination.image, SIZE);
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    let writers = Writers::start(Door::Tcp(source.address), SIZE, (4, 1, NO_PAUSE));
    writers.wait_for_writes(1000);
    assert_eq!(source.mirror_to(destination.address, &[]), STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    let written = writers.stop();
    assert_eq!(written.connections, 4, "sessions stayed until the disk was gone");
    assert_same(&source.image, &destination.image);
    written.assert_all_in(&destination.image, place);
    assert_as_sparse(&source.image, &destination.image);
    assert_eq!((source.record(), destination.record()), ("departed".into(), "ours".into()));
}

#[test]
fn every_acknowledged_write_is_at_the_destination_on_a_disk_file_system() {
    moves_under_writers(PLACES[0]);
}

#[test]
fn every_acknowledged_write_is_at_the_destination_on_tmpfs() {
    moves_under_writers(PLACES[1]);
}

/// Moves what `fill` makes of an empty image; both ends must succeed and be equal afterwards.
fn moves(place: &str, size: u64, fill: impl FnOnce(&File)) {
    let dir = directory(place);
    let (source, destination) = (Host::new(dir.path(), "source"), Host::new(dir.path(), "dest"));
    empty_image(&source.image, size);
    empty_image(&destination.image, size);
    fill(&File::options().write(true).open(&source.image).unwrap());
    let (mut serving, mut listening) = (source.serve(), destination.listen());
    assert_eq!(source.mirror_to(destination.address, &[]), STARTED);
    assert!(serving.wait_for_end().success(), "{}", serving.stderr());
    assert!(listening.wait_for_end().success(), "{}", listening.stderr());
    assert_same(&source.image, &destination.image);
    assert_as_sparse(&source.image, &destination.image);
}

#[test]
fn a_sparse_tebibyte_moves_as_fast_as_its_data() {
    for place in PLACES {
        moves(place, 1024 * GIB, |image| {
            for part in 0..100 {
                let data = common::noise(MIB as usize, part);
                image.write_all_at(&data, part * 10 * GIB + part * 4096).unwrap();
            }
        });
    }
}

//! man/flexnbd-release-notes.7: the newest version, and the versions of the formats.

use super::read;
use flexnbd::disk::ownership;
use flexnbd::migration::wire;
use flexnbd::server::SNAPSHOT_VERSION;

const PAGE: &str = "man/flexnbd-release-notes.7";

#[test]
fn the_newest_version_matches_the_program() {
    let source = read(PAGE);
    let mut headings = source.lines().filter_map(|line| line.strip_prefix(".Sh VERSION "));
    // Skips the heading "VERSION NUMBERS".
    let newest = headings.find(|heading| heading.contains('.'));
    assert_eq!(newest, Some(env!("CARGO_PKG_VERSION")));
}

/// The rows of the table of formats: name and version.
fn formats() -> Vec<(String, String)> {
    let source = read(PAGE);
    let rows = source.lines().filter_map(|line| line.strip_prefix(".It "));
    rows.filter_map(|row| {
        let mut columns = row.split(" Ta ").map(str::to_owned);
        Some((columns.next()?, columns.next()?))
    })
    .collect()
}

#[test]
fn format_versions_match_the_program() {
    let records = format!("{} and {}", ownership::VERSION, ownership::VERSION_2);
    for (format, version) in [
        ("private messages", wire::VERSION.to_string()),
        ("id of the disk", wire::DISK_ID_VERSION.to_string()),
        ("ownership record", records),
        ("stored id", ownership::VERSION.to_owned()),
        ("session snapshot", SNAPSHOT_VERSION.to_string()),
    ] {
        assert!(formats().contains(&(format.to_owned(), version)), "{format} in {:?}", formats());
    }
}

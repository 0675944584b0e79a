//! The message catalog: every message id has an entry, every entry an id, and the program sets the
//! fields that entries show.
//! Never reads a journal; the lab tests that lines arrive there.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use flexnbd::message_id;
use harness::project_path;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Fields that the unit adds to each line.
const UNIT_FIELDS: [&str; 1] = ["FLEXNBD_INSTANCE"];

/// One entry of the catalog.
struct Entry {
    headers: BTreeMap<String, String>,
    text: String,
}

/// The catalog's entries, by message id.
fn catalog() -> BTreeMap<String, Entry> {
    let text = fs::read_to_string(project_path("systemd/flexnbd.catalog")).unwrap();
    let mut found = BTreeMap::new();
    for entry in format!("\n{text}").split("\n-- ").skip(1) {
        let (id, rest) = entry.split_once('\n').unwrap();
        let (headers, text) = rest.split_once("\n\n").unwrap();
        let headers = headers.lines().map(|line| line.split_once(": ").unwrap());
        let headers = headers.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let entry = Entry { headers, text: text.to_owned() };
        assert!(found.insert(id.to_owned(), entry).is_none(), "duplicate entry {id}");
    }
    found
}

/// The source text of the program, without unit tests and `message_id.rs`.
fn source() -> String {
    fn append(directory: &Path, text: &mut String) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                append(&path, text);
            } else if !path.ends_with("message_id.rs") && !path.ends_with("tests.rs") {
                let file = fs::read_to_string(&path).unwrap();
                text.push_str(file.split("#[cfg(test)]\nmod tests {").next().unwrap());
            }
        }
    }
    let mut text = String::new();
    append(&project_path("src"), &mut text);
    text
}

/// The journal fields that the program sets.
fn fields(source: &str) -> BTreeSet<String> {
    let named = source.split("\"flexnbd.").skip(1).filter_map(|rest| rest.split_once('"'));
    let fields = named.filter(|(_, rest)| rest.trim_start().starts_with('='));
    fields.map(|(name, _)| format!("FLEXNBD_{}", name.to_uppercase())).collect()
}

#[test]
fn message_ids_are_unique_lower_case_hex() {
    let ids: BTreeSet<&str> = message_id::ALL.iter().map(|(_, id)| *id).collect();
    assert_eq!(ids.len(), message_id::ALL.len(), "duplicate id");
    for (name, id) in message_id::ALL {
        let is_lower_hex = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        assert!(id.len() == 32 && id.bytes().all(is_lower_hex), "{name} is {id}");
    }
}

#[test]
fn catalog_explains_exactly_the_known_ids() {
    let explained: BTreeSet<String> = catalog().into_keys().collect();
    let known: BTreeSet<String> = message_id::ALL.iter().map(|(_, id)| (*id).to_owned()).collect();
    assert_eq!(explained, known);
}

#[test]
fn every_message_id_is_logged_somewhere() {
    let source = source();
    for (name, _) in message_id::ALL {
        let is_used =
            source.split(|c: char| !c.is_ascii_uppercase() && c != '_').any(|w| w == *name);
        assert!(is_used, "{name} is never logged");
    }
}

#[test]
fn catalog_entries_are_complete_and_fit_a_terminal() {
    for (id, Entry { headers, text }) in catalog() {
        let keys: Vec<&str> = headers.keys().map(String::as_str).collect();
        assert_eq!(keys, ["Defined-By", "Documentation", "Subject", "Support"], "{id}");
        assert_eq!(headers["Defined-By"], "flexnbd", "{id}");
        assert!(headers["Documentation"].contains("man:flexnbd.service(7)"), "{id}");
        assert!(headers["Subject"].len() > 10 && !headers["Subject"].ends_with('.'), "{id}");
        assert!(text.len() > 80, "the entry of {id} is too short");
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{id} has a long line");
    }
}

#[test]
fn every_field_in_the_catalog_is_set() {
    let fields = fields(&source());
    assert!(fields.len() > 8, "only {fields:?} found");
    let mut shown = 0;
    for (id, Entry { headers, text }) in catalog() {
        let all = format!("{} {text}", headers["Subject"]);
        // The syntax of systemd's catalogs: @NAME@.
        for word in all.split('@').filter(|word| word.starts_with("FLEXNBD_")) {
            let is_unit_field = UNIT_FIELDS.contains(&word);
            assert!(
                is_unit_field || fields.contains(word),
                "the entry of {id} shows {word}, which is never set"
            );
            shown += 1;
        }
    }
    assert!(shown > 20, "only {shown} fields found");
}

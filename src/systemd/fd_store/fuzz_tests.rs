//! Fuzz target of the names of stored descriptors (`tests/fuzz`): each name that is read is written the same
//! way, apart from leading zeros and signs of its numbers.

use super::{DESCRIPTORS_MAX, StoredDescriptors, StoredName, capacity};

/// A name of a descriptor, and the variable with the capacity.
pub(crate) fn name(text: &str) {
    assert!(capacity(Some(text)) <= DESCRIPTORS_MAX);
    let Some(name) = StoredName::parse(text) else { return };
    assert!(StoredDescriptors::is_stored_name(text));
    assert_eq!(StoredName::parse(&name.to_string()), Some(name));
}

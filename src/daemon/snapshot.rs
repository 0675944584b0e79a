//! Sessions that outlive the process: the service manager's file descriptor store keeps them from
//! the end of one process to the start of the next.
//! Translates between the server and the store, which do not know each other.

use super::random;
use super::relaying::RelayNote;
use crate::human::counted;
use crate::message_id;
use crate::net::Stream;
use crate::server::StoredSessions;
use crate::systemd::{FdStore, ServiceManager, StoredDescriptors};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use tracing::{info, warn};

/// Begins the note of sessions whose requests were relayed. A process that cannot relay does not know it, and
/// closes the sessions.
const RELAY_MAGIC: [u8; 8] = *b"FLEXNBDr";
/// Version of the part of the note about the relay; no other is read.
const RELAY_VERSION: u32 = 1;

/// What a process leaves to the next.
#[derive(Debug, Default)]
pub(super) struct LeftSessions {
    pub(super) sessions: StoredSessions,
    /// How their requests were relayed, if they were.
    pub(super) relay: Option<RelayNote>,
}

/// Takes the last process's sessions out of the store. Closes descriptors that cannot be used.
pub(super) fn restore(stored: StoredDescriptors, notifier: &ServiceManager) -> LeftSessions {
    let count = stored.count();
    let kept = stored.take(notifier).map_err(|error| error.to_string());
    match kept.and_then(|kept| Ok((split_note(&kept.note)?, kept))) {
        Ok(((relay, snapshot), kept)) => {
            let streams = kept.descriptors.into_iter().filter_map(|(number, descriptor)| {
                let stream = Stream::inherited(descriptor);
                let usable = stream.inspect_err(|error| warn!("closed a stored session: {error}"));
                Some((number, usable.ok()?))
            });
            let sessions = StoredSessions { snapshot, streams: streams.collect() };
            LeftSessions { sessions, relay }
        }
        Err(why) => {
            warn!(
                "closed what the last process has left ({}): {why}",
                counted(count, "descriptor")
            );
            LeftSessions::default()
        }
    }
}

/// Stores sessions that this process has restored and not used.
pub(super) fn save_again(notifier: &ServiceManager, left: &LeftSessions) {
    let store = FdStore::from_env(notifier);
    // Without a store there are none.
    if store.capacity() > 0 {
        save(&store, left);
    }
}

/// Stores the sessions for the next process.
pub(super) fn save(store: &FdStore, left: &LeftSessions) {
    let LeftSessions { sessions, relay } = left;
    let count = sessions.streams.len();
    if count == 0 {
        return;
    }
    let descriptors: BTreeMap<_, _> =
        sessions.streams.iter().map(|(number, stream)| (*number, stream.as_fd())).collect();
    let note = note(relay.as_ref(), &sessions.snapshot);
    let stored = note
        .and_then(|note| Ok((random::bytes().map_err(io::Error::other)?, note)))
        .and_then(|(id, note)| store.put(u64::from_ne_bytes(id), &note, &descriptors));
    match stored {
        Ok(()) => info!(
            message_id = message_id::SESSIONS_STORED,
            "flexnbd.clients" = count,
            "left {} to the next process",
            counted(count, "session")
        ),
        Err(error) => {
            warn!("cannot leave {} to the next process: {error}", counted(count, "session"));
        }
    }
}

/// The note beside the descriptors: the snapshot, after the relay if there is one.
fn note(relay: Option<&RelayNote>, snapshot: &[u8]) -> io::Result<Vec<u8>> {
    let Some(relay) = relay else { return Ok(snapshot.to_vec()) };
    let mut note = RELAY_MAGIC.to_vec();
    note.extend(RELAY_VERSION.to_be_bytes());
    rmp_serde::encode::write_named(&mut note, relay).map_err(io::Error::other)?;
    note.extend_from_slice(snapshot);
    Ok(note)
}

/// Splits a note into the relay and the snapshot.
fn split_note(note: &[u8]) -> Result<(Option<RelayNote>, Vec<u8>), String> {
    let Some(rest) = note.strip_prefix(&RELAY_MAGIC) else { return Ok((None, note.to_vec())) };
    let version = rest.first_chunk().copied().map(u32::from_be_bytes);
    if version != Some(RELAY_VERSION) {
        return Err("another version of the program has relayed their requests".to_owned());
    }
    let mut rest = &rest[size_of::<u32>()..];
    let relay = rmp_serde::from_read(&mut rest).map_err(|error| error.to_string())?;
    Ok((Some(relay), rest.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn note_without_relay_is_the_snapshot() {
        assert_eq!(note(None, b"FLEXNBDc...").unwrap(), b"FLEXNBDc...");
        assert_eq!(split_note(b"FLEXNBDc...").unwrap(), (None, b"FLEXNBDc...".to_vec()));
    }

    #[test]
    fn note_with_relay_is_split_again() {
        let relay = RelayNote::for_tests();
        let bytes = note(Some(&relay), b"snapshot").unwrap();
        assert_eq!(split_note(&bytes).unwrap(), (Some(relay), b"snapshot".to_vec()));
    }

    #[test]
    fn note_of_another_version_is_refused() {
        let mut bytes = note(Some(&RelayNote::for_tests()), b"snapshot").unwrap();
        bytes[RELAY_MAGIC.len() + 3] += 1;
        assert!(split_note(&bytes).is_err());
        assert!(split_note(&bytes[..RELAY_MAGIC.len() + 2]).is_err(), "cut short");
        let cut = note(Some(&RelayNote::for_tests()), b"").unwrap();
        assert!(split_note(&cut[..cut.len() - 1]).is_err(), "cut short");
    }
}

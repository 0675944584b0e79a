//! Sessions that outlive the process: the service manager's file descriptor store keeps them from
//! the end of one process to the start of the next.
//! Translates between the server and the store, which do not know each other.

use super::random;
use crate::human::counted;
use crate::message_id;
use crate::net::Stream;
use crate::server::StoredSessions;
use crate::systemd::{FdStore, ServiceManager, StoredDescriptors};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use tracing::{info, warn};

/// Takes the last process's sessions out of the store. Closes descriptors that cannot be used.
pub(super) fn restore(stored: StoredDescriptors, notifier: &ServiceManager) -> StoredSessions {
    let count = stored.count();
    match stored.take(notifier) {
        Ok(kept) => {
            let streams = kept.descriptors.into_iter().filter_map(|(number, descriptor)| {
                let stream = Stream::inherited(descriptor);
                let usable = stream.inspect_err(|error| warn!("closed a stored session: {error}"));
                Some((number, usable.ok()?))
            });
            StoredSessions { snapshot: kept.note, streams: streams.collect() }
        }
        Err(why) => {
            warn!(
                "closed what the last process has left ({}): {why}",
                counted(count, "descriptor")
            );
            StoredSessions::default()
        }
    }
}

/// Stores sessions that this process has restored and not used.
pub(super) fn save_again(notifier: &ServiceManager, sessions: &StoredSessions) {
    let store = FdStore::from_env(notifier);
    // Without a store there are none.
    if store.capacity() > 0 {
        save(&store, sessions);
    }
}

/// Stores the sessions for the next process.
pub(super) fn save(store: &FdStore, sessions: &StoredSessions) {
    let count = sessions.streams.len();
    if count == 0 {
        return;
    }
    let descriptors: BTreeMap<_, _> =
        sessions.streams.iter().map(|(number, stream)| (*number, stream.as_fd())).collect();
    let stored = random::bytes()
        .map_err(io::Error::other)
        .and_then(|id| store.put(u64::from_ne_bytes(id), &sessions.snapshot, &descriptors));
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

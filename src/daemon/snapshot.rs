//! Sessions that outlive the process: taken out of the service manager's store when it begins, and
//! put in there when it ends. Translates between the server and the store, which do not know each
//! other.

use super::migrations::random;
use crate::message_id;
use crate::net::Stream;
use crate::server::StoredSessions;
use crate::systemd::{FdStore, ServiceManager, StoredDescriptors};
use crate::words::counted;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use tracing::{info, warn};

/// What the last process has left for this one. What cannot be used is closed.
pub(super) fn take_out(stored: StoredDescriptors, notifier: &ServiceManager) -> StoredSessions {
    let count = stored.count();
    match stored.take_out(notifier) {
        Ok(kept) => {
            let streams = kept.descriptors.into_iter().filter_map(|(number, descriptor)| {
                let stream = Stream::inherited(descriptor);
                let usable = stream.inspect_err(|error| warn!("closed a stored session: {error}"));
                Some((number, usable.ok()?))
            });
            StoredSessions { note: kept.note, streams: streams.collect() }
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

/// Leaves the sessions for the next process.
pub(super) fn put_in(store: &FdStore, luggage: &StoredSessions) {
    let count = luggage.streams.len();
    if count == 0 {
        return;
    }
    let descriptors: BTreeMap<_, _> =
        luggage.streams.iter().map(|(number, stream)| (*number, stream.as_fd())).collect();
    let put = random()
        .map_err(io::Error::other)
        .and_then(|bits: [u8; 8]| store.put(u64::from_ne_bytes(bits), &luggage.note, &descriptors));
    match put {
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

//! Lets clients in, one thread for each.
//! Waits for them on all listening sockets at once, and knows nothing of what they say.

use super::Shared;
use super::carry::Carried;
use super::end::SessionEnd;
use super::orders::Order;
use super::roster::{Parcel, Refused, Seat};
use super::session::Session;
use crate::net::{Listener, Peer, Stream, wait_readable};
use crate::systemd::message_id;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// Stack of a session's thread in bytes; its buffers are elsewhere.
const STACK: usize = 256 << 10;
/// How long to wait for a descriptor to become free when there is none.
const SCARCITY: Duration = Duration::from_secs(1);

/// Lets clients in until the roster is closed.
pub(super) fn accept_clients(shared: &Arc<Shared>, listeners: &[Listener]) {
    let mut scarce_until: Option<Instant> = None;
    while !shared.roster.is_closed() {
        shared.roster.knocks.answer();
        let now = Instant::now();
        let pause = shared.roster.full_until().max(scarce_until).filter(|until| now < *until);
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![shared.roster.bell.as_fd()];
        if pause.is_none() {
            descriptors.extend(listeners.iter().map(AsFd::as_fd));
        }
        let ready = match wait_readable(&descriptors, pause) {
            Ok(ready) => ready,
            Err(error) => return shared.roster.watch.accepting_failed(&error),
        };
        if ready[0] {
            shared.roster.bell.clear();
        }
        for (listener, _) in listeners.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            scarce_until = scarce_until.max(accept(shared, listener));
        }
    }
}

/// Lets one client in. Returns until when to wait, if the process has no descriptor left.
fn accept(shared: &Arc<Shared>, listener: &Listener) -> Option<Instant> {
    let _arriving = shared.roster.expect()?;
    match listener.accept() {
        Ok((stream, peer)) => {
            match shared.roster.admit(peer, Instant::now()) {
                Ok(seat) => start(shared, stream, peer, seat),
                Err(why) => refuse(&peer, why),
            }
            None
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        Err(error) => {
            warn!("cannot accept a client: {error}; trying again when a session has ended");
            Some(Instant::now() + SCARCITY)
        }
    }
}

fn refuse(peer: &Peer, why: Refused) {
    let id = match why {
        Refused::Acl => Some(message_id::CLIENT_NOT_ADMITTED),
        Refused::Full(_) => Some(message_id::CLIENT_LIMIT),
        Refused::Stopping | Refused::NoDescriptors => None,
    };
    warn!(message_id = id, "flexnbd.client" = %peer, "refused {peer}: {why}");
}

fn start(shared: &Arc<Shared>, stream: Stream, peer: Peer, seat: Seat) {
    let id = seat.id;
    info!("flexnbd.client" = %peer, "flexnbd.session" = id, "{peer} connected");
    // A connection that takes no options is on its way out, which the session will see.
    let _ = stream.tune().and_then(|()| stream.never_block());
    let _ = stream.leave_little_unsent();
    run(shared, stream, peer, seat, None);
}

/// Goes on with a session that another process has packed up, or says why not and closes it.
pub(super) fn resume(shared: &Arc<Shared>, Parcel { carried, stream }: Parcel) {
    let session = carried.session;
    let greeting_since = carried.is_greeting().then(Instant::now);
    let taken = stream.peer().map_err(|error| error.to_string()).and_then(|peer| {
        let seat = shared.roster.take_over(session, peer, greeting_since);
        seat.map(|seat| (peer, seat)).map_err(|why| format!("{peer}: {why}"))
    });
    match taken {
        Ok((peer, seat)) => {
            info!("flexnbd.client" = %peer, "flexnbd.session" = session, "{peer} goes on");
            run(shared, stream, peer, seat, Some(carried));
        }
        Err(why) => warn!("flexnbd.session" = session, "closed a session taken over: {why}"),
    }
}

/// Starts the thread of a session.
fn run(shared: &Arc<Shared>, stream: Stream, peer: Peer, seat: Seat, carried: Option<Carried>) {
    let (name, shared) = (format!("client-{}", seat.id), Arc::clone(shared));
    let thread = thread::Builder::new().name(name).stack_size(STACK);
    let started = thread.spawn(move || serve(&shared, stream, peer, seat, carried));
    if let Err(error) = started {
        let who = peer.to_string();
        warn!(
            "flexnbd.client" = who,
            "cannot start a thread for {who}: {error}; connection closed"
        );
    }
}

fn serve(shared: &Shared, stream: Stream, peer: Peer, seat: Seat, carried: Option<Carried>) {
    let id = seat.id;
    let session = Session {
        stream,
        peer,
        seat,
        disk: &shared.disk,
        reception: &*shared.reception,
        export: shared.export.clone(),
        settings: shared.settings,
        cpus: shared.cpus,
    };
    let (end, carried) = session.run(carried);
    shared.reception.closed(id);
    log_end(&session.peer, id, &end);
    if let Some(carried) = carried {
        let Session { stream, seat, .. } = session;
        seat.hand_in(Parcel { carried, stream });
    }
}

fn log_end(peer: &Peer, id: u64, end: &SessionEnd) {
    if matches!(end, SessionEnd::PackedUp) {
        info!("flexnbd.client" = %peer, "flexnbd.session" = id, "packed up the session of {peer}");
        return;
    }
    let kind = match end {
        SessionEnd::Stalled => Some(message_id::CLIENT_STALLED),
        SessionEnd::Ordered(Order::NotAdmitted) => Some(message_id::CLIENT_NOT_ADMITTED),
        _ => None,
    };
    if end.is_trouble() {
        warn!(
            message_id = kind, "flexnbd.client" = %peer, "flexnbd.session" = id,
            "closed the session of {peer}: {end}"
        );
    } else {
        info!(
            message_id = kind, "flexnbd.client" = %peer, "flexnbd.session" = id,
            "closed the session of {peer}: {end}"
        );
    }
}

//! Models of `src/server/sessions.rs`.

use super::acl::Acl;
use super::client_limits::ClientLimits;
use super::events::ServerEvents;
use super::sessions::{AdmissionError, Capacity, Registration, Sessions};
use super::stop_models::wait_for_stop;
use super::stop_request::StopRequest;
use crate::explore::{explore, far};
use crate::net::Peer;
use loom::thread;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Debug)]
struct IgnoreEvents;

impl ServerEvents for IgnoreEvents {
    fn clients_changed(&self) {}

    fn accepting_failed(&self, _why: &io::Error) {}
}

fn sessions() -> Arc<Sessions> {
    let handshake_timeout = Duration::from_secs(3600);
    let clients = ClientLimits::of(8);
    let capacity = Capacity { clients, waits_when_full: false, handshakes: 8, handshake_timeout };
    Sessions::new(capacity, Acl::default(), Arc::new(IgnoreEvents)).unwrap()
}

fn admit(sessions: &Arc<Sessions>) -> Result<Registration, AdmissionError> {
    sessions.admit(Peer::Tcp(([192, 0, 2, 1], 4711).into()), Instant::now())
}

/// Admits a client and serves it until the session is to stop.
fn serve(sessions: &Arc<Sessions>) -> Result<StopRequest, AdmissionError> {
    let registration = admit(sessions)?;
    registration.establish().unwrap();
    Ok(wait_for_stop(&registration.control))
}

/// A client is admitted while the server stops: it is refused, or its session ends and the server
/// learns that. A deadlock is a session without its stop request, or a server that waits for ever.
///
/// Found: `admit` that does not check `stopping`, or that checks it under another hold of the lock than
/// it registers; `stop` that requests before it sets `stopping`, in two holds of the lock; `Drop` of a
/// registration that does not notify `removed`.
pub fn stop_reaches_every_session() {
    explore(|| {
        let sessions = sessions();
        let first = {
            let sessions = Arc::clone(&sessions);
            thread::spawn(move || serve(&sessions))
        };
        sessions.stop();
        assert!(sessions.wait_until_empty(far()));
        assert_eq!(admit(&sessions).unwrap_err(), AdmissionError::Stopping);
        let ended = first.join().unwrap();
        assert!(matches!(ended, Ok(StopRequest::Finish) | Err(AdmissionError::Stopping)));
        assert_eq!(sessions.count(), 0);
    });
}

/// An idle server closes its table while the acceptor accepts: one of the two wins, so that no session
/// is registered after the table was closed.
///
/// Found: `close_if_empty` that ignores `accepting`; `begin_accept` that ignores `closed`, or does not
/// set `accepting`; a guard that ends before the registration.
pub fn no_session_after_the_table_is_closed() {
    explore(|| {
        let sessions = sessions();
        let acceptor = {
            let sessions = Arc::clone(&sessions);
            thread::spawn(move || {
                let accepting = sessions.begin_accept()?;
                let registration = admit(&sessions).unwrap();
                drop(accepting);
                Some(registration)
            })
        };
        let closed = sessions.close_if_empty();
        let registration = acceptor.join().unwrap();
        assert_ne!(closed, registration.is_some());
        drop(registration);
        assert!(sessions.close_if_empty() && sessions.begin_accept().is_none());
    });
}

/// A client is admitted while the access control list changes: it is refused by the new list, or its
/// session ends.
///
/// Found: `set_acl` that enforces the list under another hold of the lock, before it is replaced,
/// or not at all; `admit` that registers under another hold of the lock than it checks the list.
pub fn new_list_reaches_every_session() {
    explore(|| {
        let sessions = sessions();
        let first = {
            let sessions = Arc::clone(&sessions);
            thread::spawn(move || serve(&sessions))
        };
        sessions.set_acl(&["198.51.100.0/24"]).unwrap();
        let ended = first.join().unwrap();
        assert!(matches!(ended, Ok(StopRequest::NotAdmitted) | Err(AdmissionError::Acl)));
    });
}

/// One session displaces another one and sleeps until its end, which nothing else requests.
///
/// Found: a registration whose end does not wake the sessions that wait, or wakes them under another hold
/// of the lock, before it is removed; `disconnect_others` without a request; `have_ended` that sets
/// `awaits_others` under another hold of the lock than it checks the table.
pub fn displaced_session_ends() {
    explore(|| {
        let sessions = sessions();
        let (first, second) = (admit(&sessions).unwrap(), admit(&sessions).unwrap());
        let id = first.id;
        let displaced = thread::spawn(move || wait_for_stop(&first.control));
        let displacing = thread::spawn(move || {
            while !second.disconnect_others(&[id]) {
                second.control.wake.wait();
                second.control.wake.clear();
            }
        });
        displacing.join().unwrap();
        assert_eq!(displaced.join().unwrap(), StopRequest::Displaced);
        assert_eq!(sessions.count(), 0);
    });
}

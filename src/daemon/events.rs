//! What happens in the rooms, as events for the one who waits for them.
//! Never decides what comes of it.

use super::ProcessEvent;
use crate::server::events::ServerEvents;
use crate::sync;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

/// Listens to the server's door.
#[derive(Debug)]
pub(super) struct ServerEventSender(pub(super) Sender<ProcessEvent>);

impl ServerEvents for ServerEventSender {
    fn clients_changed(&self) {
        // The process is ending already if nobody hears it.
        let _ = self.0.send(ProcessEvent::Clients);
    }

    fn accepting_failed(&self, why: &io::Error) {
        let _ = self.0.send(ProcessEvent::NotAccepting(why.to_string()));
    }
}

/// The orders that are being obeyed.
#[derive(Debug)]
pub(super) struct ActiveCommands {
    events: Sender<ProcessEvent>,
    count: AtomicUsize,
    /// Held while an order begins, and while it is decided that none does any more.
    closed: Mutex<bool>,
}

impl ActiveCommands {
    pub(super) fn new(events: Sender<ProcessEvent>) -> Arc<Self> {
        Arc::new(Self { events, count: AtomicUsize::new(0), closed: Mutex::new(false) })
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// To be held while an order is obeyed; none when no more are.
    pub(super) fn begin(&self) -> Option<ActiveCommand<'_>> {
        let closed = sync::lock(&self.closed);
        (!*closed).then(|| {
            self.count.fetch_add(1, Ordering::AcqRel);
            ActiveCommand(self)
        })
    }

    /// Lets no order begin any more if none is being obeyed and `also` agrees. Returns whether that
    /// is so.
    pub(super) fn close_if_none(&self, also: impl FnOnce() -> bool) -> bool {
        let mut closed = sync::lock(&self.closed);
        *closed = *closed || (self.count() == 0 && also());
        *closed
    }
}

/// An order is being obeyed; over when this is dropped.
#[derive(Debug)]
pub(super) struct ActiveCommand<'a>(&'a ActiveCommands);

impl Drop for ActiveCommand<'_> {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::AcqRel);
        let _ = self.0.events.send(ProcessEvent::Obeyed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn no_order_begins_after_the_last_one_has_been_obeyed_and_it_was_closed() {
        let (events, heard) = mpsc::channel();
        let orders = ActiveCommands::new(events);
        let order = orders.begin().unwrap();
        assert!(!orders.close_if_none(|| true), "one is being obeyed");
        drop(order);
        assert!(matches!(heard.try_recv(), Ok(ProcessEvent::Obeyed)));
        assert!(!orders.close_if_none(|| false), "somebody else objects");
        drop(orders.begin().unwrap());
        assert!(orders.close_if_none(|| true));
        assert!(orders.begin().is_none());
        assert_eq!(orders.count(), 0);
    }
}

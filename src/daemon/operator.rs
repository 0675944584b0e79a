//! What operators may order of a running process, and what they are told.
//! Called from the control socket's threads; never waits for a client.

use super::lock;
use super::moving::{self, Ground};
use super::plan::{Admission, Reread};
use crate::control::command::Mirror;
use crate::control::{Command, Credentials, Operator, Reply, Status};
use crate::disk::ledger::Ledger;
use crate::migration::source::Desk;
use crate::server::Server;
use std::sync::{Arc, Mutex, MutexGuard};

/// What orders are about.
pub(super) struct Service {
    pub(super) size: u64,
    pub(super) server: Mutex<Server>,
    pub(super) reread: Option<Reread>,
    /// Present when the disk is ours and can be moved away.
    pub(super) departures: Option<Departures>,
}

/// The migration away from here, if there is one.
pub(super) struct Departures {
    pub(super) ground: Ground,
    /// Opens the ledger of the image anew, if it can keep a record.
    pub(super) ledger: Box<dyn Fn() -> Option<Ledger> + Send + Sync>,
    pub(super) desk: Mutex<Option<Arc<Desk>>>,
    /// Held while a migration is being begun, so that a second one is turned away at once.
    pub(super) beginning: Mutex<()>,
}

impl Service {
    pub(super) fn server(&self) -> MutexGuard<'_, Server> {
        lock(&self.server)
    }

    /// The migration that was begun last, over or not.
    pub(super) fn desk(&self) -> Option<Arc<Desk>> {
        self.departures.as_ref().and_then(|departures| lock(&departures.desk).clone())
    }

    fn status(&self) -> Status {
        let desk = self.desk();
        let mut status = {
            let server = self.server();
            Status {
                pid: std::process::id(),
                size: self.size,
                clients_allowed: server.accepts(),
                num_clients: server.clients() as u64,
                has_control: self.departures.is_some(),
                ..Status::default()
            }
        };
        moving::describe(desk.as_ref(), &mut status);
        status
    }

    fn set_acl(&self, entries: &[String]) -> Reply {
        match self.server().set_acl(entries) {
            Ok(()) => Reply::success("updated"),
            Err(bad) => Reply::refused(format!("bad spec: {}", bad.0)),
        }
    }

    fn reload(&self) -> Reply {
        let Some(Reread(read)) = &self.reread else {
            return Reply::refused("started without --config, so there is nothing to reload");
        };
        match read() {
            Ok(Admission { acl, clients_max }) => {
                self.server().readmit(acl, clients_max);
                Reply::success("reloaded")
            }
            Err(why) => Reply::refused(why),
        }
    }

    fn mirror(&self, order: &Mirror) -> Reply {
        let Some(departures) = &self.departures else {
            return Reply::refused("the disk has not arrived here, so it cannot be moved away");
        };
        let running = || Reply::refused("mirror already running");
        let Ok(_beginning) = departures.beginning.try_lock() else { return running() };
        if self.desk().is_some_and(|desk| desk.outcome().is_none()) {
            return running();
        }
        match moving::begin(&departures.ground, (departures.ledger)(), order) {
            Ok((desk, reply)) => {
                *lock(&departures.desk) = Some(desk);
                reply
            }
            Err(reply) => reply,
        }
    }
}

impl Operator for Service {
    fn obey(&self, command: Command, _from: Credentials) -> Reply {
        match command {
            Command::Status => Reply::success(self.status().to_string()),
            Command::Acl { entries } => self.set_acl(&entries),
            Command::Reload => self.reload(),
            Command::Break => moving::break_off(self.desk().as_ref()),
            Command::MirrorMaxBps(limit) => moving::set_speed(self.desk().as_ref(), limit),
            Command::Mirror(order) => self.mirror(&order),
        }
    }
}

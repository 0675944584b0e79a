//! The sockets of a process: those it has inherited or, without any, those of its configuration.
//! Never accepts a connection.

use super::config::Config;
use super::start_error::StartError;
use crate::control::ControlSocket;
use crate::net::{Address, Listener};
use crate::systemd::InheritedSockets;
use crate::systemd::sockets::InheritedListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use tracing::warn;

pub(super) struct Sockets {
    pub(super) listeners: Vec<Listener>,
    pub(super) control: Option<ControlSocket>,
}

impl Sockets {
    /// Opens the sockets that the process has not inherited.
    ///
    /// The control socket comes last: a process that sees it knows that clients can connect.
    pub(super) fn open(config: &Config, inherited: InheritedSockets) -> Result<Self, StartError> {
        for name in &inherited.unfamiliar {
            warn!("a socket named '{name}' was handed over; taking it for one to serve on");
        }
        let listeners = listeners(config, inherited.nbd)?;
        let control = control_socket(config, inherited.control)?;
        Ok(Self { listeners, control })
    }

    /// The paths at which [`Sockets::open`] makes sockets.
    pub(super) fn paths_to_make<'a>(
        config: &'a Config,
        inherited: &InheritedSockets,
    ) -> Vec<&'a Path> {
        let nbd = match &config.address {
            Some(Address::Unix(path)) if inherited.nbd.is_empty() => Some(path.as_path()),
            _ => None,
        };
        let control = config.control.as_deref().filter(|_| inherited.control.is_none());
        nbd.into_iter().chain(control).collect()
    }

    /// The addresses of the listeners, for people.
    pub(super) fn addresses(&self) -> String {
        let addresses = self.listeners.iter().filter_map(|listener| listener.local_address().ok());
        addresses.map(|address| address.to_string()).collect::<Vec<_>>().join(", ")
    }
}

fn listeners(
    config: &Config,
    inherited: Vec<InheritedListener>,
) -> Result<Vec<Listener>, StartError> {
    if inherited.is_empty() {
        let address = config.address.as_ref().ok_or(StartError::NoAddress)?;
        return Ok(vec![Listener::bind(address).map_err(StartError::Listen)?]);
    }
    let listeners = inherited.into_iter().map(|listener| {
        Listener::inherited(OwnedFd::from(listener))
            .map_err(|error| StartError::Inherited(error.to_string()))
    });
    let listeners: Vec<_> = listeners.collect::<Result<_, _>>()?;
    if let Some(address) = &config.address
        && !listeners.iter().any(|listener| listener.is_at(address))
    {
        warn!("not listening on {address}: the sockets handed over by the service manager win");
    }
    Ok(listeners)
}

fn control_socket(
    config: &Config,
    inherited: Option<UnixListener>,
) -> Result<Option<ControlSocket>, StartError> {
    let Some(socket) = inherited else {
        let opened = config.control.as_deref().map(ControlSocket::bind);
        return opened.transpose().map_err(StartError::Control);
    };
    if let Some(path) = &config.control
        && !is_bound_to(&socket, path)
    {
        warn!("not opening {}: the control socket handed over wins", path.display());
    }
    Ok(Some(ControlSocket::from_listener(socket)))
}

fn is_bound_to(socket: &UnixListener, path: &Path) -> bool {
    let bound = socket.local_addr().ok();
    let bound = bound.as_ref().and_then(|address| address.as_pathname());
    bound.is_some() && bound == std::path::absolute(path).ok().as_deref()
}

//! `flexnbd mirror` and `mirror-speed`: their flags, and the commands to the running server, which
//! migrates the disk.

use super::operate::{CommandKind, OperatorCommand, ServerArgument};
use super::settings::{parse_ip, parse_relay_for};
use super::size::parse_size;
use super::tls::{ClientTlsFlags, ClientTlsSettings};
use super::uri::{self, Target};
use crate::control::command::{ArrivalAction, Mirror, MirrorTls, RelayOptions, RelayRequest};
use crate::net::{AddressError, parse_port};
use std::env;
use std::net::{IpAddr, SocketAddr};

/// The flags of `mirror`.
#[derive(clap::Args, Clone, Debug)]
pub struct MirrorFlags {
    /// Address of the server to move the disk to: IPv4 or IPv6
    #[arg(short = 'l', long, value_name = "ADDR", value_parser = parse_destination)]
    addr: IpAddr,

    /// Its TCP port
    #[arg(short, long, value_name = "PORT", value_parser = parse_destination_port)]
    port: u16,

    #[command(flatten)]
    server: ServerArgument,

    /// Delete the image here once the disk has moved
    #[arg(short, long)]
    unlink: bool,

    /// Local address to connect from, for destinations that look at it
    #[arg(short, long, value_name = "BIND_ADDR", value_parser = parse_ip)]
    bind: Option<IpAddr>,

    /// Send at most so many bytes per second (K, M, G: powers of 1024); 0 for no limit
    #[arg(long, value_name = "RATE", value_parser = parse_size)]
    max_speed: Option<u64>,

    /// Move the disk even if no ownership record can be kept: after a crash both copies may be
    /// served
    #[arg(long)]
    no_record: bool,

    /// Keep the clients: once the disk has moved, pass their requests on to it, until the last one
    /// leaves
    #[arg(long)]
    relay: bool,

    /// The same for at most so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = parse_relay_for)]
    relay_for: Option<u64>,

    /// Where the destination serves the disk.
    #[arg(
        long,
        value_name = "URI",
        value_parser = uri::parse,
        help = "The same to this server and export, nbd://HOST[:PORT][/EXPORT] or \
                nbd+unix:///[EXPORT]?socket=PATH (with TLS nbds: or nbds+unix:), if the disk is not served at ADDR and PORT"
    )]
    relay_to: Option<Target>,

    /// Disconnect the clients, even if the server is configured to relay
    #[arg(long, conflicts_with_all = ["relay", "relay_for", "relay_to"])]
    no_relay: bool,

    #[command(flatten)]
    tls: ClientTlsFlags,

    /// Show progress until the migration ends; the exit status tells how
    #[arg(long)]
    wait: bool,
}

/// The flags of `mirror-speed`.
#[derive(clap::Args, Clone, Debug)]
pub struct SpeedFlags {
    #[command(flatten)]
    server: ServerArgument,

    /// Send at most so many bytes per second (K, M, G: powers of 1024); 0 for no limit
    #[arg(short, long, value_name = "RATE", value_parser = parse_size)]
    max_speed: u64,
}

impl MirrorFlags {
    /// Checks the flags, and builds the command.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self) -> Result<OperatorCommand, String> {
        let Self { addr, port, bind, wait, .. } = self;
        let bind = bind.filter(|bind| !bind.is_unspecified());
        if let Some(bind) = bind.filter(|bind| bind.is_ipv4() != addr.is_ipv4()) {
            return Err(format!("--addr {addr} cannot be reached from --bind {bind}"));
        }
        let mirror = Mirror {
            to: SocketAddr::new(addr, port),
            action: if self.unlink { ArrivalAction::Unlink } else { ArrivalAction::Exit },
            bind,
            max_bps: self.max_speed.filter(|limit| *limit > 0),
            no_record: self.no_record,
            tls: Box::new(mirror_tls(self.tls.into())?),
            relay: relay_request(self.relay, self.no_relay, self.relay_for, self.relay_to),
        };
        Ok(OperatorCommand {
            socket: self.server.socket()?,
            kind: CommandKind::Mirror { mirror, wait },
        })
    }
}

impl SpeedFlags {
    /// Checks the flags, and builds the command.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn validate(self) -> Result<OperatorCommand, String> {
        Ok(OperatorCommand {
            socket: self.server.socket()?,
            kind: CommandKind::MirrorSpeed(self.max_speed),
        })
    }
}

/// What the options say about the clients. Those about a relay imply it.
fn relay_request(
    relay: bool,
    no_relay: bool,
    seconds_max: Option<u64>,
    to: Option<Target>,
) -> RelayRequest {
    if no_relay {
        return RelayRequest::No;
    }
    if !relay && seconds_max.is_none() && to.is_none() {
        return RelayRequest::AsConfigured;
    }
    let to = to.map(|Target { remote, export, tls }| (Some(remote), export, tls));
    let (to, export, tls) = to.unwrap_or_default();
    RelayRequest::Yes(RelayOptions { seconds_max, to, export, tls })
}

/// The TLS of the migration. The server reads the files, from another directory.
fn mirror_tls(settings: ClientTlsSettings) -> Result<MirrorTls, String> {
    let tls = settings.for_mirror()?;
    // Without a current directory, relative paths mean nothing to the server, which refuses them.
    let here = env::current_dir().unwrap_or_default();
    Ok(MirrorTls { files: tls.files.relative_to(&here), ..tls })
}

/// The address of a destination, which is always an IP address: the control protocol has no other.
fn parse_destination(text: &str) -> Result<IpAddr, String> {
    if text.starts_with('/') {
        return Err(format!("`{text}` is a path, and disks are moved over TCP only"));
    }
    parse_ip(text)
}

fn parse_destination_port(text: &str) -> Result<u16, AddressError> {
    match parse_port(text)? {
        0 => Err(AddressError::PortZero),
        port => Ok(port),
    }
}

//! `flexnbd read` and `flexnbd write`: which bytes of which export.
//! Connects to nobody; moving the bytes is the client room's part.

use super::size::{parse_from, parse_length};
use super::uri::{self, Target, parse_export};
use crate::net::{Remote, parse_port, unbracket};
use std::net::IpAddr;
use std::process::ExitCode;

/// The flags of `read` and `write`.
#[derive(clap::Args, Clone, Debug)]
pub struct Flags {
    /// Server to connect to: IPv4, IPv6, a host name, or the path of a unix socket, which begins
    /// with / and has no port
    #[arg(short = 'l', long, value_name = "ADDR", conflicts_with = "uri")]
    addr: Option<String>,

    /// TCP port to connect to
    #[arg(short, long, value_name = "PORT", value_parser = parse_port, conflicts_with = "uri")]
    port: Option<u16>,

    /// Server and export as a URI: nbd://HOST[:PORT][/EXPORT] or
    /// nbd+unix:///[EXPORT]?socket=PATH, instead of --addr and --port
    #[arg(long, value_name = "URI", value_parser = uri::parse)]
    uri: Option<Target>,

    /// Name of the export [default: the server's default]
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    export: Option<String>,

    /// Byte offset to begin at, up to 2^62 (K, M, G, T: powers of 1024)
    #[arg(short = 'F', long, value_name = "OFFSET", value_parser = parse_from)]
    from: u64,

    /// How many bytes, 1 to 2^30 (K, M, G: powers of 1024)
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_length)]
    size: u64,

    /// Local address to connect from, for servers that look at it
    #[arg(short, long, value_name = "BIND_ADDR", value_parser = parse_ip)]
    bind: Option<IpAddr>,
}

/// Bytes to move, from or to a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The server.
    pub remote: Remote,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// Offset of the first byte, at most 2^62.
    pub from: u64,
    /// How many bytes, 1 to 2^30.
    pub size: u64,
    /// Local address to connect from.
    pub bind: Option<IpAddr>,
}

impl Flags {
    /// What is meant by them.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn checked(self) -> Result<Transfer, String> {
        let target = target(self.uri, self.addr, self.port)?;
        let export = match (self.export, target.export) {
            (None, named) => named,
            (Some(export), named) if named.is_empty() || named == export => export,
            (Some(export), named) => {
                return Err(format!("--export {export} contradicts {named} in --uri"));
            }
        };
        if let (Remote::Unix(_), Some(_)) = (&target.remote, self.bind) {
            return Err("--bind has no meaning for a unix socket".to_owned());
        }
        let Self { from, size, bind, .. } = self;
        Ok(Transfer { remote: target.remote, export, from, size, bind })
    }
}

/// Copies bytes of the export to standard output.
#[must_use]
pub fn read(_transfer: &Transfer) -> ExitCode {
    ExitCode::FAILURE
}

/// Copies standard input to the export.
#[must_use]
pub fn write(_transfer: &Transfer) -> ExitCode {
    ExitCode::FAILURE
}

fn target(uri: Option<Target>, addr: Option<String>, port: Option<u16>) -> Result<Target, String> {
    match (uri, addr, port) {
        (Some(target), _, _) => Ok(target),
        (None, Some(addr), port) => match Remote::parse(&addr, port) {
            Ok(remote) => Ok(Target { remote, export: String::new() }),
            Err(error) => Err(format!("--addr and --port: {error}")),
        },
        (None, None, Some(_)) => Err("--port needs --addr as well".to_owned()),
        (None, None, None) => {
            Err("the server is missing: give --addr and --port, or --uri".to_owned())
        }
    }
}

fn parse_ip(text: &str) -> Result<IpAddr, String> {
    unbracket(text).parse().map_err(|_| format!("`{text}` is not an IPv4 or IPv6 address"))
}

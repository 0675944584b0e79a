//! The settings of a server, given by flags or by a configuration file; flags take precedence.
//! Pure: never reads a file, and never opens an image or a socket.

use super::sandbox::SandboxFlags;
use super::size::{parse_create, parse_payload_memory};
use super::tls::{ClientTlsSettings, ServerTlsSettings};
use super::uri::{Target, parse_export};
use crate::control::command::RELAY_SECONDS_MAX;
use crate::daemon::RelayDefault;
use crate::disk::HolePolicy;
use crate::net::{Address, AddressError, Host, parse_port, unbracket};
use crate::server::acl::Acl;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Range of `--max-clients` and `--max-clients-per-address`. Each client has a thread and a few file descriptors.
pub const MAX_CLIENTS_RANGE: RangeInclusive<usize> = 1..=65_536;

/// Range of `--idle-exit`, in seconds; a year at most.
pub const IDLE_EXIT_RANGE: RangeInclusive<u64> = 1..=365 * 24 * 3600;

/// Range of `--timeout` of `proxy`, in seconds; a year at most, so that a deadline can be represented.
pub const TIMEOUT_RANGE: RangeInclusive<u64> = 1..=365 * 24 * 3600;

/// Range of `--connections` of `proxy`.
pub const CONNECTIONS_RANGE: RangeInclusive<usize> = 1..=16;

/// The settings that the flags of `serve` and a configuration file share.
///
/// Each long option is also a key of the file, in capitals and with `_` for `-`.
#[derive(clap::Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Address to listen on: IPv4, IPv6, or the path of a unix socket, which begins with / and
    /// has no port. Not needed when the service manager hands over a listening socket
    #[arg(short = 'l', long, value_name = "ADDR")]
    pub addr: Option<Host>,

    /// TCP port to listen on
    #[arg(short, long, value_name = "PORT", value_parser = parse_port)]
    pub port: Option<u16>,

    /// File or block device to serve
    #[arg(short, long, value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Make FILE if it does not exist: sparse, of SIZE bytes (K, M, G, T: powers of 1024)
    #[arg(long, value_name = "SIZE", value_parser = parse_create)]
    pub create: Option<u64>,

    /// Open a control socket at this path
    #[arg(short, long, value_name = "SOCK")]
    pub sock: Option<PathBuf>,

    /// Admit nobody when there are no ACL entries, rather than everybody
    #[arg(short, long)]
    pub default_deny: bool,

    /// Disconnect a client whose request or reply makes no progress for two minutes
    #[arg(short, long)]
    pub killswitch: bool,

    /// Refuse to change the disk
    #[arg(short, long)]
    pub read_only: bool,

    /// Name of the export; clients that name no export get it, too
    #[arg(long, value_name = "NAME", value_parser = parse_export)]
    pub export: Option<String>,

    /// Greet clients the old way, for those that know no other
    #[arg(long)]
    pub oldstyle: bool,

    /// Receive also from one client that is not a flexnbd; for `listen` only.
    #[arg(skip)]
    pub plain: bool,

    /// Admit at most N clients at once [default: 128]
    #[arg(long, value_name = "N", value_parser = parse_max_clients)]
    pub max_clients: Option<usize>,

    /// Admit at most N clients of one address at once [default: as --max-clients]
    #[arg(long, value_name = "N", value_parser = parse_max_clients)]
    pub max_clients_per_address: Option<usize>,

    /// Use at most so much memory for the payloads of requests, besides 4 MiB for each client (K, M, G, T:
    /// powers of 1024) [default: a quarter of the memory, at most 1G]
    #[arg(long, value_name = "BYTES", value_parser = parse_payload_memory)]
    pub payload_memory: Option<u64>,

    /// End when there has been neither a client nor a migration for so long
    #[arg(long, value_name = "SECONDS", value_parser = parse_idle_exit)]
    pub idle_exit: Option<u64>,

    /// Whether to believe the file system where it says that FILE has holes: auto (where that is
    /// known to be right), trust, or ignore [default: auto]
    #[arg(long, value_name = "POLICY", value_parser = parse_holes)]
    pub holes: Option<HolePolicy>,

    /// Read and write FILE past the page cache of this host (O_DIRECT)
    #[arg(long)]
    pub direct: bool,

    /// Whether clients stay when `mirror` moves the disk, and their requests are passed on to it: no, yes, or
    /// for at most so many SECONDS; mirror's own options win [default: no]
    #[arg(long, value_name = "POLICY", value_parser = parse_relay)]
    pub relay: Option<RelayDefault>,

    /// TLS with clients.
    #[command(flatten)]
    pub tls: ServerTlsSettings,

    /// How the process is confined.
    #[command(flatten)]
    pub sandbox: SandboxFlags,

    /// Addresses of clients to admit, IPv4 or IPv6, each with an optional /PREFIX
    #[arg(value_name = "ACL_ENTRY", value_parser = parse_acl_entry)]
    pub acl: Vec<String>,

    /// The upstream; for `proxy` only.
    #[arg(skip)]
    pub upstream: UpstreamSettings,

    /// When the service starts. Only the generator uses it.
    #[arg(skip)]
    pub autostart: Option<Autostart>,

    /// Whether the socket unit filters packets by the ACL as well. Only the generator uses it.
    #[arg(skip)]
    pub ip_filter: bool,
}

/// The settings of `proxy` about the server whose disk it passes on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UpstreamSettings {
    /// The addresses of the disk, in the order in which to try them.
    pub to: Vec<Target>,
    /// Local address to connect from.
    pub bind: Option<IpAddr>,
    /// Size of the read-ahead in bytes; 0 for none.
    pub cache: Option<u64>,
    /// Most bytes of memory for changes that are not flushed.
    pub unflushed: Option<u64>,
    /// Most connections to one server.
    pub connections: Option<usize>,
    /// Seconds until a silent server counts as lost.
    pub timeout: Option<u64>,
    /// TLS with the server.
    pub tls: ClientTlsSettings,
}

impl UpstreamSettings {
    /// Merges these settings with `fallback`, which provides missing values. Addresses replace those
    /// of `fallback`.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        Self {
            to: if self.to.is_empty() { fallback.to } else { self.to },
            bind: self.bind.or(fallback.bind),
            cache: self.cache.or(fallback.cache),
            unflushed: self.unflushed.or(fallback.unflushed),
            connections: self.connections.or(fallback.connections),
            timeout: self.timeout.or(fallback.timeout),
            tls: self.tls.or(fallback.tls),
        }
    }

    /// The first key of the configuration file that is set, if one is.
    #[must_use]
    pub fn first_key(&self) -> Option<&'static str> {
        let keys = [
            ("TO", !self.to.is_empty()),
            ("BIND", self.bind.is_some()),
            ("CACHE", self.cache.is_some()),
            ("UNFLUSHED", self.unflushed.is_some()),
            ("CONNECTIONS", self.connections.is_some()),
            ("TIMEOUT", self.timeout.is_some()),
        ];
        let first = keys.into_iter().find_map(|(key, is_set)| is_set.then_some(key));
        first.or_else(|| self.tls.first_key())
    }
}

/// When the service of a configuration file starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Autostart {
    /// When an operator, or a unit that an operator has enabled, starts it.
    #[default]
    No,
    /// At boot.
    Yes,
    /// When the first client connects.
    OnDemand,
}

/// An invalid combination of `--addr` and `--port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ListenAddressError {
    /// A port without an address.
    #[error("--port needs --addr as well")]
    AddressMissing,
    /// An IP address without a port.
    #[error("--addr {0} needs --port as well")]
    PortMissing(String),
    /// Address and port do not fit each other.
    #[error("--addr and --port: {0}")]
    Mismatch(AddressError),
}

impl Settings {
    /// Merges these settings with `fallback`, which provides missing values. A switch is on if
    /// either has it on; a non-empty ACL replaces that of `fallback`.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        // A unix socket has no port, so the port of the fallback does not apply.
        let is_path = matches!(self.addr, Some(Host::Path(_)));
        let fallback_port = if is_path { None } else { fallback.port };
        Self {
            addr: self.addr.or(fallback.addr),
            port: self.port.or(fallback_port),
            file: self.file.or(fallback.file),
            create: self.create.or(fallback.create),
            sock: self.sock.or(fallback.sock),
            default_deny: self.default_deny || fallback.default_deny,
            killswitch: self.killswitch || fallback.killswitch,
            read_only: self.read_only || fallback.read_only,
            export: self.export.or(fallback.export),
            oldstyle: self.oldstyle || fallback.oldstyle,
            plain: self.plain || fallback.plain,
            max_clients: self.max_clients.or(fallback.max_clients),
            max_clients_per_address: self
                .max_clients_per_address
                .or(fallback.max_clients_per_address),
            payload_memory: self.payload_memory.or(fallback.payload_memory),
            idle_exit: self.idle_exit.or(fallback.idle_exit),
            holes: self.holes.or(fallback.holes),
            direct: self.direct || fallback.direct,
            relay: self.relay.or(fallback.relay),
            tls: self.tls.or(fallback.tls),
            sandbox: self.sandbox.or(fallback.sandbox),
            acl: if self.acl.is_empty() { fallback.acl } else { self.acl },
            upstream: self.upstream.or(fallback.upstream),
            autostart: self.autostart.or(fallback.autostart),
            ip_filter: self.ip_filter || fallback.ip_filter,
        }
    }

    /// Clears the settings that `listen` ignores. One file may configure both modes, so keys for
    /// serving only are ignored, not refused.
    #[must_use]
    pub fn for_listen(self) -> Self {
        Self {
            killswitch: false,
            read_only: false,
            max_clients: None,
            max_clients_per_address: None,
            payload_memory: None,
            idle_exit: None,
            relay: None,
            ..self
        }
    }

    /// Clears the settings that `serve` ignores.
    #[must_use]
    pub fn for_serve(self) -> Self {
        Self { plain: false, ..self }
    }

    /// The first key of the configuration file that only an image has, if one is set.
    #[must_use]
    pub fn first_image_key(&self) -> Option<&'static str> {
        let keys = [
            ("FILE", self.file.is_some()),
            ("CREATE", self.create.is_some()),
            ("HOLES", self.holes.is_some()),
            ("DIRECT", self.direct),
            ("RELAY", self.relay.is_some()),
            ("PLAIN", self.plain),
        ];
        keys.into_iter().find_map(|(key, is_set)| is_set.then_some(key))
    }

    /// The address to listen on; `None` if neither address nor port is given.
    ///
    /// # Errors
    /// One of the two is missing, or a unix socket has a port.
    pub fn address(&self) -> Result<Option<Address>, ListenAddressError> {
        match (&self.addr, self.port) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(ListenAddressError::AddressMissing),
            (Some(host), port) => match host.clone().with_port(port) {
                Ok(address) => Ok(Some(address)),
                Err(AddressError::PortMissing(ip)) => Err(ListenAddressError::PortMissing(ip)),
                Err(error) => Err(ListenAddressError::Mismatch(error)),
            },
        }
    }
}

/// Checks one entry of an access control list, and returns it unchanged.
///
/// # Errors
/// A sentence for the operator.
pub fn parse_acl_entry(text: &str) -> Result<String, String> {
    Acl::parse(&[text], false).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// Parses a number of digits only; `str::parse` also accepts a leading +.
fn parse_digits<N: FromStr>(text: &str) -> Option<N> {
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_digits { text.parse().ok() } else { None }
}

/// Parses `--max-clients` or `--max-clients-per-address`: a number within [`MAX_CLIENTS_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_max_clients(text: &str) -> Result<usize, String> {
    parse_digits(text).filter(|number| MAX_CLIENTS_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (MAX_CLIENTS_RANGE.start(), MAX_CLIENTS_RANGE.end());
        format!("`{text}` is not a number from {least} to {most}")
    })
}

/// Parses `--idle-exit`: a number of seconds within [`IDLE_EXIT_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_idle_exit(text: &str) -> Result<u64, String> {
    parse_digits(text).filter(|number| IDLE_EXIT_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (IDLE_EXIT_RANGE.start(), IDLE_EXIT_RANGE.end());
        format!("`{text}` is not a number of seconds from {least} to {most}")
    })
}

/// Parses `--relay` of `serve`: no, yes, or a number of seconds as for `--relay-for`.
///
/// # Errors
/// A sentence for the operator.
pub fn parse_relay(text: &str) -> Result<RelayDefault, String> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" => Ok(RelayDefault::Unlimited),
        "no" | "false" | "off" | "0" => Ok(RelayDefault::No),
        _ => match parse_relay_for(text) {
            Ok(seconds) => Ok(RelayDefault::AtMost(Duration::from_secs(seconds))),
            Err(why) => Err(format!("{why}, nor yes nor no")),
        },
    }
}

/// Parses `--relay-for` of `mirror`: a number of seconds up to [`RELAY_SECONDS_MAX`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_relay_for(text: &str) -> Result<u64, String> {
    parse_digits(text)
        .filter(|number| (1..=RELAY_SECONDS_MAX).contains(number))
        .ok_or_else(|| format!("`{text}` is not a number of seconds from 1 to {RELAY_SECONDS_MAX}"))
}

/// Parses `--timeout` of `proxy`: a number of seconds within [`TIMEOUT_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_timeout(text: &str) -> Result<u64, String> {
    parse_digits(text).filter(|number| TIMEOUT_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (TIMEOUT_RANGE.start(), TIMEOUT_RANGE.end());
        format!("`{text}` is not a number of seconds from {least} to {most}")
    })
}

/// Parses `--connections` of `proxy`: a number within [`CONNECTIONS_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_connections(text: &str) -> Result<usize, String> {
    parse_digits(text).filter(|number| CONNECTIONS_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (CONNECTIONS_RANGE.start(), CONNECTIONS_RANGE.end());
        format!("`{text}` is not a number from {least} to {most}")
    })
}

/// Parses an IPv4 or IPv6 address, brackets allowed.
///
/// # Errors
/// A sentence for the operator.
pub fn parse_ip(text: &str) -> Result<IpAddr, String> {
    let ip = unbracket(text).parse();
    ip.map_err(|_| format!("`{text}` is not an IPv4 or IPv6 address"))
}

/// Parses `--holes`.
///
/// # Errors
/// A sentence for the operator.
pub fn parse_holes(text: &str) -> Result<HolePolicy, String> {
    match text {
        "auto" => Ok(HolePolicy::Auto),
        "trust" => Ok(HolePolicy::Trust),
        "ignore" => Ok(HolePolicy::Ignore),
        _ => Err(format!("`{text}` is none of auto, trust and ignore")),
    }
}

impl ListenAddressError {
    /// The message with the keys of a configuration file in place of the options.
    #[must_use]
    pub fn with_keys(&self) -> String {
        self.to_string().replace("--addr", "ADDR").replace("--port", "PORT")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::uri;
    use crate::net::tls::{TlsFiles, TlsMode};

    fn host(text: &str) -> Option<Host> {
        Some(text.parse().unwrap())
    }

    fn full(word: &str, number: u16) -> Settings {
        Settings {
            addr: host(&format!("192.0.2.{number}")),
            port: Some(number),
            file: Some(word.into()),
            create: Some(512 * u64::from(number)),
            sock: Some(word.into()),
            default_deny: true,
            killswitch: true,
            read_only: true,
            export: Some(word.to_owned()),
            oldstyle: true,
            plain: true,
            max_clients: Some(number.into()),
            max_clients_per_address: Some(number.into()),
            payload_memory: Some(number.into()),
            holes: Some(if word == "flags" { HolePolicy::Trust } else { HolePolicy::Ignore }),
            direct: true,
            relay: Some(RelayDefault::AtMost(Duration::from_secs(number.into()))),
            tls: ServerTlsSettings {
                tls: Some(if word == "flags" { TlsMode::On } else { TlsMode::Require }),
                tls_cert: word.parse().ok(),
                tls_key: word.parse().ok(),
                tls_ca: word.parse().ok(),
                tls_allow: vec![word.parse().unwrap()],
            },
            idle_exit: Some(number.into()),
            sandbox: SandboxFlags { no_sandbox: true, user: Some(word.parse().unwrap()) },
            acl: vec![word.to_owned()],
            upstream: UpstreamSettings {
                to: vec![uri::parse(&format!("nbd://{word}")).unwrap()],
                bind: Some(format!("192.0.2.{number}").parse().unwrap()),
                cache: Some(number.into()),
                unflushed: Some(number.into()),
                connections: Some(number.into()),
                timeout: Some(number.into()),
                tls: ClientTlsSettings {
                    mode: Some(if word == "flags" { TlsMode::On } else { TlsMode::Require }),
                    files: TlsFiles { ca: word.parse().ok(), ..TlsFiles::default() },
                    hostname: Some(word.to_owned()),
                },
            },
            autostart: Some(if word == "flags" { Autostart::Yes } else { Autostart::No }),
            ip_filter: true,
        }
    }

    #[test]
    fn the_fallback_fills_missing_settings() {
        let (flags, file) = (full("flags", 1), full("file", 2));
        assert_eq!(flags.clone().or(file.clone()), flags);
        assert_eq!(Settings::default().or(file.clone()), file);
        assert_eq!(flags.clone().or(Settings::default()), flags);
    }

    #[test]
    fn socket_path_takes_no_port_from_the_fallback() {
        let flags = Settings { addr: host("/run/x"), ..Settings::default() };
        let merged = flags.or(full("file", 2));
        assert_eq!(merged.address(), Ok(Some(Address::Unix("/run/x".into()))));
    }

    #[test]
    fn address_and_port_are_both_given_or_neither() {
        let settings = |addr, port| Settings { addr, port, ..Settings::default() };
        assert_eq!(settings(None, None).address(), Ok(None));
        let tcp = settings(host("::1"), Some(7)).address();
        assert_eq!(tcp, Ok(Some(Address::Tcp("[::1]:7".parse().unwrap()))));
        assert_eq!(settings(None, Some(7)).address(), Err(ListenAddressError::AddressMissing));
        let missing = settings(host("[::1]"), None).address().unwrap_err();
        assert_eq!(missing.to_string(), "--addr ::1 needs --port as well");
        let mismatch = settings(host("/x"), Some(7)).address().unwrap_err();
        assert_eq!(
            mismatch.to_string(),
            "--addr and --port: /x is the path of a unix socket, which has no port"
        );
    }

    #[test]
    fn relay_is_a_switch_or_a_number_of_seconds() {
        let at_most = |seconds| Ok(RelayDefault::AtMost(Duration::from_secs(seconds)));
        assert_eq!(parse_relay("Yes"), Ok(RelayDefault::Unlimited));
        assert_eq!(parse_relay("off"), Ok(RelayDefault::No));
        assert_eq!(parse_relay("0"), Ok(RelayDefault::No));
        assert_eq!(parse_relay("1"), at_most(1));
        assert_eq!(parse_relay("31536000"), at_most(31_536_000));
        for text in ["31536001", "", "maybe", "-1", "1s"] {
            let why =
                format!("`{text}` is not a number of seconds from 1 to 31536000, nor yes nor no");
            assert_eq!(parse_relay(text), Err(why));
        }
        assert_eq!(parse_relay_for("31536000"), Ok(31_536_000));
        assert!(parse_relay_for("0").is_err() && parse_relay_for("31536001").is_err());
    }

    #[test]
    fn idle_exit_is_between_a_second_and_a_year() {
        assert_eq!(parse_idle_exit("1"), Ok(1));
        assert_eq!(parse_idle_exit("31536000"), Ok(31_536_000));
        for text in ["0", "31536001", "", "never", "-1", "+1", " 1", "1s"] {
            let error = parse_idle_exit(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number of seconds from 1 to 31536000"));
        }
    }

    #[test]
    fn timeout_and_connections_have_ranges() {
        assert_eq!((parse_timeout("1"), parse_timeout("31536000")), (Ok(1), Ok(31_536_000)));
        for text in ["0", "31536001", "", "x"] {
            let error = parse_timeout(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number of seconds from 1 to 31536000"));
        }
        assert_eq!((parse_connections("1"), parse_connections("16")), (Ok(1), Ok(16)));
        for text in ["0", "17", "", "x"] {
            let error = parse_connections(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number from 1 to 16"));
        }
    }

    #[test]
    fn max_clients_is_between_1_and_65536() {
        assert_eq!(parse_max_clients("1"), Ok(1));
        assert_eq!(parse_max_clients("65536"), Ok(65_536));
        for text in ["0", "65537", "", "many", "-1", "+1", "1 "] {
            let error = parse_max_clients(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number from 1 to 65536"));
        }
    }
}

//! What a server can be told, by flags or by a configuration file: the same things, one struct.
//! Decides which of the two wins, never reads a file, and never opens what it names.

use super::size::parse_create;
use super::uri::parse_export;
use crate::disk::HolePolicy;
use crate::net::{Address, AddressError, Host, parse_port};
use crate::server::acl::Acl;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

/// How many clients `--max-clients` may admit. Each has a thread and a few descriptors.
pub const MAX_CLIENTS_RANGE: RangeInclusive<usize> = 1..=65_536;

/// After how many seconds with nothing to do `--idle-exit` may end the process; a year at most.
pub const IDLE_EXIT_RANGE: RangeInclusive<u64> = 1..=365 * 24 * 3600;

/// Everything that both the flags of `serve` and a configuration file can say.
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

    /// Receive from one writer of another make, too; for `listen` only.
    #[arg(skip)]
    pub plain: bool,

    /// Admit at most N clients at once [default: 128]
    #[arg(long, value_name = "N", value_parser = parse_max_clients)]
    pub max_clients: Option<usize>,

    /// End when there has been neither a client nor a migration for so long
    #[arg(long, value_name = "SECONDS", value_parser = parse_idle_exit)]
    pub idle_exit: Option<u64>,

    /// Whether to believe the file system where it says that FILE has holes: auto (where that is known
    /// to be right), trust, or ignore [default: auto]
    #[arg(long, value_name = "POLICY", value_parser = parse_holes)]
    pub holes: Option<HolePolicy>,

    /// Addresses of clients to admit, IPv4 or IPv6, each with an optional /PREFIX
    #[arg(value_name = "ACL_ENTRY", value_parser = parse_acl_entry)]
    pub acl: Vec<String>,

    /// When the service starts. For the generator of units only: a process has started already.
    #[arg(skip)]
    pub autostart: Option<Autostart>,

    /// Whether the socket unit keeps out, too, whom the ACL does not admit; for the generator only.
    #[arg(skip)]
    pub ip_filter: bool,
}

/// When the service of a configuration file starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Autostart {
    /// When an operator, or what an operator has enabled, starts it.
    #[default]
    No,
    /// At boot.
    Yes,
    /// When the first client connects.
    OnDemand,
}

/// Where to listen cannot be made out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressMissing {
    /// A port, but no address.
    AddressMissing,
    /// The two do not fit each other.
    Unfit(AddressError),
}

impl Settings {
    /// These settings, and where they say nothing, those of `below`. What is only switched on by
    /// being there is on when either says so; an ACL replaces the other as a whole.
    #[must_use]
    pub fn over(self, below: Self) -> Self {
        // The file's port belongs to the file's address: a path given instead has none.
        let below_port = if matches!(self.addr, Some(Host::Path(_))) { None } else { below.port };
        Self {
            addr: self.addr.or(below.addr),
            port: self.port.or(below_port),
            file: self.file.or(below.file),
            create: self.create.or(below.create),
            sock: self.sock.or(below.sock),
            default_deny: self.default_deny || below.default_deny,
            killswitch: self.killswitch || below.killswitch,
            read_only: self.read_only || below.read_only,
            export: self.export.or(below.export),
            oldstyle: self.oldstyle || below.oldstyle,
            plain: self.plain || below.plain,
            max_clients: self.max_clients.or(below.max_clients),
            idle_exit: self.idle_exit.or(below.idle_exit),
            holes: self.holes.or(below.holes),
            acl: if self.acl.is_empty() { below.acl } else { self.acl },
            autostart: self.autostart.or(below.autostart),
            ip_filter: self.ip_filter || below.ip_filter,
        }
    }

    /// These settings as far as `listen` heeds them. One file may feed both modes, so that the keys
    /// that are about serving a disk that is ours are passed over, not refused.
    #[must_use]
    pub fn to_listen(self) -> Self {
        Self { killswitch: false, read_only: false, max_clients: None, idle_exit: None, ..self }
    }

    /// These settings as far as `serve` heeds them.
    #[must_use]
    pub fn to_serve(self) -> Self {
        Self { plain: false, ..self }
    }

    /// Where to listen; none if neither address nor port is given.
    ///
    /// # Errors
    /// When one of the two is missing or too much.
    pub fn address(&self) -> Result<Option<Address>, AddressMissing> {
        match (&self.addr, self.port) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(AddressMissing::AddressMissing),
            (Some(host), port) => {
                host.clone().with_port(port).map(Some).map_err(AddressMissing::Unfit)
            }
        }
    }
}

/// One entry of the access control list, unchanged if it is one.
///
/// # Errors
/// A sentence for the operator.
pub fn parse_acl_entry(text: &str) -> Result<String, String> {
    Acl::parse(&[text], false).map(|_| text.to_owned()).map_err(|bad| bad.to_string())
}

/// A number that is written in digits and nothing else.
fn digits<N: FromStr>(text: &str) -> Option<N> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
    if is_plain { text.parse().ok() } else { None }
}

/// `--max-clients`: a number within [`MAX_CLIENTS_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_max_clients(text: &str) -> Result<usize, String> {
    digits(text).filter(|number| MAX_CLIENTS_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (MAX_CLIENTS_RANGE.start(), MAX_CLIENTS_RANGE.end());
        format!("`{text}` is not a number from {least} to {most}")
    })
}

/// `--idle-exit`: a number of seconds within [`IDLE_EXIT_RANGE`].
///
/// # Errors
/// A sentence for the operator.
pub fn parse_idle_exit(text: &str) -> Result<u64, String> {
    digits(text).filter(|number| IDLE_EXIT_RANGE.contains(number)).ok_or_else(|| {
        let (least, most) = (IDLE_EXIT_RANGE.start(), IDLE_EXIT_RANGE.end());
        format!("`{text}` is not a number of seconds from {least} to {most}")
    })
}

/// `--holes`: one of three words.
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

impl AddressMissing {
    /// The same, for those who have said it by the keys of a file.
    #[must_use]
    pub fn in_keys(&self) -> String {
        self.to_string().replace("--addr", "ADDR").replace("--port", "PORT")
    }
}

impl fmt::Display for AddressMissing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddressMissing => write!(f, "--port needs --addr as well"),
            Self::Unfit(AddressError::PortMissing(ip)) => {
                write!(f, "--addr {ip} needs --port as well")
            }
            Self::Unfit(error) => write!(f, "--addr and --port: {error}"),
        }
    }
}

impl std::error::Error for AddressMissing {}

#[cfg(test)]
mod tests {
    use super::*;

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
            holes: Some(if word == "above" { HolePolicy::Trust } else { HolePolicy::Ignore }),
            idle_exit: Some(number.into()),
            acl: vec![word.to_owned()],
            autostart: Some(if word == "above" { Autostart::Yes } else { Autostart::No }),
            ip_filter: true,
        }
    }

    #[test]
    fn what_is_above_wins_and_what_is_below_fills_the_gaps() {
        let (above, below) = (full("above", 1), full("below", 2));
        assert_eq!(above.clone().over(below.clone()), above);
        assert_eq!(Settings::default().over(below.clone()), below);
        assert_eq!(above.clone().over(Settings::default()), above);
    }

    #[test]
    fn a_path_above_has_no_port_from_below() {
        let above = Settings { addr: host("/run/x"), ..Settings::default() };
        let merged = above.over(full("below", 2));
        assert_eq!(merged.address(), Ok(Some(Address::Unix("/run/x".into()))));
    }

    #[test]
    fn address_and_port_come_together_or_not_at_all() {
        let settings = |addr, port| Settings { addr, port, ..Settings::default() };
        assert_eq!(settings(None, None).address(), Ok(None));
        let tcp = settings(host("::1"), Some(7)).address();
        assert_eq!(tcp, Ok(Some(Address::Tcp("[::1]:7".parse().unwrap()))));
        assert_eq!(settings(None, Some(7)).address(), Err(AddressMissing::AddressMissing));
        let missing = settings(host("[::1]"), None).address().unwrap_err();
        assert_eq!(missing.to_string(), "--addr ::1 needs --port as well");
        let unfit = settings(host("/x"), Some(7)).address().unwrap_err();
        assert_eq!(
            unfit.to_string(),
            "--addr and --port: /x is the path of a unix socket, which has no port"
        );
    }

    #[test]
    fn idling_ends_after_a_second_at_the_earliest_and_a_year_at_the_latest() {
        assert_eq!(parse_idle_exit("1"), Ok(1));
        assert_eq!(parse_idle_exit("31536000"), Ok(31_536_000));
        for text in ["0", "31536001", "", "never", "-1", "+1", " 1", "1s"] {
            let error = parse_idle_exit(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number of seconds from 1 to 31536000"));
        }
    }

    #[test]
    fn at_least_one_client_and_at_most_65536_may_be_admitted() {
        assert_eq!(parse_max_clients("1"), Ok(1));
        assert_eq!(parse_max_clients("65536"), Ok(65_536));
        for text in ["0", "65537", "", "many", "-1", "+1", "1 "] {
            let error = parse_max_clients(text).unwrap_err();
            assert_eq!(error, format!("`{text}` is not a number from 1 to 65536"));
        }
    }
}

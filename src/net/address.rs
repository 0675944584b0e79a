//! Addresses to listen on or to connect to, parsed and valid.
//! Pure, except for [`resolve`], which queries the host's resolver.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// An address to listen on or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// An IP address and a TCP port.
    Tcp(SocketAddr),
    /// The path of a unix socket.
    Unix(PathBuf),
}

/// An address without its port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// An IP address; it needs a port.
    Ip(IpAddr),
    /// The path of a unix socket; it has no port.
    Path(PathBuf),
}

/// An address to connect to, whose host may be a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Remote {
    /// A host name or IP address (without brackets) and a TCP port.
    Host {
        /// Name or address.
        host: String,
        /// TCP port, never 0.
        port: u16,
    },
    /// The path of a unix socket.
    Unix(PathBuf),
}

/// Why an address is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither an IP address nor a path.
    #[error("`{0}` is neither an IPv4 or IPv6 address nor a path beginning with /")]
    NotAnAddress(String),
    /// Not a host name, an IP address or a path.
    #[error("`{0}` is not a host name, an IP address, or a path beginning with /")]
    NotAHost(String),
    /// An IP address that includes a port.
    #[error("`{0}` has a port in it; give the port by itself")]
    PortInAddress(String),
    /// An IP address or a host without a port.
    #[error("address {0} needs a port")]
    PortMissing(String),
    /// A path with a port.
    #[error("{0} is the path of a unix socket, which has no port")]
    PortWithPath(String),
    /// Not a number from 0 (to listen: any free port) to 65535.
    #[error("`{0}` is not a port, a number up to 65535")]
    NotAPort(String),
    /// Port 0 to connect to.
    #[error("port 0 is not a port to connect to")]
    PortZero,
}

impl Address {
    /// An address to listen on: an IPv4 or IPv6 address (brackets allowed) with a port, or a path
    /// beginning with `/` without one. Port 0 lets the kernel choose.
    ///
    /// # Errors
    /// The address is invalid, or the port is missing or superfluous.
    pub fn parse(address: &str, port: Option<u16>) -> Result<Self, AddressError> {
        address.parse::<Host>()?.with_port(port)
    }
}

impl Host {
    /// The address to listen on.
    ///
    /// # Errors
    /// [`AddressError::PortMissing`] for an IP address without a port,
    /// [`AddressError::PortWithPath`] for a path with one.
    pub fn with_port(self, port: Option<u16>) -> Result<Address, AddressError> {
        match (self, port) {
            (Self::Ip(ip), Some(port)) => Ok(Address::Tcp(SocketAddr::new(ip, port))),
            (Self::Path(path), None) => Ok(Address::Unix(path)),
            (Self::Ip(ip), None) => Err(AddressError::PortMissing(ip.to_string())),
            (Self::Path(path), Some(_)) => Err(AddressError::PortWithPath(shown(&path))),
        }
    }
}

/// An IPv4 or IPv6 address, brackets allowed, or a path beginning with `/`.
impl FromStr for Host {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.starts_with('/') {
            return Ok(Self::Path(text.into()));
        }
        unbracket(text).parse().map(Self::Ip).map_err(|_| not_an_ip(text))
    }
}

impl Remote {
    /// An address to connect to: as [`Address::parse`], and the host may be a name.
    ///
    /// # Errors
    /// The address is invalid, or the port is missing or superfluous.
    pub fn parse(host: &str, port: Option<u16>) -> Result<Self, AddressError> {
        if host.starts_with('/') {
            return match port {
                None => Ok(Self::Unix(host.into())),
                Some(_) => Err(AddressError::PortWithPath(host.to_owned())),
            };
        }
        let host = host_of(host)?;
        match port {
            None => Err(AddressError::PortMissing(host)),
            Some(0) => Err(AddressError::PortZero),
            Some(port) => Ok(Self::Host { host, port }),
        }
    }

    /// The addresses of the host, at least one, in the order in which to try them.
    ///
    /// # Errors
    /// The host is unknown; the error names it.
    pub fn resolve(&self) -> io::Result<Vec<Address>> {
        match self {
            Self::Unix(path) => Ok(vec![Address::Unix(path.clone())]),
            Self::Host { host, port } => {
                Ok(resolve(host, *port)?.into_iter().map(Address::Tcp).collect())
            }
        }
    }
}

/// The addresses of `host`, a name or an IP address (brackets allowed), each with `port`; at least
/// one. It may query the network and take as long as the resolver takes.
///
/// # Errors
/// The host is unknown; the error names it.
pub fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    let unknown = |kind, reason: String| {
        io::Error::new(kind, format!("cannot find the address of host `{host}`: {reason}"))
    };
    let found: Vec<_> = (unbracket(host), port)
        .to_socket_addrs()
        .map_err(|error| unknown(error.kind(), error.to_string()))?
        .collect();
    if found.is_empty() {
        return Err(unknown(io::ErrorKind::NotFound, "it has none".to_owned()));
    }
    Ok(found)
}

/// A TCP port in decimal.
///
/// # Errors
/// [`AddressError::NotAPort`].
pub fn parse_port(text: &str) -> Result<u16, AddressError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits => Ok(port),
        _ => Err(AddressError::NotAPort(text.to_owned())),
    }
}

/// Removes the brackets of `[::1]`; any other text is unchanged.
#[must_use]
pub fn unbracket(text: &str) -> &str {
    text.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(text)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

fn not_an_ip(address: &str) -> AddressError {
    if address.parse::<SocketAddr>().is_ok() {
        AddressError::PortInAddress(address.to_owned())
    } else {
        AddressError::NotAnAddress(address.to_owned())
    }
}

/// The host without brackets: an IP address, or a name of letters, digits, `.`, `-` and `_`.
fn host_of(text: &str) -> Result<String, AddressError> {
    let inner = unbracket(text);
    if inner.parse::<IpAddr>().is_ok() {
        return Ok(inner.to_owned());
    }
    if text.rsplit_once(':').is_some_and(|(_, port)| parse_port(port).is_ok()) {
        return Err(AddressError::PortInAddress(text.to_owned()));
    }
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '.' | '-' | '_');
    if text.is_empty() || text.starts_with('-') || !text.chars().all(fits) {
        return Err(AddressError::NotAHost(text.to_owned()));
    }
    Ok(text.to_owned())
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

impl fmt::Display for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Host { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Address, AddressError, Remote, parse_port, resolve};

    fn shown(address: &str, port: Option<u16>) -> String {
        match Address::parse(address, port) {
            Ok(address) => address.to_string(),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn ipv4_ipv6_and_paths_are_addresses() {
        assert_eq!(shown("127.0.0.1", Some(4777)), "127.0.0.1:4777");
        assert_eq!(shown("::", Some(4777)), "[::]:4777");
        assert_eq!(shown("::1", Some(0)), "[::1]:0");
        assert_eq!(shown("[::1]", Some(65535)), "[::1]:65535");
        assert_eq!(shown("/run/disk.sock", None), "/run/disk.sock");
    }

    #[test]
    fn the_error_names_an_invalid_address() {
        for text in ["", "localhost", "[::1", "127.1", "run/disk.sock", "1.2.3.4/24", "[localhost]"]
        {
            let error = Address::parse(text, Some(1)).unwrap_err();
            assert_eq!(error, AddressError::NotAnAddress(text.to_owned()));
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn only_an_ip_address_has_a_port() {
        let path = || "/run/x".to_owned();
        assert_eq!(Address::parse("::1", None), Err(AddressError::PortMissing("::1".to_owned())));
        assert_eq!(Address::parse("/run/x", Some(1)), Err(AddressError::PortWithPath(path())));
        assert_eq!(Remote::parse("/run/x", Some(1)), Err(AddressError::PortWithPath(path())));
        for text in ["127.0.0.1:80", "[::1]:80"] {
            let expected = AddressError::PortInAddress(text.to_owned());
            assert_eq!(Address::parse(text, Some(80)), Err(expected.clone()));
            assert_eq!(Remote::parse(text, Some(80)), Err(expected));
        }
    }

    #[test]
    fn a_port_is_a_number_up_to_65535() {
        assert_eq!(parse_port("0"), Ok(0));
        assert_eq!(parse_port("65535"), Ok(65535));
        for text in ["65536", "", "-1", "+1", "nbd", "10 ", "0x10"] {
            assert_eq!(parse_port(text), Err(AddressError::NotAPort(text.to_owned())));
        }
    }

    #[test]
    fn a_remote_may_be_a_name_and_its_port_is_never_zero() {
        let host = |host: &str| Remote::Host { host: host.to_owned(), port: 7 };
        assert_eq!(Remote::parse("localhost", Some(7)), Ok(host("localhost")));
        assert_eq!(Remote::parse("disk-1.example", Some(7)), Ok(host("disk-1.example")));
        assert_eq!(Remote::parse("[::1]", Some(7)), Ok(host("::1")));
        assert_eq!(Remote::parse("/x", None), Ok(Remote::Unix("/x".into())));
        assert_eq!(Remote::parse("localhost", Some(0)), Err(AddressError::PortZero));
        assert_eq!(
            Remote::parse("localhost", None),
            Err(AddressError::PortMissing("localhost".to_owned()))
        );
        for text in ["", "a b", "a/b", "-a", "user@host", "[a"] {
            let expected = AddressError::NotAHost(text.to_owned());
            assert_eq!(Remote::parse(text, Some(7)), Err(expected), "{text}");
        }
    }

    #[test]
    fn a_remote_is_displayed_as_in_a_uri() {
        assert_eq!(Remote::parse("::1", Some(7)).unwrap().to_string(), "[::1]:7");
        assert_eq!(Remote::parse("localhost", Some(7)).unwrap().to_string(), "localhost:7");
        assert_eq!(Remote::Unix("/x".into()).to_string(), "/x");
    }

    #[test]
    fn an_ip_address_resolves_to_itself() {
        assert_eq!(resolve("127.0.0.1", 9).unwrap(), ["127.0.0.1:9".parse().unwrap()]);
        assert_eq!(resolve("[::1]", 9).unwrap(), ["[::1]:9".parse().unwrap()]);
        let remote = Remote::parse("::1", Some(9)).unwrap();
        assert_eq!(remote.resolve().unwrap(), [Address::Tcp("[::1]:9".parse().unwrap())]);
        let unix = Remote::Unix("/x".into());
        assert_eq!(unix.resolve().unwrap(), [Address::Unix("/x".into())]);
    }

    #[test]
    fn the_error_names_an_unknown_host() {
        // Every resolver rejects an empty label without a query.
        let error = resolve("a..b", 9).unwrap_err();
        assert!(error.to_string().contains("`a..b`"), "{error}");
    }
}

//! NBD URIs, as in `doc/uri.md` of the NBD project: `nbd://host[:port][/export]` and
//! `nbd+unix:///export?socket=path`.
//! Pure; what we could not honour is refused, never passed over.

use crate::nbd::wire::STRING_LENGTH_MAX;
use crate::net::{AddressError, Remote, parse_port};
use percent_encoding::percent_decode_str;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt;

/// The port of NBD where none is given (IANA).
pub const DEFAULT_PORT: u16 = 10809;

/// A server, and which of its exports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Where the server is.
    pub remote: Remote,
    /// The export's name; empty for the server's default.
    pub export: String,
}

/// What is wrong with a URI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UriError {
    /// It does not begin with `nbd://` or `nbd+unix://`.
    Scheme(String),
    /// It asks for TLS.
    Tls,
    /// It has a user name, which only TLS has a use for.
    User,
    /// It has a part after `#`.
    Fragment,
    /// A parameter that we do not know, or that has no place here.
    Parameter(String),
    /// A `%` without two hexadecimal digits.
    Percent,
    /// `nbd://` without a host.
    HostMissing,
    /// `nbd+unix://` with a host.
    HostWithSocket(String),
    /// `nbd+unix://` without `socket=`, or twice.
    SocketMissing,
    /// The host or port.
    Address(AddressError),
    /// The name of the export.
    Export(ExportError),
    /// A NUL byte in the socket's path.
    Nul,
}

/// What is wrong with the name of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportError {
    /// More than the 4096 bytes that the NBD specification allows.
    TooLong,
    /// It is not UTF-8.
    NotUtf8,
    /// It has a NUL byte in it.
    Nul,
}

/// Reads a URI.
///
/// # Errors
/// One [`UriError`] for each way to get it wrong.
pub fn parse(uri: &str) -> Result<Target, UriError> {
    let (scheme, rest) = uri.split_once("://").ok_or_else(|| UriError::Scheme(uri.to_owned()))?;
    let parts = Parts::of(rest)?;
    match scheme.to_ascii_lowercase().as_str() {
        "nbd" => over_tcp(&parts),
        "nbd+unix" => over_unix(&parts),
        "nbds" | "nbds+unix" | "nbds+vsock" => Err(UriError::Tls),
        _ => Err(UriError::Scheme(uri.to_owned())),
    }
}

/// The name of an export, checked against the limits of the NBD specification.
///
/// # Errors
/// [`ExportError`].
pub fn parse_export(name: &str) -> Result<String, ExportError> {
    if name.len() > STRING_LENGTH_MAX {
        return Err(ExportError::TooLong);
    }
    if name.contains('\0') {
        return Err(ExportError::Nul);
    }
    Ok(name.to_owned())
}

/// A URI after its scheme, split but not decoded.
struct Parts<'a> {
    authority: &'a str,
    /// Without the slash that begins it.
    path: &'a str,
    query: Option<&'a str>,
}

impl<'a> Parts<'a> {
    fn of(rest: &'a str) -> Result<Self, UriError> {
        if rest.contains('#') {
            return Err(UriError::Fragment);
        }
        let (before, query) = match rest.split_once('?') {
            Some((before, query)) => (before, Some(query)),
            None => (rest, None),
        };
        let (authority, path) = before.split_once('/').unwrap_or((before, ""));
        if authority.contains('@') {
            return Err(UriError::User);
        }
        Ok(Self { authority, path, query })
    }

    fn parameters(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        let query = self.query.unwrap_or("");
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        pairs.map(|pair| pair.split_once('=').unwrap_or((pair, "")))
    }

    fn export(&self) -> Result<String, UriError> {
        let name = String::from_utf8(decoded(self.path)?)
            .map_err(|_| UriError::Export(ExportError::NotUtf8))?;
        parse_export(&name).map_err(UriError::Export)
    }
}

fn over_tcp(parts: &Parts<'_>) -> Result<Target, UriError> {
    if let Some((key, _)) = parts.parameters().next() {
        return Err(UriError::Parameter(key.to_owned()));
    }
    let (host, port) = host_and_port(parts.authority)?;
    let remote = Remote::parse(host, Some(port)).map_err(UriError::Address)?;
    Ok(Target { remote, export: parts.export()? })
}

/// `host`, `host:port` or `[address]:port`; an empty port is the default one.
fn host_and_port(authority: &str) -> Result<(&str, u16), UriError> {
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, ""),
    };
    if host.is_empty() {
        return Err(UriError::HostMissing);
    }
    let port = if port.is_empty() { Ok(DEFAULT_PORT) } else { parse_port(port) };
    Ok((host, port.map_err(UriError::Address)?))
}

fn over_unix(parts: &Parts<'_>) -> Result<Target, UriError> {
    if !parts.authority.is_empty() {
        return Err(UriError::HostWithSocket(parts.authority.to_owned()));
    }
    let mut socket = None;
    for (key, value) in parts.parameters() {
        match key {
            "socket" if socket.is_none() => socket = Some(decoded(value)?),
            "socket" => return Err(UriError::SocketMissing),
            _ => return Err(UriError::Parameter(key.to_owned())),
        }
    }
    let socket = socket.filter(|path| !path.is_empty()).ok_or(UriError::SocketMissing)?;
    if socket.contains(&0) {
        return Err(UriError::Nul);
    }
    let remote = Remote::Unix(OsString::from_vec(socket).into());
    Ok(Target { remote, export: parts.export()? })
}

fn decoded(text: &str) -> Result<Vec<u8>, UriError> {
    let mut escapes = text.split('%').skip(1);
    let is_escape =
        |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    if !escapes.all(is_escape) {
        return Err(UriError::Percent);
    }
    Ok(percent_decode_str(text).collect())
}

impl fmt::Display for UriError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scheme(uri) => write!(f, "`{uri}` begins neither with nbd:// nor nbd+unix://"),
            Self::Tls => write!(f, "nbds means TLS, which is not supported here; use nbd"),
            Self::User => write!(f, "a user name has no meaning without TLS; leave it out"),
            Self::Fragment => write!(f, "a # has no meaning here; write %23 for one in a name"),
            Self::Parameter(key) => write!(f, "the parameter `{key}` has no meaning here"),
            Self::Percent => write!(f, "a % must be followed by two hexadecimal digits"),
            Self::HostMissing => write!(f, "the host is missing after nbd://"),
            Self::HostWithSocket(host) => write!(
                f,
                "`{host}` cannot be meant, since nbd+unix has no host; write nbd+unix:/// with \
                 three slashes"
            ),
            Self::SocketMissing => write!(f, "nbd+unix needs one ?socket=PATH"),
            Self::Address(error) => write!(f, "{error}"),
            Self::Export(error) => write!(f, "{error}"),
            Self::Nul => write!(f, "the socket's path has a NUL byte in it"),
        }
    }
}

impl std::error::Error for UriError {}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => {
                write!(f, "the name of the export is longer than {STRING_LENGTH_MAX} bytes")
            }
            Self::NotUtf8 => write!(f, "the name of the export is not UTF-8"),
            Self::Nul => write!(f, "the name of the export has a NUL byte in it"),
        }
    }
}

impl std::error::Error for ExportError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(host: &str, port: u16, export: &str) -> Result<Target, UriError> {
        let remote = Remote::Host { host: host.to_owned(), port };
        Ok(Target { remote, export: export.to_owned() })
    }

    fn unix(path: &str, export: &str) -> Result<Target, UriError> {
        Ok(Target { remote: Remote::Unix(path.into()), export: export.to_owned() })
    }

    #[test]
    fn a_host_may_have_a_port_and_an_export() {
        assert_eq!(parse("nbd://localhost"), host("localhost", 10809, ""));
        assert_eq!(parse("nbd://localhost/"), host("localhost", 10809, ""));
        assert_eq!(parse("NBD://localhost:/"), host("localhost", 10809, ""));
        assert_eq!(parse("nbd://disks.example:4777/a"), host("disks.example", 4777, "a"));
        assert_eq!(parse("nbd://[::1]/a/b"), host("::1", 10809, "a/b"));
        assert_eq!(parse("nbd://[::1]:7//a"), host("::1", 7, "/a"));
    }

    #[test]
    fn a_unix_socket_may_have_an_export() {
        assert_eq!(parse("nbd+unix:///?socket=/run/x"), unix("/run/x", ""));
        assert_eq!(parse("nbd+unix://?socket=/run/x"), unix("/run/x", ""));
        assert_eq!(parse("nbd+unix:///disk?socket=x.sock"), unix("x.sock", "disk"));
    }

    #[test]
    fn names_and_paths_are_decoded() {
        assert_eq!(parse("nbd://h/%C3%A4%20%23%2f"), host("h", 10809, "ä #/"));
        assert_eq!(parse("nbd+unix:///%3f?socket=/a%26b%3Dc"), unix("/a&b=c", "?"));
    }

    #[test]
    fn tls_is_refused_by_its_name() {
        for uri in ["nbds://h", "nbds+unix:///?socket=x", "NBDS://h"] {
            assert_eq!(parse(uri), Err(UriError::Tls), "{uri}");
        }
    }

    #[test]
    fn other_schemes_are_refused() {
        for uri in ["", "localhost", "http://h", "nbd:h:10809", "nbd+vsock://1"] {
            let error = parse(uri).unwrap_err();
            assert_eq!(error, UriError::Scheme(uri.to_owned()));
        }
    }

    #[test]
    fn what_could_not_be_honoured_is_refused() {
        let parameter = |key: &str| UriError::Parameter(key.to_owned());
        let not_a_port = UriError::Address(AddressError::NotAPort("99999".to_owned()));
        let cases = [
            ("nbd://user@h", UriError::User),
            ("nbd://h/a#b", UriError::Fragment),
            ("nbd://h/?socket=/x", parameter("socket")),
            ("nbd+unix:///?socket=/x&tls-hostname=h", parameter("tls-hostname")),
            ("nbd:///x", UriError::HostMissing),
            ("nbd://:10809/x", UriError::HostMissing),
            ("nbd://h:0", UriError::Address(AddressError::PortZero)),
            ("nbd://h:99999", not_a_port),
            ("nbd+unix:///x", UriError::SocketMissing),
            ("nbd+unix:///x?socket=", UriError::SocketMissing),
            ("nbd+unix:///?socket=/x&socket=/y", UriError::SocketMissing),
            ("nbd+unix://h/?socket=/x", UriError::HostWithSocket("h".to_owned())),
            ("nbd+unix:///?socket=%00", UriError::Nul),
            ("nbd://h/%00", UriError::Export(ExportError::Nul)),
            ("nbd://h/%ff", UriError::Export(ExportError::NotUtf8)),
        ];
        for (uri, expected) in cases {
            assert_eq!(parse(uri), Err(expected), "{uri}");
        }
    }

    #[test]
    fn a_percent_sign_stands_before_two_hexadecimal_digits() {
        for uri in ["nbd://h/%", "nbd://h/%4", "nbd://h/%zz", "nbd://h/%é", "nbd://h/a%%20"] {
            assert_eq!(parse(uri), Err(UriError::Percent), "{uri}");
        }
    }

    #[test]
    fn the_name_of_an_export_has_at_most_4096_bytes() {
        assert!(parse_export(&"x".repeat(4096)).is_ok());
        assert_eq!(parse_export(&"x".repeat(4097)), Err(ExportError::TooLong));
        assert_eq!(parse_export(&"ä".repeat(2049)), Err(ExportError::TooLong));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(rest: String) {
            let _ = parse(&format!("nbd://{rest}"));
            let _ = parse(&format!("nbd+unix:///{rest}"));
        }

        #[test]
        fn every_name_survives_being_encoded(name in "[^\0]{0,40}") {
            let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(parse(&format!("nbd://h/{encoded}")), host("h", 10809, &name));
        }
    }
}

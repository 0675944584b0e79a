//! NBD URIs, as in `doc/uri.md` of the NBD project: `nbd://host[:port][/export]` and
//! `nbd+unix:///export?socket=path`, with TLS `nbds://` and `nbds+unix://`, which may have a
//! `tls-hostname=name` as those of libnbd.
//! Pure. Parts of a URI that flexnbd does not support are errors, never ignored.

use crate::nbd::wire::STRING_LENGTH_MAX;
use crate::net::tls::{TlsMode, TlsTarget};
use crate::net::{AddressError, Remote, parse_port};
use percent_encoding::percent_decode_str;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

/// The default port of NBD (assigned by IANA).
pub const DEFAULT_PORT: u16 = 10809;

/// A server and the name of an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The server's address.
    pub remote: Remote,
    /// The export's name; empty for the server's default.
    pub export: String,
    /// Whether the URI requires TLS, and the name of the server.
    pub tls: TlsTarget,
}

impl Target {
    /// The default export of a server, without TLS.
    #[must_use]
    pub fn plain(remote: Remote) -> Self {
        Self { remote, export: String::new(), tls: TlsTarget::default() }
    }
}

/// An invalid or unsupported URI.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// It begins with none of the schemes.
    #[error(
        "`{0}` begins neither with nbd:// nor nbd+unix://, nor with nbds:// or nbds+unix:// for TLS"
    )]
    Scheme(String),
    /// It has a user name, which only TLS with pre-shared keys uses.
    #[error("a user name has no meaning here, where certificates are used; leave it out")]
    User,
    /// It has a fragment.
    #[error("a # has no meaning here; write %23 for one in a name")]
    Fragment,
    /// A query parameter that is unknown or does not apply to the scheme.
    #[error("the parameter `{0}` has no meaning here")]
    Parameter(String),
    /// A `%` without two hexadecimal digits.
    #[error("a % must be followed by two hexadecimal digits")]
    Percent,
    /// `nbd://` without a host.
    #[error("the host is missing after nbd://")]
    HostMissing,
    /// `nbd+unix://` with a host.
    #[error(
        "`{0}` has no meaning here: nbd+unix takes no host; write nbd+unix:/// with three slashes"
    )]
    HostWithSocket(String),
    /// `nbd+unix://` without `socket=`, or with two.
    #[error("nbd+unix needs one ?socket=PATH")]
    SocketMissing,
    /// An invalid host or port.
    #[error("{0}")]
    Address(AddressError),
    /// An invalid name of an export.
    #[error("{0}")]
    Export(ExportError),
    /// A NUL byte in the socket's path.
    #[error("the socket's path has a NUL byte in it")]
    Nul,
}

/// An invalid name of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Longer than the 4096 bytes that the NBD specification allows.
    #[error("the name of the export is longer than {STRING_LENGTH_MAX} bytes")]
    TooLong,
    /// Not UTF-8.
    #[error("the name of the export is not UTF-8")]
    NotUtf8,
    /// A NUL byte in the name.
    #[error("the name of the export has a NUL byte in it")]
    Nul,
}

/// Parses a URI.
///
/// # Errors
/// [`UriError`].
pub fn parse(uri: &str) -> Result<Target, UriError> {
    let (scheme, rest) = uri.split_once("://").ok_or_else(|| UriError::Scheme(uri.to_owned()))?;
    let parts = Parts::of(rest)?;
    match scheme.to_ascii_lowercase().as_str() {
        "nbd" => parse_tcp(&parts, TlsMode::Off),
        "nbds" => parse_tcp(&parts, TlsMode::Require),
        "nbd+unix" => parse_unix(&parts, TlsMode::Off),
        "nbds+unix" => parse_unix(&parts, TlsMode::Require),
        _ => Err(UriError::Scheme(uri.to_owned())),
    }
}

/// Checks the name of an export against the NBD specification, and returns it unchanged.
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

/// The parts of a URI after its scheme, still percent-encoded.
struct Parts<'a> {
    authority: &'a str,
    /// Without its leading slash.
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
        let name = String::from_utf8(percent_decode(self.path)?)
            .map_err(|_| UriError::Export(ExportError::NotUtf8))?;
        parse_export(&name).map_err(UriError::Export)
    }
}

fn parse_tcp(parts: &Parts<'_>, mode: TlsMode) -> Result<Target, UriError> {
    let mut tls = TlsTarget { mode, hostname: None };
    for (key, value) in parts.parameters() {
        take_hostname(&mut tls, key, value)?;
    }
    let (host, port) = split_host_port(parts.authority)?;
    let remote = Remote::parse(host, Some(port)).map_err(UriError::Address)?;
    Ok(Target { remote, export: parts.export()?, tls })
}

/// Takes the parameter `tls-hostname`, the only one that all schemes with TLS have.
fn take_hostname(tls: &mut TlsTarget, key: &str, value: &str) -> Result<(), UriError> {
    let has_meaning = key == "tls-hostname" && tls.mode != TlsMode::Off && tls.hostname.is_none();
    let name = String::from_utf8(percent_decode(value)?).ok().filter(|name| !name.is_empty());
    match name.filter(|_| has_meaning) {
        Some(name) => tls.hostname = Some(name),
        None => return Err(UriError::Parameter(key.to_owned())),
    }
    Ok(())
}

/// Splits `host`, `host:port` or `[address]:port`; an empty port means [`DEFAULT_PORT`].
fn split_host_port(authority: &str) -> Result<(&str, u16), UriError> {
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

fn parse_unix(parts: &Parts<'_>, mode: TlsMode) -> Result<Target, UriError> {
    if !parts.authority.is_empty() {
        return Err(UriError::HostWithSocket(parts.authority.to_owned()));
    }
    let (mut socket, mut tls) = (None, TlsTarget { mode, hostname: None });
    for (key, value) in parts.parameters() {
        match key {
            "socket" if socket.is_none() => socket = Some(percent_decode(value)?),
            "socket" => return Err(UriError::SocketMissing),
            _ => take_hostname(&mut tls, key, value)?,
        }
    }
    let socket = socket.filter(|path| !path.is_empty()).ok_or(UriError::SocketMissing)?;
    if socket.contains(&0) {
        return Err(UriError::Nul);
    }
    let remote = Remote::Unix(OsString::from_vec(socket).into());
    Ok(Target { remote, export: parts.export()?, tls })
}

fn percent_decode(text: &str) -> Result<Vec<u8>, UriError> {
    let mut escapes = text.split('%').skip(1);
    let is_escape =
        |rest: &str| rest.len() >= 2 && rest.bytes().take(2).all(|byte| byte.is_ascii_hexdigit());
    if !escapes.all(is_escape) {
        return Err(UriError::Percent);
    }
    Ok(percent_decode_str(text).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(host: &str, port: u16, export: &str) -> Result<Target, UriError> {
        let remote = Remote::Host { host: host.to_owned(), port };
        Ok(Target { export: export.to_owned(), ..Target::plain(remote) })
    }

    fn unix(path: &str, export: &str) -> Result<Target, UriError> {
        Ok(Target { export: export.to_owned(), ..Target::plain(Remote::Unix(path.into())) })
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
    fn names_and_paths_are_percent_decoded() {
        assert_eq!(parse("nbd://h/%C3%A4%20%23%2f"), host("h", 10809, "ä #/"));
        assert_eq!(parse("nbd+unix:///%3f?socket=/a%26b%3Dc"), unix("/a&b=c", "?"));
    }

    #[test]
    fn schemes_with_an_s_require_tls() {
        let tls = |hostname: Option<&str>| TlsTarget {
            mode: TlsMode::Require,
            hostname: hostname.map(str::to_owned),
        };
        for (uri, plain, hostname) in [
            ("nbds://h/x", host("h", 10809, "x"), None),
            ("NBDS://h:7?tls-hostname=%61.example", host("h", 7, ""), Some("a.example")),
            ("nbds+unix:///?socket=x", unix("x", ""), None),
            ("nbds+unix:///y?tls-hostname=h&socket=x", unix("x", "y"), Some("h")),
        ] {
            let expected = Target { tls: tls(hostname), ..plain.unwrap() };
            assert_eq!(parse(uri), Ok(expected), "{uri}");
        }
    }

    #[test]
    fn unknown_schemes_are_refused() {
        for uri in ["", "localhost", "http://h", "nbd:h:10809", "nbd+vsock://1", "nbds+vsock://1"] {
            let error = parse(uri).unwrap_err();
            assert_eq!(error, UriError::Scheme(uri.to_owned()));
        }
    }

    #[test]
    fn unsupported_and_missing_parts_are_refused() {
        let parameter = |key: &str| UriError::Parameter(key.to_owned());
        let not_a_port = UriError::Address(AddressError::NotAPort("99999".to_owned()));
        let cases = [
            ("nbd://user@h", UriError::User),
            ("nbd://h/a#b", UriError::Fragment),
            ("nbd://h/?socket=/x", parameter("socket")),
            ("nbd+unix:///?socket=/x&tls-hostname=h", parameter("tls-hostname")),
            ("nbd://h?tls-hostname=h", parameter("tls-hostname")),
            ("nbds://h?tls-hostname=", parameter("tls-hostname")),
            ("nbds://h?tls-hostname=a&tls-hostname=a", parameter("tls-hostname")),
            ("nbds://h?tls-certificates=/x", parameter("tls-certificates")),
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
    fn a_percent_sign_needs_two_hexadecimal_digits() {
        for uri in ["nbd://h/%", "nbd://h/%4", "nbd://h/%zz", "nbd://h/%é", "nbd://h/a%%20"] {
            assert_eq!(parse(uri), Err(UriError::Percent), "{uri}");
        }
    }

    #[test]
    fn an_export_name_has_at_most_4096_bytes() {
        assert!(parse_export(&"x".repeat(4096)).is_ok());
        assert_eq!(parse_export(&"x".repeat(4097)), Err(ExportError::TooLong));
        assert_eq!(parse_export(&"ä".repeat(2049)), Err(ExportError::TooLong));
    }

    proptest! {
        #[test]
        fn no_text_panics(rest: String) {
            let _ = parse(&format!("nbd://{rest}"));
            let _ = parse(&format!("nbd+unix:///{rest}"));
        }

        #[test]
        fn every_encoded_name_is_decoded(name in "[^\0]{0,40}") {
            let encoded: String = name.bytes().map(|byte| format!("%{byte:02x}")).collect();
            prop_assert_eq!(parse(&format!("nbd://h/{encoded}")), host("h", 10809, &name));
        }
    }
}

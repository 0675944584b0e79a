//! Subject alternative names. Pure.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A subject alternative name of client certificates (RFC 5280, 4.2.1.6). One of another kind never
/// matches, and an asterisk stands for nothing but itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowedName {
    /// A host name, in lower case.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
    /// An address of electronic mail, its host in lower case.
    Email(String),
    /// A URI, such as a SPIFFE id.
    Uri(String),
}

/// A text that is no [`AllowedName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither a host name nor an IP address, an email address or a URI")]
pub struct AllowedNameError(String);

impl AllowedName {
    pub(super) fn dns(name: &str) -> Self {
        Self::Dns(name.to_ascii_lowercase())
    }

    pub(super) fn email(name: &str) -> Self {
        Self::Email(match name.rsplit_once('@') {
            Some((mailbox, host)) => format!("{mailbox}@{}", host.to_ascii_lowercase()),
            None => name.to_owned(),
        })
    }

    pub(super) fn uri(name: &str) -> Self {
        Self::Uri(name.to_owned())
    }
}

impl fmt::Display for AllowedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) | Self::Email(name) | Self::Uri(name) => f.write_str(name),
            Self::Ip(ip) => write!(f, "{ip}"),
        }
    }
}

impl FromStr for AllowedName {
    type Err = AllowedNameError;

    fn from_str(text: &str) -> Result<Self, AllowedNameError> {
        if let Ok(ip) = text.parse() {
            return Ok(Self::Ip(ip));
        }
        let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b"-._*".contains(&byte);
        let is_visible = text.bytes().all(|byte| byte.is_ascii_graphic());
        match text {
            "" => Err(AllowedNameError(text.to_owned())),
            _ if !is_visible => Err(AllowedNameError(text.to_owned())),
            _ if text.contains(':') => Ok(Self::uri(text)),
            _ if text.contains('@') => Ok(Self::email(text)),
            _ if text.bytes().all(is_host) => Ok(Self::dns(text)),
            _ => Err(AllowedNameError(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart_by_their_form() {
        for (text, expected) in [
            ("Host-1.Example", AllowedName::Dns("host-1.example".to_owned())),
            ("*.example", AllowedName::Dns("*.example".to_owned())),
            ("192.0.2.1", AllowedName::Ip([192, 0, 2, 1].into())),
            ("2001:db8::1", AllowedName::Ip("2001:db8::1".parse().unwrap())),
            ("Op@Host.Example", AllowedName::Email("Op@host.example".to_owned())),
            ("spiffe://a/B", AllowedName::Uri("spiffe://a/B".to_owned())),
            ("urn:x@y", AllowedName::Uri("urn:x@y".to_owned())),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "a b", "a/b", "häuser", "a,b", "a\n"] {
            assert_eq!(text.parse::<AllowedName>(), Err(AllowedNameError(text.to_owned())));
        }
    }
}

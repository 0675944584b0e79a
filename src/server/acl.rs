//! The access control list: which addresses may connect (flexnbd(1), "Access control").
//! Pure. Knows addresses, not sockets; access to unix sockets depends on their permissions instead.

use ipnet::IpNet;
use std::net::IpAddr;
use thiserror::Error;

/// An access control list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acl {
    entries: Vec<IpNet>,
    default_deny: bool,
}

/// The entry is neither an address nor an address with a prefix length.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "'{0}' is not an access control entry; give an IPv4 or IPv6 address, or one with a prefix \
     length, such as 192.0.2.0/24"
)]
pub struct BadEntry(pub String);

impl Acl {
    /// A list of these entries. An empty list admits all addresses, or none with `default_deny`.
    ///
    /// # Errors
    /// The first malformed entry.
    pub fn parse<S: AsRef<str>>(entries: &[S], default_deny: bool) -> Result<Self, BadEntry> {
        let entries =
            entries.iter().map(|entry| parse(entry.as_ref())).collect::<Result<_, _>>()?;
        Ok(Self { entries, default_deny })
    }

    /// A list of other entries that treats an empty list as this one does.
    ///
    /// # Errors
    /// The first malformed entry.
    pub fn with_entries<S: AsRef<str>>(&self, entries: &[S]) -> Result<Self, BadEntry> {
        Self::parse(entries, self.default_deny)
    }

    /// The entries in canonical form: `192.0.2.0/24`, IPv4-mapped addresses as IPv4.
    #[must_use]
    pub fn entries(&self) -> Vec<String> {
        self.entries.iter().map(|entry| entry.trunc().to_string()).collect()
    }

    /// Whether a client at this address may connect. IPv4 entries apply to IPv4 clients of a
    /// dual-stack socket, which have IPv4-mapped addresses.
    #[must_use]
    pub fn admits(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        if self.entries.is_empty() {
            return !self.default_deny;
        }
        self.entries.iter().any(|entry| entry.contains(&client))
    }
}

fn parse(entry: &str) -> Result<IpNet, BadEntry> {
    let bad = || BadEntry(entry.to_owned());
    let (address, prefix) = match entry.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (entry, None),
    };
    let given: IpAddr = address.parse().map_err(|_| bad())?;
    let canonical = given.to_canonical();
    let width = if canonical.is_ipv4() { 32 } else { 128 };
    let length = match prefix {
        None => width,
        // The prefix of an IPv4-mapped address counts from the start of its IPv6 form.
        Some(prefix) if given.is_ipv6() && canonical.is_ipv4() => {
            digits(prefix).and_then(|length| length.checked_sub(96)).ok_or_else(bad)?
        }
        Some(prefix) => digits(prefix).ok_or_else(bad)?,
    };
    IpNet::new(canonical, length).map_err(|_| bad())
}

/// Parses a prefix length. Refuses a leading zero, which may mean octal or a missing digit.
fn digits(prefix: &str) -> Option<u8> {
    let is_plain = prefix.bytes().all(|byte| byte.is_ascii_digit());
    let has_leading_zero = prefix.len() > 1 && prefix.starts_with('0');
    if is_plain && !has_leading_zero { prefix.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admits(entries: &[&str], default_deny: bool, client: &str) -> bool {
        Acl::parse(entries, default_deny).unwrap().admits(client.parse().unwrap())
    }

    #[test]
    fn an_empty_list_admits_all_or_none_as_configured() {
        assert!(admits(&[], false, "192.0.2.1"));
        assert!(!admits(&[], true, "192.0.2.1"));
    }

    #[test]
    fn only_listed_addresses_are_admitted_with_either_default() {
        for default_deny in [false, true] {
            assert!(admits(&["192.0.2.1"], default_deny, "192.0.2.1"));
            assert!(!admits(&["192.0.2.1"], default_deny, "192.0.2.2"));
            assert!(admits(&["10.0.0.1", "2001:db8::/32"], default_deny, "2001:db8:1::7"));
            assert!(!admits(&["2001:db8::/32"], default_deny, "2001:db9::1"));
        }
    }

    #[test]
    fn prefixes_cover_their_network_and_ignore_host_bits() {
        assert!(admits(&["192.0.2.77/24"], false, "192.0.2.255"));
        assert!(!admits(&["192.0.2.0/24"], false, "192.0.3.0"));
        assert!(admits(&["0.0.0.0/0"], false, "8.8.8.8"));
        assert!(!admits(&["0.0.0.0/0"], false, "::1"));
        assert!(admits(&["::ffff:192.0.2.0/120"], false, "192.0.2.9"));
    }

    #[test]
    fn entries_are_returned_in_canonical_form() {
        let acl = Acl::parse(&["192.0.2.77/24", "::1", "::ffff:192.0.2.9/120"], false).unwrap();
        assert_eq!(acl.entries(), ["192.0.2.0/24", "::1/128", "192.0.2.0/24"]);
    }

    #[test]
    fn an_ipv4_client_of_a_dual_stack_socket_matches_ipv4_entries() {
        assert!(admits(&["192.0.2.1"], false, "::ffff:192.0.2.1"));
    }

    #[test]
    fn a_malformed_entry_is_named() {
        for entry in [
            "",
            "localhost",
            "1.2.3",
            "1.2.3.4/33",
            "::1/129",
            "1.2.3.4/",
            "1.2.3.4/+8",
            "1.2.3.4/-8",
            "1.2.3.4/08",
            "1.2.3.4/00",
            "1.2.3.4/ 8",
            "1.2.3.4/8 ",
            "1.2.3.4 /8",
            " 1.2.3.4/8",
            "::1/064",
            "::ffff:1.2.3.4/0120",
            "01.2.3.4",
            "1.2.3.4/24/8",
            "::ffff:1.2.3.4/95",
        ] {
            assert_eq!(Acl::parse(&["::1", entry], false), Err(BadEntry(entry.to_owned())));
        }
        assert!(Acl::parse(&["1.2.3.4/32", "::1/128", "1.2.3.4/0", "::/0"], false).is_ok());
    }
}

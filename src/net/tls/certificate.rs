//! What a certificate says: its names, and how long it is valid (RFC 5280). Pure: time is an argument.

use super::name::AllowedName;
use crate::human;
use rustls::pki_types::CertificateDer;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, SystemTime};
use x509_cert::certificate::{CertificateInner, Raw};
use x509_cert::der::{self, Decode};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

/// How long before its end a certificate is reported to expire.
pub const EXPIRY_NOTICE: Duration = Duration::from_secs(24 * 3600);

/// When a certificate, or a chain of them, is valid; since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub not_before: Duration,
    /// The last moment.
    pub not_after: Duration,
}

/// A warning about the end of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateExpiry {
    /// It is not valid yet, but from this time, in seconds since 1970.
    NotYet(u64),
    /// It ends after this time, which is at most [`EXPIRY_NOTICE`].
    Soon(Duration),
    /// It ended at this time, in seconds since 1970.
    Expired(u64),
}

impl fmt::Display for CertificateExpiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotYet(from) => write!(f, "is not valid before {}", human::utc(*from)),
            Self::Soon(left) => write!(f, "expires in {}", human::duration(*left)),
            Self::Expired(at) => write!(f, "expired at {}", human::utc(*at)),
        }
    }
}

impl CertificateExpiry {
    /// Whether peers refuse the certificate already.
    #[must_use]
    pub fn has_expired(&self) -> bool {
        matches!(self, Self::Expired(_))
    }
}

impl Validity {
    /// The time in which all certificates of a chain are valid.
    pub(super) fn of_chain(chain: &[CertificateDer<'_>]) -> Result<Self, der::Error> {
        let mut whole = Self { not_before: Duration::ZERO, not_after: Duration::MAX };
        for certificate in chain {
            let certificate = parse(certificate)?;
            let validity = certificate.tbs_certificate().validity();
            whole.not_before = whole.not_before.max(validity.not_before.to_unix_duration());
            whole.not_after = whole.not_after.min(validity.not_after.to_unix_duration());
        }
        Ok(whole)
    }

    /// The warning at this moment; `None` while the end is far.
    #[must_use]
    pub fn expiry(&self, now: SystemTime) -> Option<CertificateExpiry> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if now < self.not_before {
            return Some(CertificateExpiry::NotYet(self.not_before.as_secs()));
        }
        match self.not_after.checked_sub(now) {
            None => Some(CertificateExpiry::Expired(self.not_after.as_secs())),
            Some(left) => (left <= EXPIRY_NOTICE).then_some(CertificateExpiry::Soon(left)),
        }
    }
}

/// The subject alternative names of a certificate; those of other kinds are left out.
pub(super) fn names(certificate: &CertificateDer<'_>) -> Result<Vec<AllowedName>, der::Error> {
    let certificate = parse(certificate)?;
    let names = certificate.tbs_certificate().get_extension::<SubjectAltName>()?;
    Ok(names.map_or_else(Vec::new, |(_, names)| names.0.iter().filter_map(name).collect()))
}

fn name(name: &GeneralName) -> Option<AllowedName> {
    match name {
        GeneralName::DnsName(name) => Some(AllowedName::dns(name.as_str())),
        GeneralName::Rfc822Name(name) => Some(AllowedName::email(name.as_str())),
        GeneralName::UniformResourceIdentifier(name) => Some(AllowedName::uri(name.as_str())),
        GeneralName::IpAddress(bytes) => ip(bytes.as_bytes()).map(AllowedName::Ip),
        _ => None,
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into()),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into()),
        _ => None,
    }
}

/// Serial numbers that break RFC 5280 are accepted, because rustls accepts them, too.
fn parse(certificate: &CertificateDer<'_>) -> Result<CertificateInner<Raw>, der::Error> {
    CertificateInner::from_der(certificate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: u64 = 1_000_000;
    const TO: u64 = 2_000_000;

    fn expiry(seconds: u64) -> Option<CertificateExpiry> {
        let validity =
            Validity { not_before: Duration::from_secs(FROM), not_after: Duration::from_secs(TO) };
        validity.expiry(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn expiry_is_reported_a_day_before() {
        let day = EXPIRY_NOTICE.as_secs();
        assert_eq!(expiry(TO - day - 1), None);
        assert_eq!(expiry(TO - day), Some(CertificateExpiry::Soon(EXPIRY_NOTICE)));
        assert_eq!(expiry(TO), Some(CertificateExpiry::Soon(Duration::ZERO)));
        assert_eq!(expiry(TO + 1), Some(CertificateExpiry::Expired(TO)));
    }

    #[test]
    fn certificates_of_the_future_are_reported() {
        assert_eq!(expiry(FROM - 1), Some(CertificateExpiry::NotYet(FROM)));
        assert_eq!(expiry(FROM), None);
        assert_eq!(
            CertificateExpiry::NotYet(FROM).to_string(),
            "is not valid before 1970-01-12T13:46:40Z"
        );
    }

    #[test]
    fn addresses_have_four_or_sixteen_bytes() {
        assert_eq!(ip(&[127, 0, 0, 1]), Some([127, 0, 0, 1].into()));
        assert_eq!(ip(&Ipv6Addr::LOCALHOST.octets()), Some(Ipv6Addr::LOCALHOST.into()));
        // An address with its mask, as in name constraints.
        assert_eq!((ip(&[0; 8]), ip(&[])), (None, None));
    }
}

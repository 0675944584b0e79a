//! Errors of TLS handshakes as sentences for operators. Pure.

use crate::human;
use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Explains why a handshake or a connection failed: the reason, and where it helps what to do.
#[must_use]
pub fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => {
            format!("the peer's certificate {}", certificate(error))
        }
        Error::AlertReceived(alert) => format!("the peer refused: {}", alert_text(*alert)),
        Error::NoCertificatesPresented => "the peer presented no certificate".to_owned(),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the peer sent something that is not TLS".to_owned()
        }
        Error::DecryptError => "a record was damaged or changed on its way".to_owned(),
        error => error.to_string(),
    }
}

fn certificate(error: &CertificateError) -> String {
    let names = |names: &[String]| match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    match error {
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("expired at {}", human::utc(not_after.as_secs()))
        }
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("is not valid before {}", human::utc(not_before.as_secs()))
        }
        CertificateError::UnknownIssuer => {
            "is not from an authority that is trusted here".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            format!("is not for {}; its names: {}", expected.to_str(), names(presented))
        }
        CertificateError::ApplicationVerificationFailure => {
            "has none of the names that are allowed here".to_owned()
        }
        CertificateError::BadSignature => "has a wrong signature".to_owned(),
        CertificateError::BadEncoding => "is malformed".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is for another purpose (extended key usage)".to_owned()
        }
        error => format!("is invalid: {error}"),
    }
}

fn alert_text(alert: AlertDescription) -> String {
    match alert {
        AlertDescription::UnknownCA => "our certificate is not from an authority that it trusts",
        AlertDescription::BadCertificate => "our certificate is invalid",
        AlertDescription::CertificateExpired => "our certificate has expired",
        AlertDescription::CertificateRequired => "it demands a certificate",
        AlertDescription::AccessDenied => "our certificate has none of the names that it allows",
        AlertDescription::ProtocolVersion => "it speaks another version of TLS",
        AlertDescription::HandshakeFailure => {
            "it accepts none of our ciphers and signatures, or demands a certificate"
        }
        other => return format!("alert {other:?}"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::{ServerName, UnixTime};
    use std::time::Duration;

    fn of_certificate(error: CertificateError) -> String {
        explain(&Error::InvalidCertificate(error))
    }

    #[test]
    fn certificates_are_explained_with_names_and_times() {
        let (time, not_after) = (UnixTime::now(), UnixTime::since_unix_epoch(Duration::ZERO));
        assert_eq!(
            of_certificate(CertificateError::ExpiredContext { time, not_after }),
            "the peer's certificate expired at 1970-01-01T00:00:00Z"
        );
        let expected = ServerName::try_from("a.example").unwrap();
        let other = |presented| {
            let expected = expected.clone();
            of_certificate(CertificateError::NotValidForNameContext { expected, presented })
        };
        let text = "the peer's certificate is not for a.example; its names: ";
        assert_eq!(other(vec![]), format!("{text}none"));
        assert_eq!(other(vec!["b".into(), "c".into()]), format!("{text}b, c"));
        let denied = of_certificate(CertificateError::ApplicationVerificationFailure);
        assert_eq!(denied, "the peer's certificate has none of the names that are allowed here");
    }

    #[test]
    fn alerts_are_explained_from_our_side() {
        let text = explain(&Error::AlertReceived(AlertDescription::CertificateRequired));
        assert_eq!(text, "the peer refused: it demands a certificate");
        let text = explain(&Error::AlertReceived(AlertDescription::InternalError));
        assert_eq!(text, "the peer refused: alert InternalError");
    }
}

//! Certificates and keys as files, and handshakes in memory between the configurations of both sides.

use super::*;
use harness::pki::{DAY, Identity, Pki, Request, keys};
use rustls::{
    AlertDescription, CertificateError, CipherSuite, ClientConnection, Connection, Error,
    ProtocolVersion, ServerConnection,
};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn file(path: &Path) -> Option<TlsFile> {
    Some(TlsFile::Path(path.to_owned()))
}

fn files(identity: &Identity, ca: Option<&Pki>) -> TlsFiles {
    let ca = ca.and_then(|pki| file(&pki.ca()));
    TlsFiles { cert: file(&identity.cert), key: file(&identity.key), ca }
}

fn server(files: &TlsFiles, allow: &[&str]) -> ServerTls {
    let allow: Vec<AllowedName> = allow.iter().map(|name| name.parse().unwrap()).collect();
    ServerTls::load(TlsMode::Require, files, &allow).unwrap()
}

fn client(files: &TlsFiles, host: &str) -> ClientTls {
    let target = TlsTarget { mode: TlsMode::Require, hostname: Some(host.to_owned()) };
    let remote = crate::net::Remote::Unix("/nowhere".into());
    TlsClient::load(files).unwrap().for_remote(&target, &remote).unwrap().unwrap()
}

/// Both ends of a handshake, or the error of each.
struct Handshake {
    client: (ClientConnection, Result<(), Error>),
    server: (ServerConnection, Result<(), Error>),
}

fn shake_hands(client: &ClientTls, server: &ServerTls) -> Handshake {
    let name = client.server_name().clone();
    let mut near = ClientConnection::new(Arc::clone(client.config()), name).unwrap();
    let mut far = ServerConnection::new(Arc::clone(server.config())).unwrap();
    let (mut near_result, mut far_result) = (Ok(()), Ok(()));
    // Each side needs at most three turns.
    for _ in 0..8 {
        let sent = pass(&mut near, &mut far, &mut far_result);
        let answered = pass(&mut far, &mut near, &mut near_result);
        if !sent && !answered {
            break;
        }
    }
    Handshake { client: (near, near_result), server: (far, far_result) }
}

/// Passes on all bytes of one side to the other; returns whether there were any.
fn pass(
    from: &mut (
             impl std::ops::DerefMut<Target = rustls::ConnectionCommon<impl rustls::SideData>> + ?Sized
         ),
    to: &mut (
             impl std::ops::DerefMut<Target = rustls::ConnectionCommon<impl rustls::SideData>> + ?Sized
         ),
    result: &mut Result<(), Error>,
) -> bool {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes).unwrap();
    }
    let mut rest = &bytes[..];
    while !rest.is_empty() && result.is_ok() {
        to.read_tls(&mut rest).unwrap();
        *result = to.process_new_packets().map(drop);
    }
    !bytes.is_empty()
}

impl Handshake {
    #[track_caller]
    fn succeeded(&self) -> CipherSuite {
        assert_eq!((&self.client.1, &self.server.1), (&Ok(()), &Ok(())));
        assert!(!self.client.0.is_handshaking() && !self.server.0.is_handshaking());
        self.client.0.negotiated_cipher_suite().unwrap().suite()
    }

    /// The error of the server, and the alert that the client got.
    #[track_caller]
    fn refused_by_server(self) -> (Error, AlertDescription) {
        match (self.server.1, self.client.1) {
            (Err(error), Err(Error::AlertReceived(alert))) => (error, alert),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn keys_of_all_forms_are_read() {
    let pki = Pki::new();
    for (pkcs8, other) in [(keys::RSA_PKCS8, keys::RSA_PKCS1), (keys::EC_PKCS8, keys::EC_SEC1)] {
        let identity = pki.issue("server", &Request::server().with_key(pkcs8));
        let of_client = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
        for pem in [pkcs8, other] {
            fs::write(&identity.key, pem).unwrap();
            let server = server(&files(&identity, None), &[]);
            shake_hands(&client(&of_client, "localhost"), &server).succeeded();
        }
    }
}

#[test]
fn key_may_be_in_the_file_of_the_certificate() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let both = [fs::read(&identity.cert).unwrap(), fs::read(&identity.key).unwrap()].concat();
    fs::write(&identity.cert, both).unwrap();
    let files = TlsFiles { cert: file(&identity.cert), ..TlsFiles::default() };
    let of_client = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
    shake_hands(&client(&of_client, "127.0.0.1"), &server(&files, &[])).succeeded();
}

#[test]
fn aes_128_is_chosen_and_both_versions_work() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let server = server(&files(&identity, None), &[]);
    let client = client(&TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() }, "localhost");
    let suite = shake_hands(&client, &server).succeeded();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    let mut roots = rustls::RootCertStore::empty();
    for certificate in TlsFile::Path(pki.ca()).certificates().unwrap() {
        roots.add(certificate).unwrap();
    }
    // A client with its own preference.
    let old = rustls::ClientConfig::builder_with_provider(Arc::new(
        rustls::crypto::ring::default_provider(),
    ))
    .with_protocol_versions(&[&rustls::version::TLS12])
    .unwrap()
    .with_root_certificates(roots)
    .with_no_client_auth();
    let name = client.server_name().clone();
    let mut near = ClientConnection::new(Arc::new(old), name).unwrap();
    let mut far = ServerConnection::new(Arc::clone(server.config())).unwrap();
    let mut result = Ok(());
    while pass(&mut near, &mut far, &mut result) | pass(&mut far, &mut near, &mut Ok(())) {}
    assert_eq!(result, Ok(()));
    let far: Connection = far.into();
    assert_eq!(far.protocol_version(), Some(ProtocolVersion::TLSv1_2));
    let suite = far.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256);
}

#[test]
fn no_record_follows_the_handshake() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let server = server(&files(&identity, None), &[]);
    let client = client(&TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() }, "localhost");
    let name = client.server_name().clone();
    let mut near = ClientConnection::new(Arc::clone(client.config()), name).unwrap();
    let mut far = ServerConnection::new(Arc::clone(server.config())).unwrap();
    let mut result = Ok(());
    pass(&mut near, &mut far, &mut result);
    pass(&mut far, &mut near, &mut result);
    pass(&mut near, &mut far, &mut result);
    assert_eq!(result, Ok(()));
    assert!(!far.is_handshaking() && !far.wants_write(), "it sends a ticket");
}

#[test]
fn client_certificates_are_demanded_with_an_authority() {
    let (pki, other) = (Pki::new(), Pki::new());
    let identity = pki.issue("server", &Request::server());
    let server = server(&files(&identity, Some(&pki)), &[]);
    let of_client = |identity: &Identity| client(&files(identity, Some(&pki)), "localhost");
    let good = pki.issue("client", &Request::client(&["a.example"]));
    shake_hands(&of_client(&good), &server).succeeded();

    let none = client(&TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() }, "localhost");
    let refused = shake_hands(&none, &server).refused_by_server();
    assert_eq!(refused, (Error::NoCertificatesPresented, AlertDescription::CertificateRequired));

    let foreign = other.issue("client", &Request::client(&["a.example"]));
    let refused = shake_hands(&of_client(&foreign), &server).refused_by_server();
    let unknown = Error::InvalidCertificate(CertificateError::UnknownIssuer);
    assert_eq!(refused, (unknown, AlertDescription::UnknownCA));

    let now = SystemTime::now();
    let old = pki.issue("old", &Request::client(&["a.example"]).until(now - DAY));
    let (error, alert) = shake_hands(&of_client(&old), &server).refused_by_server();
    assert_eq!(alert, AlertDescription::CertificateExpired);
    assert!(explain(&error).starts_with("the peer's certificate expired at 20"), "{error}");

    let (error, alert) = shake_hands(&of_client(&identity), &server).refused_by_server();
    assert_eq!(alert, AlertDescription::UnsupportedCertificate);
    assert!(explain(&error).contains("is for another purpose"), "{error}");
}

#[test]
fn only_allowed_names_are_accepted() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let allow = ["Good.example", "192.0.2.1", "2001:db8::1", "op@x.example", "spiffe://x/good"];
    let server = server(&files(&identity, Some(&pki)), &allow);
    let shake = |name: &[&str]| {
        let identity = pki.issue("client", &Request::client(name));
        shake_hands(&client(&files(&identity, Some(&pki)), "localhost"), &server)
    };
    for good in [
        &["good.EXAMPLE"][..],
        &["bad.example", "good.example"],
        &["192.0.2.1"],
        &["2001:db8::1"],
        &["op@X.example"],
        &["spiffe://x/good"],
    ] {
        shake(good).succeeded();
    }
    for bad in [
        &[][..],
        &["*.example"],
        &["bad.example"],
        &["192.0.2.2"],
        &["Op@x.example"],
        &["spiffe://x/Good"],
        &["good.example@good.example"],
    ] {
        let (error, alert) = shake(bad).refused_by_server();
        assert_eq!(alert, AlertDescription::AccessDenied, "{bad:?}: {error}");
    }
}

#[test]
fn servers_must_have_the_name_and_a_trusted_authority() {
    let (pki, other) = (Pki::new(), Pki::new());
    let of_server = pki.issue("server", &Request::server());
    let server = server(&files(&of_server, None), &[]);
    let trusting = |pki: &Pki, host: &str| {
        let files = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
        shake_hands(&client(&files, host), &server).client.1
    };
    for host in ["localhost", "127.0.0.1", "::1"] {
        assert_eq!(trusting(&pki, host), Ok(()), "{host}");
    }
    for host in ["localhost.example", "127.0.0.2", "::2"] {
        let error = trusting(&pki, host).unwrap_err();
        let expected = format!("is not for {host}; its names: ");
        assert!(explain(&error).contains(&expected), "{}", explain(&error));
    }
    assert!(trusting(&other, "localhost").is_err());
}

#[test]
fn unix_sockets_need_a_name() {
    let pki = Pki::new();
    let files = TlsFiles { ca: file(&pki.ca()), ..TlsFiles::default() };
    let loaded = TlsClient::load(&files).unwrap();
    let unix = crate::net::Remote::Unix("/run/x".into());
    let target = |hostname: Option<&str>| TlsTarget {
        mode: TlsMode::On,
        hostname: hostname.map(str::to_owned),
    };
    let missing = loaded.for_remote(&target(None), &unix).unwrap_err();
    assert_eq!(missing, TlsError::ServerNameMissing);
    assert!(loaded.for_remote(&target(Some("localhost")), &unix).unwrap().is_some());
    let bad = loaded.for_remote(&target(Some("a b")), &unix).unwrap_err();
    assert_eq!(bad, TlsError::BadServerName("a b".to_owned()));
    assert!(loaded.for_remote(&TlsTarget::default(), &unix).unwrap().is_none());
    let address = crate::net::Address::Tcp("[::1]:7".parse().unwrap());
    let name = loaded.for_address(&target(None), &address).unwrap().unwrap();
    assert_eq!(name.server_name().to_str(), "::1");
}

#[test]
fn unusable_files_are_named_with_the_reason() {
    let pki = Pki::new();
    let identity = pki.issue("server", &Request::server());
    let other = pki.issue("other", &Request::server());
    let load = |cert: &Path, key: &Path| {
        let files = TlsFiles { cert: file(cert), key: file(key), ca: None };
        ServerTls::load(TlsMode::On, &files, &[]).unwrap_err().to_string()
    };
    let written = |name: &str, content: &str| {
        let path = pki.path().join(name);
        fs::write(&path, content).unwrap();
        path
    };
    let Identity { cert, key } = &identity;
    let name = |path: &Path| path.display().to_string();

    let missing = pki.path().join("missing");
    let expected = format!("cannot read {}: it does not exist", name(&missing));
    assert_eq!(load(&missing, key), expected);
    assert_eq!(load(cert, &missing), expected);
    let directory = format!("cannot read {}: it is not a regular file", name(pki.path()));
    assert_eq!(load(pki.path(), key), directory);
    assert!(load(key, key).contains("has no certificate in PEM form"));
    assert!(load(cert, cert).contains("has no private key in PEM form"));
    let encrypted = written("encrypted", keys::ENCRYPTED);
    assert!(load(cert, &encrypted).contains("is encrypted, and a service cannot"));
    let traditional = "-----BEGIN EC PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\
        DEK-Info: AES-256-CBC,00\n\nAAAA\n-----END EC PRIVATE KEY-----\n";
    assert!(load(cert, &written("traditional", traditional)).contains("is encrypted"));
    let mismatch = format!(
        "the private key in {} is not that of the first certificate in {}",
        name(&other.key),
        name(cert)
    );
    assert_eq!(load(cert, &other.key), mismatch);
    let broken = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    assert!(load(cert, &written("broken", broken)).contains("cannot be used"));
    let cut = "-----BEGIN CERTIFICATE-----\nAAAA\n";
    assert!(load(&written("cut", cut), key).contains("the line -----END is missing"));
    let garbage = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let garbage = written("garbage", garbage);
    let text = load(&garbage, key);
    assert!(text.starts_with(&format!("a certificate in {} is invalid", name(&garbage))), "{text}");
    let ca = TlsFiles { ca: file(&garbage), ..files(&identity, None) };
    assert!(ServerTls::load(TlsMode::On, &ca, &[]).is_err());
    let none = ServerTls::load(TlsMode::On, &TlsFiles::default(), &[]).unwrap_err();
    assert_eq!(none, TlsError::CertificateMissing);
}

#[test]
fn warnings_name_expiry_and_readable_keys() {
    let pki = Pki::new();
    let now = SystemTime::now();
    let identity = pki.issue("server", &Request::server().until(now + DAY + DAY / 2));
    let warnings = |now| server(&files(&identity, None), &[]).warnings(now);
    assert_eq!(warnings(now), []);
    let cert = TlsFile::Path(identity.cert.clone());
    let text = warnings(now + DAY)[0].to_string();
    let start = format!("the certificate in {cert} expires in 1");
    assert!(text.starts_with(&start) && text.ends_with("; renew it, and reload"), "{text}");
    assert!(warnings(now + 2 * DAY)[0].to_string().contains(" expired at 20"));
    assert!(matches!(
        warnings(now - 60 * DAY)[..],
        [TlsWarning::Expiry(_, CertificateExpiry::NotYet(_))]
    ));
    fs::set_permissions(&identity.key, fs::Permissions::from_mode(0o644)).unwrap();
    let key = TlsFile::Path(identity.key.clone());
    assert_eq!(warnings(now), [TlsWarning::KeyReadableByAll(key)]);
    assert_eq!(server(&files(&identity, None), &[]).expiry(now), None);
}

#[test]
fn chain_expires_with_its_first_certificate() {
    let pki = Pki::new();
    let now = SystemTime::now();
    let soon = pki.issue("soon", &Request::server().until(now + Duration::from_secs(3600)));
    let later = pki.issue("later", &Request::server());
    let chain = [fs::read(&later.cert).unwrap(), fs::read(&soon.cert).unwrap()].concat();
    fs::write(&later.cert, chain).unwrap();
    assert!(server(&files(&later, None), &[]).expiry(now).is_some());
}

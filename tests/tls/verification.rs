//! Who is trusted: authorities, names, client certificates, times; and what operators are told.

use crate::{Certificates, assert_works, identity_options, read, server_options, tls_uri};
use harness::pki::{DAY, Identity, Pki, Request};
use harness::raw::Wire;
use harness::{Builder, Endpoint, Program, Server, noise};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::time::SystemTime;

/// A server whose certificate is changed, and `read` from it with these options.
fn read_from(
    certificates: &Certificates,
    server: &Identity,
    uri: &str,
    options: &str,
) -> harness::Outcome {
    let image = certificates.image();
    let server = Builder::serve(&image).args(server_options(server)).start();
    let Endpoint::Tcp(address) = server.endpoint() else { panic!("not TCP") };
    read(&uri.replace("PORT", &address.port().to_string()), options).run()
}

#[test]
fn servers_are_verified_by_name_and_time() {
    let certificates = Certificates::new();
    let options = certificates.client_options(false);
    let expect = |request: &Request, uri: &str, fault: Option<&str>| {
        let server = certificates.pki.issue("changed", request);
        let outcome = read_from(&certificates, &server, uri, &options);
        match fault {
            None => outcome.succeeded(),
            Some(fault) => outcome.refused(1, &[fault]),
        };
    };
    let now = SystemTime::now();
    expect(&Request::server(), "nbds://localhost:PORT", None);
    expect(&Request::server(), "nbds://127.0.0.1:PORT", None);
    expect(&Request::server().rsa(), "nbds://127.0.0.1:PORT", None);
    let other = Request::server().named(&["other.example", "192.0.2.1"]);
    let fault = "is not for localhost; its names: ";
    expect(&other, "nbds://localhost:PORT", Some(fault));
    expect(&other, "nbds://127.0.0.1:PORT", Some("is not for 127.0.0.1; its names: "));
    expect(&other, "nbds://127.0.0.1:PORT?tls-hostname=other.example", None);
    expect(&Request::server().until(now - DAY), "nbds://localhost:PORT", Some("expired at 20"));
    expect(
        &Request::server().until(now + 60 * DAY),
        "nbds://localhost:PORT",
        Some("not valid before 20"),
    );
    let client = Request::client(&["localhost"]);
    expect(&client, "nbds://localhost:PORT", Some("is for another purpose"));
}

#[test]
fn unix_sockets_are_verified_by_the_given_name() {
    let certificates = Certificates::new();
    let socket = certificates.pki.path().join("nbd.sock");
    let server = certificates.serve("--tls require").unix(&socket).start();
    let uri = format!("nbds+unix:///?socket={}", socket.display());
    let options = certificates.client_options(false);
    read(&uri, &options).run().refused(2, &["needs a name to verify its certificate with"]);
    read(&uri, &format!("{options} --tls-hostname localhost")).run().succeeded();
    read(&format!("{uri}&tls-hostname=localhost"), &options).run().succeeded();
    read(&uri, &format!("{options} --tls-hostname b")).run().refused(1, &["is not for b"]);
    drop(server);
}

#[test]
fn untrusted_authorities_are_refused_in_both_roles() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let server = ours.serve(&ours.demanding()).start();
    let uri = tls_uri(server.endpoint());
    read(&uri, &ours.client_options(true)).run().succeeded();
    let trusting_other = format!("--tls-ca {}", theirs.pki.ca().display());
    read(&uri, &trusting_other).run().refused(1, &["not from an authority that is trusted here"]);
    let ca = format!("--tls-ca {}", ours.pki.ca().display());
    let foreign = format!("{ca} {}", identity_options(&theirs.client));
    read(&uri, &foreign)
        .run()
        .refused(1, &["our certificate is not from an authority that it trusts"]);
    // The authorities of this host do not include ours.
    read(&uri, "").run().ended_with(1);
}

#[test]
fn client_certificates_are_demanded_and_dated() {
    let certificates = Certificates::new();
    let server = certificates.serve(&certificates.demanding()).start();
    let uri = tls_uri(server.endpoint());
    let none = certificates.client_options(false);
    read(&uri, &none).run().refused(1, &["the peer refused: it demands a certificate"]);
    server.wait_for_stderr("the peer presented no certificate");
    // Another server, since each logs the refusals of an address rarely.
    drop(server);
    let server = certificates.serve(&certificates.demanding()).start();
    let uri = tls_uri(server.endpoint());
    let old = Request::client(&["client.example"]).until(SystemTime::now() - DAY);
    let old = certificates.pki.issue("old", &old);
    read(&uri, &format!("{none} {}", identity_options(&old))).run().refused(1, &["has expired"]);
    server.wait_for_stderr("the peer's certificate expired at 20");
}

#[test]
fn only_allowed_names_are_served() {
    let certificates = Certificates::new();
    let options = format!(
        "{} --tls-allow client.example --tls-allow 192.0.2.7 --tls-allow op@x.example",
        certificates.demanding()
    );
    let server = certificates.serve(&options).start();
    let uri = tls_uri(server.endpoint());
    let ca = certificates.client_options(false);
    let with = |names: &[&str]| {
        let identity = certificates.pki.issue("named", &Request::client(names));
        read(&uri, &format!("{ca} {}", identity_options(&identity))).run()
    };
    for good in [&["client.example"][..], &["192.0.2.7"], &["x.example", "op@x.example"]] {
        with(good).succeeded();
    }
    let refusal = "our certificate has none of the names that it allows";
    for bad in [&["x.example"][..], &["192.0.2.8"], &[]] {
        with(bad).refused(1, &[refusal]);
    }
    server.wait_for_stderr("has none of the names that are allowed here");
}

#[test]
fn unverified_client_reads_nothing_before_its_refusal() {
    let certificates = Certificates::new();
    let image = certificates.image();
    harness::write_at(&image, 0, &noise(1 << 20, 1));
    let server = certificates.serve(&certificates.demanding()).start();
    // With TLS 1.3 a client finishes its handshake before the server has seen its certificate.
    let refused = match certificates.start_tls(&server, None) {
        Err(error) => error,
        Ok(mut wire) => {
            let _ = wire.try_send(&harness::raw::typical_handshake());
            wire.try_recv(&mut [0; 64]).expect_err("it gets an alert")
        }
    };
    assert!(refused.to_string().contains("CertificateRequired"), "{refused}");
    assert_works(certificates.start_tls(&server, Some(&certificates.client)).unwrap());
}

/// The exit status and stderr of a server that cannot start.
#[track_caller]
fn refused_start(certificates: &Certificates, options: &str, parts: &[&str]) {
    let line = format!("serve --addr 127.0.0.1 --port 1 {options} --file");
    Program::flexnbd(&line).args([certificates.image()]).run().refused(78, parts);
}

#[test]
fn unusable_files_keep_a_server_from_starting() {
    let certificates = Certificates::new();
    let other = certificates.pki.issue("other", &Request::server());
    let (cert, key) = (certificates.server.cert.display(), certificates.server.key.display());
    refused_start(
        &certificates,
        "--tls-cert /missing.pem",
        &["cannot read /missing.pem: it does not exist"],
    );
    refused_start(&certificates, &format!("--tls-cert {cert}"), &["has no private key"]);
    refused_start(&certificates, &format!("--tls-cert {key}"), &["has no certificate"]);
    let mixed = format!("--tls-cert {cert} --tls-key {}", other.key.display());
    refused_start(&certificates, &mixed, &["is not that of the first certificate in"]);
    let credential = "--tls-cert credential:cert";
    refused_start(&certificates, credential, &["credential:cert", "LoadCredential="]);
}

#[test]
fn status_of_a_configuration_reports_unusable_files() {
    let certificates = Certificates::new();
    let other = certificates.pki.issue("other", &Request::server());
    let status = |key: &str| {
        let (image, cert) = (certificates.image(), certificates.server.cert.display().to_string());
        let text = format!("FILE={}\nTLS_CERT={cert}\nTLS_KEY={key}\n", image.display());
        let file = certificates.pki.path().join("disk.conf");
        fs::write(&file, text).unwrap();
        Program::flexnbd("status --config").args([&file]).run()
    };
    status(&certificates.server.key.display().to_string()).succeeded();
    let mismatch = status(&other.key.display().to_string());
    mismatch.refused(1, &["is not that of the first certificate"]);
    // Only the process of the unit has it.
    status("credential:key").succeeded();
}

#[test]
fn a_readable_key_and_a_late_certificate_are_warned_about() {
    let certificates = Certificates::new();
    let soon = Request::server().until(SystemTime::now() + DAY / 2);
    let soon = certificates.pki.issue("soon", &soon);
    fs::set_permissions(&soon.key, fs::Permissions::from_mode(0o644)).unwrap();
    let image = certificates.image();
    let server = Builder::serve(&image).args(server_options(&soon)).start();
    let cert = soon.cert.display();
    server.wait_for_stderr(&format!("the certificate in {cert} expires in 11 h"));
    server.wait_for_stderr(&format!("may read the private key in {}", soon.key.display()));
    // Both are still used.
    assert_works(certificates.start_tls(&server, None).unwrap());
    let old = Request::server().until(SystemTime::now() - DAY);
    let old = certificates.pki.issue("old", &old);
    drop(server);
    let server = Builder::serve(&image).args(server_options(&old)).start();
    server.wait_for_stderr("expired at 20");
}

#[test]
fn credentials_are_read_from_their_directory() {
    let certificates = Certificates::new();
    let directory = certificates.pki.path().join("credentials");
    fs::create_dir(&directory).unwrap();
    fs::copy(&certificates.server.cert, directory.join("cert")).unwrap();
    fs::copy(&certificates.server.key, directory.join("key")).unwrap();
    fs::copy(certificates.pki.ca(), directory.join("ca")).unwrap();
    let options = "--tls-cert credential:cert --tls-key credential:key --tls-ca credential:ca";
    let builder = || Builder::serve(&certificates.image()).args(options.split_whitespace());
    let server = builder().env("CREDENTIALS_DIRECTORY", &directory).start();
    assert_works(certificates.start_tls(&server, Some(&certificates.client)).unwrap());
}

/// Does a handshake with a server whose client trusts this authority only.
fn shake_hands(server: &Server, pki: &Pki) -> io::Result<Wire> {
    let mut wire = Wire::haggle(server.endpoint(), 3);
    assert_eq!(wire.ask_final(harness::raw::OPT_STARTTLS, &[]), harness::raw::REP_ACK);
    wire.start_tls(&pki.client_config(None, rustls::ALL_VERSIONS))
}

#[test]
fn chains_of_intermediates_are_presented() {
    let (root, below) = (Pki::new(), Pki::new());
    let server = below.issue("server", &Request::server());
    let intermediate = root.sign_authority(&below);
    let image = harness::sparse_image(below.path(), "image", crate::SIZE);
    let alone = Builder::serve(&image).args(server_options(&server)).start();
    assert!(shake_hands(&alone, &root).is_err(), "the issuer is unknown");
    let chain = [fs::read(&server.cert).unwrap(), intermediate.into_bytes()].concat();
    fs::write(&server.cert, chain).unwrap();
    drop(alone);
    let whole = Builder::serve(&image).args(server_options(&server)).start();
    assert_works(shake_hands(&whole, &root).unwrap());
}

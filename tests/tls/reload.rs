//! `reload`: new connections get the new certificates, open ones keep theirs.

use crate::{Certificates, assert_works, read, tls_uri};
use harness::pki::{Pki, Request};
use harness::raw::{
    FIXED_NEWSTYLE, NO_ZEROES, OPT_LIST, OPT_STARTTLS, REP_ACK, REP_ERR_TLS_REQD, Wire,
};
use harness::session::{Mode, Session};
use harness::{Builder, Program, Server};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;

/// A server with a configuration file and a control socket.
struct Configured {
    server: Server,
    file: std::path::PathBuf,
    socket: std::path::PathBuf,
}

impl Configured {
    #[track_caller]
    fn start(certificates: &Certificates, text: &str) -> Configured {
        let file = certificates.pki.path().join("disk.conf");
        let socket = certificates.pki.path().join("control.sock");
        fs::write(&file, text).unwrap();
        let builder = Builder::serve(&certificates.image()).args(["--config"]).args([&file]);
        let server = builder.args(["--sock"]).args([&socket]).start();
        Configured { server, file, socket }
    }

    fn reload(&self) -> harness::Outcome {
        Program::flexnbd("reload --sock").args([&self.socket]).run()
    }
}

fn keys(certificates: &Certificates, mode: &str) -> String {
    let (cert, key) = (certificates.server.cert.display(), certificates.server.key.display());
    format!("TLS={mode}\nTLS_CERT={cert}\nTLS_KEY={key}\n")
}

fn replace(certificates: &Certificates, pki: &Pki) {
    let other = pki.issue("server", &Request::server());
    fs::copy(&other.cert, &certificates.server.cert).unwrap();
    fs::copy(&other.key, &certificates.server.key).unwrap();
}

#[track_caller]
fn trusts(pki: &Pki, server: &Server) -> bool {
    let mut wire = Wire::haggle(server.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
    wire.start_tls(&pki.client_config(None, rustls::ALL_VERSIONS)).is_ok()
}

#[test]
fn new_connections_get_the_new_certificate() {
    let certificates = Certificates::new();
    let configured = Configured::start(&certificates, &keys(&certificates, "require"));
    let before = certificates.start_tls(&configured.server, None).unwrap();
    let mut before = Session::go(before, Mode::Simple, None, b"");
    let other = Pki::new();
    replace(&certificates, &other);
    assert!(trusts(&certificates.pki, &configured.server), "nothing has changed yet");
    configured.reload().succeeded();
    assert!(trusts(&other, &configured.server) && !trusts(&certificates.pki, &configured.server));
    before.assert_in_sync();
}

#[test]
fn bad_certificates_are_refused_and_the_old_ones_stay() {
    let certificates = Certificates::new();
    let configured = Configured::start(&certificates, &keys(&certificates, "require"));
    let good = fs::read(&certificates.server.cert).unwrap();
    fs::write(&certificates.server.cert, "nonsense").unwrap();
    configured.reload().refused(1, &["has no certificate in PEM form"]);
    assert!(trusts(&certificates.pki, &configured.server));
    configured.server.signal(Signal::SIGHUP);
    configured.server.wait_for_stderr("cannot reload: ");
    fs::write(&certificates.server.cert, good).unwrap();
    configured.reload().succeeded();
    assert!(trusts(&certificates.pki, &configured.server));
}

#[test]
fn the_mode_can_be_changed() {
    let certificates = Certificates::new();
    let configured = Configured::start(&certificates, &keys(&certificates, "on"));
    let plain = || Wire::haggle(configured.server.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
    let mut before = Session::go(plain(), Mode::Simple, None, b"");
    fs::write(&configured.file, keys(&certificates, "require")).unwrap();
    configured.reload().succeeded();
    assert_eq!(plain().ask_final(OPT_LIST, &[]), REP_ERR_TLS_REQD);
    before.assert_in_sync();
    fs::write(&configured.file, "").unwrap();
    configured.reload().succeeded();
    assert_ne!(plain().ask_final(OPT_STARTTLS, &[]), REP_ACK);
    assert_works(plain());
}

#[test]
fn allowed_names_and_authorities_are_reloaded() {
    let certificates = Certificates::new();
    let ca = format!("TLS_CA={}\n", certificates.pki.ca().display());
    let text = keys(&certificates, "require") + &ca;
    let configured = Configured::start(&certificates, &text);
    let uri = tls_uri(configured.server.endpoint());
    let options = certificates.client_options(true);
    read(&uri, &options).run().succeeded();
    fs::write(&configured.file, format!("{text}TLS_ALLOW=other.example\n")).unwrap();
    configured.reload().succeeded();
    read(&uri, &options).run().ended_with(1);
    fs::write(&configured.file, format!("{text}TLS_ALLOW=other.example client.example\n")).unwrap();
    configured.reload().succeeded();
    read(&uri, &options).run().succeeded();
}

#[test]
fn hangup_reloads_certificates_without_a_file() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require --verbose").start();
    let other = Pki::new();
    replace(&certificates, &other);
    server.signal(Signal::SIGHUP);
    server.wait_for_stderr("received SIGHUP: reloaded");
    assert!(trusts(&other, &server));
}

#[test]
fn proxy_reconnects_with_the_new_certificate() {
    let certificates = Certificates::new();
    let demanding = certificates.demanding();
    let endpoint = harness::Endpoint::Tcp(harness::unused_loopback_address());
    let upstream = || certificates.serve(&demanding).at(endpoint.clone());
    let named = certificates.pki.issue("server", &Request::server().named(&[&ip(&endpoint)]));
    assert_eq!(named.cert, certificates.server.cert);
    let first = upstream().args(["--tls-allow", "client.example"]).start();
    let to = certificates.client_options(true).replace("--tls", "--to-tls");
    let proxy = Builder::proxy().args(["--verbose", "--to", &tls_uri(&endpoint)]);
    let proxy = proxy.args(to.split_whitespace()).start();
    let wire = Wire::haggle(proxy.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    session.assert_in_sync();
    drop(first);
    let _second = upstream().args(["--tls-allow", "new.example"]).start();
    proxy.wait_for_stderr("has none of the names that it allows");
    certificates.pki.issue("client", &Request::client(&["new.example"]));
    proxy.signal(Signal::SIGHUP);
    session.assert_in_sync();
}

fn ip(endpoint: &harness::Endpoint) -> String {
    match endpoint {
        harness::Endpoint::Tcp(address) => address.ip().to_string(),
        harness::Endpoint::Unix(path) => panic!("{}", Path::display(path)),
    }
}

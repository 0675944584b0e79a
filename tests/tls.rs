//! TLS between flexnbd and other programs, in both roles: the negotiation, the trusted names, and the effect of
//! a reload. Certificates are made for each test.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "tls/clients.rs"]
mod clients;
#[path = "tls/migration.rs"]
mod migration;
#[path = "tls/negotiation.rs"]
mod negotiation;
#[path = "tls/proxy.rs"]
mod proxy;
#[path = "tls/reload.rs"]
mod reload;
#[path = "tls/servers.rs"]
mod servers;
#[path = "tls/verification.rs"]
mod verification;

use harness::pki::{Identity, Pki, Request};
use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, OPT_STARTTLS, REP_ACK, Wire};
use harness::session::{Mode, Session};
use harness::{Builder, Endpoint, MIB, Program, Server, sparse_image};
use std::io;
use std::path::{Path, PathBuf};

const SIZE: u64 = 64 * MIB;

/// An authority, and what it has signed: a server at the loopback addresses, and a client.
struct Certificates {
    pki: Pki,
    server: Identity,
    client: Identity,
}

impl Certificates {
    fn new() -> Certificates {
        let pki = Pki::new();
        let server = pki.issue("server", &Request::server());
        let client = pki.issue("client", &Request::client(&["client.example"]));
        Certificates { pki, server, client }
    }

    /// The same with an RSA key of the server.
    fn rsa() -> Certificates {
        let certificates = Certificates::new();
        certificates.pki.issue("server", &Request::server().rsa());
        certificates
    }

    /// A sparse image.
    fn image(&self) -> PathBuf {
        sparse_image(self.pki.path(), "image", SIZE)
    }

    /// A directory for other programs, with a client certificate or without.
    fn directory(&self, name: &str, has_client: bool) -> String {
        let client = has_client.then_some(&self.client);
        self.pki.directory(name, &self.server, client).display().to_string()
    }

    /// `flexnbd serve` with the server's certificate.
    fn serve(&self, options: &str) -> Builder {
        let image = self.image();
        Builder::serve(&image).args(server_options(&self.server)).args(options.split_whitespace())
    }

    /// The options by which a server demands client certificates.
    fn demanding(&self) -> String {
        format!("--tls require --tls-ca {}", self.pki.ca().display())
    }

    /// The options of a client that trusts the authority, with a certificate or without.
    fn client_options(&self, has_client: bool) -> String {
        let ca = format!("--tls-ca {}", self.pki.ca().display());
        if has_client { format!("{ca} {}", identity_options(&self.client)) } else { ca }
    }

    /// Connects as a client that trusts the authority, and does the TLS handshake.
    #[track_caller]
    fn start_tls(&self, server: &Server, client: Option<&Identity>) -> io::Result<Wire> {
        let mut wire = Wire::haggle(server.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
        assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
        wire.start_tls(&self.pki.client_config(client, rustls::ALL_VERSIONS))
    }
}

fn identity_options(identity: &Identity) -> String {
    format!("--tls-cert {} --tls-key {}", identity.cert.display(), identity.key.display())
}

fn server_options(identity: &Identity) -> Vec<String> {
    identity_options(identity).split(' ').map(str::to_owned).collect()
}

/// The URI of a server's default export with TLS.
fn tls_uri(endpoint: &Endpoint) -> String {
    endpoint.uri().replacen("nbd", "nbds", 1)
}

/// The same for libnbd, with a directory of certificates.
fn libnbd_uri(endpoint: &Endpoint, directory: &str) -> String {
    format!("{}/?tls-certificates={directory}", tls_uri(endpoint))
}

/// `flexnbd read` of a sector.
fn read(uri: &str, options: &str) -> Program {
    Program::flexnbd("read --from 0 --size 512 --uri").args([uri]).words(options)
}

/// Checks that a session works: writes, reads back.
#[track_caller]
fn assert_works(wire: Wire) {
    use harness::raw::{READ, WRITE};
    use harness::session::Request;
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    assert_eq!(session.size, SIZE);
    let data = harness::noise(3 << 20, 1);
    session.ok(Request::write(12345, &data));
    assert!(session.read(12345, data.len() as u64) == data, "data read back");
    assert!(session.offers(READ) && session.offers(WRITE));
}

#[track_caller]
fn assert_same_files(left: &Path, right: &Path) {
    assert!(std::fs::read(left).unwrap() == std::fs::read(right).unwrap(), "{left:?} {right:?}");
}

//! A proxy with TLS on both sides.

use crate::{Certificates, assert_works, tls_uri};
use harness::raw::{FIXED_NEWSTYLE, NO_ZEROES, Wire};
use harness::session::{Mode, Session};
use harness::{Builder, Endpoint, Program, unused_loopback_address};

#[test]
fn a_proxy_has_tls_with_clients_and_upstream() {
    let (front, back) = (Certificates::new(), Certificates::new());
    let upstream = back.serve(&back.demanding()).start();
    let to = back.client_options(true).replace("--tls", "--to-tls");
    let proxy = Builder::proxy()
        .args(["--to", &tls_uri(upstream.endpoint())])
        .args(to.split_whitespace())
        .args(crate::server_options(&front.server))
        .args(front.demanding().split_whitespace())
        .start();
    assert_works(front.start_tls(&proxy, Some(&front.client)).unwrap());
    assert!(front.start_tls(&upstream, Some(&front.client)).is_err(), "another authority");
    let mut plain = Wire::haggle(proxy.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
    assert_eq!(plain.ask_final(harness::raw::OPT_LIST, &[]), harness::raw::REP_ERR_TLS_REQD);
}

#[test]
fn a_proxy_brings_tls_to_clients_without() {
    let certificates = Certificates::new();
    let upstream = certificates.serve("--tls require").start();
    let to = certificates.client_options(false).replace("--tls", "--to-tls");
    let uri = upstream.uri();
    let proxy = Builder::proxy().args(["--to", &uri]).args(to.split_whitespace()).start();
    assert_works(Wire::haggle(proxy.endpoint(), FIXED_NEWSTYLE | NO_ZEROES));
}

#[test]
fn a_proxy_keeps_its_clients_while_the_upstream_restarts() {
    let certificates = Certificates::new();
    let endpoint = Endpoint::Tcp(unused_loopback_address());
    let Endpoint::Tcp(address) = endpoint else { panic!("not TCP") };
    let names = [address.ip().to_string()];
    let request = harness::pki::Request::server().named(&[&names[0]]);
    certificates.pki.issue("server", &request);
    let upstream = || certificates.serve(&certificates.demanding()).at(endpoint.clone()).start();
    let first = upstream();
    let to = certificates.client_options(true).replace("--tls", "--to-tls");
    let proxy = Builder::proxy().args(["--to", &tls_uri(&endpoint)]).args(to.split_whitespace());
    let proxy = proxy.start();
    let wire = Wire::haggle(proxy.endpoint(), FIXED_NEWSTYLE | NO_ZEROES);
    let mut session = Session::go(wire, Mode::Simple, None, b"");
    let mut server = first;
    for _ in 0..2 {
        session.assert_in_sync();
        drop(server);
        server = upstream();
    }
    session.assert_in_sync();
}

#[test]
fn a_proxy_refuses_an_upstream_that_it_does_not_trust() {
    let (ours, theirs) = (Certificates::new(), Certificates::new());
    let upstream = theirs.serve("--tls require").start();
    let proxy = |uri: &str, options: &str| {
        let line = format!("proxy --addr 127.0.0.1 --port 1 --to {uri} {options}");
        Program::flexnbd(&line).run()
    };
    let to = ours.client_options(false).replace("--tls", "--to-tls");
    proxy(&tls_uri(upstream.endpoint()), &to)
        .refused(1, &["not from an authority that is trusted here"]);
    proxy(&upstream.uri(), "").refused(1, &["TLS"]);
    let plain = Builder::serve(&ours.image()).start();
    proxy(&tls_uri(plain.endpoint()), &to).refused(1, &["TLS"]);
    let missing = "--to-tls-ca /missing.pem";
    proxy(&upstream.uri(), missing).refused(78, &["cannot read /missing.pem: it does not exist"]);
}

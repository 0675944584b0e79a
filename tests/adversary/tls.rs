//! Cases of TLS: what follows `NBD_OPT_STARTTLS`, before and within the handshake of TLS.

use crate::handshakes::greeted;
use crate::script::{Case, Fate, Step};
use harness::pki::Pki;
use harness::raw::*;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::sync::Arc;

/// Bytes of the server up to the reply to `NBD_OPT_STARTTLS`.
const ACKNOWLEDGED: usize = GREETING_LENGTH + 20;
/// Types of records (RFC 8446, section 5.1).
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

fn record(kind: u8, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(content.len()).unwrap().to_be_bytes();
    [&[kind, 3, 3][..], &length, content].concat()
}

/// A case whose steps follow the server's agreement to begin TLS.
fn agreed(name: impl Into<String>, steps: impl IntoIterator<Item = Step>, fate: Fate) -> Case {
    let start = greeted(&encode_option(OPT_STARTTLS, b""));
    let mut all = vec![Step::Send(start), Step::Await(ACKNOWLEDGED)];
    all.extend(steps);
    Case::new(name, all, fate)
}

/// The first message of a client that trusts this authority.
fn client_hello(pki: &Pki) -> Vec<u8> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.ca()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).unwrap();
    hello
}

fn records(cases: &mut Vec<Case>) {
    for kind in 0..=u8::MAX {
        // A handshake record of this content is the begin of a longer message.
        if kind != HANDSHAKE {
            let steps = [Step::Send(record(kind, &[1, 2, 3, 4]))];
            cases.push(agreed(format!("a record of type {kind}"), steps, Fate::Closed));
        }
    }
    for length in [0, 1, 4, 16_384, 16_385, 16_640, 16_641, 65_535] {
        for kind in [ALERT, HANDSHAKE, DATA] {
            let steps = [Step::Send(record(kind, &vec![0; length])), Step::HalfClose];
            let name = format!("a record of type {kind} with {length} zeros");
            cases.push(agreed(name, steps, Fate::Closed));
        }
    }
    let fatal = record(ALERT, &[2, 40]);
    cases.push(agreed("an alert instead of a handshake", [Step::Send(fatal)], Fate::Closed));
    let change = record(CHANGE_CIPHER_SPEC, &[1]);
    cases.push(agreed("countless changes", [Step::Flood(change, 10_000)], Fate::Leaves));
    // The begin of the longest message, one byte in each record.
    let message = [1, 0, 0xff, 0xff].into_iter().chain(std::iter::repeat_n(0, 0xffff));
    let tiny: Vec<u8> = message.flat_map(|byte| record(HANDSHAKE, &[byte])).collect();
    cases.push(agreed("a message in tiny records", [Step::Send(tiny)], Fate::Closed));
}

fn hellos(cases: &mut Vec<Case>, hello: &[u8]) {
    for length in (0..hello.len()).step_by(5) {
        let steps = [Step::Send(hello[..length].to_vec()), Step::HalfClose];
        cases.push(agreed(format!("{length} bytes of a ClientHello"), steps, Fate::Closed));
    }
    for at in (0..hello.len()).step_by(2) {
        let mut spoiled = hello.to_vec();
        spoiled[at] ^= 0xff;
        let steps = [Step::Send(spoiled), Step::HalfClose];
        cases.push(agreed(format!("a ClientHello with a wrong byte {at}"), steps, Fate::Closed));
    }
    cases.push(agreed("a slow ClientHello", [Step::Drip(hello.to_vec())], Fate::Resets));
    let twice = [Step::Send(hello.repeat(2)), Step::HalfClose];
    cases.push(agreed("two ClientHellos", twice, Fate::Closed));
    for (name, more) in [
        ("data", record(DATA, &[7; 64])),
        ("plain options", encode_option(OPT_LIST, b"")),
        ("an alert", record(ALERT, &[2, 42])),
        ("a message of another state", record(HANDSHAKE, &[20, 0, 0, 1, 0])),
    ] {
        // The answer has certificate and signature.
        let hello = Step::Send(hello.to_vec());
        let steps = [hello, Step::Await(ACKNOWLEDGED + 500), Step::Send(more)];
        cases.push(agreed(format!("{name} after the server's flight"), steps, Fate::Closed));
    }
    for fate in [Fate::Leaves, Fate::Resets] {
        let name = format!("a ClientHello, and then {fate:?}");
        cases.push(agreed(name, [Step::Send(hello.to_vec())], fate));
    }
}

fn around(cases: &mut Vec<Case>, hello: &[u8]) {
    let start = encode_option(OPT_STARTTLS, b"");
    for (name, more) in [
        ("an option", encode_option(OPT_LIST, b"")),
        ("itself", start.clone()),
        ("a byte", vec![0]),
        ("a ClientHello", hello.to_vec()),
    ] {
        let bytes = greeted(&[&start[..], &more].concat());
        let name = format!("STARTTLS together with {name}");
        cases.push(Case::new(name, vec![Step::Send(bytes)], Fate::Closed));
    }
    let plain = encode_go(b"", &[INFO_BLOCK_SIZE]);
    let steps = [Step::Send(encode_option(OPT_GO, &plain))];
    cases.push(agreed("plain options instead of TLS", steps, Fate::Closed));
    cases.push(agreed("the end instead of TLS", [Step::HalfClose], Fate::Closed));
    cases.push(agreed("nothing instead of TLS", [], Fate::Leaves));
    cases.push(agreed("urgent data instead of TLS", [Step::Urgent], Fate::Resets));
}

/// All cases, against a server whose clients may begin TLS.
pub(crate) fn cases(pki: &Pki) -> Vec<Case> {
    let (mut cases, hello) = (Vec::new(), client_hello(pki));
    records(&mut cases);
    hellos(&mut cases, &hello);
    around(&mut cases, &hello);
    cases
}

//! STARTTLS in bytes, in the modes off, on and require (NBD specification, "TLS support").

use crate::{Certificates, assert_works};
use harness::raw::*;
use harness::session::{Mode, Session};
use harness::{Server, pki::Pki};
use rustls::version::{TLS12, TLS13};
use std::io::ErrorKind;

const FLAGS: u32 = FIXED_NEWSTYLE | NO_ZEROES;

fn haggle(server: &Server) -> Wire {
    Wire::haggle(server.endpoint(), FLAGS)
}

#[test]
fn starttls_is_refused_without_a_certificate() {
    let image_owner = Certificates::new();
    for options in [&[][..], &["--tls", "off"]] {
        let server = harness::Builder::serve(&image_owner.image()).args(options).start();
        let mut wire = haggle(&server);
        let refused = wire.ask_final(OPT_STARTTLS, &[]);
        assert!([REP_ERR_UNSUP, REP_ERR_POLICY].contains(&refused), "{refused:#x}");
        wire.assert_haggling_in_sync();
    }
}

/// "The server MUST NOT send NBD_REP_ERR_TLS_REQD" in SELECTIVETLS unless an export needs it: all of ours
/// are the same in both modes.
#[test]
fn on_serves_with_and_without_tls() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls on").start();
    assert_works(haggle(&server));
    assert_works(certificates.start_tls(&server, None).unwrap());
    assert_eq!(server.stderr(), "");
}

/// "[In FORCEDTLS] the server MUST reply with NBD_REP_ERR_TLS_REQD" to any option but STARTTLS,
/// EXPORT_NAME and ABORT.
#[test]
fn require_refuses_every_option_before_starttls() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = haggle(&server);
    let meta = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    for (option, data) in [
        (OPT_LIST, Vec::new()),
        (OPT_INFO, encode_go(b"", &[])),
        (OPT_GO, encode_go(b"", &[])),
        (OPT_STRUCTURED_REPLY, Vec::new()),
        (OPT_EXTENDED_HEADERS, Vec::new()),
        (OPT_LIST_META_CONTEXT, meta.clone()),
        (OPT_SET_META_CONTEXT, meta),
        (OPT_PRIVATE, vec![0; 24]),
        (OPT_LIST, b"data".to_vec()),
    ] {
        assert_eq!(wire.ask(option, &data), (Vec::new(), REP_ERR_TLS_REQD), "option {option}");
    }
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
    let config = certificates.pki.client_config(None, rustls::ALL_VERSIONS);
    assert_works(wire.start_tls(&config).unwrap());
    let mut wire = haggle(&server);
    assert_eq!(wire.ask_final(OPT_ABORT, &[]), REP_ACK);
    wire.expect_closed("after ABORT");
}

/// "If the client sends NBD_OPT_EXPORT_NAME, the server MUST disconnect."
#[test]
fn require_closes_after_export_name() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = haggle(&server);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME has no reply for an error");
    let mut wire = certificates.start_tls(&server, None).unwrap();
    wire.send_option(OPT_EXPORT_NAME, b"");
    assert_eq!(wire.recv_u64(), crate::SIZE);
}

/// "The server MUST NOT send any data" of an export to a client without fixed newstyle flags; such a client
/// cannot send STARTTLS either.
#[test]
fn client_without_fixed_newstyle_gets_nothing() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = Wire::haggle(server.endpoint(), 0);
    wire.send_option(OPT_EXPORT_NAME, b"");
    wire.expect_closed("EXPORT_NAME without TLS");
}

/// "[After STARTTLS] the client and the server MUST NOT use any state of option haggling from before."
#[test]
fn nothing_negotiated_survives_starttls() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls on").start();
    let config = certificates.pki.client_config(None, rustls::ALL_VERSIONS);
    let meta = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    for option in [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS] {
        let mut wire = haggle(&server);
        assert_eq!(wire.ask_final(option, &[]), REP_ACK);
        assert_eq!(wire.ask(OPT_SET_META_CONTEXT, &meta).0.len(), 1);
        assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
        let mut wire = wire.start_tls(&config).unwrap();
        // Contexts need structured replies, which have to be negotiated again.
        let (contexts, refused) = wire.ask(OPT_SET_META_CONTEXT, &meta);
        assert_eq!((contexts.len(), refused), (0, REP_ERR_INVALID), "option {option}");
        // Replies are simple ones again.
        let mut session = Session::go(wire, Mode::Simple, None, b"");
        assert_eq!(session.read(0, 512), vec![0; 512], "option {option}");
    }
    let mut wire = haggle(&server);
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
    let mut wire = wire.start_tls(&config).unwrap();
    assert_eq!(wire.ask_final(OPT_STRUCTURED_REPLY, &[]), REP_ACK);
    assert_eq!(wire.ask(OPT_SET_META_CONTEXT, &meta).0.len(), 1);
}

/// An attacker could insert plain options before the handshake, in the hope that they are taken for the
/// client's afterwards (CVE-2021-3716).
#[test]
fn bytes_sent_together_with_starttls_end_the_session() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls on").start();
    for more in [encode_option(OPT_STRUCTURED_REPLY, &[]), vec![0], vec![22, 3, 1, 2, 0]] {
        let mut wire = haggle(&server);
        wire.send(&[encode_option(OPT_STARTTLS, &[]), more].concat());
        let rest = wire.recv_to_end();
        // At most the reply to STARTTLS.
        assert!(rest.len() <= 20, "{rest:02x?}");
        server.wait_for_stderr("NBD_OPT_STARTTLS");
    }
    assert_works(haggle(&server));
}

#[test]
fn starttls_with_data_is_invalid() {
    let certificates = Certificates::new();
    for mode in ["on", "require"] {
        let server = certificates.serve(&format!("--tls {mode}")).start();
        let mut wire = haggle(&server);
        assert_eq!(wire.ask_final(OPT_STARTTLS, b"x"), REP_ERR_INVALID);
        assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
        let config = certificates.pki.client_config(None, rustls::ALL_VERSIONS);
        assert_works(wire.start_tls(&config).unwrap());
    }
}

/// "[If TLS is already in use] the server MUST reply with NBD_REP_ERR_INVALID."
#[test]
fn second_starttls_is_invalid() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = certificates.start_tls(&server, None).unwrap();
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ERR_INVALID);
    wire.assert_haggling_in_sync();
    assert_works(wire);
}

#[test]
fn both_versions_are_spoken_with_aes_128_first() {
    for certificates in [Certificates::new(), Certificates::rsa()] {
        let server = certificates.serve("--tls require").start();
        for (version, start, end) in [
            (&TLS13, "TLSv1_3", "TLS13_AES_128_GCM_SHA256"),
            (&TLS12, "TLSv1_2", "_WITH_AES_128_GCM_SHA256"),
        ] {
            let mut wire = haggle(&server);
            assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
            let wire = wire.start_tls(&certificates.pki.client_config(None, &[version])).unwrap();
            let terms = wire.tls_terms();
            assert!(terms.starts_with(start) && terms.ends_with(end), "{terms}");
            assert_works(wire);
        }
    }
}

#[test]
fn garbage_in_place_of_tls_ends_the_session_only() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0; 512],
        &[22, 3, 1, 0xff, 0xff, 1],
        &[23, 3, 3, 0, 1, 0],
    ] {
        let mut wire = haggle(&server);
        assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
        wire.send(garbage);
        wire.shutdown_write();
        // An alert at most, in one record.
        assert!(wire.recv_to_end().len() < 64);
    }
    // A plain request where a record is expected.
    let mut wire = haggle(&server);
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
    wire.send(&encode_option(OPT_GO, &encode_go(b"", &[])));
    wire.shutdown_write();
    assert!(wire.recv_to_end().len() < 64);
    assert_works(certificates.start_tls(&server, None).unwrap());
}

#[test]
fn server_ends_tls_with_close_notify() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = certificates.start_tls(&server, None).unwrap();
    assert_eq!(wire.ask_final(OPT_ABORT, &[]), REP_ACK);
    let (rest, end) = wire.recv_to_end_or_error();
    assert!(rest.is_empty());
    // rustls reports a stream without close_notify as truncated.
    assert!(
        end.as_ref().map_or_else(|e| e.kind(), |()| ErrorKind::Other) != ErrorKind::UnexpectedEof,
        "{end:?}"
    );
}

#[test]
fn oldstyle_excludes_tls() {
    let certificates = Certificates::new();
    let image = certificates.image();
    for mode in ["on", "require"] {
        let line = format!("serve --oldstyle --tls {mode} --addr 127.0.0.1 --port 1 --file");
        let program = harness::Program::flexnbd(&line).args([&image]);
        let program = program.args(crate::server_options(&certificates.server));
        program.run().refused(2, &["--oldstyle excludes --tls-cert: the old handshake has no TLS"]);
    }
}

#[test]
fn authority_of_another_pki_is_not_trusted() {
    let certificates = Certificates::new();
    let server = certificates.serve("--tls require").start();
    let mut wire = haggle(&server);
    assert_eq!(wire.ask_final(OPT_STARTTLS, &[]), REP_ACK);
    let other = Pki::new().client_config(None, rustls::ALL_VERSIONS);
    let Err(error) = wire.start_tls(&other) else { panic!("the client trusts anybody") };
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
    assert_works(certificates.start_tls(&server, None).unwrap());
}

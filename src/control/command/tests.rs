//! Tests of `command.rs`.

use super::*;
use crate::net::Remote;
use crate::net::tls::{TlsFile, TlsFiles, TlsMode, TlsTarget};
use proptest::prelude::*;

fn parse(wire: &[u8]) -> Result<Option<Command>, CommandError> {
    Incoming::default().feed(wire)
}

fn at_end(wire: &[u8]) -> Result<Command, CommandError> {
    let mut incoming = Incoming::default();
    assert_eq!(incoming.feed(wire), Ok(None));
    incoming.end()
}

fn acl(entries: &[&str]) -> Command {
    Command::Acl { entries: entries.iter().map(|&entry| entry.to_owned()).collect() }
}

#[test]
fn commands_of_the_originals_client_are_parsed() {
    let bound = Mirror {
        action: ArrivalAction::Unlink,
        bind: Some("10.0.0.9".parse().unwrap()),
        ..Mirror::plain("10.0.0.1:4777")
    };
    let cases: [(&[u8], Command); 7] = [
        (b"status\n\n", Command::Status),
        (b"break\n\n", Command::Break),
        (b"acl\n\n", acl(&[])),
        (b"acl\n127.0.0.1\n10.0.0.0/8\n\n", acl(&["127.0.0.1", "10.0.0.0/8"])),
        // Without a bind address, its empty line ends the command; another one follows.
        (b"mirror\n10.0.0.1\n4777\nexit\n\n\n", Command::Mirror(Mirror::plain("10.0.0.1:4777"))),
        (b"mirror\n10.0.0.1\n4777\nunlink\n10.0.0.9\n\n", Command::Mirror(bound)),
        (b"mirror_max_bps\n1048576\n\n", Command::MirrorMaxBps(1_048_576)),
    ];
    for (wire, command) in cases {
        assert_eq!(parse(wire), Ok(Some(command)), "{}", wire.escape_ascii());
    }
}

#[test]
fn commands_are_encoded_as_the_originals_server_expects() {
    let limited = Mirror { max_bps: Some(7), ..Mirror::plain("[::1]:4777") };
    let cases: [(Command, &[u8]); 7] = [
        (Command::Status, b"status\n\n"),
        (Command::Break, b"break\n\n"),
        (Command::MirrorWait(Mirror::plain("[::1]:1")), b"mirror_wait\n::1\n1\nexit\n\n"),
        (acl(&["::1"]), b"acl\n::1\n\n"),
        (Command::Mirror(Mirror::plain("10.0.0.1:4777")), b"mirror\n10.0.0.1\n4777\nexit\n\n"),
        // An empty line for the bind address would end the command before the limit.
        (Command::Mirror(limited), b"mirror\n::1\n4777\nexit\n::\n7\n\n"),
        (Command::MirrorMaxBps(0), b"mirror_max_bps\n0\n\n"),
    ];
    for (command, wire) in cases {
        assert_eq!(command.to_wire().unwrap().escape_ascii().to_string(), {
            wire.escape_ascii().to_string()
        });
    }
}

#[test]
fn mirror_without_an_action_exits() {
    assert_eq!(
        parse(b"mirror\n10.0.0.1\n1\n\n"),
        Ok(Some(Command::Mirror(Mirror::plain("10.0.0.1:1"))))
    );
}

#[test]
fn each_wrong_argument_has_its_own_error() {
    let cases: [(&[u8], CommandError); 18] = [
        (b"\n", CommandError::MissingCommand),
        (b"dance\n\n", CommandError::UnknownCommand),
        (b"STATUS\n\n", CommandError::UnknownCommand),
        (b"mirror\n\n", CommandError::MirrorWithoutDestination),
        (b"mirror\n10.0.0.1\n\n", CommandError::MirrorWithoutDestination),
        (b"mirror\nten\n1\n\n", CommandError::BadAddress),
        (b"mirror\n10.0.0.1\n0\n\n", CommandError::BadPort),
        (b"mirror\n10.0.0.1\n65536\n\n", CommandError::BadPort),
        (b"mirror\n10.0.0.1\n1\nstay\n\n", CommandError::BadAction),
        (b"mirror\n10.0.0.1\n1\nexit\nhere\n\n", CommandError::BadBindAddress),
        (b"mirror\n10.0.0.1\n1\nexit\n::1\nfast\n\n", CommandError::MaxBpsNotANumber),
        (b"mirror\n10.0.0.1\n1\nexit\n::1\n1\nmore\n\n", CommandError::BadMirrorWord),
        (
            b"mirror\n10.0.0.1\n1\nexit\n::1\n1\n6\n7\n8\n9\n10\n11\n12\n13\n14\n15\n16\n17\n18\n\n",
            CommandError::TooManyMirrorArguments,
        ),
        (b"mirror_max_bps\n\n", CommandError::MaxBpsMissing),
        (b"mirror_max_bps\n-1\n\n", CommandError::MaxBpsNotANumber),
        (b"mirror_max_bps\n1.5\n\n", CommandError::MaxBpsNotANumber),
        (b"mirror_max_bps\n18446744073709551616\n\n", CommandError::MaxBpsTooLarge),
        (b"\xff\n\n", CommandError::NotText),
    ];
    for (wire, error) in cases {
        assert_eq!(parse(wire), Err(error), "{}", wire.escape_ascii());
    }
}

#[test]
fn numbers_at_their_limits_are_parsed() {
    assert!(parse(b"mirror\n10.0.0.1\n1\n\n").is_ok());
    assert!(parse(b"mirror\n10.0.0.1\n65535\n\n").is_ok());
    assert_eq!(
        parse(b"mirror_max_bps\n18446744073709551615\n\n"),
        Ok(Some(Command::MirrorMaxBps(u64::MAX)))
    );
}

#[test]
fn missing_and_unknown_commands_have_their_own_codes() {
    assert_eq!(Reply::from(CommandError::MissingCommand).to_wire(), b"9: missing command\n");
    assert_eq!(Reply::from(CommandError::UnknownCommand).to_wire(), b"10: unknown command\n");
    assert_eq!(Reply::from(CommandError::BadAddress).to_wire(), b"1: bad IP address\n");
}

#[test]
fn a_line_has_at_most_256_bytes() {
    let entry = "1".repeat(LINE_BYTES_MAX);
    assert_eq!(parse(format!("acl\n{entry}\n\n").as_bytes()), Ok(Some(acl(&[&entry]))));
    assert_eq!(parse(format!("acl\n{entry}1").as_bytes()), Err(CommandError::LineTooLong));
}

#[test]
fn a_command_has_at_most_4096_lines() {
    let full = format!("acl\n{}", "::1\n".repeat(LINES_MAX - 1));
    let Ok(Some(Command::Acl { entries })) = parse(format!("{full}\n").as_bytes()) else {
        panic!("a command of {LINES_MAX} lines must be parsed");
    };
    assert_eq!(entries.len(), LINES_MAX - 1);
    assert_eq!(parse(format!("{full}:").as_bytes()), Err(CommandError::TooManyLines));
}

#[test]
fn an_acl_that_cannot_be_encoded_is_refused() {
    let longest = "1".repeat(LINE_BYTES_MAX);
    assert!(acl(&[&longest]).to_wire().is_ok());
    for bad in ["", "a\nb", &format!("{longest}1")] {
        assert_eq!(acl(&[bad]).to_wire(), Err(CommandEncodeError::BadEntry(bad.to_owned())));
    }
    assert!(acl(&vec!["::1"; LINES_MAX - 1]).to_wire().is_ok());
    assert_eq!(
        acl(&vec!["::1"; LINES_MAX]).to_wire(),
        Err(CommandEncodeError::TooManyEntries(LINES_MAX))
    );
}

#[test]
fn end_of_file_after_whole_lines_ends_a_command() {
    assert_eq!(at_end(b"status\n"), Ok(Command::Status));
    assert_eq!(at_end(b"acl\n::1\n"), Ok(acl(&["::1"])));
    assert_eq!(at_end(b""), Err(CommandError::MissingCommand));
}

#[test]
fn end_of_file_inside_a_line_is_an_error() {
    assert_eq!(at_end(b"status"), Err(CommandError::CutShort));
    assert_eq!(at_end(b"mirror\n10.0.0.1\n80"), Err(CommandError::CutShort));
}

#[test]
fn bytes_after_the_empty_line_are_ignored() {
    assert_eq!(parse(b"status\n\nmirror\n\xff"), Ok(Some(Command::Status)));
}

#[test]
fn log_text_shortens_a_long_acl() {
    assert_eq!(acl(&["::1", "::2"]).to_string(), "acl ::1 ::2");
    assert_eq!(acl(&["::1"; 8]).to_string(), format!("acl{}", " ::1".repeat(8)));
    assert_eq!(acl(&["::1"; 9]).to_string(), format!("acl{} and 1 more", " ::1".repeat(8)));
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![any::<Ipv4Addr>().prop_map(IpAddr::V4), any::<Ipv6Addr>().prop_map(IpAddr::V6)]
}

fn any_relay() -> impl Strategy<Value = RelayRequest> {
    let seconds = proptest::option::of(1..=RELAY_SECONDS_MAX);
    let to = proptest::option::of("[a-z]{1,9}".prop_map(|host| Remote::Host { host, port: 7 }));
    let mode = proptest::sample::select(vec![TlsMode::Off, TlsMode::On, TlsMode::Require]);
    let tls = (mode, proptest::option::of("[a-z]{1,9}"))
        .prop_map(|(mode, hostname)| TlsTarget { mode, hostname });
    let options = (seconds, to, "[a-z =]{0,9}", tls);
    prop_oneof![
        Just(RelayRequest::AsConfigured),
        Just(RelayRequest::No),
        options.prop_map(|(seconds_max, to, export, tls)| {
            RelayRequest::Yes(RelayOptions { seconds_max, to, export, tls })
        }),
    ]
}

fn any_tls() -> impl Strategy<Value = MirrorTls> {
    let mode = proptest::option::of(proptest::sample::select(vec![TlsMode::Off, TlsMode::On]));
    let ca = proptest::option::of("/[a-z=]{1,9}".prop_map(|path| TlsFile::Path(path.into())));
    (mode, ca, proptest::option::of("[a-z]{1,9}")).prop_map(|(mode, ca, hostname)| MirrorTls {
        mode,
        files: TlsFiles { ca, ..TlsFiles::default() },
        hostname,
    })
}

fn any_mirror() -> impl Strategy<Value = Mirror> {
    let bind = any_ip().prop_filter("unspecified means none", |ip| !ip.is_unspecified());
    let action = proptest::sample::select(&ArrivalAction::ALL[..]);
    let limit = (any::<Option<u64>>(), any::<bool>(), any_relay(), any_tls());
    (any_ip(), 1u16.., action, proptest::option::of(bind), limit).prop_map(
        |(ip, port, action, bind, (max_bps, no_record, relay, tls))| {
            let has_words =
                no_record || relay != RelayRequest::AsConfigured || tls != MirrorTls::default();
            Mirror {
                to: SocketAddr::new(ip, port),
                action,
                bind,
                max_bps: max_bps.filter(|limit| *limit > 0 || !has_words),
                no_record,
                relay,
                tls: Box::new(tls),
            }
        },
    )
}

fn any_command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::Status),
        Just(Command::Break),
        Just(Command::Reload),
        any::<u64>().prop_map(Command::MirrorMaxBps),
        any_mirror().prop_map(Command::Mirror),
        any_mirror().prop_map(Command::MirrorWait),
        proptest::collection::vec("[^\n]{1,64}", 0..20)
            .prop_map(|entries| Command::Acl { entries }),
    ]
}

proptest! {
    #[test]
    fn every_command_round_trips(command in any_command()) {
        prop_assert_eq!(parse(&command.to_wire().unwrap()), Ok(Some(command)));
    }

    #[test]
    fn every_prefix_of_a_command_is_incomplete(command in any_command(), cut: prop::sample::Index) {
        let wire = command.to_wire().unwrap();
        prop_assert_eq!(parse(&wire[..cut.index(wire.len())]), Ok(None));
    }

    #[test]
    fn command_parses_however_its_bytes_are_split(command in any_command(), step in 1usize..9) {
        let wire = command.to_wire().unwrap();
        let mut incoming = Incoming::default();
        let mut got = Ok(None);
        for chunk in wire.chunks(step) {
            prop_assert_eq!(&got, &Ok(None));
            got = incoming.feed(chunk);
        }
        prop_assert_eq!(got, Ok(Some(command)));
    }

    #[test]
    fn parsing_never_panics(bytes: Vec<u8>) {
        let mut incoming = Incoming::default();
        if incoming.feed(&bytes) == Ok(None) {
            let _ = incoming.end();
        }
    }
}

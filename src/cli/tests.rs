//! Valid command lines with their commands, and invalid ones with their usage errors. No test opens
//! a socket or a disk.

use super::offline::{DiskArgument, OfflineStatus};
use super::operate::CommandKind;
use super::start::ProcessRole;
use super::*;
use crate::control::command::{ArrivalAction, Mirror, RelayOptions, RelayRequest};
use crate::daemon::RecordPolicy;
use crate::net::Remote;
use crate::net::tls::{TlsFiles, TlsTarget};

fn parsed(line: &str) -> Result<Invocation, EarlyExit> {
    parse(["flexnbd"].into_iter().chain(line.split_whitespace()).map(OsString::from))
}

fn command_of(line: &str) -> CliCommand {
    match parsed(line) {
        Ok(invocation) => invocation.command,
        Err(EarlyExit::Misuse(error)) => panic!("{line}: {error}"),
        Err(EarlyExit::Output(text)) => panic!("{line}: {text}"),
    }
}

fn start_request(line: &str) -> StartRequest {
    match command_of(line) {
        CliCommand::Start(request) => *request,
        other => panic!("{line}: {other:?}"),
    }
}

fn settings(line: &str) -> settings::Settings {
    start_request(line).settings
}

fn usage_error_of(line: &str) -> UsageError {
    match parsed(line) {
        Err(EarlyExit::Misuse(error)) => error,
        other => panic!("{line}: {other:?}"),
    }
}

/// Checks the sentence, and that the usage is the mode's, in one line.
#[track_caller]
fn assert_misuse(line: &str, sentence: &str) {
    let error = usage_error_of(line);
    assert_eq!(error.sentence, sentence, "{line}");
    let first = line.split_whitespace().find(|word| !word.starts_with('-'));
    let mode = first.filter(|word| MODES.contains(word));
    assert_eq!(error.mode, mode, "{line}");
    let prefix = mode.map_or("flexnbd MODE".to_owned(), |mode| format!("flexnbd {mode} "));
    assert!(error.usage.starts_with(&prefix), "{line}: {}", error.usage);
    assert_eq!(error.to_string().lines().count(), 2, "{error}");
}

const TRANSFER: &str = "--addr ::1 --port 7 --from 0 --size 1";

#[test]
fn every_long_option_of_serve_is_parsed() {
    let line = "serve --addr 127.0.0.1 --port 4777 --file /a --sock /b --default-deny --killswitch \
        --create 1G --read-only --export disk --oldstyle --max-clients 5 \
        --max-clients-per-address 4 --payload-memory 8M --idle-exit 60 --config /c --holes trust --direct 192.0.2.1 ::1";
    let expected = settings::Settings {
        addr: Some("127.0.0.1".parse().unwrap()),
        port: Some(4777),
        file: Some("/a".into()),
        create: Some(1 << 30),
        sock: Some("/b".into()),
        default_deny: true,
        killswitch: true,
        read_only: true,
        export: Some("disk".to_owned()),
        oldstyle: true,
        max_clients: Some(5),
        max_clients_per_address: Some(4),
        payload_memory: Some(8 << 20),
        idle_exit: Some(60),
        holes: Some(crate::disk::HolePolicy::Trust),
        direct: true,
        acl: vec!["192.0.2.1".to_owned(), "::1".to_owned()],
        ..settings::Settings::default()
    };
    let config_file = Some("/c".into());
    assert_eq!(
        start_request(line),
        StartRequest { role: ProcessRole::Serve, settings: expected, config_file }
    );
}

#[test]
fn every_option_of_listen_is_parsed() {
    let long = "listen --addr 127.0.0.1 --port 4777 --file /a --sock /b --default-deny \
        --create 1G --overwrite --export disk --oldstyle --direct --config /c 192.0.2.1 ::1";
    let short = "listen -l 127.0.0.1 -p 4777 -f /a -s /b -d --create 1G --overwrite \
        --export disk --oldstyle --direct --config /c 192.0.2.1 ::1";
    let expected = settings::Settings {
        addr: Some("127.0.0.1".parse().unwrap()),
        port: Some(4777),
        file: Some("/a".into()),
        create: Some(1 << 30),
        sock: Some("/b".into()),
        default_deny: true,
        export: Some("disk".to_owned()),
        oldstyle: true,
        direct: true,
        acl: vec!["192.0.2.1".to_owned(), "::1".to_owned()],
        ..settings::Settings::default()
    };
    let role = ProcessRole::Listen { overwrite: true, records: RecordPolicy::Required };
    let expected = StartRequest { role, settings: expected, config_file: Some("/c".into()) };
    assert_eq!(start_request(long), expected);
    assert_eq!(start_request(short), expected);
    assert_eq!(
        start_request("listen -f /a").role,
        ProcessRole::Listen { overwrite: false, records: RecordPolicy::Required }
    );
}

#[test]
fn listen_has_no_options_for_serving() {
    for option in ["-k", "-r", "--killswitch", "--read-only", "--max-clients"] {
        assert_misuse(&format!("listen -f /a {option}"), &format!("unknown option `{option}`"));
    }
    assert_misuse("serve -f /a --overwrite", "unknown option `--overwrite`");
}

fn operation(line: &str) -> CommandKind {
    match command_of(line) {
        CliCommand::Operate(command) => {
            assert_eq!(command.socket.to_str(), Some("/x"), "{line}");
            command.kind
        }
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn every_option_of_mirror_is_parsed() {
    let plain = Mirror::plain;
    let full = Mirror {
        action: ArrivalAction::Unlink,
        bind: Some("192.0.2.9".parse().unwrap()),
        max_bps: Some(10 << 20),
        no_record: true,
        relay: RelayRequest::Yes(RelayOptions {
            seconds_max: Some(60),
            to: Some(crate::net::Remote::Unix("/s".into())),
            export: "disk".to_owned(),
            ..RelayOptions::default()
        }),
        ..plain("192.0.2.1:7")
    };
    let long = "mirror --addr 192.0.2.1 --port 7 --sock /x --unlink --bind 192.0.2.9 \
        --max-speed 10M --no-record --wait --relay-for 60 --relay-to nbd+unix:///disk?socket=/s";
    let short = "mirror -l 192.0.2.1 -p 7 -s /x -u -b 192.0.2.9 --max-speed 10485760 --no-record --wait \
        --relay --relay-for 60 --relay-to nbd+unix:///disk?socket=/s";
    for line in [long, short] {
        assert_eq!(
            operation(line),
            CommandKind::Mirror { mirror: full.clone(), wait: true },
            "{line}"
        );
    }
    for address in ["::1", "[::1]"] {
        let kind = operation(&format!("mirror -l {address} -p 7 -s /x"));
        assert_eq!(kind, CommandKind::Mirror { mirror: plain("[::1]:7"), wait: false });
    }
    let relay = |options: &str| match operation(&format!("mirror -l ::1 -p 7 -s /x {options}")) {
        CommandKind::Mirror { mirror, .. } => mirror.relay,
        other => panic!("{other:?}"),
    };
    assert_eq!(relay("--no-relay"), RelayRequest::No);
    assert_eq!(relay("--relay"), RelayRequest::Yes(RelayOptions::default()));
    // No limit and any local address: the same as without these options.
    let kind = operation("mirror -l ::1 -p 7 -s /x --max-speed 0 -b ::");
    assert_eq!(kind, CommandKind::Mirror { mirror: plain("[::1]:7"), wait: false });
}

#[test]
fn mirror_speed_and_break_are_parsed() {
    assert_eq!(operation("mirror-speed -s /x -m 4K"), CommandKind::MirrorSpeed(4096));
    assert_eq!(operation("mirror-speed --sock /x --max-speed 0"), CommandKind::MirrorSpeed(0));
    assert_eq!(operation("break --sock /x"), CommandKind::Break);
    assert_eq!(
        command_of("break --instance a"),
        CliCommand::Operate(OperatorCommand {
            socket: "/run/flexnbd/a.sock".into(),
            kind: CommandKind::Break
        })
    );
}

#[test]
fn a_migration_needs_a_server_and_a_destination() {
    assert_misuse("mirror -s /x", "--addr ADDR and --port PORT are missing");
    assert_misuse("mirror -s /x -l ::1", "--port PORT is missing");
    let missing = "the server is missing: give --sock SOCK or --instance NAME";
    for line in ["mirror -l ::1 -p 7", "mirror-speed -m 1", "break"] {
        assert_misuse(line, missing);
    }
    assert_misuse("mirror-speed -s /x", "--max-speed RATE is missing");
    assert_misuse(
        "mirror -l ::1 -p 7 -s /x --instance a",
        "--sock SOCK cannot go with --instance NAME",
    );
}

#[test]
fn a_migration_needs_tcp_addresses_of_one_family() {
    assert_misuse(
        "mirror -l /run/x -p 7 -s /x",
        "--addr ADDR: `/run/x` is a path, and disks are moved over TCP only",
    );
    assert_misuse(
        "mirror -l localhost -p 7 -s /x",
        "--addr ADDR: `localhost` is not an IPv4 or IPv6 address",
    );
    assert_misuse("mirror -l ::1 -p 0 -s /x", "--port PORT: port 0 is not a port to connect to");
    assert_misuse(
        "mirror -l ::1 -p 65536 -s /x",
        "--port PORT: `65536` is not a port, a number up to 65535",
    );
    assert_misuse(
        "mirror -l ::1 -p 7 -s /x -b eth0",
        "--bind BIND_ADDR: `eth0` is not an IPv4 or IPv6 address",
    );
    assert_misuse(
        "mirror -l ::1 -p 7 -s /x -b 192.0.2.1",
        "--addr ::1 cannot be reached from --bind 192.0.2.1",
    );
}

#[test]
fn a_speed_limit_is_a_number_of_bytes() {
    let sentence = "--max-speed RATE: `10M/s` is not a number of bytes, such as 4096, 4K, 100M, \
        20G or 1T";
    assert_misuse("mirror-speed -s /x -m 10M/s", sentence);
    assert_misuse("mirror -l ::1 -p 7 -s /x --max-speed 10M/s", sentence);
}

#[test]
fn adopt_needs_a_file() {
    let adopt = |force| CliCommand::Adopt(adopt::Adopt { file: "/a".into(), force });
    assert_eq!(command_of("adopt -f /a"), adopt(false));
    assert_eq!(command_of("adopt --file /a --force"), adopt(true));
    assert_misuse("adopt", "--file FILE is missing");
    assert_misuse("adopt /a", "`/a` has no meaning here");
}

#[test]
fn short_options_of_serve_equal_the_long_ones() {
    let short = settings("serve -l ::1 -p 7 -f /a -s /b -d -k -r ::2");
    let long = settings(
        "serve --addr ::1 --port 7 --file /a --sock /b --default-deny --killswitch --read-only ::2",
    );
    assert_eq!(short, long);
    assert_eq!(settings("serve -dkr"), settings("serve -d -k -r"));
}

#[test]
fn acl_entries_may_stand_between_options() {
    assert_eq!(settings("serve ::1 -f /a ::2 -d ::3").acl, ["::1", "::2", "::3"]);
}

#[test]
fn the_last_of_a_repeated_option_wins() {
    assert_eq!(settings("serve -f /a -d --file /b -d").file, Some("/b".into()));
}

#[test]
fn read_and_write_have_the_same_options() {
    let expected = Transfer {
        remote: Remote::Host { host: "localhost".to_owned(), port: 7 },
        export: "disk".to_owned(),
        from: 4096,
        size: 1 << 20,
        bind: Some("127.0.0.9".parse().unwrap()),
        tls: TlsTarget::default(),
        tls_files: TlsFiles::default(),
    };
    let long = "--addr localhost --port 7 --from 4K --size 1M --bind 127.0.0.9 --export disk";
    let short = "-l localhost -p 7 -F 4096 -S 1048576 -b 127.0.0.9 --export disk";
    for options in [long, short] {
        assert_eq!(command_of(&format!("read {options}")), CliCommand::Read(expected.clone()));
        assert_eq!(command_of(&format!("write {options}")), CliCommand::Write(expected.clone()));
    }
}

#[test]
fn a_uri_sets_server_and_export() {
    let CliCommand::Read(transfer) = command_of("read --uri nbd://[::1]/disk -F 0 -S 1 -b [::2]")
    else {
        panic!("read")
    };
    assert_eq!(transfer.remote, Remote::Host { host: "::1".to_owned(), port: 10809 });
    assert_eq!(transfer.export, "disk");
    assert_eq!(transfer.bind, Some("::2".parse().unwrap()));
    for (uri, export) in [("nbd://h", "disk"), ("nbd://h/disk", "disk")] {
        let CliCommand::Read(transfer) =
            command_of(&format!("read --uri {uri} --export {export} -F 0 -S 1"))
        else {
            panic!("read")
        };
        assert_eq!(transfer.export, "disk");
    }
}

#[test]
fn a_transfer_can_use_a_unix_socket() {
    let CliCommand::Write(transfer) = command_of("write -l /run/x -F 0 -S 1") else {
        panic!("write")
    };
    assert_eq!(transfer.remote, Remote::Unix("/run/x".into()));
}

#[test]
fn a_server_is_selected_by_socket_or_instance() {
    let operate =
        |socket: &str, kind| CliCommand::Operate(OperatorCommand { socket: socket.into(), kind });
    let entries = || CommandKind::Acl(vec!["::1".to_owned(), "192.0.2.0/24".to_owned()]);
    assert_eq!(command_of("acl --sock /x ::1 192.0.2.0/24"), operate("/x", entries()));
    assert_eq!(command_of("acl ::1 -s /x 192.0.2.0/24"), operate("/x", entries()));
    assert_eq!(
        command_of("status --instance a:b-1"),
        operate("/run/flexnbd/a:b-1.sock", CommandKind::Status { json: false })
    );
    assert_eq!(
        command_of("status -s /x --json"),
        operate("/x", CommandKind::Status { json: true })
    );
    let offline = |disk, json| CliCommand::Inspect(OfflineStatus { disk, json });
    assert_eq!(command_of("status -f /x"), offline(DiskArgument::File("/x".into()), false));
    let named = DiskArgument::Config("/y".into());
    assert_eq!(command_of("status --config /y --json"), offline(named, true));
    assert_eq!(
        command_of("reload --instance a"),
        operate("/run/flexnbd/a.sock", CommandKind::Reload)
    );
}

#[test]
fn the_last_of_verbose_and_quiet_wins() {
    for (line, expected) in [
        ("status -s /x", Verbosity::Normal),
        ("-v status -s /x", Verbosity::Verbose),
        ("status -v -s /x", Verbosity::Verbose),
        ("status -s /x --quiet", Verbosity::Quiet),
        ("status -s /x -v -q", Verbosity::Quiet),
        ("status -q -s /x -v", Verbosity::Verbose),
        ("-q -v status -s /x", Verbosity::Verbose),
        ("-v -q status -s /x", Verbosity::Quiet),
        ("-q status -s /x -v", Verbosity::Verbose),
        ("-v status -s /x -q", Verbosity::Quiet),
        ("-v -v status -v -s /x -v", Verbosity::Verbose),
        ("status -s /x -v -q -v", Verbosity::Verbose),
    ] {
        assert_eq!(parsed(line).unwrap().verbosity, expected, "{line}");
    }
}

#[test]
fn help_is_accepted_at_every_position() {
    let help = |line: &str| match parsed(line) {
        Err(EarlyExit::Output(text)) => text,
        Ok(Invocation { command: CliCommand::Help(text), .. }) => text,
        other => panic!("{line}: {other:?}"),
    };
    for line in ["-h", "--help", "help", "-v help", "help -q"] {
        for mode in MODES {
            assert!(help(line).contains(&format!("\n  {mode}  ")), "{line} lacks {mode}");
        }
    }
    for line in ["serve -h", "serve --help", "help serve", "serve -f /a -h"] {
        let text = help(line);
        assert!(text.contains("Usage: flexnbd serve --file FILE [--addr"), "{line}: {text}");
        assert!(text.contains("-d, --default-deny"), "{line}: {text}");
    }
    assert!(help("help help").contains("Usage: flexnbd help [MODE]"));
    assert!(help("--version").starts_with("flexnbd "));
}

#[test]
fn the_list_of_modes_matches_the_parser() {
    let command = command();
    let modes: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    assert_eq!(modes, MODES);
}

#[test]
fn every_option_and_mode_has_a_help_text() {
    for mode in command().get_subcommands() {
        for argument in mode.get_arguments() {
            assert!(argument.get_help().is_some(), "{} {}", mode.get_name(), argument.get_id());
        }
        assert!(mode.get_about().is_some(), "{}", mode.get_name());
    }
}

#[test]
fn the_parsers_definition_is_consistent() {
    command().debug_assert();
}

#[test]
fn a_missing_or_unknown_mode_lists_all() {
    let modes = "the modes are serve, listen, proxy, mirror, mirror-speed, break, read, write, acl, \
        status, reload, adopt and help";
    for line in ["", "-q", "--verbose"] {
        assert_misuse(line, &format!("a mode is missing; {modes}"));
    }
    assert_misuse("sevre", &format!("unknown mode `sevre`; {modes}"));
    assert_misuse("-q mirrored -s /x", &format!("unknown mode `mirrored`; {modes}"));
    assert_misuse("help sevre", &format!("unknown mode `sevre`; {modes}"));
}

#[test]
fn a_usage_error_is_a_sentence_and_the_usage() {
    let error = usage_error_of("status");
    assert_eq!(
        error.to_string(),
        "flexnbd status: the server is missing: give --sock SOCK or --instance NAME\n\
         Usage: flexnbd status --sock SOCK [OPTION]..."
    );
    assert!(usage_error_of("sevre").to_string().starts_with("flexnbd: unknown mode"));
}

#[test]
fn an_unknown_option_is_named_with_a_suggestion() {
    assert_misuse("serve --fil /a", "unknown option `--fil`; perhaps --file is meant");
    assert_misuse("serve --zzz", "unknown option `--zzz`");
    assert_misuse("serve -x", "unknown option `-x`");
    assert_misuse("-x serve", "unknown option `-x`");
    assert_misuse("status -s /x -f /y", "--sock SOCK cannot go with --file FILE");
    assert_misuse("status --config /x -f /y", "--config FILE cannot go with --file FILE");
    assert_misuse("status -s /x now", "`now` has no meaning here");
    assert_misuse("status -s /x --killswitch", "unknown option `--killswitch`");
    assert_misuse("help serve now", "`now` has no meaning here");
}

#[test]
fn a_missing_or_unexpected_value_is_reported() {
    assert_misuse("serve --file", "--file FILE needs a value");
    assert_misuse("serve -p", "--port PORT needs a value");
    assert_misuse("serve --file=", "--file FILE needs a value");
    assert_misuse("serve --killswitch=yes", "--killswitch takes no value, not `yes`");
}

#[test]
fn invalid_addresses_and_ports_are_refused() {
    let no_address = "is neither an IPv4 or IPv6 address nor a path beginning with /";
    assert_misuse("serve -l localhost", &format!("--addr ADDR: `localhost` {no_address}"));
    assert_misuse(
        "serve -l 127.0.0.1:80",
        "--addr ADDR: `127.0.0.1:80` has a port in it; give the port by itself",
    );
    for mode in ["serve", "read", "write"] {
        for port in ["65536", "nbd"] {
            assert_misuse(
                &format!("{mode} -p {port}"),
                &format!("--port PORT: `{port}` is not a port, a number up to 65535"),
            );
        }
    }
}

#[test]
fn sizes_and_counts_outside_their_limits_are_refused() {
    assert_misuse(
        "serve --create 511",
        "--create SIZE: `511` is not between 512 and 9223372036854775807",
    );
    assert_misuse("serve --max-clients 0", "--max-clients N: `0` is not a number from 1 to 65536");
    assert_misuse(
        "read -l ::1 -p 7 -S 1 -F 4611686018427387905",
        "--from OFFSET: `4611686018427387905` is not between 0 and 4611686018427387904",
    );
    assert_misuse(
        "write -l ::1 -p 7 -F 0 -S 0",
        "--size SIZE: `0` is not between 1 and 1073741824",
    );
    assert_misuse(
        "read -l ::1 -p 7 -F 0 -S 2x",
        "--size SIZE: `2x` is not a number of bytes, such as 4096, 4K, 100M, 20G or 1T",
    );
}

#[test]
fn a_transfer_needs_a_server_and_a_range() {
    assert_misuse("read -l ::1 -p 7", "--from OFFSET and --size SIZE are missing");
    assert_misuse("write -l ::1 -p 7 -F 0", "--size SIZE is missing");
    let server = "the server is missing: give --addr and --port, or --uri";
    assert_misuse("read -F 0 -S 1", server);
    assert_misuse("read -p 7 -F 0 -S 1", "--port needs --addr as well");
    assert_misuse("write -l ::1 -F 0 -S 1", "--addr and --port: address ::1 needs a port");
    assert_misuse(
        "write -l ::1 -p 0 -F 0 -S 1",
        "--addr and --port: port 0 is not a port to connect to",
    );
    assert_misuse(
        "write -l /x -p 7 -F 0 -S 1",
        "--addr and --port: /x is the path of a unix socket, which has no port",
    );
}

#[test]
fn contradicting_options_of_a_transfer_are_refused() {
    assert_misuse(
        "read --uri nbd://h -l ::1 -p 7 -F 0 -S 1",
        "--uri URI cannot go with --addr ADDR and --port PORT",
    );
    assert_misuse(
        &format!("read {TRANSFER} --uri nbd://h"),
        "--addr ADDR cannot go with --uri URI",
    );
    assert_misuse("read --uri nbd://h -p 7 -F 0 -S 1", "--uri URI cannot go with --port PORT");
    assert_misuse("read --uri nbd://h/a --export b -F 0 -S 1", "--export b contradicts a in --uri");
    assert_misuse("read -l /x -b ::1 -F 0 -S 1", "--bind has no meaning for a unix socket");
    assert_misuse(
        &format!("read {TRANSFER} -b eth0"),
        "--bind BIND_ADDR: `eth0` is not an IPv4 or IPv6 address",
    );
}

#[test]
fn an_unsupported_uri_is_refused() {
    assert_misuse(
        "read --uri http://h -F 0 -S 1",
        "--uri URI: `http://h` begins neither with nbd:// nor nbd+unix://, nor with nbds:// or \
         nbds+unix:// for TLS",
    );
}

#[test]
fn an_export_name_over_the_limit_is_refused() {
    let error = usage_error_of(&format!("serve --export {}", "x".repeat(4097)));
    assert_eq!(error.sentence, "--export NAME: the name of the export is longer than 4096 bytes");
}

#[test]
fn a_command_needs_exactly_one_server() {
    let missing = "the server is missing: give --sock SOCK or --instance NAME";
    for line in ["status", "reload", "acl ::1"] {
        assert_misuse(line, missing);
    }
    let both = "--sock SOCK cannot go with --instance NAME";
    for line in ["status -s /x --instance a", "acl -s /x --instance a ::1"] {
        assert_misuse(line, both);
    }
    assert_misuse("acl -s /x", "an ACL_ENTRY is missing; 0.0.0.0/0 and ::/0 admit everybody");
}

#[test]
fn an_instance_name_cannot_leave_the_run_directory() {
    for name in ["../x", "a/b", ".hidden", ".."] {
        let error = usage_error_of(&format!("status --instance {name}"));
        let start = format!("--instance NAME: `{name}` is not the name of an instance");
        assert!(error.sentence.starts_with(&start), "{error}");
    }
    let fits = "x".repeat(instance::INSTANCE_BYTES_MAX);
    let CliCommand::Operate(command) = command_of(&format!("status --instance {fits}")) else {
        panic!("status")
    };
    assert_eq!(command.socket.as_os_str().len(), 107);
    let error = usage_error_of(&format!("status --instance {fits}x"));
    assert!(error.sentence.ends_with("is longer than the 89 bytes of a name"), "{error}");
}

#[test]
fn only_paths_may_be_other_than_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let with = |option: &str| {
        let odd = OsString::from_vec(b"/\xff".to_vec());
        parse(["flexnbd", "serve", option].map(OsString::from).into_iter().chain([odd]))
    };
    assert!(matches!(with("--file"), Ok(Invocation { command: CliCommand::Start(_), .. })));
    let Err(EarlyExit::Misuse(error)) = with("--export") else { panic!("export") };
    assert_eq!(error.sentence, "an argument is not valid UTF-8");
}

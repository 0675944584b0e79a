//! What a command line means, and what each mistake is answered with.
//! Nothing here opens a socket or a disk.

use super::offline::{DiskArgument, OfflineStatus};
use super::operate::CommandKind;
use super::*;
use crate::control::command::{ArrivalAction, Mirror};
use crate::daemon::{ProcessRole, RecordPolicy};
use crate::net::Remote;

fn parsed(line: &str) -> Result<Invocation, Stop> {
    parse(["flexnbd"].into_iter().chain(line.split_whitespace()).map(OsString::from))
}

fn meant(line: &str) -> CliCommand {
    match parsed(line) {
        Ok(invocation) => invocation.command,
        Err(Stop::Misuse(misuse)) => panic!("{line}: {misuse}"),
        Err(Stop::Answer(text)) => panic!("{line}: {text}"),
    }
}

fn started(line: &str) -> StartRequest {
    match meant(line) {
        CliCommand::Start(start) => start,
        other => panic!("{line}: {other:?}"),
    }
}

fn settings(line: &str) -> settings::Settings {
    started(line).settings
}

fn refused(line: &str) -> UsageError {
    match parsed(line) {
        Err(Stop::Misuse(misuse)) => misuse,
        other => panic!("{line}: {other:?}"),
    }
}

/// Checks the sentence, and that the usage is one line and that of the mode.
#[track_caller]
fn refuses(line: &str, sentence: &str) {
    let misuse = refused(line);
    assert_eq!(misuse.sentence, sentence, "{line}");
    let first = line.split_whitespace().find(|word| !word.starts_with('-'));
    let mode = first.filter(|word| MODES.contains(word));
    assert_eq!(misuse.mode, mode, "{line}");
    let prefix = mode.map_or("flexnbd MODE".to_owned(), |mode| format!("flexnbd {mode} "));
    assert!(misuse.usage.starts_with(&prefix), "{line}: {}", misuse.usage);
    assert_eq!(misuse.to_string().lines().count(), 2, "{misuse}");
}

const TRANSFER: &str = "--addr ::1 --port 7 --from 0 --size 1";

#[test]
fn every_long_option_of_serve_is_understood() {
    let line = "serve --addr 127.0.0.1 --port 4777 --file /a --sock /b --default-deny --killswitch \
        --create 1G --read-only --export disk --oldstyle --max-clients 5 --idle-exit 60 --config /c \
        --holes trust 192.0.2.1 ::1";
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
        idle_exit: Some(60),
        holes: Some(crate::disk::HolePolicy::Trust),
        acl: vec!["192.0.2.1".to_owned(), "::1".to_owned()],
        ..settings::Settings::default()
    };
    let config = Some("/c".into());
    assert_eq!(
        started(line),
        StartRequest { role: ProcessRole::Serve, settings: expected, config }
    );
}

#[test]
fn every_option_of_listen_is_understood() {
    let long = "listen --addr 127.0.0.1 --port 4777 --file /a --sock /b --default-deny \
        --create 1G --overwrite --export disk --oldstyle --config /c 192.0.2.1 ::1";
    let short = "listen -l 127.0.0.1 -p 4777 -f /a -s /b -d --create 1G --overwrite \
        --export disk --oldstyle --config /c 192.0.2.1 ::1";
    let expected = settings::Settings {
        addr: Some("127.0.0.1".parse().unwrap()),
        port: Some(4777),
        file: Some("/a".into()),
        create: Some(1 << 30),
        sock: Some("/b".into()),
        default_deny: true,
        export: Some("disk".to_owned()),
        oldstyle: true,
        acl: vec!["192.0.2.1".to_owned(), "::1".to_owned()],
        ..settings::Settings::default()
    };
    let role = ProcessRole::Listen { overwrite: true, records: RecordPolicy::Required };
    let expected = StartRequest { role, settings: expected, config: Some("/c".into()) };
    assert_eq!(started(long), expected);
    assert_eq!(started(short), expected);
    assert_eq!(
        started("listen -f /a").role,
        ProcessRole::Listen { overwrite: false, records: RecordPolicy::Required }
    );
}

#[test]
fn what_makes_no_sense_for_an_incoming_disk_is_no_option_of_listen() {
    for option in ["-k", "-r", "--killswitch", "--read-only", "--max-clients"] {
        refuses(&format!("listen -f /a {option}"), &format!("unknown option `{option}`"));
    }
    refuses("serve -f /a --overwrite", "unknown option `--overwrite`");
}

fn ordered(line: &str) -> CommandKind {
    match meant(line) {
        CliCommand::Operate(order) => {
            assert_eq!(order.socket.to_str(), Some("/x"), "{line}");
            order.kind
        }
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn every_option_of_mirror_is_understood() {
    let plain = |to: &str| Mirror {
        to: to.parse().unwrap(),
        action: ArrivalAction::Exit,
        bind: None,
        max_bps: None,
        no_record: false,
    };
    let full = Mirror {
        action: ArrivalAction::Unlink,
        bind: Some("192.0.2.9".parse().unwrap()),
        max_bps: Some(10 << 20),
        no_record: true,
        ..plain("192.0.2.1:7")
    };
    let long = "mirror --addr 192.0.2.1 --port 7 --sock /x --unlink --bind 192.0.2.9 \
        --max-speed 10M --no-record --wait";
    let short =
        "mirror -l 192.0.2.1 -p 7 -s /x -u -b 192.0.2.9 --max-speed 10485760 --no-record --wait";
    for line in [long, short] {
        assert_eq!(
            ordered(line),
            CommandKind::Mirror { order: full.clone(), wait: true },
            "{line}"
        );
    }
    for address in ["::1", "[::1]"] {
        let order = ordered(&format!("mirror -l {address} -p 7 -s /x"));
        assert_eq!(order, CommandKind::Mirror { order: plain("[::1]:7"), wait: false });
    }
    // No limit, and from anywhere: as if nothing had been said.
    let order = ordered("mirror -l ::1 -p 7 -s /x --max-speed 0 -b ::");
    assert_eq!(order, CommandKind::Mirror { order: plain("[::1]:7"), wait: false });
}

#[test]
fn a_running_migration_can_be_slowed_and_stopped() {
    assert_eq!(ordered("mirror-speed -s /x -m 4K"), CommandKind::MirrorSpeed(4096));
    assert_eq!(ordered("mirror-speed --sock /x --max-speed 0"), CommandKind::MirrorSpeed(0));
    assert_eq!(ordered("break --sock /x"), CommandKind::Break);
    assert_eq!(
        meant("break --instance a"),
        CliCommand::Operate(OperatorCommand {
            socket: "/run/flexnbd/a.sock".into(),
            kind: CommandKind::Break
        })
    );
}

#[test]
fn a_migration_needs_to_know_where_from_and_where_to() {
    refuses("mirror -s /x", "--addr ADDR and --port PORT are missing");
    refuses("mirror -s /x -l ::1", "--port PORT is missing");
    let missing = "the server is missing: give --sock SOCK or --instance NAME";
    for line in ["mirror -l ::1 -p 7", "mirror-speed -m 1", "break"] {
        refuses(line, missing);
    }
    refuses("mirror-speed -s /x", "--max-speed RATE is missing");
    refuses("mirror -l ::1 -p 7 -s /x --instance a", "--sock SOCK cannot go with --instance NAME");
}

#[test]
fn a_migration_goes_over_tcp_from_an_address_to_one_of_its_kind() {
    refuses(
        "mirror -l /run/x -p 7 -s /x",
        "--addr ADDR: `/run/x` is a path, and disks are moved over TCP only",
    );
    refuses(
        "mirror -l localhost -p 7 -s /x",
        "--addr ADDR: `localhost` is not an IPv4 or IPv6 address",
    );
    refuses("mirror -l ::1 -p 0 -s /x", "--port PORT: port 0 is not a port to connect to");
    refuses(
        "mirror -l ::1 -p 65536 -s /x",
        "--port PORT: `65536` is not a port, a number up to 65535",
    );
    refuses(
        "mirror -l ::1 -p 7 -s /x -b eth0",
        "--bind BIND_ADDR: `eth0` is not an IPv4 or IPv6 address",
    );
    refuses(
        "mirror -l ::1 -p 7 -s /x -b 192.0.2.1",
        "--addr ::1 cannot be reached from --bind 192.0.2.1",
    );
}

#[test]
fn a_speed_is_a_number_of_bytes() {
    let sentence = "--max-speed RATE: `10M/s` is not a number of bytes, such as 4096, 4K, 100M, \
        20G or 1T";
    refuses("mirror-speed -s /x -m 10M/s", sentence);
    refuses("mirror -l ::1 -p 7 -s /x --max-speed 10M/s", sentence);
}

#[test]
fn a_copy_to_adopt_is_a_file() {
    let adopt = |force| CliCommand::Adopt(adopt::Adopt { file: "/a".into(), force });
    assert_eq!(meant("adopt -f /a"), adopt(false));
    assert_eq!(meant("adopt --file /a --force"), adopt(true));
    refuses("adopt", "--file FILE is missing");
    refuses("adopt /a", "`/a` has no meaning here");
}

#[test]
fn every_short_option_of_serve_means_its_long_one() {
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
fn of_an_option_given_twice_the_last_counts() {
    assert_eq!(settings("serve -f /a -d --file /b -d").file, Some("/b".into()));
}

#[test]
fn read_and_write_know_the_same_options() {
    let expected = Transfer {
        remote: Remote::Host { host: "localhost".to_owned(), port: 7 },
        export: "disk".to_owned(),
        from: 4096,
        size: 1 << 20,
        bind: Some("127.0.0.9".parse().unwrap()),
    };
    let long = "--addr localhost --port 7 --from 4K --size 1M --bind 127.0.0.9 --export disk";
    let short = "-l localhost -p 7 -F 4096 -S 1048576 -b 127.0.0.9 --export disk";
    for options in [long, short] {
        assert_eq!(meant(&format!("read {options}")), CliCommand::Read(expected.clone()));
        assert_eq!(meant(&format!("write {options}")), CliCommand::Write(expected.clone()));
    }
}

#[test]
fn a_uri_names_server_and_export() {
    let CliCommand::Read(transfer) = meant("read --uri nbd://[::1]/disk -F 0 -S 1 -b [::2]") else {
        panic!("read")
    };
    assert_eq!(transfer.remote, Remote::Host { host: "::1".to_owned(), port: 10809 });
    assert_eq!(transfer.export, "disk");
    assert_eq!(transfer.bind, Some("::2".parse().unwrap()));
    for (uri, export) in [("nbd://h", "disk"), ("nbd://h/disk", "disk")] {
        let CliCommand::Read(transfer) =
            meant(&format!("read --uri {uri} --export {export} -F 0 -S 1"))
        else {
            panic!("read")
        };
        assert_eq!(transfer.export, "disk");
    }
}

#[test]
fn a_transfer_may_go_over_a_unix_socket() {
    let CliCommand::Write(transfer) = meant("write -l /run/x -F 0 -S 1") else { panic!("write") };
    assert_eq!(transfer.remote, Remote::Unix("/run/x".into()));
}

#[test]
fn orders_name_their_server_by_socket_or_instance() {
    let order =
        |socket: &str, kind| CliCommand::Operate(OperatorCommand { socket: socket.into(), kind });
    let entries = || CommandKind::Acl(vec!["::1".to_owned(), "192.0.2.0/24".to_owned()]);
    assert_eq!(meant("acl --sock /x ::1 192.0.2.0/24"), order("/x", entries()));
    assert_eq!(meant("acl ::1 -s /x 192.0.2.0/24"), order("/x", entries()));
    assert_eq!(
        meant("status --instance a:b-1"),
        order("/run/flexnbd/a:b-1.sock", CommandKind::Status { json: false })
    );
    assert_eq!(meant("status -s /x --json"), order("/x", CommandKind::Status { json: true }));
    let offline = |disk, json| CliCommand::Inspect(OfflineStatus { disk, json });
    assert_eq!(meant("status -f /x"), offline(DiskArgument::File("/x".into()), false));
    let named = DiskArgument::Config("/y".into());
    assert_eq!(meant("status --config /y --json"), offline(named, true));
    assert_eq!(meant("reload --instance a"), order("/run/flexnbd/a.sock", CommandKind::Reload));
}

#[test]
fn the_last_of_verbose_and_quiet_wins_before_and_after_the_mode() {
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
fn help_is_an_answer_wherever_it_is_asked_for() {
    let answer = |line: &str| match parsed(line) {
        Err(Stop::Answer(text)) => text,
        Ok(Invocation { command: CliCommand::Help(text), .. }) => text,
        other => panic!("{line}: {other:?}"),
    };
    for line in ["-h", "--help", "help", "-v help", "help -q"] {
        for mode in MODES {
            assert!(answer(line).contains(&format!("\n  {mode}  ")), "{line} lacks {mode}");
        }
    }
    for line in ["serve -h", "serve --help", "help serve", "serve -f /a -h"] {
        let text = answer(line);
        assert!(text.contains("Usage: flexnbd serve --file FILE [--addr"), "{line}: {text}");
        assert!(text.contains("-d, --default-deny"), "{line}: {text}");
    }
    assert!(answer("help help").contains("Usage: flexnbd help [MODE]"));
    assert!(answer("--version").starts_with("flexnbd "));
}

#[test]
fn the_list_of_modes_is_the_parsers() {
    let command = command();
    let modes: Vec<&str> = command.get_subcommands().map(clap::Command::get_name).collect();
    assert_eq!(modes, MODES);
}

#[test]
fn every_option_says_what_it_is_for() {
    for mode in command().get_subcommands() {
        for argument in mode.get_arguments() {
            assert!(argument.get_help().is_some(), "{} {}", mode.get_name(), argument.get_id());
        }
        assert!(mode.get_about().is_some(), "{}", mode.get_name());
    }
}

#[test]
fn the_parser_is_sound() {
    command().debug_assert();
}

#[test]
fn without_a_mode_the_modes_are_listed() {
    let modes = "the modes are serve, listen, mirror, mirror-speed, break, read, write, acl, \
        status, reload, adopt and help";
    for line in ["", "-q", "--verbose"] {
        refuses(line, &format!("a mode is missing; {modes}"));
    }
    refuses("sevre", &format!("unknown mode `sevre`; {modes}"));
    refuses("-q mirrored -s /x", &format!("unknown mode `mirrored`; {modes}"));
    refuses("help sevre", &format!("unknown mode `sevre`; {modes}"));
}

#[test]
fn a_misuse_is_two_lines_who_and_what_then_the_usage() {
    let misuse = refused("status");
    assert_eq!(
        misuse.to_string(),
        "flexnbd status: the server is missing: give --sock SOCK or --instance NAME\n\
         Usage: flexnbd status --sock SOCK [OPTION]..."
    );
    assert!(refused("sevre").to_string().starts_with("flexnbd: unknown mode"));
}

#[test]
fn an_unknown_option_is_named_and_its_neighbour_suggested() {
    refuses("serve --fil /a", "unknown option `--fil`; perhaps --file is meant");
    refuses("serve --zzz", "unknown option `--zzz`");
    refuses("serve -x", "unknown option `-x`");
    refuses("-x serve", "unknown option `-x`");
    refuses("status -s /x -f /y", "--sock SOCK cannot go with --file FILE");
    refuses("status --config /x -f /y", "--config FILE cannot go with --file FILE");
    refuses("status -s /x now", "`now` has no meaning here");
    refuses("status -s /x --killswitch", "unknown option `--killswitch`");
    refuses("help serve now", "`now` has no meaning here");
}

#[test]
fn an_option_without_its_value_is_named() {
    refuses("serve --file", "--file FILE needs a value");
    refuses("serve -p", "--port PORT needs a value");
    refuses("serve --file=", "--file FILE needs a value");
    refuses("serve --killswitch=yes", "--killswitch takes no value, not `yes`");
}

#[test]
fn addresses_and_ports_that_are_none_are_refused() {
    let no_address = "is neither an IPv4 or IPv6 address nor a path beginning with /";
    refuses("serve -l localhost", &format!("--addr ADDR: `localhost` {no_address}"));
    refuses(
        "serve -l 127.0.0.1:80",
        "--addr ADDR: `127.0.0.1:80` has a port in it; give the port by itself",
    );
    for mode in ["serve", "read", "write"] {
        for port in ["65536", "nbd"] {
            refuses(
                &format!("{mode} -p {port}"),
                &format!("--port PORT: `{port}` is not a port, a number up to 65535"),
            );
        }
    }
}

#[test]
fn sizes_and_counts_outside_their_limits_are_refused() {
    refuses(
        "serve --create 511",
        "--create SIZE: `511` is not between 512 and 9223372036854775807",
    );
    refuses("serve --max-clients 0", "--max-clients N: `0` is not a number from 1 to 65536");
    refuses(
        "read -l ::1 -p 7 -S 1 -F 4611686018427387905",
        "--from OFFSET: `4611686018427387905` is not between 0 and 4611686018427387904",
    );
    refuses("write -l ::1 -p 7 -F 0 -S 0", "--size SIZE: `0` is not between 1 and 1073741824");
    refuses(
        "read -l ::1 -p 7 -F 0 -S 2x",
        "--size SIZE: `2x` is not a number of bytes, such as 4096, 4K, 100M, 20G or 1T",
    );
}

#[test]
fn a_transfer_needs_to_know_what_and_where() {
    refuses("read -l ::1 -p 7", "--from OFFSET and --size SIZE are missing");
    refuses("write -l ::1 -p 7 -F 0", "--size SIZE is missing");
    let server = "the server is missing: give --addr and --port, or --uri";
    refuses("read -F 0 -S 1", server);
    refuses("read -p 7 -F 0 -S 1", "--port needs --addr as well");
    refuses("write -l ::1 -F 0 -S 1", "--addr and --port: address ::1 needs a port");
    refuses("write -l ::1 -p 0 -F 0 -S 1", "--addr and --port: port 0 is not a port to connect to");
    refuses(
        "write -l /x -p 7 -F 0 -S 1",
        "--addr and --port: /x is the path of a unix socket, which has no port",
    );
}

#[test]
fn a_transfer_that_contradicts_itself_is_refused() {
    refuses(
        "read --uri nbd://h -l ::1 -p 7 -F 0 -S 1",
        "--uri URI cannot go with --addr ADDR and --port PORT",
    );
    refuses(&format!("read {TRANSFER} --uri nbd://h"), "--addr ADDR cannot go with --uri URI");
    refuses("read --uri nbd://h -p 7 -F 0 -S 1", "--uri URI cannot go with --port PORT");
    refuses("read --uri nbd://h/a --export b -F 0 -S 1", "--export b contradicts a in --uri");
    refuses("read -l /x -b ::1 -F 0 -S 1", "--bind has no meaning for a unix socket");
    refuses(
        &format!("read {TRANSFER} -b eth0"),
        "--bind BIND_ADDR: `eth0` is not an IPv4 or IPv6 address",
    );
}

#[test]
fn a_uri_that_cannot_be_honoured_is_refused() {
    refuses(
        "read --uri nbds://h -F 0 -S 1",
        "--uri URI: nbds means TLS, which is not supported here; use nbd",
    );
    refuses(
        "read --uri http://h -F 0 -S 1",
        "--uri URI: `http://h` begins neither with nbd:// nor nbd+unix://",
    );
}

#[test]
fn an_export_name_over_the_limit_is_refused() {
    let misuse = refused(&format!("serve --export {}", "x".repeat(4097)));
    assert_eq!(misuse.sentence, "--export NAME: the name of the export is longer than 4096 bytes");
}

#[test]
fn an_order_needs_to_know_one_server() {
    let missing = "the server is missing: give --sock SOCK or --instance NAME";
    for line in ["status", "reload", "acl ::1"] {
        refuses(line, missing);
    }
    let both = "--sock SOCK cannot go with --instance NAME";
    for line in ["status -s /x --instance a", "acl -s /x --instance a ::1"] {
        refuses(line, both);
    }
    refuses("acl -s /x", "an ACL_ENTRY is missing; 0.0.0.0/0 and ::/0 admit everybody");
}

#[test]
fn an_instance_is_a_word_that_leads_nowhere_else() {
    for name in ["../x", "a/b", ".hidden", ".."] {
        let misuse = refused(&format!("status --instance {name}"));
        let start = format!("--instance NAME: `{name}` is not the name of an instance");
        assert!(misuse.sentence.starts_with(&start), "{misuse}");
    }
    let fits = "x".repeat(operate::INSTANCE_BYTES_MAX);
    let CliCommand::Operate(order) = meant(&format!("status --instance {fits}")) else {
        panic!("status")
    };
    assert_eq!(order.socket.as_os_str().len(), 107);
    let misuse = refused(&format!("status --instance {fits}x"));
    assert!(misuse.sentence.ends_with("is longer than the 89 bytes of a name"), "{misuse}");
}

#[test]
fn an_argument_that_is_not_utf8_is_refused_where_text_is_needed_and_taken_as_a_path() {
    use std::os::unix::ffi::OsStringExt;
    let with = |option: &str| {
        let odd = OsString::from_vec(b"/\xff".to_vec());
        parse(["flexnbd", "serve", option].map(OsString::from).into_iter().chain([odd]))
    };
    assert!(matches!(with("--file"), Ok(Invocation { command: CliCommand::Start(_), .. })));
    let Err(Stop::Misuse(misuse)) = with("--export") else { panic!("export") };
    assert_eq!(misuse.sentence, "an argument is not valid UTF-8");
}

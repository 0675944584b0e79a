//! man/flexnbd.1: modes, options, keys, limits and paths match the program in both directions.

use super::roff::{Page, arguments_of, plain};
use super::{module_source, read};
use clap::{Arg, Command};
use flexnbd::cli::{self, MODES, config, instance, settings, size, uri};
use flexnbd::control::Status;
use flexnbd::control::status::{
    DISK_ID, FLUSH_FAILED, MIGRATION_FAILED, MIGRATION_PASSES, MIGRATION_REASON, MIGRATION_STAGE,
    MIGRATION_WAITING, Migration, OWNERSHIP, PAYLOAD_BYTES, PAYLOAD_BYTES_MAX, RELAY_SECONDS_LEFT,
    RELAYING_TO, SANDBOX, UNFLUSHED_BYTES, UPSTREAM, UPSTREAM_CONNECTED, UPSTREAM_ERROR,
    UPSTREAM_RECONNECTS, UPSTREAM_SECONDS,
};
use flexnbd::daemon::available_memory::{
    PAYLOAD_MEMORY_DEFAULT_MAX, PAYLOAD_MEMORY_DEFAULT_MIN, PAYLOAD_MEMORY_DIVISOR,
};
use flexnbd::disk::{part_sizes, write_behind};
use flexnbd::nbd::handshake::option::{OPTIONS_LENGTH_MAX, OPTIONS_MAX};
use flexnbd::server::payload_memory::OWN_MEMORY;
use flexnbd::{control, net, server};
use std::collections::BTreeSet;
use std::path::Path;

const PAGE: &str = "man/flexnbd.1";

fn page() -> Page {
    Page::parse(&read(PAGE))
}

/// The parser, built with the arguments that clap adds.
fn program() -> Command {
    let mut command = cli::command();
    command.build();
    command
}

fn mode(name: &str) -> Command {
    let program = program();
    program.find_subcommand(name).unwrap_or_else(|| panic!("no mode {name}")).clone()
}

/// An argument in the form of the page: `-f, --file FILE`.
fn shown(arg: &Arg) -> String {
    let short = arg.get_short().map(|short| format!("-{short}"));
    let long = arg.get_long().map(|long| format!("--{long}"));
    let names: Vec<String> = short.into_iter().chain(long).collect();
    let takes_value = arg.get_num_args().is_none_or(|count| count.takes_values());
    let value = arg.get_value_names().filter(|_| takes_value).map(|names| names.join(" "));
    [names.join(", "), value.unwrap_or_default()].join(" ").trim().to_owned()
}

fn arguments(command: &Command) -> BTreeSet<String> {
    command.get_arguments().map(shown).collect()
}

/// The options of every mode.
fn global() -> BTreeSet<String> {
    let version = "-V, --version";
    arguments(&program()).into_iter().filter(|option| option != version).collect()
}

/// The items of a section that are arguments; others are keys.
fn documented(page: &Page, place: &str) -> BTreeSet<String> {
    let items = page.items(place).into_iter().filter(|item| !item.starts_with("Va "));
    items.map(plain).collect()
}

/// The keys that a section describes, in order.
fn keys<'a>(page: &'a Page, place: &str) -> Vec<&'a str> {
    page.items(place).into_iter().filter_map(|item| item.strip_prefix("Va ")).collect()
}

#[test]
fn exactly_the_known_modes_have_sections() {
    assert_eq!(page().subsections("MODES"), MODES);
    let known: Vec<String> =
        program().get_subcommands().map(|mode| mode.get_name().to_owned()).collect();
    assert_eq!(known, MODES);
}

#[test]
fn each_mode_describes_exactly_its_arguments() {
    let page = page();
    for name in MODES {
        let all = arguments(&mode(name));
        assert!(all.is_superset(&global()), "{name} does not take the global options");
        let own: BTreeSet<String> = all.difference(&global()).cloned().collect();
        assert_eq!(documented(&page, &format!("MODES/{name}")), own, "{name}");
    }
}

#[test]
fn global_options_have_their_own_section() {
    assert_eq!(documented(&page(), "GLOBAL OPTIONS"), arguments(&program()));
}

/// The options of a mode in the synopsis; a bundle such as `-qv` yields `-q` and `-v`.
fn in_synopsis(page: &Page, name: &str) -> BTreeSet<String> {
    let lines: Vec<&str> = page.at("SYNOPSIS").collect();
    let usages = lines.split(|line| *line == ".Nm");
    let with_name = format!(".Cm {name}");
    let mut usages = usages.filter(|lines| lines.first() == Some(&with_name.as_str()));
    let usage = usages.next().unwrap_or_else(|| panic!("the synopsis lacks {name}"));
    assert!(usages.next().is_none(), "the synopsis shows {name} twice");
    let mut found = BTreeSet::new();
    for line in usage {
        for flag in arguments_of("Fl", line) {
            if flag.starts_with('-') {
                found.insert(format!("-{flag}"));
            } else {
                found.extend(flag.chars().map(|short| format!("-{short}")));
            }
        }
    }
    found
}

#[test]
fn the_synopsis_shows_each_option_once() {
    let page = page();
    for name in MODES {
        let shown = in_synopsis(&page, name);
        for arg in mode(name).get_arguments() {
            let short = arg.get_short().map(|short| format!("-{short}"));
            let long = arg.get_long().map(|long| format!("--{long}"));
            let names: Vec<&String> = short.iter().chain(&long).collect();
            let count = names.iter().filter(|option| shown.contains(**option)).count();
            let expected = usize::from(!names.is_empty() && long.as_deref() != Some("--help"));
            assert_eq!(count, expected, "{name} {names:?} in the synopsis");
        }
        let known = arguments(&mode(name)).into_iter().collect::<Vec<_>>().join(" ");
        let is_known = |option: &str| known.split([' ', ',']).any(|word| word == option);
        let unknown: Vec<_> = shown.iter().filter(|option| !is_known(option)).collect();
        assert!(unknown.is_empty(), "the synopsis of {name} shows {unknown:?}");
    }
}

#[test]
fn status_keys_match_the_server_in_order() {
    let migration = Migration { speed_limit: Some(1), ..Migration::default() };
    let newer = [
        MIGRATION_STAGE,
        MIGRATION_PASSES,
        MIGRATION_FAILED,
        OWNERSHIP,
        DISK_ID,
        MIGRATION_WAITING,
        MIGRATION_REASON,
        RELAYING_TO,
        RELAY_SECONDS_LEFT,
        UPSTREAM,
        UPSTREAM_CONNECTED,
        UPSTREAM_SECONDS,
        UPSTREAM_RECONNECTS,
        UNFLUSHED_BYTES,
        UPSTREAM_ERROR,
        PAYLOAD_BYTES,
        PAYLOAD_BYTES_MAX,
        SANDBOX,
        FLUSH_FAILED,
    ];
    let extra = newer.map(|key| (key.to_owned(), String::new())).to_vec();
    let line = Status { migration: Some(migration), extra, ..Status::default() }.to_string();
    let served: Vec<String> =
        control::status::pairs(&line).unwrap().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys(&page(), "MODES/status"), served);
}

#[test]
fn the_example_configuration_file_is_valid() {
    let is_setting = |line: &&String| {
        line.split_once('=').is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_uppercase()))
    };
    let lines: Vec<String> = page().literal().iter().filter(is_setting).cloned().collect();
    assert!(lines.len() >= 4, "only {} lines found", lines.len());
    config::parse(Path::new("disk.conf"), &lines.join("\n")).unwrap();
}

/// The integers in a text, in order.
pub(crate) fn numbers(text: &str) -> Vec<u64> {
    let digits = text.split(|c: char| !c.is_ascii_digit()).filter(|part| !part.is_empty());
    digits.map(|part| part.parse().unwrap()).collect()
}

#[test]
fn documented_limits_and_timeouts_match_the_program() {
    const MIB: u64 = 1 << 20;
    let page = page();
    let documented_numbers = |item: &str| numbers(&page.item_text("LIMITS AND TIMEOUTS", item));
    let newstyle = u64::from(server::session::PAYLOAD_MAX) / MIB;
    let oldstyle = u64::from(server::session::PAYLOAD_MAX_OLDSTYLE) / (MIB << 10);
    assert_eq!(documented_numbers("Clients at once"), [server::CLIENTS_MAX as u64]);
    let contended = server::CONTENDED_HANDSHAKE_TIMEOUT.as_secs();
    assert_eq!(
        documented_numbers("Clients in the handshake"),
        [server::HANDSHAKES_MAX as u64, contended]
    );
    let options = [u64::from(OPTIONS_MAX), OPTIONS_LENGTH_MAX / MIB];
    assert_eq!(documented_numbers("Options of a handshake"), options);
    assert_eq!(documented_numbers("Handshake"), [server::HANDSHAKE_TIMEOUT.as_secs()]);
    assert_eq!(documented_numbers("Lines in the log")[0], server::SESSIONS_LOGGED_MAX);
    assert_eq!(documented_numbers("Killswitch"), [server::STALL_LIMIT.as_secs()]);
    assert_eq!(documented_numbers("Payload"), [newstyle, oldstyle]);
    let (idle, every) = (net::KEEPALIVE_IDLE.as_secs(), net::KEEPALIVE_INTERVAL.as_secs());
    assert_eq!(
        documented_numbers("TCP keepalive"),
        [idle, every, u64::from(net::KEEPALIVE_PROBES_MAX)]
    );
    assert_eq!(documented_numbers("Vanished peer"), [net::PEER_TIMEOUT.as_secs()]);
    let mib = |bytes: u64| bytes / MIB;
    assert_eq!(documented_numbers("Memory for payloads"), [mib(OWN_MEMORY)]);
    let (least, most) = (mib(part_sizes::PART_MIN), mib(part_sizes::PART_MAX));
    let by_extent = mib(part_sizes::PART_MAX_BY_EXTENT);
    assert_eq!(documented_numbers("Trims and zeroing"), [least, most, by_extent]);
    assert_eq!(documented_numbers("Writing back"), [mib(write_behind::STEP_BYTES)]);
    let constants = module_source("daemon");
    for (name, seconds) in ["GRACE", "DISK_GRACE"].into_iter().zip(documented_numbers("Stopping")) {
        let constant = format!("const {name}: Duration = Duration::from_secs({seconds});");
        assert!(constants.contains(&constant), "there is no `{constant}`");
    }
    let (most, timeout) = (control::listener::CONNECTIONS_MAX, control::listener::TIMEOUT);
    assert_eq!(documented_numbers("Control connections"), [most as u64, timeout.as_secs()]);
    let (length, lines) = (control::command::LINE_BYTES_MAX, control::command::LINES_MAX);
    assert_eq!(documented_numbers("Control commands"), [length as u64, lines as u64]);
    assert_eq!(
        documented_numbers("Replies to commands"),
        [control::client::REPLY_TIMEOUT.as_secs()]
    );
}

/// The range and the default of `--payload-memory` in bytes, and the memory of each client in MiB.
pub(crate) fn payload_memory() -> [u64; 6] {
    let (least, most) = (*size::PAYLOAD_MEMORY_RANGE.start(), *size::PAYLOAD_MEMORY_RANGE.end());
    let (part, at_most) = (PAYLOAD_MEMORY_DIVISOR, PAYLOAD_MEMORY_DEFAULT_MAX);
    [least, most, OWN_MEMORY >> 20, part, PAYLOAD_MEMORY_DEFAULT_MIN, at_most]
}

#[test]
fn documented_option_ranges_match_the_program() {
    let page = page();
    let serve = |item: &str| numbers(&page.item_text("MODES/serve", item));
    let (least, most) = (*settings::MAX_CLIENTS_RANGE.start(), *settings::MAX_CLIENTS_RANGE.end());
    let clients = [least, most, server::CLIENTS_MAX].map(|number| number as u64);
    assert_eq!(serve("Fl -max-clients Ar N"), clients);
    assert_eq!(serve("Fl -max-clients-per-address Ar N")[..2], clients[..2]);
    assert_eq!(serve("Fl -payload-memory Ar BYTES"), payload_memory());
    let (least, most) = (*settings::IDLE_EXIT_RANGE.start(), *settings::IDLE_EXIT_RANGE.end());
    assert_eq!(serve("Fl -idle-exit Ar SECONDS"), [0, least, most]);
    assert_eq!(serve("Fl -create Ar SIZE"), [*size::CREATE_RANGE.start()]);
    for mode in ["MODES/read", "MODES/write"] {
        let documented_numbers = |item: &str| numbers(&page.item_text(mode, item));
        let from = *size::FROM_RANGE.end();
        assert_eq!((documented_numbers("Fl F , Fl -from Ar OFFSET"), from), (vec![2, 62], 1 << 62));
        let most = *size::LENGTH_RANGE.end();
        assert_eq!(
            (documented_numbers("Fl S , Fl -size Ar SIZE"), most),
            (vec![1, 2, 30], 1 << 30)
        );
    }
    let port = page.at("ADDRESSES").find(|line| line.starts_with("The port is ")).unwrap();
    assert_eq!(numbers(port), [u64::from(uri::DEFAULT_PORT)]);
}

#[test]
fn documented_files_match_the_program() {
    let name: instance::Instance = "NAME".parse().unwrap();
    let files = [net::tls::CLIENT_TRUST_STORE.to_owned(), name.socket().display().to_string()];
    assert_eq!(page().items("FILES"), files.map(|path| format!("Pa {path}")));
}

//! man/flexnbd-proxy.1: options, ranges, times, status keys and examples match the program.

use super::command_line::numbers;
use super::generator::generate;
use super::roff::{Page, plain};
use super::{module_source, read};
use flexnbd::cli::{self, settings, size, start};
use flexnbd::control::status::{
    UNFLUSHED_BYTES, UPSTREAM, UPSTREAM_CONNECTED, UPSTREAM_ERROR, UPSTREAM_RECONNECTS,
    UPSTREAM_SECONDS,
};
use flexnbd::ids::DiskId;
use flexnbd::nbd::introduction::Introduction;
use flexnbd::nbd::wire::PRIVATE_OPTION;
use flexnbd::upstream::{CONNECTIONS_DEFAULT, UPSTREAM_TIMEOUT_DEFAULT};
use std::collections::BTreeSet;

const PAGE: &str = "man/flexnbd-proxy.1";

fn page() -> Page {
    Page::parse(&read(PAGE))
}

/// The names of the options of `flexnbd proxy`: long ones, and short ones.
fn options() -> BTreeSet<String> {
    let mut program = cli::command();
    program.build();
    let mode = program.find_subcommand("proxy").unwrap();
    let long = mode.get_arguments().filter_map(clap::Arg::get_long);
    let short = mode.get_arguments().filter_map(clap::Arg::get_short);
    let long = long.map(|name| format!("--{name}"));
    long.chain(short.map(|name| format!("-{name}"))).collect()
}

#[test]
fn exactly_the_options_of_the_mode_are_described() {
    let page = page();
    let items = page.items("OPTIONS").into_iter().map(plain).collect::<Vec<_>>();
    let words = items.iter().flat_map(|item| item.split([' ', ',']));
    let described: BTreeSet<String> =
        words.filter(|word| word.starts_with('-')).map(str::to_owned).collect();
    assert_eq!(described, options());
}

#[test]
fn documented_ranges_and_defaults_match() {
    const MIB: u64 = 1 << 20;
    let page = page();
    let documented = |item: &str| numbers(&page.item_text("OPTIONS", item));
    let cache = "Fl c , Fl -cache Ns Op = Ns Ar BYTES";
    let default: u64 = cli::proxy::CACHE_DEFAULT.parse().unwrap();
    assert_eq!(
        documented(cache),
        [default, *size::CACHE_RANGE.start(), *size::CACHE_RANGE.end() / MIB]
    );
    let connections = [
        *settings::CONNECTIONS_RANGE.start(),
        *settings::CONNECTIONS_RANGE.end(),
        CONNECTIONS_DEFAULT,
    ];
    assert_eq!(documented("Fl -connections Ar N"), connections.map(|number| number as u64));
    let timeout = [
        *settings::TIMEOUT_RANGE.start(),
        *settings::TIMEOUT_RANGE.end(),
        UPSTREAM_TIMEOUT_DEFAULT.as_secs(),
    ];
    assert_eq!(documented("Fl -timeout Ar SECONDS"), timeout);
    assert_eq!(page.items("ENVIRONMENT"), [format!("Ev {}", start::TIMEOUT_VARIABLE)]);
}

#[test]
fn documented_grace_matches_the_program() {
    let page = page();
    let stopping: Vec<u64> = page.at("RESTART AND STOP").flat_map(numbers).collect();
    // The other number is the section of a page.
    let constant = format!("const DISK_GRACE: Duration = Duration::from_secs({});", stopping[1]);
    assert!(module_source("daemon").contains(&constant), "there is no `{constant}`");
}

#[test]
fn documented_times_of_reconnecting_match() {
    let page = page();
    let times: Vec<u64> = page.at("THE UPSTREAM/When it is lost").flat_map(numbers).collect();
    let upstream = module_source("upstream");
    for (name, seconds) in ["DELAY_MAX", "ATTEMPT_TIMEOUT_MAX"].into_iter().zip(&times) {
        let constant = format!("const {name}: Duration = Duration::from_secs({seconds});");
        assert!(upstream.contains(&constant), "there is no `{constant}`");
    }
    assert_eq!(times.len(), 2);
}

#[test]
fn the_documented_introduction_matches() {
    let page = page();
    let fields = page.items("PROTOCOL").split_off(1);
    let field = |name: &str, bytes: std::ops::Range<usize>| {
        format!("{} Ta {} Ta {name}", bytes.start, bytes.len())
    };
    let introduction = Introduction { client: [7; 16], generation: 0x0102_0304_0506_0708 };
    let bytes = introduction.encode();
    let version = u32::from_be_bytes(bytes[..4].try_into().unwrap());
    assert_eq!(Introduction::reply(None), version.to_be_bytes());
    assert_eq!(Introduction::reply(Some(DiskId([7; 16])))[4..], [7; 16]);
    assert_eq!(bytes[4..12], introduction.generation.to_be_bytes());
    assert_eq!(bytes[12..], introduction.client);
    let version = format!("version, {version}");
    let expected = [field(&version, 0..4), field("generation", 4..12), field("client", 12..28)];
    assert_eq!(fields, expected);
    assert!(read(PAGE).contains(&format!("0x{PRIVATE_OPTION:X}")));
}

#[test]
fn documented_status_keys_match() {
    let page = page();
    let named: Vec<String> = page
        .at("COMMANDS")
        .filter_map(|line| line.strip_prefix(".Va "))
        .flat_map(|line| line.split([' ', ',']))
        .filter(|word| word.starts_with("upstream") || word.starts_with("unflushed"))
        .map(str::to_owned)
        .collect();
    let keys = [
        UPSTREAM,
        UPSTREAM_CONNECTED,
        UPSTREAM_SECONDS,
        UPSTREAM_RECONNECTS,
        UNFLUSHED_BYTES,
        UPSTREAM_ERROR,
    ];
    assert_eq!(named, keys);
}

#[test]
fn the_example_configuration_is_that_of_a_proxy() {
    let page = page();
    let examples = page.blocks("EXAMPLES");
    let configuration = examples.iter().find(|block| block.starts_with("TO=")).unwrap();
    let generated = generate(configuration);
    assert_eq!(generated.errors, "");
    let units: Vec<&str> = generated.files.keys().map(String::as_str).collect();
    assert!(units.iter().any(|unit| unit.starts_with("flexnbd-proxy@")), "{units:?}");
    assert!(!units.iter().any(|unit| unit.starts_with("flexnbd@")), "{units:?}");
}

//! man/flexnbd.conf.5: keys, which component uses each key, ranges, values and messages.

use super::command_line::numbers;
use super::generator::generate;
use super::read;
use super::roff::Page;
use flexnbd::cli::proxy::ProxyFlags;
use flexnbd::cli::settings::{self, Settings};
use flexnbd::cli::start::StartRequest;
use flexnbd::cli::{self, CliCommand, config, size};
use flexnbd::daemon::{Config, DiskConfig};
use flexnbd::server;
use flexnbd::upstream::{CONNECTIONS_DEFAULT, UNFLUSHED_BYTES_DEFAULT, UPSTREAM_TIMEOUT_DEFAULT};
use harness::project_path;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::SocketAddr;
use std::path::Path;

const PAGE: &str = "man/flexnbd.conf.5";

fn page() -> Page {
    Page::parse(&read(PAGE))
}

/// The section of each key's description.
fn sections_of_keys(page: &Page) -> BTreeMap<String, String> {
    let sections = page.subsections("KEYS");
    assert!(sections.len() > 3, "only {sections:?} found");
    let places = sections.iter().map(|name| format!("KEYS/{name}"));
    let described = places.flat_map(|place| {
        let items = page.items(&place).into_iter().filter_map(|item| item.strip_prefix("Va "));
        items.map(|key| (key.to_owned(), place.clone())).collect::<Vec<_>>()
    });
    let described: Vec<(String, String)> = described.collect();
    let places: BTreeMap<String, String> = described.iter().cloned().collect();
    assert_eq!(places.len(), described.len(), "a key is described twice");
    places
}

/// The description of a key, on one line.
fn description(key: &str) -> String {
    let page = page();
    page.item_text(&sections_of_keys(&page)[key], &format!("Va {key}"))
}

fn parsed(text: &str) -> Result<Settings, String> {
    config::parse(Path::new("disk.conf"), text).map_err(|error| error.to_string())
}

#[test]
fn exactly_the_known_keys_are_described() {
    let described: BTreeSet<String> = sections_of_keys(&page()).into_keys().collect();
    assert_eq!(described, BTreeSet::from(config::KEYS.map(str::to_owned)));
}

/// A configuration with these keys and values.
fn text(lines: &BTreeMap<&str, &str>) -> String {
    lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect()
}

/// The server configuration that a mode loads from this text; `None` if it refuses the text.
fn load(mode: &str, text: &str) -> Option<Config> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("disk.conf");
    std::fs::write(&file, text).unwrap();
    let line = ["flexnbd", mode, "--config", file.to_str().unwrap()].map(Into::into);
    match cli::parse(line.into_iter()).unwrap().command {
        CliCommand::Start(start) => {
            let mut config = StartRequest::load(&start).ok()?;
            // The path differs with every call.
            config.confinement.read_again.clear();
            if let DiskConfig::Image(image) = &mut config.disk {
                image.config_file = None;
            }
            Some(config)
        }
        other => panic!("{mode} is {other:?}"),
    }
}

/// Valid configurations; [`OTHER_VALUES`] has a different value for each key.
fn bases() -> [BTreeMap<&'static str, &'static str>; 5] {
    let open = BTreeMap::from([("FILE", "/dev/a"), ("ADDR", "::"), ("PORT", "7")]);
    let open = open.into_iter().chain([("IP_FILTER", "yes")]).collect::<BTreeMap<_, _>>();
    let listed = open.clone().into_iter().chain([("ACL", "::1")]).collect();
    let proxy = BTreeMap::from([("TO", "nbd://a"), ("ADDR", "::"), ("PORT", "7")]);
    let tls = [("TLS_CERT", "/c"), ("TLS_CA", "/a")];
    let secured = open.clone().into_iter().chain(tls).collect();
    let secured_proxy = proxy.clone().into_iter().chain(tls).chain([("TO_TLS_CERT", "/c")]);
    let secured_proxy = secured_proxy.collect();
    [open, listed, secured, proxy, secured_proxy]
}

/// Another valid value for each key.
const OTHER_VALUES: [(&str, &str); 39] = [
    ("FILE", "/dev/b"),
    ("CREATE", "1M"),
    ("READ_ONLY", "yes"),
    ("HOLES", "ignore"),
    ("DIRECT", "yes"),
    ("RELAY", "yes"),
    ("TO", "nbds+unix:///?socket=/tmp/a&tls-hostname=a"),
    ("BIND", "::1"),
    ("CACHE", "4K"),
    ("UNFLUSHED", "1M"),
    ("CONNECTIONS", "2"),
    ("TIMEOUT", "7"),
    ("TO_TLS", "on"),
    ("TO_TLS_CA", "/b"),
    ("TO_TLS_CERT", "/b"),
    ("TO_TLS_KEY", "/b"),
    ("TO_TLS_HOSTNAME", "b"),
    ("ADDR", "::1"),
    ("PORT", "8"),
    ("EXPORT", "disk"),
    ("OLDSTYLE", "yes"),
    ("PLAIN", "yes"),
    ("ACL", "::2"),
    ("DEFAULT_DENY", "yes"),
    ("IP_FILTER", "no"),
    ("MAX_CLIENTS", "2000"),
    ("MAX_CLIENTS_PER_ADDRESS", "2"),
    ("PAYLOAD_MEMORY", "2M"),
    ("TLS", "require"),
    ("TLS_CERT", "/b"),
    ("TLS_KEY", "/b"),
    ("TLS_CA", "/b"),
    ("TLS_ALLOW", "b"),
    ("KILLSWITCH", "yes"),
    ("IDLE_EXIT", "7"),
    ("SOCK", "/run/x"),
    ("SANDBOX", "no"),
    ("USER", "a"),
    ("AUTOSTART", "yes"),
];

/// `yes` if setting `key` to this value changes the result of `compute` for a configuration.
fn uses<T: PartialEq>(
    (key, value): (&'static str, &'static str),
    compute: impl Fn(&str) -> Option<T>,
) -> &'static str {
    let is_used = bases().into_iter().any(|base| {
        let mut changed = base.clone();
        changed.insert(key, value);
        let (before, after) = (compute(&text(&base)), compute(&text(&changed)));
        before.is_some() && after.is_some() && before != after
    });
    if is_used { "yes" } else { "no" }
}

#[test]
fn the_table_shows_the_users_of_each_key() {
    assert_eq!(BTreeSet::from(OTHER_VALUES.map(|(key, _)| key)), BTreeSet::from(config::KEYS));
    let page = page();
    let mut rows: Vec<&str> = page.items("USE OF EACH KEY");
    assert_eq!(
        rows.remove(0),
        "Em key Ta Cm serve Ta Cm listen Ta Cm proxy Ta Em units Ta Cm reload"
    );
    let expected = OTHER_VALUES.map(|other| {
        let serve = uses(other, |text| load("serve", text));
        let listen = uses(other, |text| load("listen", text));
        let proxy = uses(other, |text| load("proxy", text));
        let units = uses(other, |text| Some(generate(text).files));
        let reload = uses(other, |text| Some(load("serve", text)?.admission));
        format!("Va {} Ta {serve} Ta {listen} Ta {proxy} Ta {units} Ta {reload}", other.0)
    });
    assert_eq!(rows, expected);
}

#[test]
fn documented_ranges_match_the_program() {
    let documented = |key| numbers(&description(key));
    let (least, most) = (*settings::MAX_CLIENTS_RANGE.start(), *settings::MAX_CLIENTS_RANGE.end());
    let clients = [least, most, server::CLIENTS_MAX].map(|number| number as u64);
    assert_eq!(documented("MAX_CLIENTS")[..3], clients);
    assert_eq!(documented("MAX_CLIENTS_PER_ADDRESS")[..2], clients[..2]);
    let without_section = documented("PAYLOAD_MEMORY").into_iter().filter(|number| *number != 1);
    let payload_memory = super::command_line::payload_memory();
    assert_eq!(without_section.collect::<Vec<_>>(), payload_memory);
    let (least, most) = (*settings::IDLE_EXIT_RANGE.start(), *settings::IDLE_EXIT_RANGE.end());
    assert_eq!(documented("IDLE_EXIT"), [least, most]);
    assert_eq!(documented("CREATE"), [*size::CREATE_RANGE.start()]);
    assert_eq!(documented("PORT"), [u64::from(u16::MAX), 0]);
    let (least, most) = (*size::CACHE_RANGE.start(), *size::CACHE_RANGE.end());
    assert_eq!(documented("CACHE"), [least, most, 0]);
    let (least, most) = (*size::UNFLUSHED_RANGE.start(), *size::UNFLUSHED_RANGE.end());
    assert_eq!(documented("UNFLUSHED"), [least, most, UNFLUSHED_BYTES_DEFAULT]);
    let connections = [
        *settings::CONNECTIONS_RANGE.start(),
        *settings::CONNECTIONS_RANGE.end(),
        CONNECTIONS_DEFAULT,
    ];
    assert_eq!(documented("CONNECTIONS"), connections.map(|number| number as u64));
    let (least, most) = (*settings::TIMEOUT_RANGE.start(), *settings::TIMEOUT_RANGE.end());
    assert_eq!(documented("TIMEOUT"), [least, most, UPSTREAM_TIMEOUT_DEFAULT.as_secs()]);
    assert_eq!(documented("KILLSWITCH"), [server::STALL_LIMIT.as_secs()]);
    let longest = numbers(&description("EXPORT"))[0] as usize;
    assert!(parsed(&format!("EXPORT={}", "x".repeat(longest))).is_ok());
    assert!(parsed(&format!("EXPORT={}", "x".repeat(longest + 1))).is_err());
    let text_of_key = description("ADDR");
    let longest = numbers(text_of_key.split("at most ").nth(1).unwrap())[0] as usize;
    let fits = |bytes: usize| SocketAddr::from_pathname(format!("/{}", "x".repeat(bytes - 1)));
    assert!(fits(longest).is_ok() && fits(longest + 1).is_err());
}

#[test]
fn the_size_limit_of_the_generator_is_documented() {
    let page = page();
    let mut lines = page.at("INVALID CONFIGURATIONS");
    let documented =
        lines.find_map(|line| line.strip_prefix("A configuration longer than")).unwrap();
    let most = usize::try_from(numbers(documented)[0]).unwrap();
    let start = "FILE=/a\nADDR=::\nPORT=7\n";
    let padded = |length: usize| format!("{start}{}", "\n".repeat(length - start.len()));
    assert_eq!(generate(&padded(most)).errors, "");
    assert!(generate(&padded(most + 1)).errors.contains(&format!("longer than {most} bytes")));
}

#[test]
fn documented_switch_values_are_accepted() {
    let documented = page().item_text("SYNTAX", "switch");
    let words: Vec<&str> = documented.split([' ', ',']).filter(|word| !word.is_empty()).collect();
    let (yes, rest) = words.split_at(words.iter().position(|word| *word == "and").unwrap());
    let no = &rest[1..rest.iter().position(|word| *word == "in").unwrap()];
    let read = |word: &&&str| parsed(&format!("READ_ONLY={word}")).map(|found| found.read_only);
    for (words, expected) in [(yes, true), (no, false)] {
        let words: Vec<&&str> = words.iter().filter(|word| **word != "or").collect();
        assert_eq!(words.len(), 4, "{words:?}");
        assert!(words.iter().all(|word| read(word) == Ok(expected)), "{words:?}");
        let upper = words.iter().map(|word| word.to_uppercase());
        assert!(upper.into_iter().all(|word| parsed(&format!("READ_ONLY={word}")).is_ok()));
    }
}

#[test]
fn documented_autostart_values_are_accepted() {
    let page = page();
    let items = page.items("KEYS/The service");
    let words: Vec<&str> = items.iter().filter_map(|item| item.strip_prefix("Li ")).collect();
    let read = |word: &&str| parsed(&format!("AUTOSTART={word}")).unwrap().autostart.unwrap();
    let values: Vec<settings::Autostart> = words.iter().map(read).collect();
    let all = [settings::Autostart::No, settings::Autostart::Yes, settings::Autostart::OnDemand];
    assert_eq!(values, all);
    assert_eq!(values[0], settings::Autostart::default(), "the first is documented as the default");
}

#[test]
fn keys_without_an_option_are_documented() {
    let serve = <Settings as clap::Args>::augment_args(clap::Command::new("serve"));
    let proxy = <ProxyFlags as clap::Args>::augment_args(clap::Command::new("proxy"));
    let name = |arg: &clap::Arg| arg.get_long().unwrap_or(arg.get_id().as_str()).to_owned();
    let key = |arg: &clap::Arg| name(arg).to_uppercase().replace('-', "_");
    let mut options: Vec<String> =
        serve.get_arguments().chain(proxy.get_arguments()).map(key).collect();
    // An option of `listen` only, and the opposite of `--no-sandbox`.
    options.extend(["PLAIN", "SANDBOX"].map(str::to_owned));
    let without: BTreeSet<&str> =
        config::KEYS.into_iter().filter(|key| !options.iter().any(|known| known == key)).collect();
    let page = page();
    let first: Vec<&str> =
        page.at("OPTIONS AND KEYS").take_while(|line| !line.starts_with("is also")).collect();
    let named = first.iter().filter_map(|line| line.strip_prefix(".Va ")).collect();
    assert_eq!(without, named);
}

/// Whether a message matches the page, where words in capitals are placeholders.
fn is_as_shown(message: &str, shown: &str) -> bool {
    let shown = shown.replace('\'', "`").replace("KEY KEY ...", "WHY");
    let words = ["LINE", "WORD", "KEY", "WHY", "N"];
    let is_one = |word: &&str| words.contains(&word.trim_matches(|c: char| !c.is_uppercase()));
    let rest = shown.split_inclusive(' ').map(|word| {
        let word = word.replace("KEY=VALUE", "key=value");
        if is_one(&word.as_str()) { word.replace(char::is_uppercase, "*") } else { word }
    });
    let pattern: String = rest.collect();
    let message = message.replace("KEY=VALUE", "key=value");
    let parts: Vec<&str> = pattern.split('*').filter(|part| !part.is_empty()).collect();
    let mut left = message.as_str();
    for part in &parts {
        let Some(at) = left.find(part) else { return false };
        left = &left[at + part.len()..];
    }
    let is_whole = pattern.ends_with('*') || left.is_empty();
    is_whole && (pattern.starts_with('*') || message.starts_with(parts[0]))
}

#[test]
fn documented_messages_match_the_program() {
    let wrong = [
        "FILE /a",
        "PROT=1",
        "NOTHING_LIKE_IT=1",
        "FILE=/a\nFILE=/a",
        "FILE='/a",
        "FILE='a'b'",
        "FILE=/a # b",
        "PORT=x",
    ];
    let page = page();
    let shown = page.items("INVALID CONFIGURATIONS");
    let shown = &shown[4..];
    assert_eq!(shown.len(), wrong.len(), "{shown:?}");
    for (shown, wrong) in shown.iter().zip(wrong) {
        let error = parsed(wrong).unwrap_err();
        let (_, message) = error.split_once(": ").unwrap();
        assert!(is_as_shown(message, shown), "`{message}` as `{shown}`");
    }
    let place = page.at("INVALID CONFIGURATIONS").find_map(|line| line.strip_prefix(".Dq "));
    let place = place.unwrap().trim_end_matches(" .");
    let error = config::parse(Path::new("/etc/flexnbd/disk.conf"), "\n\nWHAT=1").unwrap_err();
    assert!(error.to_string().starts_with(place), "{error} does not begin with `{place}`");
}

#[test]
fn the_generator_accepts_the_examples() {
    let page = page();
    let examples = page.blocks("EXAMPLES");
    assert!(examples.len() >= 3, "only {examples:?} found");
    for example in &examples {
        assert_eq!(generate(example).errors, "", "{example}");
        let is_proxy = example.contains("TO=");
        for (mode, loads) in [("serve", !is_proxy), ("listen", !is_proxy), ("proxy", is_proxy)] {
            assert_eq!(load(mode, example).is_some(), loads, "{mode}: {example}");
        }
    }
    for lines in page.blocks("KEYS") {
        parsed(&lines).unwrap();
    }
}

#[test]
fn documented_files_are_packaged() {
    let page = page();
    let items = page.items("FILES");
    let example = items.iter().find_map(|item| item.strip_prefix("Pa /usr/share/doc/flexnbd/"));
    assert!(project_path("systemd").join(example.unwrap()).is_file());
    let (directory, name) = example.unwrap().rsplit_once('/').unwrap();
    let asset = format!("[\"systemd/{directory}/{name}\", \"usr/share/doc/flexnbd/{directory}/\"");
    assert!(read("Cargo.toml").contains(&asset), "there is no asset {asset}");
}

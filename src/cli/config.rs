//! The configuration file: parses its text into [`Settings`].
//! Pure: [`super::start`] reads the file. Unknown keys and invalid values are errors, never
//! ignored.
//!
//! ```text
//! # A comment has a line of its own.
//! ADDR=::
//! PORT=10809
//! FILE="/srv/disks/a disk.img"
//! ACL=192.0.2.0/24, 2001:db8::/32
//! READ_ONLY=yes
//! ```
//!
//! White space around keys and values is ignored. A value may be quoted with `'` or `"`, without
//! escapes. `TO` and `TLS_ALLOW` may be repeated, and may hold several values. A switch is `yes`, `true`, `on` or `1`; or `no`, `false`, `off` or `0`.

use super::settings::{
    Autostart, Settings, parse_acl_entry, parse_connections, parse_holes, parse_idle_exit,
    parse_ip, parse_max_clients, parse_relay, parse_timeout,
};
use super::size::{parse_cache, parse_create, parse_payload_memory, parse_unflushed};
use super::uri::{self, Target, parse_export};
use crate::net::parse_port;
use crate::net::tls::AllowedName;
use std::fmt;
use std::path::{Path, PathBuf};
use strsim::levenshtein;

/// All keys, named like the long options: in capitals, with `_` for `-`; `SANDBOX` is the opposite of
/// `--no-sandbox`. The last two have no option, because they configure the service's units, not the process.
pub const KEYS: [&str; 39] = [
    "ADDR",
    "PORT",
    "FILE",
    "CREATE",
    "SOCK",
    "DEFAULT_DENY",
    "KILLSWITCH",
    "READ_ONLY",
    "EXPORT",
    "OLDSTYLE",
    "PLAIN",
    "MAX_CLIENTS",
    "MAX_CLIENTS_PER_ADDRESS",
    "PAYLOAD_MEMORY",
    "IDLE_EXIT",
    "HOLES",
    "DIRECT",
    "RELAY",
    "TLS",
    "TLS_CERT",
    "TLS_KEY",
    "TLS_CA",
    "TLS_ALLOW",
    "SANDBOX",
    "USER",
    "ACL",
    "TO",
    "BIND",
    "CACHE",
    "UNFLUSHED",
    "CONNECTIONS",
    "TIMEOUT",
    "TO_TLS",
    "TO_TLS_CA",
    "TO_TLS_CERT",
    "TO_TLS_KEY",
    "TO_TLS_HOSTNAME",
    "AUTOSTART",
    "IP_FILTER",
];

/// Longest configuration file, in bytes. An access control list of 10,000 entries fits.
pub const BYTES_MAX: u64 = 1 << 20;

/// Largest Levenshtein distance between an unknown key and the key suggested for it.
const HINT_DISTANCE_MAX: usize = 3;

/// An error in a configuration file, with its position.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}, line {line}: {reason}", .file.display())]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The number of the line, from 1.
    pub line: usize,
    /// The error.
    pub reason: ConfigReason,
}

/// An error in one line of a configuration file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigReason {
    /// The line is neither `KEY=VALUE` nor a comment nor blank.
    #[error("`{0}` is not KEY=VALUE")]
    NotAnAssignment(String),
    /// An unknown key that is not similar to any other.
    #[error("unknown key {0}; the keys are {keys}", keys = KEYS.join(" "))]
    UnknownKey(String),
    /// An unknown key, and the key to suggest.
    #[error("unknown key {0}; perhaps {1} is meant")]
    MisspelledKey(String, &'static str),
    /// A key that an earlier line, of this number, has set already.
    #[error("{0} is already set in line {1}")]
    Duplicate(String, usize),
    /// A key, and why its value is invalid.
    #[error("{0}: {1}")]
    InvalidValue(String, String),
}

/// Parses the text of a configuration file; `file` is its path, for errors only.
///
/// # Errors
/// The first error in the file.
pub fn parse(file: &Path, text: &str) -> Result<Settings, ConfigError> {
    let (settings, error) = salvage(file, text);
    error.map_or(Ok(settings), Err)
}

/// Parses the valid lines of a configuration file, and returns its first error as well.
///
/// For the generator, so that an instance keeps its units while an operator edits its file. A
/// server must not start from a file with an error.
#[must_use]
pub fn salvage(file: &Path, text: &str) -> (Settings, Option<ConfigError>) {
    let mut settings = Settings::default();
    let mut seen: Vec<(&str, usize)> = Vec::new();
    let mut first_error = None;
    for (line, content) in (1..).zip(text.lines()) {
        if let Err(reason) = parse_line(&mut settings, &mut seen, line, content.trim()) {
            first_error.get_or_insert_with(|| ConfigError { file: file.to_owned(), line, reason });
        }
    }
    (settings, first_error)
}

fn parse_line<'a>(
    settings: &mut Settings,
    seen: &mut Vec<(&'a str, usize)>,
    line: usize,
    content: &'a str,
) -> Result<(), ConfigReason> {
    if content.is_empty() || content.starts_with('#') {
        return Ok(());
    }
    let (key, value) = split_assignment(content)?;
    if !KEYS.contains(&key) {
        return Err(match nearest_key(key) {
            Some(nearest) => ConfigReason::MisspelledKey(key.to_owned(), nearest),
            None => ConfigReason::UnknownKey(key.to_owned()),
        });
    }
    let is_list = matches!(key, "TO" | "TLS_ALLOW");
    if let Some((_, earlier)) = seen.iter().find(|(other, _)| *other == key && !is_list) {
        return Err(ConfigReason::Duplicate(key.to_owned(), *earlier));
    }
    seen.push((key, line));
    let invalid = |why| ConfigReason::InvalidValue(key.to_owned(), why);
    set(settings, key, unquote(value).map_err(invalid)?).map_err(invalid)
}

fn split_assignment(content: &str) -> Result<(&str, &str), ConfigReason> {
    let (key, value) =
        content.split_once('=').ok_or_else(|| ConfigReason::NotAnAssignment(content.to_owned()))?;
    Ok((key.trim_end(), value.trim_start()))
}

/// Removes matching quotes. A # after white space is an error, because it may begin a comment or be
/// part of a path.
fn unquote(value: &str) -> Result<&str, String> {
    for quote in ['"', '\''] {
        let Some(inner) = value.strip_prefix(quote) else { continue };
        let inner = inner.strip_suffix(quote).ok_or("the closing quote is missing")?;
        return if inner.contains(quote) {
            Err("a quote inside quotes".to_owned())
        } else {
            Ok(inner)
        };
    }
    if value.contains(" #") || value.contains("\t#") || value.starts_with('#') {
        return Err("a comment needs a line of its own; quote the value if # is part of it".into());
    }
    Ok(value)
}

fn set(settings: &mut Settings, key: &str, value: &str) -> Result<(), String> {
    match key {
        "ADDR" => settings.addr = Some(value.parse().map_err(to_text)?),
        "PORT" => settings.port = Some(parse_port(value).map_err(to_text)?),
        "FILE" => settings.file = Some(parse_path(value)?),
        "CREATE" => settings.create = Some(parse_create(value).map_err(to_text)?),
        "SOCK" => settings.sock = Some(parse_path(value)?),
        "DEFAULT_DENY" => settings.default_deny = parse_switch(value)?,
        "KILLSWITCH" => settings.killswitch = parse_switch(value)?,
        "READ_ONLY" => settings.read_only = parse_switch(value)?,
        "EXPORT" => settings.export = Some(parse_export(value).map_err(to_text)?),
        "OLDSTYLE" => settings.oldstyle = parse_switch(value)?,
        "PLAIN" => settings.plain = parse_switch(value)?,
        "MAX_CLIENTS" => settings.max_clients = Some(parse_max_clients(value)?),
        "MAX_CLIENTS_PER_ADDRESS" => {
            settings.max_clients_per_address = Some(parse_max_clients(value)?);
        }
        "PAYLOAD_MEMORY" => {
            settings.payload_memory = Some(parse_payload_memory(value).map_err(to_text)?);
        }
        "IDLE_EXIT" => settings.idle_exit = Some(parse_idle_exit(value)?),
        "HOLES" => settings.holes = Some(parse_holes(value)?),
        "DIRECT" => settings.direct = parse_switch(value)?,
        "RELAY" => settings.relay = Some(parse_relay(value)?),
        "TLS" => settings.tls.tls = Some(value.parse()?),
        "TLS_CERT" => settings.tls.tls_cert = Some(value.parse()?),
        "TLS_KEY" => settings.tls.tls_key = Some(value.parse()?),
        "TLS_CA" => settings.tls.tls_ca = Some(value.parse()?),
        "TLS_ALLOW" => settings.tls.tls_allow.extend(parse_allowed(value)?),
        "SANDBOX" => settings.sandbox.no_sandbox = !parse_switch(value)?,
        "USER" => settings.sandbox.user = Some(value.parse().map_err(to_text)?),
        "ACL" => settings.acl = parse_acl(value)?,
        "TO" => settings.upstream.to.extend(parse_targets(value)?),
        "BIND" => settings.upstream.bind = Some(parse_ip(value)?),
        "CACHE" => settings.upstream.cache = Some(parse_cache(value).map_err(to_text)?),
        "UNFLUSHED" => settings.upstream.unflushed = Some(parse_unflushed(value).map_err(to_text)?),
        "CONNECTIONS" => settings.upstream.connections = Some(parse_connections(value)?),
        "TIMEOUT" => settings.upstream.timeout = Some(parse_timeout(value)?),
        "TO_TLS" => settings.upstream.tls.mode = Some(value.parse()?),
        "TO_TLS_CA" => settings.upstream.tls.files.ca = Some(value.parse()?),
        "TO_TLS_CERT" => settings.upstream.tls.files.cert = Some(value.parse()?),
        "TO_TLS_KEY" => settings.upstream.tls.files.key = Some(value.parse()?),
        "TO_TLS_HOSTNAME" => settings.upstream.tls.hostname = Some(parse_hostname(value)?),
        "AUTOSTART" => settings.autostart = Some(parse_autostart(value)?),
        "IP_FILTER" => settings.ip_filter = parse_switch(value)?,
        // A test compares this list with KEYS.
        _ => return Err("the key has no meaning".to_owned()),
    }
    Ok(())
}

fn to_text(error: impl fmt::Display) -> String {
    error.to_string()
}

fn parse_path(value: &str) -> Result<PathBuf, String> {
    if value.is_empty() { Err("the path is empty".to_owned()) } else { Ok(value.into()) }
}

fn parse_switch(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err(format!("`{value}` is neither yes nor no")),
    }
}

fn parse_autostart(value: &str) -> Result<Autostart, String> {
    if value.eq_ignore_ascii_case("on-demand") {
        return Ok(Autostart::OnDemand);
    }
    match parse_switch(value) {
        Ok(true) => Ok(Autostart::Yes),
        Ok(false) => Ok(Autostart::No),
        Err(_) => Err(format!("`{value}` is neither yes nor no nor on-demand")),
    }
}

/// Splits entries that are separated by spaces, commas or both.
fn entries(value: &str) -> impl Iterator<Item = &str> {
    let separator = |c: char| c == ',' || c.is_whitespace();
    value.split(separator).filter(|entry| !entry.is_empty())
}

fn parse_acl(value: &str) -> Result<Vec<String>, String> {
    entries(value).map(parse_acl_entry).collect()
}

/// Parses the names of client certificates. At least one: an empty list would admit all.
fn parse_allowed(value: &str) -> Result<Vec<AllowedName>, String> {
    let names: Vec<_> =
        entries(value).map(str::parse).collect::<Result<_, _>>().map_err(to_text)?;
    if names.is_empty() { Err("there is no name".to_owned()) } else { Ok(names) }
}

fn parse_hostname(value: &str) -> Result<String, String> {
    if value.is_empty() { Err("the name is empty".to_owned()) } else { Ok(value.to_owned()) }
}

/// Parses the URIs of the upstream, separated by white space. At least one.
fn parse_targets(value: &str) -> Result<Vec<Target>, String> {
    let targets: Vec<Target> =
        value.split_whitespace().map(uri::parse).collect::<Result<_, _>>().map_err(to_text)?;
    if targets.is_empty() { Err("there is no URI".to_owned()) } else { Ok(targets) }
}

/// The key to suggest for an unknown one.
fn nearest_key(key: &str) -> Option<&'static str> {
    let key = key.to_ascii_uppercase().replace('-', "_");
    let candidates = KEYS.iter().map(|known| (levenshtein(&key, known), *known));
    let (distance, nearest) = candidates.min_by_key(|(distance, _)| *distance)?;
    (distance <= HINT_DISTANCE_MAX && distance < nearest.len()).then_some(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::proxy::ProxyFlags;
    use crate::cli::sandbox::SandboxFlags;
    use crate::cli::settings::UpstreamSettings;
    use crate::cli::tls::{ClientTlsSettings, ServerTlsSettings};
    use crate::daemon::RelayDefault;
    use crate::disk::HolePolicy;
    use crate::net::tls::{TlsFiles, TlsMode};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn parse_text(text: &str) -> Result<Settings, String> {
        parse(Path::new("disk.conf"), text).map_err(to_text)
    }

    fn refusal(text: &str) -> String {
        parse_text(text).unwrap_err()
    }

    #[test]
    fn every_key_sets_its_setting() {
        let text = "ADDR=[::1]\nPORT=7\nFILE=/a\nCREATE=1M\nSOCK=/b\nDEFAULT_DENY=yes\n\
            KILLSWITCH=on\nREAD_ONLY=1\nEXPORT=disk\nOLDSTYLE=True\nPLAIN=yes\nMAX_CLIENTS=3\n\
            MAX_CLIENTS_PER_ADDRESS=2\nPAYLOAD_MEMORY=8M\nIDLE_EXIT=60\nHOLES=trust\nDIRECT=yes\nRELAY=yes\n\
            SANDBOX=no\nUSER=a:b\nACL=::/0\nTO=nbd://a nbd://b\nTO=nbd://c\n\
            BIND=::2\nCACHE=4K\nUNFLUSHED=1M\nCONNECTIONS=2\nTIMEOUT=9\nAUTOSTART=on-demand\n\
            TLS=Require\nTLS_CERT=/c\nTLS_KEY=credential:k\nTLS_CA=/ca\nTLS_ALLOW=a\nTO_TLS=on\n\
            TO_TLS_CA=/tca\nTO_TLS_CERT=/tc\nTO_TLS_KEY=/tk\nTO_TLS_HOSTNAME=h\nIP_FILTER=yes\n";
        let file = |path: &str| path.parse().ok();
        let expected = Settings {
            addr: Some("::1".parse().unwrap()),
            port: Some(7),
            file: Some("/a".into()),
            create: Some(1 << 20),
            sock: Some("/b".into()),
            default_deny: true,
            killswitch: true,
            read_only: true,
            export: Some("disk".to_owned()),
            oldstyle: true,
            plain: true,
            max_clients: Some(3),
            max_clients_per_address: Some(2),
            payload_memory: Some(8 << 20),
            idle_exit: Some(60),
            holes: Some(HolePolicy::Trust),
            direct: true,
            relay: Some(RelayDefault::Unlimited),
            tls: ServerTlsSettings {
                tls: Some(TlsMode::Require),
                tls_cert: file("/c"),
                tls_key: file("credential:k"),
                tls_ca: file("/ca"),
                tls_allow: vec!["a".parse().unwrap()],
            },
            sandbox: SandboxFlags { no_sandbox: true, user: Some("a:b".parse().unwrap()) },
            acl: vec!["::/0".to_owned()],
            upstream: UpstreamSettings {
                to: ["nbd://a", "nbd://b", "nbd://c"].map(|to| uri::parse(to).unwrap()).to_vec(),
                bind: Some("::2".parse().unwrap()),
                cache: Some(4096),
                unflushed: Some(1 << 20),
                connections: Some(2),
                timeout: Some(9),
                tls: ClientTlsSettings {
                    mode: Some(TlsMode::On),
                    files: TlsFiles { cert: file("/tc"), key: file("/tk"), ca: file("/tca") },
                    hostname: Some("h".to_owned()),
                },
            },
            autostart: Some(Autostart::OnDemand),
            ip_filter: true,
        };
        assert_eq!(parse_text(text), Ok(expected));
        for key in KEYS {
            assert!(text.contains(&format!("{key}=")), "{key} is missing here");
        }
    }

    #[test]
    fn keys_correspond_to_options_except_the_units_keys() {
        let serve = <Settings as clap::Args>::augment_args(clap::Command::new("serve"));
        let proxy = <ProxyFlags as clap::Args>::augment_args(clap::Command::new("proxy"));
        let name = |arg: &clap::Arg| arg.get_long().unwrap_or(arg.get_id().as_str()).to_owned();
        let key = |arg: &clap::Arg| name(arg).to_uppercase().replace('-', "_");
        let mut options: BTreeSet<String> =
            serve.get_arguments().chain(proxy.get_arguments()).map(key).collect();
        // The original's way of TO, and the option that names the file.
        for option in ["CONN_ADDR", "CONN_PORT", "CONFIG"] {
            assert!(options.remove(option), "{option}");
        }
        assert!(options.remove("NO_SANDBOX") && options.insert("SANDBOX".to_owned()));
        // PLAIN is an option of `listen` only.
        options.extend(["AUTOSTART", "IP_FILTER", "PLAIN"].map(str::to_owned));
        assert_eq!(options, KEYS.map(str::to_owned).into());
    }

    #[test]
    fn blank_lines_comments_and_spaces_are_ignored() {
        let text = "\n# FILE=/no\n  \t\n   # PORT=x\n  FILE =  /a b  \r\n";
        let expected = Settings { file: Some("/a b".into()), ..Settings::default() };
        assert_eq!(parse_text(text), Ok(expected));
        assert_eq!(parse_text(""), Ok(Settings::default()));
    }

    #[test]
    fn matching_quotes_are_removed_without_escapes() {
        for (value, expected) in [
            ("\" /a #b \"", " /a #b "),
            ("'/a\"b'", "/a\"b"),
            ("/it's", "/it's"),
            ("\"/a\\n\"", "/a\\n"),
            ("/a=b", "/a=b"),
            ("/a#b", "/a#b"),
        ] {
            let settings = parse_text(&format!("FILE={value}")).unwrap();
            assert_eq!(settings.file, Some(expected.into()), "{value}");
        }
    }

    #[test]
    fn unmatched_quotes_are_refused() {
        let missing = "disk.conf, line 1: FILE: the closing quote is missing";
        for value in ["\"/a", "'/a\"", "\""] {
            assert_eq!(refusal(&format!("FILE={value}")), missing);
        }
        assert_eq!(refusal("FILE='a'b'"), "disk.conf, line 1: FILE: a quote inside quotes");
    }

    #[test]
    fn a_comment_after_a_value_is_refused() {
        for line in ["FILE=/a # the disk", "FILE=/a\t# the disk", "FILE=# the disk"] {
            assert!(refusal(line).contains("a comment needs a line of its own"), "{line}");
        }
    }

    #[test]
    fn acl_entries_are_separated_by_spaces_or_commas() {
        for value in ["::1 ::2 10.0.0.0/8", "::1,::2,10.0.0.0/8", "\"::1  ::2,,10.0.0.0/8,\""] {
            let acl = parse_text(&format!("ACL={value}")).unwrap().acl;
            assert_eq!(acl, ["::1", "::2", "10.0.0.0/8"], "{value}");
        }
        assert!(refusal("ACL=::1 a").contains("ACL: 'a' is not an access control entry"));
        assert!(parse_text("ACL=").unwrap().acl.is_empty());
    }

    #[test]
    fn switches_accept_four_words_each_way() {
        for value in ["yes", "TRUE", "On", "1"] {
            assert!(parse_text(&format!("READ_ONLY={value}")).unwrap().read_only);
        }
        for value in ["no", "FALSE", "Off", "0"] {
            assert!(!parse_text(&format!("READ_ONLY={value}")).unwrap().read_only);
        }
    }

    #[test]
    fn autostart_is_a_switch_or_on_demand() {
        let autostart = |value| parse_text(&format!("AUTOSTART={value}")).unwrap().autostart;
        assert_eq!(autostart("Yes"), Some(Autostart::Yes));
        assert_eq!(autostart("off"), Some(Autostart::No));
        assert_eq!(autostart("On-Demand"), Some(Autostart::OnDemand));
        assert_eq!(parse_text("").unwrap().autostart, None);
        let refused = refusal("AUTOSTART=demand");
        assert!(refused.ends_with("AUTOSTART: `demand` is neither yes nor no nor on-demand"));
    }

    #[test]
    fn salvage_keeps_valid_lines_and_the_first_error() {
        let text = "PORT=7\nADR=::\nPORT=8\nREAD_ONLY=perhaps\nFILE=/a\n";
        let (settings, error) = salvage(Path::new("disk.conf"), text);
        let valid = Settings { port: Some(7), file: Some("/a".into()), ..Settings::default() };
        assert_eq!(settings, valid);
        let error = error.unwrap();
        assert_eq!(error.to_string(), "disk.conf, line 2: unknown key ADR; perhaps ADDR is meant");
        assert_eq!(parse(Path::new("disk.conf"), text), Err(error));
    }

    #[test]
    fn an_unknown_key_is_reported_with_a_suggestion() {
        let hint = |key| refusal(&format!("\nFILE=/a\n{key}=1\n"));
        assert_eq!(hint("PROT"), "disk.conf, line 3: unknown key PROT; perhaps PORT is meant");
        assert!(hint("port").ends_with("perhaps PORT is meant"));
        assert!(hint("read-only").ends_with("perhaps READ_ONLY is meant"));
        assert!(hint("DEFAULTDENY").ends_with("perhaps DEFAULT_DENY is meant"));
        assert!(hint("VOLUME_GROUP").contains("the keys are ADDR PORT FILE"));
        assert!(hint("").contains("unknown key ;"), "{}", hint(""));
    }

    #[test]
    fn a_repeated_key_is_refused_with_both_lines() {
        let text = "FILE=/a\n\nFILE=/a\n";
        assert_eq!(refusal(text), "disk.conf, line 3: FILE is already set in line 1");
    }

    #[test]
    fn a_line_without_an_assignment_is_quoted() {
        assert_eq!(refusal("FILE /a"), "disk.conf, line 1: `FILE /a` is not KEY=VALUE");
    }

    #[test]
    fn an_invalid_value_is_refused_with_its_key() {
        for (line, message) in [
            ("ADDR=localhost", "ADDR: `localhost` is neither an IPv4 or IPv6 address nor a path"),
            ("PORT=70000", "PORT: `70000` is not a port"),
            ("PORT=", "PORT: `` is not a port"),
            ("FILE=", "FILE: the path is empty"),
            ("SOCK=''", "SOCK: the path is empty"),
            ("CREATE=1P", "CREATE: `1P` is not a number of bytes"),
            ("CREATE=1", "CREATE: `1` is not between 512 and"),
            ("MAX_CLIENTS_PER_ADDRESS=65537", "MAX_CLIENTS_PER_ADDRESS: `65537` is not a number"),
            ("MAX_CLIENTS=0", "MAX_CLIENTS: `0` is not a number from 1"),
            ("HOLES=yes", "HOLES: `yes` is none of auto, trust and ignore"),
            ("DIRECT=perhaps", "DIRECT: `perhaps` is neither yes nor no"),
            ("IDLE_EXIT=0", "IDLE_EXIT: `0` is not a number of seconds from 1"),
            ("READ_ONLY=maybe", "READ_ONLY: `maybe` is neither yes nor no"),
            ("DEFAULT_DENY=", "DEFAULT_DENY: `` is neither yes nor no"),
            ("TO=", "TO: there is no URI"),
            ("TO=nbd://a b", "TO: `b` begins neither with nbd:// nor nbd+unix://"),
            ("BIND=eth0", "BIND: `eth0` is not an IPv4 or IPv6 address"),
            ("CACHE=17M", "CACHE: `17M` is not between 0 and 16777216"),
            ("UNFLUSHED=1K", "UNFLUSHED: `1K` is not between 1048576 and"),
            ("CONNECTIONS=17", "CONNECTIONS: `17` is not a number from 1 to 16"),
            ("TLS=yes", "TLS: `yes` is none of off, on and require"),
            ("TLS_CERT=", "TLS_CERT: the path is empty"),
            ("TLS_ALLOW=,", "TLS_ALLOW: there is no name"),
            ("TLS_ALLOW=a/b", "TLS_ALLOW: `a/b` is neither a host name"),
            ("TO_TLS_HOSTNAME=", "TO_TLS_HOSTNAME: the name is empty"),
            ("TIMEOUT=0", "TIMEOUT: `0` is not a number of seconds from 1"),
        ] {
            let error = refusal(line);
            assert!(error.starts_with(&format!("disk.conf, line 1: {message}")), "{error}");
        }
        let long = refusal(&format!("EXPORT={}", "x".repeat(4097)));
        assert!(long.contains("EXPORT: the name of the export is longer"), "{long}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[A-Z_=#\"' \n\\PC]{0,60}") {
            let _ = parse_text(&text);
        }
    }
}

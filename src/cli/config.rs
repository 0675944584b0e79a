//! The configuration file: text in, [`Settings`] out.
//! Pure; the file is read elsewhere, and what is unknown or wrong in it is never passed over.
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
//! Space around keys and values does not count. A value may stand in `'` or `"`, which are taken
//! off; nothing inside is special. Switches are `yes true on 1` or `no false off 0`.

use super::settings::{
    Autostart, Settings, parse_acl_entry, parse_holes, parse_idle_exit, parse_max_clients,
};
use super::size::parse_create;
use super::uri::parse_export;
use crate::net::parse_port;
use std::fmt;
use std::path::{Path, PathBuf};

/// Every key, named like the long option: in capitals, with `_` for `-`. The last ones have no
/// option, since they are about the units of the service and not about the process.
pub const KEYS: [&str; 17] = [
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
    "IDLE_EXIT",
    "HOLES",
    "ACL",
    "AUTOSTART",
    "IP_FILTER",
];

/// Longest configuration file, in bytes. An access control list of 10,000 entries is shorter.
pub const BYTES_MAX: u64 = 1 << 20;

/// How many letters a key may be away from the one that is suggested for it.
const HINT_DISTANCE_MAX: usize = 3;

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong there.
    pub reason: ConfigReason,
}

/// What can be wrong with a line of the configuration file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfigReason {
    /// Neither `KEY=VALUE` nor a comment nor blank; holds the line.
    NotAnAssignment(String),
    /// A key that we do not know, and the one that may be meant.
    UnknownKey(String, Option<&'static str>),
    /// A key that an earlier line has set already.
    Duplicate(String, usize),
    /// A value that the key cannot have, and why.
    BadValue(String, String),
}

/// Reads the text of a configuration file; `file` is for the errors only.
///
/// # Errors
/// The first thing that is wrong.
pub fn parse(file: &Path, text: &str) -> Result<Settings, ConfigError> {
    let (settings, wrong) = salvage(file, text);
    wrong.map_or(Ok(settings), Err)
}

/// The good lines of a configuration file, and the first thing that is wrong with it.
///
/// Nothing may be served by them if something is; but the units of an instance should be where
/// they were while somebody is editing its file.
#[must_use]
pub fn salvage(file: &Path, text: &str) -> (Settings, Option<ConfigError>) {
    let mut settings = Settings::default();
    let mut seen: Vec<(&str, usize)> = Vec::new();
    let mut wrong = None;
    for (line, content) in (1..).zip(text.lines()) {
        if let Err(reason) = take_line(&mut settings, &mut seen, line, content.trim()) {
            wrong.get_or_insert_with(|| ConfigError { file: file.to_owned(), line, reason });
        }
    }
    (settings, wrong)
}

fn take_line<'a>(
    settings: &mut Settings,
    seen: &mut Vec<(&'a str, usize)>,
    line: usize,
    content: &'a str,
) -> Result<(), ConfigReason> {
    if content.is_empty() || content.starts_with('#') {
        return Ok(());
    }
    let (key, value) = assignment(content)?;
    if !KEYS.contains(&key) {
        return Err(ConfigReason::UnknownKey(key.to_owned(), nearest(key)));
    }
    if let Some((_, earlier)) = seen.iter().find(|(other, _)| *other == key) {
        return Err(ConfigReason::Duplicate(key.to_owned(), *earlier));
    }
    seen.push((key, line));
    let bad = |why| ConfigReason::BadValue(key.to_owned(), why);
    set(settings, key, unquoted(value).map_err(bad)?).map_err(bad)
}

fn assignment(content: &str) -> Result<(&str, &str), ConfigReason> {
    let (key, value) =
        content.split_once('=').ok_or_else(|| ConfigReason::NotAnAssignment(content.to_owned()))?;
    Ok((key.trim_end(), value.trim_start()))
}

/// Takes matching quotes off. What looks like a comment behind a value is an error, since part of
/// a path may look so, too.
fn unquoted(value: &str) -> Result<&str, String> {
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
        "ADDR" => settings.addr = Some(value.parse().map_err(said)?),
        "PORT" => settings.port = Some(parse_port(value).map_err(said)?),
        "FILE" => settings.file = Some(path(value)?),
        "CREATE" => settings.create = Some(parse_create(value).map_err(said)?),
        "SOCK" => settings.sock = Some(path(value)?),
        "DEFAULT_DENY" => settings.default_deny = switch(value)?,
        "KILLSWITCH" => settings.killswitch = switch(value)?,
        "READ_ONLY" => settings.read_only = switch(value)?,
        "EXPORT" => settings.export = Some(parse_export(value).map_err(said)?),
        "OLDSTYLE" => settings.oldstyle = switch(value)?,
        "PLAIN" => settings.plain = switch(value)?,
        "MAX_CLIENTS" => settings.max_clients = Some(parse_max_clients(value)?),
        "IDLE_EXIT" => settings.idle_exit = Some(parse_idle_exit(value)?),
        "HOLES" => settings.holes = Some(parse_holes(value)?),
        "ACL" => settings.acl = entries(value)?,
        "AUTOSTART" => settings.autostart = Some(autostart(value)?),
        "IP_FILTER" => settings.ip_filter = switch(value)?,
        // A test holds this list against KEYS.
        _ => return Err("the key has no meaning".to_owned()),
    }
    Ok(())
}

fn said(error: impl fmt::Display) -> String {
    error.to_string()
}

fn path(value: &str) -> Result<PathBuf, String> {
    if value.is_empty() { Err("the path is empty".to_owned()) } else { Ok(value.into()) }
}

fn switch(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "yes" | "true" | "on" | "1" => Ok(true),
        "no" | "false" | "off" | "0" => Ok(false),
        _ => Err(format!("`{value}` is neither yes nor no")),
    }
}

fn autostart(value: &str) -> Result<Autostart, String> {
    if value.eq_ignore_ascii_case("on-demand") {
        return Ok(Autostart::OnDemand);
    }
    match switch(value) {
        Ok(true) => Ok(Autostart::Yes),
        Ok(false) => Ok(Autostart::No),
        Err(_) => Err(format!("`{value}` is neither yes nor no nor on-demand")),
    }
}

/// Separated by spaces or commas, or both.
fn entries(value: &str) -> Result<Vec<String>, String> {
    let separator = |c: char| c == ',' || c.is_whitespace();
    value.split(separator).filter(|entry| !entry.is_empty()).map(parse_acl_entry).collect()
}

/// The key that may be meant.
fn nearest(key: &str) -> Option<&'static str> {
    let key = key.to_ascii_uppercase().replace('-', "_");
    let (distance, nearest) =
        KEYS.iter().map(|known| (distance(&key, known), *known)).min_by_key(|(far, _)| *far)?;
    (distance <= HINT_DISTANCE_MAX && distance < nearest.len()).then_some(nearest)
}

/// How many letters must be put in, taken out or changed to get from one word to the other
/// (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, line {}: {}", self.file.display(), self.line, self.reason)
    }
}

impl fmt::Display for ConfigReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnAssignment(line) => write!(f, "`{line}` is not KEY=VALUE"),
            Self::UnknownKey(key, Some(hint)) => {
                write!(f, "unknown key {key}; perhaps {hint} is meant")
            }
            Self::UnknownKey(key, None) => {
                write!(f, "unknown key {key}; the keys are {}", KEYS.join(" "))
            }
            Self::Duplicate(key, line) => write!(f, "{key} is already set in line {line}"),
            Self::BadValue(key, why) => write!(f, "{key}: {why}"),
        }
    }
}

impl std::error::Error for ConfigError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::HolePolicy;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Settings, String> {
        parse(Path::new("disk.conf"), text).map_err(said)
    }

    fn refusal(text: &str) -> String {
        read(text).unwrap_err()
    }

    #[test]
    fn every_key_is_taken() {
        let text = "ADDR=[::1]\nPORT=7\nFILE=/a\nCREATE=1M\nSOCK=/b\nDEFAULT_DENY=yes\n\
            KILLSWITCH=on\nREAD_ONLY=1\nEXPORT=disk\nOLDSTYLE=True\nPLAIN=yes\nMAX_CLIENTS=3\n\
            IDLE_EXIT=60\nHOLES=trust\nACL=::/0\nAUTOSTART=on-demand\nIP_FILTER=yes\n";
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
            idle_exit: Some(60),
            holes: Some(HolePolicy::Trust),
            acl: vec!["::/0".to_owned()],
            autostart: Some(Autostart::OnDemand),
            ip_filter: true,
        };
        assert_eq!(read(text), Ok(expected));
        for key in KEYS {
            assert!(text.contains(&format!("{key}=")), "{key} is not tried here");
        }
    }

    #[test]
    fn every_option_has_its_key_and_every_key_its_option_but_those_of_the_units() {
        let command = <Settings as clap::Args>::augment_args(clap::Command::new("serve"));
        let name = |arg: &clap::Arg| arg.get_long().unwrap_or(arg.get_id().as_str()).to_owned();
        let mut options: Vec<String> =
            command.get_arguments().map(|arg| name(arg).to_uppercase().replace('-', "_")).collect();
        let mut keys = KEYS.map(str::to_owned);
        // PLAIN is an option of `listen` only.
        options.extend(["AUTOSTART", "IP_FILTER", "PLAIN"].map(str::to_owned));
        options.sort_unstable();
        keys.sort_unstable();
        assert_eq!(options, keys);
    }

    #[test]
    fn blank_lines_comments_and_space_do_not_count() {
        let text = "\n# FILE=/no\n  \t\n   # PORT=x\n  FILE =  /a b  \r\n";
        let expected = Settings { file: Some("/a b".into()), ..Settings::default() };
        assert_eq!(read(text), Ok(expected));
        assert_eq!(read(""), Ok(Settings::default()));
    }

    #[test]
    fn matching_quotes_are_taken_off_and_nothing_inside_is_special() {
        for (value, expected) in [
            ("\" /a #b \"", " /a #b "),
            ("'/a\"b'", "/a\"b"),
            ("/it's", "/it's"),
            ("\"/a\\n\"", "/a\\n"),
            ("/a=b", "/a=b"),
            ("/a#b", "/a#b"),
        ] {
            let settings = read(&format!("FILE={value}")).unwrap();
            assert_eq!(settings.file, Some(expected.into()), "{value}");
        }
    }

    #[test]
    fn quotes_that_do_not_match_are_refused() {
        let missing = "disk.conf, line 1: FILE: the closing quote is missing";
        for value in ["\"/a", "'/a\"", "\""] {
            assert_eq!(refusal(&format!("FILE={value}")), missing);
        }
        assert_eq!(refusal("FILE='a'b'"), "disk.conf, line 1: FILE: a quote inside quotes");
    }

    #[test]
    fn a_comment_behind_a_value_is_refused() {
        for line in ["FILE=/a # the disk", "FILE=/a\t# the disk", "FILE=# the disk"] {
            assert!(refusal(line).contains("a comment needs a line of its own"), "{line}");
        }
    }

    #[test]
    fn acl_entries_are_separated_by_spaces_or_commas() {
        for value in ["::1 ::2 10.0.0.0/8", "::1,::2,10.0.0.0/8", "\"::1  ::2,,10.0.0.0/8,\""] {
            let acl = read(&format!("ACL={value}")).unwrap().acl;
            assert_eq!(acl, ["::1", "::2", "10.0.0.0/8"], "{value}");
        }
        assert!(refusal("ACL=::1 a").contains("ACL: 'a' is not an access control entry"));
        assert!(read("ACL=").unwrap().acl.is_empty());
    }

    #[test]
    fn switches_have_four_words_each_way() {
        for value in ["yes", "TRUE", "On", "1"] {
            assert!(read(&format!("READ_ONLY={value}")).unwrap().read_only);
        }
        for value in ["no", "FALSE", "Off", "0"] {
            assert!(!read(&format!("READ_ONLY={value}")).unwrap().read_only);
        }
    }

    #[test]
    fn autostart_is_a_switch_with_a_third_position() {
        let autostart = |value| read(&format!("AUTOSTART={value}")).unwrap().autostart;
        assert_eq!(autostart("Yes"), Some(Autostart::Yes));
        assert_eq!(autostart("off"), Some(Autostart::No));
        assert_eq!(autostart("On-Demand"), Some(Autostart::OnDemand));
        assert_eq!(read("").unwrap().autostart, None);
        let refused = refusal("AUTOSTART=demand");
        assert!(refused.ends_with("AUTOSTART: `demand` is neither yes nor no nor on-demand"));
    }

    #[test]
    fn good_lines_are_salvaged_from_among_bad_ones_and_the_first_bad_one_is_named() {
        let text = "PORT=7\nADR=::\nPORT=8\nREAD_ONLY=perhaps\nFILE=/a\n";
        let (settings, wrong) = salvage(Path::new("disk.conf"), text);
        let good = Settings { port: Some(7), file: Some("/a".into()), ..Settings::default() };
        assert_eq!(settings, good);
        let wrong = wrong.unwrap();
        assert_eq!(wrong.to_string(), "disk.conf, line 2: unknown key ADR; perhaps ADDR is meant");
        assert_eq!(parse(Path::new("disk.conf"), text), Err(wrong));
    }

    #[test]
    fn an_unknown_key_is_named_with_file_and_line_and_what_may_be_meant() {
        let hint = |key| refusal(&format!("\nFILE=/a\n{key}=1\n"));
        assert_eq!(hint("PROT"), "disk.conf, line 3: unknown key PROT; perhaps PORT is meant");
        assert!(hint("port").ends_with("perhaps PORT is meant"));
        assert!(hint("read-only").ends_with("perhaps READ_ONLY is meant"));
        assert!(hint("DEFAULTDENY").ends_with("perhaps DEFAULT_DENY is meant"));
        assert!(hint("VOLUME_GROUP").contains("the keys are ADDR PORT FILE"));
        assert!(hint("").contains("unknown key ;"), "{}", hint(""));
    }

    #[test]
    fn a_key_that_comes_twice_is_refused_with_both_lines() {
        let text = "FILE=/a\n\nFILE=/a\n";
        assert_eq!(refusal(text), "disk.conf, line 3: FILE is already set in line 1");
    }

    #[test]
    fn a_line_that_is_no_assignment_is_shown() {
        assert_eq!(refusal("FILE /a"), "disk.conf, line 1: `FILE /a` is not KEY=VALUE");
    }

    #[test]
    fn a_bad_value_is_refused_with_its_key() {
        for (line, what) in [
            ("ADDR=localhost", "ADDR: `localhost` is neither an IPv4 or IPv6 address nor a path"),
            ("PORT=70000", "PORT: `70000` is not a port"),
            ("PORT=", "PORT: `` is not a port"),
            ("FILE=", "FILE: the path is empty"),
            ("SOCK=''", "SOCK: the path is empty"),
            ("CREATE=1P", "CREATE: `1P` is not a number of bytes"),
            ("CREATE=1", "CREATE: `1` is not between 512 and"),
            ("MAX_CLIENTS=0", "MAX_CLIENTS: `0` is not a number from 1"),
            ("HOLES=yes", "HOLES: `yes` is none of auto, trust and ignore"),
            ("IDLE_EXIT=0", "IDLE_EXIT: `0` is not a number of seconds from 1"),
            ("READ_ONLY=maybe", "READ_ONLY: `maybe` is neither yes nor no"),
            ("DEFAULT_DENY=", "DEFAULT_DENY: `` is neither yes nor no"),
        ] {
            let error = refusal(line);
            assert!(error.starts_with(&format!("disk.conf, line 1: {what}")), "{error}");
        }
        let long = refusal(&format!("EXPORT={}", "x".repeat(4097)));
        assert!(long.contains("EXPORT: the name of the export is longer"), "{long}");
    }

    #[test]
    fn distance_counts_letters() {
        assert_eq!(distance("", "ACL"), 3);
        assert_eq!(distance("ACL", "ACL"), 0);
        assert_eq!(distance("PROT", "PORT"), 2);
        assert_eq!(distance("ADR", "ADDR"), 1);
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[A-Z_=#\"' \n\\PC]{0,60}") {
            let _ = read(&text);
        }
    }
}

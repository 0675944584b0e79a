//! man/flexnbd.service.7 against the program and systemd/: units and their settings, output of the
//! generator, limits, fields and messages of the journal, files of the package.

use super::command_line::numbers;
use super::every_page::units;
use super::generator::{INSTANCE, generate};
use super::roff::Page;
use super::{module_source, read};
use flexnbd::cli::instance::{INSTANCE_BYTES_MAX, Instance};
use flexnbd::disk::OpenError;
use flexnbd::message_id;
use flexnbd::systemd::{fd_store, unit};
use harness::project_path;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const PAGE: &str = "man/flexnbd.service.7";
const SERVE: &str = "systemd/flexnbd@.service";
const LISTEN: &str = "systemd/flexnbd-listen@.service";
/// Settings that the page documents for a drop-in of the operator; our units do not have them.
const FOR_OPERATORS: [&str; 1] = ["FileDescriptorStorePreserve=yes"];

fn page() -> Page {
    Page::parse(&read(PAGE))
}

/// The text of a section, on one line and without macros.
fn text(page: &Page, place: &str) -> String {
    let words = page.at(place).map(|line| match line.strip_prefix('.') {
        Some(macros) => macros.split_once(' ').map_or("", |(_, rest)| rest),
        None => line,
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The file names of the unit templates.
fn templates() -> BTreeSet<String> {
    let entries = std::fs::read_dir(project_path("systemd")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".service") || name.ends_with(".socket")).collect()
}

/// The settings of all templates.
fn settings() -> Vec<String> {
    let lines = |name: &String| -> Vec<String> {
        read(&format!("systemd/{name}")).lines().map(str::to_owned).collect()
    };
    let all = templates().iter().flat_map(lines).collect::<Vec<_>>();
    all.into_iter().filter(|line| line.contains('=') && !line.starts_with('#')).collect()
}

/// The values of a setting in a unit file.
fn values(file: &str, setting: &str) -> Vec<String> {
    let text = read(file);
    let lines = text.lines().filter_map(|line| line.strip_prefix(setting));
    lines.filter_map(|rest| rest.strip_prefix('=')).map(str::to_owned).collect()
}

#[test]
fn exactly_our_units_are_described() {
    let page = page();
    let described: BTreeSet<String> =
        page.items("UNITS").iter().map(|item| item.replace("Pa ", "")).collect();
    assert_eq!(described, templates());
    let named = page.at("NAME").filter_map(|line| line.strip_prefix(".Nm "));
    let named: BTreeSet<String> = named.flat_map(units).collect();
    assert_eq!(named, templates());
    let synopsis: BTreeSet<String> = page.at("SYNOPSIS").flat_map(units).collect();
    assert_eq!(synopsis, templates());
}

/// Whether a word is a unit setting, `Name=` or `Name=value`.
fn is_setting(word: &str) -> bool {
    let name = word.split('=').next().unwrap();
    name.len() < word.len()
        && name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
        && name.contains(|c: char| c.is_ascii_lowercase())
}

/// The settings named in a text.
fn settings_in(text: &str) -> BTreeSet<&str> {
    text.split(' ').filter(|word| is_setting(word)).collect()
}

/// Configurations that together produce every setting of the generator, with the item of the page
/// that describes the settings.
const CONFIGURATIONS: [(&str, &str); 14] = [
    ("Va FILE , TO", "FILE=/var/lib/flexnbd/a"),
    ("Va ADDR , PORT", "FILE=/var/lib/flexnbd/a\nADDR=::\nPORT=7"),
    ("Va FILE , No when it is a file", "FILE=/srv/a"),
    ("Va FILE , No when it is a file", "FILE=/home/a/b"),
    ("Va FILE , No when it is a file", "FILE=/root/a"),
    ("Va FILE , No when it is a file", "FILE=/run/user/7/a"),
    ("Va FILE , No when it is a file", "FILE=/tmp/a"),
    ("Va FILE , No when it is a file", "FILE=/var/tmp/a"),
    ("Va FILE , No when it is a block device", "FILE=/dev/a"),
    ("Va TO , No when it is a unix socket", "TO=nbd+unix:///?socket=/run/a/b"),
    ("Va TO , No when it is a unix socket", "TO=nbd+unix:///?socket=/home/a/b"),
    ("Va MAX_CLIENTS , No when it is more than 1024", "FILE=/var/lib/flexnbd/a\nMAX_CLIENTS=2000"),
    ("Va AUTOSTART", "FILE=/dev/a\nAUTOSTART=yes"),
    ("Va IP_FILTER", "FILE=/var/lib/flexnbd/a\nIP_FILTER=yes\nACL=::1"),
];

#[test]
fn generated_settings_match_the_documentation() {
    let page = page();
    let place = "WHAT THE GENERATOR WRITES";
    let items = page.items(place);
    assert_eq!(items, {
        // In the order of the page.
        let mut known: Vec<&str> = CONFIGURATIONS.iter().map(|(item, _)| *item).collect();
        known.dedup();
        known
    });
    let mut documented_before: BTreeSet<String> = BTreeSet::from(["RequiresMountsFor".to_owned()]);
    for item in items {
        let documented = page.item_text(place, item);
        let documented = settings_in(&documented);
        let mut written: BTreeSet<String> = BTreeSet::new();
        for (_, text) in CONFIGURATIONS.iter().filter(|(of, _)| *of == item) {
            let generated = generate(text);
            assert_eq!(generated.errors, "", "{text}");
            written.extend(generated.settings().into_iter().map(str::to_owned));
        }
        for setting in &documented {
            let has_setting = |line: &String| line.starts_with(setting);
            assert!(
                written.iter().any(has_setting),
                "{item}: no generated line begins with {setting}"
            );
        }
        let name = |line: &str| line.split('=').next().unwrap().to_owned();
        let documented: BTreeSet<String> = documented.into_iter().map(name).collect();
        let undocumented: Vec<String> = written.iter().map(|line| name(line)).collect();
        let undocumented: Vec<_> = undocumented
            .iter()
            .filter(|name| !documented.contains(*name) && !documented_before.contains(*name))
            .collect();
        assert!(undocumented.is_empty(), "{item}: {undocumented:?} are not documented");
        documented_before.extend(documented);
    }
}

#[test]
fn documented_client_limits_match_the_generated_settings() {
    let page = page();
    let item = "Va MAX_CLIENTS , No when it is more than 1024";
    let provided = numbers(item)[0];
    let generated = |clients| generate(&format!("FILE=/var/lib/flexnbd/a\nMAX_CLIENTS={clients}"));
    assert!(!generated(provided).settings().iter().any(|line| line.starts_with("TasksMax=")));
    let more = numbers(&page.item_text("WHAT THE GENERATOR WRITES", item))[0];
    let expected = format!("TasksMax={}", provided + 1 + more);
    assert!(generated(provided + 1).settings().contains(&expected.as_str()), "no {expected}");
    assert_eq!(values(SERVE, "FileDescriptorStoreMax"), [(provided + 1).to_string()]);
    let descriptors = page.at("RESTART AND UPGRADE/Who is disconnected all the same");
    let descriptors: Vec<u64> = descriptors.flat_map(numbers).collect();
    assert_eq!(descriptors[..2], [provided, fd_store::DESCRIPTORS_MAX as u64]);
}

#[test]
fn documented_drop_in_names_match() {
    let page = page();
    let names: Vec<&str> = page
        .at("WHAT THE GENERATOR WRITES")
        .filter_map(|line| line.strip_prefix(".Pa 00"))
        .collect();
    let name = format!("00{}", names[0].replace("NAME", INSTANCE));
    let generated = generate("FILE=/srv/a\nADDR=::\nPORT=7\n").files;
    let mut drop_ins = generated.keys().filter(|path| path.ends_with(".conf"));
    assert!(drop_ins.all(|path| path.ends_with(&name)), "{generated:?} without {name}");
}

#[test]
fn quoted_settings_match_the_units() {
    let page = page();
    let generated: Vec<String> = CONFIGURATIONS
        .iter()
        .flat_map(|(_, text)| {
            generate(text).settings().into_iter().map(str::to_owned).collect::<Vec<_>>()
        })
        .collect();
    let all: Vec<String> =
        settings().into_iter().chain(generated).chain(FOR_OPERATORS.map(str::to_owned)).collect();
    let source = read(PAGE).replace(r"\-", "-");
    let quoted: BTreeSet<&str> =
        source.lines().filter_map(|line| line.strip_prefix('.')).flat_map(settings_in).collect();
    assert!(quoted.len() > 15, "only {quoted:?} found");
    for setting in quoted {
        let is_there = match setting.ends_with('=') {
            true => all.iter().any(|line| line.starts_with(setting)),
            false => all.iter().any(|line| line == setting),
        };
        assert!(is_there, "no unit has {setting}");
    }
    // The command line in the example drop-in is the unit's, with --overwrite.
    let replaced = page.literal();
    let replaced = replaced.iter().find(|line| line.contains("=/usr/bin/flexnbd")).unwrap();
    let plain = replaced.replace("--overwrite ", "");
    assert_ne!(*replaced, plain);
    assert!(read(LISTEN).lines().any(|line| line == plain), "{LISTEN} has no {plain}");
}

#[test]
fn documented_commands_match_the_units() {
    let page = page();
    let documented = page.item_text("UNITS", "Pa flexnbd@.service");
    let words = ["serve", "--config", "/etc/flexnbd/NAME.conf"];
    let exec = values(SERVE, "ExecStart");
    assert_eq!(exec, [format!("/usr/bin/flexnbd {}", words.join(" ").replace("NAME", "%i"))]);
    for word in words {
        assert!(documented.contains(word.trim_start_matches("--")), "{documented} has no {word}");
    }
}

#[test]
fn documented_times_match_units_and_program() {
    let page = page();
    let in_units = |setting: &str| {
        let all: BTreeSet<String> =
            [SERVE, LISTEN].into_iter().flat_map(|unit| values(unit, setting)).collect();
        assert_eq!(all.len(), 1, "{setting} is {all:?}");
        numbers(all.first().unwrap())[0]
    };
    let crash = numbers(&page.item_text("START AND STOP", "crash"));
    assert_eq!(crash, [in_units("RestartSec")]);
    let stopping = numbers(&text(&page, "STATUS AND WATCHDOG/Timeouts"));
    let longest = format!("CLOSING_MAX: Duration = Duration::from_secs({});", stopping[1]);
    assert_eq!((stopping.len(), stopping[0]), (2, in_units("TimeoutStopSec")));
    assert!(module_source("daemon").contains(&longest), "there is no `{longest}`");
    let watchdog = numbers(&text(&page, "STATUS AND WATCHDOG/Watchdog"));
    assert_eq!(watchdog, [in_units("WatchdogSec"); 2]);
    let grace = page.at("RESTART AND UPGRADE/Who is disconnected all the same");
    let grace: Vec<u64> =
        grace.filter(|line| line.contains(" seconds")).flat_map(numbers).collect();
    let constant = format!("const DISK_GRACE: Duration = Duration::from_secs({});", grace[0]);
    assert!(module_source("daemon").contains(&constant), "there is no `{constant}`");
    let other_host = page.item_text(
        "WHEN A DISK CANNOT BE SERVED",
        "Only another host knows whether the disk has moved",
    );
    for (seconds, name) in numbers(&other_host).into_iter().zip(["FIRST", "MAX"]) {
        let constant = format!("REFUSING_PAUSE_{name}: Duration = Duration::from_secs({seconds});");
        assert!(module_source("daemon").contains(&constant), "there is no `{constant}`");
    }
    let constant = "const LOG_INTERVAL: Duration = Duration::from_secs(60);";
    let refusing = page.item_text("WHEN A DISK CANNOT BE SERVED", "A client waits");
    assert!(refusing.contains("no more than one in a minute"));
    assert!(module_source("daemon").contains(constant), "there is no `{constant}`");
}

#[test]
fn documented_times_of_attached_devices_match() {
    let page = page();
    let script = read("systemd/attach");
    let stop = numbers(&text(&page, "BLOCK DEVICES/Stop"));
    let wait = format!("WAIT_SECS=${{FLEXNBD_ATTACH_WAIT_SECS:-{}}}\n", stop[0]);
    assert!(script.contains(&wait), "no {wait}");
    let failures = "BLOCK DEVICES/When the disk cannot be attached";
    let start = numbers(&text(&page, failures));
    let timeout = values("systemd/flexnbd-attach@.service", "TimeoutStartSec");
    assert_eq!(timeout, [format!("{}s", start[0])]);
    for line in page.at(failures).filter_map(|line| line.strip_prefix(".Dq ")) {
        let message = line.trim_end_matches(" .").replace("flexnbd@disk.socket", "$1");
        assert!(script.contains(&message), "{message}");
    }
}

#[test]
fn documented_instance_names_are_accepted() {
    let page = page();
    let characters: BTreeSet<char> = page
        .at("INSTANCES")
        .filter_map(|line| line.strip_prefix(".Sq "))
        .map(|rest| rest.trim_start_matches(r"\&").chars().next().unwrap())
        .collect();
    // Backslashes are valid, for systemd's escapes, but not documented.
    let others = (0x20_u8..0x7f).map(char::from).filter(|c| !c.is_alphanumeric() && *c != '\\');
    for c in others {
        let is_documented = characters.contains(&c);
        assert_eq!(unit::is_instance_name(&format!("a{c}b")), is_documented, "{c}");
        if is_documented {
            assert!(format!("a{c}b").parse::<Instance>().is_ok(), "{c}");
        }
    }
    assert!(".a".parse::<Instance>().is_err());
    let documented = text(&page, "INSTANCES");
    assert!(documented.contains(&format!("at most {INSTANCE_BYTES_MAX} bytes")), "{documented}");
}

#[test]
fn exactly_the_known_message_ids_are_listed() {
    let page = page();
    let listed: Vec<String> =
        page.items("JOURNAL/Messages").into_iter().map(str::to_owned).collect();
    let known = message_id::ALL.iter().map(|(name, id)| format!("Dv {name} Li {id}"));
    assert_eq!(listed, known.collect::<Vec<_>>());
    let queried: Vec<String> = page
        .literal()
        .iter()
        .filter_map(|line| line.split_once("MESSAGE_ID="))
        .map(|(_, rest)| rest.split(' ').next().unwrap().to_owned())
        .collect();
    assert!(!queried.is_empty());
    for id in queried {
        assert!(message_id::ALL.iter().any(|(_, known)| *known == id), "unknown id {id}");
    }
}

/// The source of the program without its unit tests.
fn source() -> String {
    fn visit(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => visit(&path, found),
                false if path.file_stem().unwrap().to_string_lossy().ends_with("tests") => {}
                false => found.push(path),
            }
        }
    }
    let mut files = Vec::new();
    visit(&project_path("src"), &mut files);
    let texts = files.iter().map(|file| std::fs::read_to_string(file).unwrap());
    texts.map(|text| text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()).collect()
}

#[test]
fn exactly_the_journal_fields_set_are_listed() {
    let source = source();
    let named = source.split("\"flexnbd.").skip(1).filter_map(|rest| rest.split_once('"'));
    let set = named.filter(|(_, rest)| rest.trim_start().starts_with('='));
    let mut fields: BTreeSet<String> =
        set.map(|(name, _)| format!("FLEXNBD_{}", name.to_uppercase())).collect();
    assert!(fields.len() >= 4, "only {fields:?} found");
    for unit in [SERVE, LISTEN] {
        let extra = values(unit, "LogExtraFields");
        fields.extend(extra.iter().map(|field| field.split('=').next().unwrap().to_owned()));
    }
    fields.extend(["ERRNO", "MESSAGE_ID"].map(str::to_owned));
    let page = page();
    let listed = page.items("JOURNAL/Fields").into_iter().map(|item| item.replace("Va ", ""));
    assert_eq!(listed.collect::<BTreeSet<_>>(), fields);
    let queried = page.literal().join(" ");
    let queried = queried.split(|c: char| !c.is_ascii_uppercase() && c != '_');
    let queried: Vec<&str> = queried.filter(|word| word.starts_with("FLEXNBD_")).collect();
    assert!(queried.len() >= 3, "only {queried:?} found");
    assert!(queried.iter().all(|field| fields.contains(*field)), "{queried:?}");
}

#[test]
fn documented_exit_statuses_match_the_units() {
    let page = page();
    assert_eq!(page.items("EXIT STATUS"), ["0", "1", "2 , 78"]);
    assert_eq!(values(SERVE, "RestartPreventExitStatus"), ["2 78"]);
    assert_eq!(values(LISTEN, "RestartPreventExitStatus"), ["1 2 78"]);
    for unit in [SERVE, LISTEN] {
        assert_eq!(values(unit, "Restart"), ["on-failure"], "{unit}");
    }
}

#[test]
fn exactly_the_variables_read_are_listed() {
    /// Variables that dependencies read.
    const DEPENDENCIES: [&str; 6] = [
        "LISTEN_FDS",
        "LISTEN_PID",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "JOURNAL_STREAM",
        "CREDENTIALS_DIRECTORY",
    ];
    /// Variables of the generator, of another page, or of the unit tests.
    const UNLISTED: [&str; 7] = [
        "SYSTEMD_SCOPE",
        "FLEXNBD_CONFIGURATIONS",
        "FLEXNBD_MS_REQUEST_LIMIT_SECS",
        "XDG_STATE_HOME",
        "HOME",
        "FLEXNBD_ACCEPT",
        "FLEXNBD_UPSTREAM_TIMEOUT",
    ];
    let page = page();
    let items = page.items("ENVIRONMENT").join(" , ");
    let listed: BTreeSet<&str> =
        items.split([' ', ',']).filter(|word| !word.is_empty() && *word != "Ev").collect();
    let source = source();
    let constants = source.split("_VARIABLE: &str = \"").skip(1);
    let direct = source.split("env::var(\"").skip(1);
    let read: BTreeSet<&str> =
        constants.chain(direct).map(|rest| rest.split('"').next().unwrap()).collect();
    let expected: BTreeSet<&str> =
        read.into_iter().filter(|name| !UNLISTED.contains(name)).chain(DEPENDENCIES).collect();
    assert_eq!(listed, expected);
    for named in [UNLISTED[2], UNLISTED[6]] {
        assert!(page.at("ENVIRONMENT").any(|line| line.contains(named)), "{named}");
    }
}

#[test]
fn exactly_the_packaged_files_are_listed() {
    /// Directories whose files the page does not list.
    const UNLISTED_DIRECTORIES: [&str; 4] =
        ["usr/bin/", "usr/share/man/", "usr/share/doc/", "usr/share/lintian/"];
    let package = read("Cargo.toml");
    let assets = package.lines().filter_map(|line| line.trim().strip_prefix("[\""));
    let installed: BTreeSet<String> = assets
        .filter_map(|line| {
            let mut parts = line.split("\", \"");
            let (from, to) = (parts.next()?, parts.next()?);
            let name = from.rsplit('/').next()?;
            let path = if to.ends_with('/') { format!("{to}{name}") } else { to.to_owned() };
            (!UNLISTED_DIRECTORIES.iter().any(|unlisted| to.starts_with(unlisted)))
                .then(|| format!("/{path}"))
        })
        .collect();
    let page = page();
    let items = page.items("FILES").into_iter().map(|item| item.replace("Pa ", ""));
    let (packaged, others): (BTreeSet<String>, BTreeSet<String>) =
        items.partition(|path| path.starts_with("/usr/"));
    assert_eq!(packaged, installed);
    let socket = "NAME".parse::<Instance>().unwrap().socket().display().to_string();
    let expected = ["/etc/flexnbd/NAME.conf", "/var/lib/flexnbd", &socket];
    assert_eq!(others, BTreeSet::from(expected.map(str::to_owned)));
    let control = values("systemd/flexnbd-control@.socket", "ListenStream");
    assert_eq!(control, [socket.replace("NAME", "%i")]);
    let directory = format!("d {} ", Path::new(&socket).parent().unwrap().display());
    assert!(read("systemd/flexnbd.tmpfiles").contains(&directory), "tmpfiles lacks {directory}");
}

#[test]
fn documented_permission_errors_match_the_messages() {
    let path = PathBuf::from("/srv/disks/disk.img");
    let refusals = [
        OpenError::NotReadable { path: path.clone(), uid: 7 }.to_string(),
        OpenError::NotWritable { path: path.clone(), uid: 7 }.to_string(),
        OpenError::ReadOnlyFileSystem { path }.to_string(),
    ];
    let page = page();
    let quoted = page.at("IMAGES AND THE SANDBOX").filter_map(|line| line.strip_prefix(".Dq "));
    let quoted: Vec<&str> = quoted.map(|line| line.trim_end_matches(" .")).collect();
    assert_eq!(quoted.len(), refusals.len(), "{quoted:?}");
    for (quoted, refusal) in quoted.iter().zip(&refusals) {
        let refusal = refusal.replace("user id 7", "user id N");
        assert!(refusal.contains(quoted), "`{quoted}` is not in `{refusal}`");
    }
}

#[test]
fn documented_status_texts_match_the_program() {
    let source = source();
    let page = page();
    let quoted = page.at("STATUS AND WATCHDOG/Status").filter_map(|line| line.strip_prefix(".Dq "));
    let quoted: Vec<&str> = quoted.map(|line| line.trim_end_matches([' ', ',', '.'])).collect();
    assert_eq!(quoted.len(), 8, "{quoted:?}");
    // systemd writes the first and the last.
    for words in &quoted[1..7] {
        assert!(source.contains(&format!("\"{words}")), "no text begins with `{words}`");
    }
    let shown = page.blocks("STATUS AND WATCHDOG").remove(0);
    for words in [" on ", " clients", " % copied, ", "/s", ", about ", " left"] {
        assert!(shown.contains(words) && source.contains(words), "`{words}`");
    }
}

#[test]
fn the_quick_start_lines_are_in_the_example() {
    let page = page();
    let quick = &page.blocks("QUICK START")[0];
    assert_eq!((quick.lines().count(), generate(quick).errors.as_str()), (4, ""));
    let lines = |text: &str| -> Vec<String> {
        let lines = text.lines().map(|line| line.trim_start_matches(['#', ' ']).to_owned());
        lines.map(|line| line.replace("NAME", INSTANCE)).collect()
    };
    let example = lines(&read("systemd/examples/disk.conf"));
    assert!(example.windows(4).any(|window| window == lines(quick)), "{quick}");
    assert!(page.blocks("MOVING A DISK")[0] == *quick);
}

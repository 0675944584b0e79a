//! man/flexnbd.service.7, the program and the files in systemd/: units and their settings, what the
//! generator writes, limits, fields and messages of the journal, files of the package.

use super::every::units;
use super::generator::{INSTANCE, generate};
use super::page::numbers;
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
/// What an operator may write into a drop-in, and nothing of ours does.
const FOR_OPERATORS: [&str; 1] = ["FileDescriptorStorePreserve=yes"];

fn page() -> Page {
    Page::parse(&read(PAGE))
}

/// All of the text at a place, on one line and without macros.
fn text(page: &Page, place: &str) -> String {
    let words = page.at(place).map(|line| match line.strip_prefix('.') {
        Some(macros) => macros.split_once(' ').map_or("", |(_, rest)| rest),
        None => line,
    });
    words.collect::<Vec<_>>().join(" ")
}

/// The templates, by the names of their files.
fn templates() -> BTreeSet<String> {
    let entries = std::fs::read_dir(project_path("systemd")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.ends_with(".service") || name.ends_with(".socket")).collect()
}

/// The lines of all templates that set something.
fn settings() -> Vec<String> {
    let lines = |name: &String| -> Vec<String> {
        read(&format!("systemd/{name}")).lines().map(str::to_owned).collect()
    };
    let all = templates().iter().flat_map(lines).collect::<Vec<_>>();
    all.into_iter().filter(|line| line.contains('=') && !line.starts_with('#')).collect()
}

/// The values of a setting in a file.
fn values(file: &str, setting: &str) -> Vec<String> {
    let text = read(file);
    let lines = text.lines().filter_map(|line| line.strip_prefix(setting));
    lines.filter_map(|rest| rest.strip_prefix('=')).map(str::to_owned).collect()
}

#[test]
fn every_unit_is_described_and_no_other_is() {
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

/// Whether a word is a setting of a unit, `Name=` or `Name=value`.
fn is_setting(word: &str) -> bool {
    let name = word.split('=').next().unwrap();
    name.len() < word.len()
        && name.starts_with(|c: char| c.is_ascii_uppercase())
        && name.chars().all(|c| c.is_ascii_alphanumeric())
        && name.contains(|c: char| c.is_ascii_lowercase())
}

/// The settings that some text names.
fn settings_in(text: &str) -> BTreeSet<&str> {
    text.split(' ').filter(|word| is_setting(word)).collect()
}

/// Configurations that are turned into everything that the generator can write, and by which items
/// of the page.
const CONFIGURATIONS: [(&str, &str); 11] = [
    ("Va ADDR , PORT", "FILE=/var/lib/flexnbd/a\nADDR=::\nPORT=7"),
    ("Va FILE , No when it is a file", "FILE=/srv/a"),
    ("Va FILE , No when it is a file", "FILE=/home/a/b"),
    ("Va FILE , No when it is a file", "FILE=/root/a"),
    ("Va FILE , No when it is a file", "FILE=/run/user/7/a"),
    ("Va FILE , No when it is a file", "FILE=/tmp/a"),
    ("Va FILE , No when it is a file", "FILE=/var/tmp/a"),
    ("Va FILE , No when it is a block device", "FILE=/dev/a"),
    ("Va MAX_CLIENTS , No when it is more than 1024", "FILE=/var/lib/flexnbd/a\nMAX_CLIENTS=2000"),
    ("Va AUTOSTART", "FILE=/dev/a\nAUTOSTART=yes"),
    ("Va IP_FILTER", "FILE=/var/lib/flexnbd/a\nIP_FILTER=yes\nACL=::1"),
];

#[test]
fn what_the_generator_writes_is_what_it_is_said_to() {
    let page = page();
    let place = "WHAT THE GENERATOR WRITES";
    let items = page.items(place);
    assert_eq!(items, {
        // in the order of the page
        let mut known: Vec<&str> = CONFIGURATIONS.iter().map(|(item, _)| *item).collect();
        known.dedup();
        known
    });
    let mut told_before: BTreeSet<String> = BTreeSet::from(["RequiresMountsFor".to_owned()]);
    for item in items {
        let said = page.item_text(place, item);
        let said = settings_in(&said);
        let mut written: BTreeSet<String> = BTreeSet::new();
        for (_, text) in CONFIGURATIONS.iter().filter(|(of, _)| *of == item) {
            let made = generate(text);
            assert_eq!(made.told, "", "{text}");
            written.extend(made.settings().into_iter().map(str::to_owned));
        }
        for setting in &said {
            let is_there = |line: &String| line.starts_with(setting);
            assert!(written.iter().any(is_there), "{item}: nothing begins with {setting}");
        }
        let name = |line: &str| line.split('=').next().unwrap().to_owned();
        let said: BTreeSet<String> = said.into_iter().map(name).collect();
        let unsaid: Vec<String> = written.iter().map(|line| name(line)).collect();
        let unsaid: Vec<_> = unsaid
            .iter()
            .filter(|name| !said.contains(*name) && !told_before.contains(*name))
            .collect();
        assert!(unsaid.is_empty(), "{item}: {unsaid:?} are written, too");
        told_before.extend(said);
    }
}

#[test]
fn the_generator_makes_room_for_as_many_clients_as_it_is_said_to() {
    let page = page();
    let item = "Va MAX_CLIENTS , No when it is more than 1024";
    let provided = numbers(item)[0];
    let made = |clients| generate(&format!("FILE=/var/lib/flexnbd/a\nMAX_CLIENTS={clients}"));
    assert!(!made(provided).settings().iter().any(|line| line.starts_with("TasksMax=")));
    let more = numbers(&page.item_text("WHAT THE GENERATOR WRITES", item))[0];
    let expected = format!("TasksMax={}", provided + 1 + more);
    assert!(made(provided + 1).settings().contains(&expected.as_str()), "no {expected}");
    assert_eq!(values(SERVE, "FileDescriptorStoreMax"), [(provided + 1).to_string()]);
    let carried = page.at("RESTART AND UPGRADE/Who is disconnected all the same");
    let carried: Vec<u64> = carried.flat_map(numbers).collect();
    assert_eq!(carried[..2], [provided, fd_store::DESCRIPTORS_MAX as u64]);
}

#[test]
fn drop_ins_have_the_names_that_are_told() {
    let page = page();
    let names: Vec<&str> = page
        .at("WHAT THE GENERATOR WRITES")
        .filter_map(|line| line.strip_prefix(".Pa 00"))
        .collect();
    let name = format!("00{}", names[0].replace("NAME", INSTANCE));
    let made = generate("FILE=/srv/a\nADDR=::\nPORT=7\n").made;
    assert!(made.keys().all(|path| path.ends_with(&name)), "{made:?} without {name}");
}

#[test]
fn settings_that_are_quoted_are_those_of_the_units() {
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
    // A command line in a drop-in of an operator is that of the unit, but for what it is there for.
    let replaced = page.literal();
    let replaced = replaced.iter().find(|line| line.contains("=/usr/bin/flexnbd")).unwrap();
    let plain = replaced.replace("--overwrite ", "");
    assert_ne!(*replaced, plain);
    assert!(read(LISTEN).lines().any(|line| line == plain), "{LISTEN} has no {plain}");
}

#[test]
fn the_commands_of_the_units_are_those_that_are_told() {
    let page = page();
    let told = page.item_text("UNITS", "Pa flexnbd@.service");
    let words = ["serve", "--config", "/etc/flexnbd/NAME.conf"];
    let exec = values(SERVE, "ExecStart");
    assert_eq!(exec, [format!("/usr/bin/flexnbd {}", words.join(" ").replace("NAME", "%i"))]);
    for word in words {
        assert!(told.contains(word.trim_start_matches("--")), "{told} has no {word}");
    }
}

#[test]
fn times_are_those_of_the_units_and_the_program() {
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
    let alive = numbers(&text(&page, "STATUS AND WATCHDOG/Watchdog"));
    assert_eq!(alive, [in_units("WatchdogSec"); 2]);
    let grace = page.at("RESTART AND UPGRADE/Who is disconnected all the same");
    let grace: Vec<u64> =
        grace.filter(|line| line.contains(" seconds")).flat_map(numbers).collect();
    let constant = format!("const DISK_GRACE: Duration = Duration::from_secs({});", grace[0]);
    assert!(module_source("daemon").contains(&constant), "there is no `{constant}`");
    let asks = page.item_text(
        "WHEN A DISK CANNOT BE SERVED",
        "Only another host knows whether the disk has moved",
    );
    for (seconds, name) in numbers(&asks).into_iter().zip(["FIRST", "MAX"]) {
        let constant = format!("REFUSING_PAUSE_{name}: Duration = Duration::from_secs({seconds});");
        assert!(module_source("daemon").contains(&constant), "there is no `{constant}`");
    }
    let constant = "const LOG_INTERVAL: Duration = Duration::from_secs(60);";
    let refusing = page.item_text("WHEN A DISK CANNOT BE SERVED", "A client waits");
    assert!(refusing.contains("no more than one in a minute"));
    assert!(module_source("daemon").contains(constant), "there is no `{constant}`");
}

#[test]
fn names_of_instances_are_as_the_page_says() {
    let page = page();
    let characters: BTreeSet<char> = page
        .at("INSTANCES")
        .filter_map(|line| line.strip_prefix(".Sq "))
        .map(|rest| rest.trim_start_matches(r"\&").chars().next().unwrap())
        .collect();
    // A backslash is for those who know how systemd escapes; nobody is told to use one.
    let others = (0x20_u8..0x7f).map(char::from).filter(|c| !c.is_alphanumeric() && *c != '\\');
    for c in others {
        let is_told = characters.contains(&c);
        assert_eq!(unit::is_instance_name(&format!("a{c}b")), is_told, "{c}");
        if is_told {
            assert!(format!("a{c}b").parse::<Instance>().is_ok(), "{c}");
        }
    }
    assert!(".a".parse::<Instance>().is_err());
    let said = text(&page, "INSTANCES");
    assert!(said.contains(&format!("at most {INSTANCE_BYTES_MAX} bytes")), "{said}");
}

#[test]
fn every_kind_of_message_is_listed_with_its_number_and_no_other_is() {
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
        assert!(message_id::ALL.iter().any(|(_, known)| *known == id), "nothing has {id}");
    }
}

/// The program's source but for its tests.
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
fn every_field_of_the_journal_is_listed_and_no_other_is() {
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
fn exit_statuses_are_treated_as_is_told() {
    let page = page();
    assert_eq!(page.items("EXIT STATUS"), ["0", "1", "2 , 78"]);
    assert_eq!(values(SERVE, "RestartPreventExitStatus"), ["2 78"]);
    assert_eq!(values(LISTEN, "RestartPreventExitStatus"), ["1 2 78"]);
    for unit in [SERVE, LISTEN] {
        assert_eq!(values(unit, "Restart"), ["on-failure"], "{unit}");
    }
}

#[test]
fn the_environment_is_what_the_program_looks_at() {
    /// Read by crates that we use for it.
    const ELSEWHERE: [&str; 5] =
        ["LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM"];
    /// Of the generator, described in another page, or of the tests in `src`.
    const OTHERS: [&str; 6] = [
        "SYSTEMD_SCOPE",
        "FLEXNBD_CONFIGURATIONS",
        "FLEXNBD_MS_REQUEST_LIMIT_SECS",
        "XDG_STATE_HOME",
        "HOME",
        "FLEXNBD_ACCEPT",
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
        read.into_iter().filter(|name| !OTHERS.contains(name)).chain(ELSEWHERE).collect();
    assert_eq!(listed, expected);
    assert!(page.at("ENVIRONMENT").any(|line| line.contains(OTHERS[2])));
}

#[test]
fn every_file_of_the_package_is_listed_and_no_other_is() {
    /// What everybody expects there, and no operator ever looks for.
    const USUAL: [&str; 4] = ["usr/bin/", "usr/share/man/", "usr/share/doc/", "usr/share/lintian/"];
    let package = read("Cargo.toml");
    let assets = package.lines().filter_map(|line| line.trim().strip_prefix("[\""));
    let installed: BTreeSet<String> = assets
        .filter_map(|line| {
            let mut parts = line.split("\", \"");
            let (from, to) = (parts.next()?, parts.next()?);
            let name = from.rsplit('/').next()?;
            let path = if to.ends_with('/') { format!("{to}{name}") } else { to.to_owned() };
            (!USUAL.iter().any(|usual| to.starts_with(usual))).then(|| format!("/{path}"))
        })
        .collect();
    let page = page();
    let items = page.items("FILES").into_iter().map(|item| item.replace("Pa ", ""));
    let (ours, theirs): (BTreeSet<String>, BTreeSet<String>) =
        items.partition(|path| path.starts_with("/usr/"));
    assert_eq!(ours, installed);
    let socket = "NAME".parse::<Instance>().unwrap().socket().display().to_string();
    let expected = ["/etc/flexnbd/NAME.conf", "/var/lib/flexnbd", &socket];
    assert_eq!(theirs, BTreeSet::from(expected.map(str::to_owned)));
    let control = values("systemd/flexnbd-control@.socket", "ListenStream");
    assert_eq!(control, [socket.replace("NAME", "%i")]);
    let directory = format!("d {} ", Path::new(&socket).parent().unwrap().display());
    assert!(read("systemd/flexnbd.tmpfiles").contains(&directory), "nobody makes {directory}");
}

#[test]
fn an_image_that_is_not_the_services_own_is_told_in_the_words_of_the_program() {
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
fn the_words_of_the_status_are_those_of_the_program() {
    let source = source();
    let page = page();
    let quoted = page.at("STATUS AND WATCHDOG/Status").filter_map(|line| line.strip_prefix(".Dq "));
    let quoted: Vec<&str> = quoted.map(|line| line.trim_end_matches([' ', ',', '.'])).collect();
    assert_eq!(quoted.len(), 6, "{quoted:?}");
    // The first and the last are systemd's.
    for words in &quoted[1..5] {
        assert!(source.contains(&format!("\"{words}")), "nothing begins with `{words}`");
    }
    let shown = page.blocks("STATUS AND WATCHDOG").remove(0);
    for words in [" on ", " clients", " % copied, ", "/s", ", about ", " left"] {
        assert!(shown.contains(words) && source.contains(words), "`{words}`");
    }
}

#[test]
fn four_lines_are_enough_and_the_example_with_every_key_says_the_same_ones() {
    let page = page();
    let quick = &page.blocks("QUICK START")[0];
    assert_eq!((quick.lines().count(), generate(quick).told.as_str()), (4, ""));
    let lines = |text: &str| -> Vec<String> {
        let lines = text.lines().map(|line| line.trim_start_matches(['#', ' ']).to_owned());
        lines.map(|line| line.replace("NAME", INSTANCE)).collect()
    };
    let example = lines(&read("systemd/examples/disk.conf"));
    assert!(example.windows(4).any(|window| window == lines(quick)), "{quick}");
    assert!(page.blocks("MOVING A DISK")[0] == *quick);
}

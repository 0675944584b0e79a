//! man/flexnbd-migration.7: limits, records, verdicts, stages, messages, commands and wire formats.

use super::command_line::numbers;
use super::roff::Page;
use super::{assert_valid, module_source, read};
use flexnbd::cli::MODES;
use flexnbd::disk::ownership::disk_id::StoredDiskId;
use flexnbd::disk::ownership::{
    self, BadRecord, ForListen, ForServe, Id, Provenance, RECORD_MAX, REMOTE_ADDRESS_MAX, Record,
    RemoteAddress, for_adopt, for_listen, for_serve,
};
use flexnbd::disk::record_store::RecordStoreError;
use flexnbd::disk::record_store::disk_id::DISK_ID_ATTRIBUTE;
use flexnbd::disk::{DeletionError, dirty, record_store, state_directory};
use flexnbd::ids::DiskId;
use flexnbd::migration::arrival::{SOURCE_SILENCE, WRITER_SILENCE};
use flexnbd::migration::freeze::{
    BACKOFF_FIRST, BACKOFF_MAX, DRAIN_MAX, DRAIN_MIN, FREEZE_MAX, OPEN_SHARE, STALL_MAX,
};
use flexnbd::migration::job::{Job, Obstacle, SIZE_MIN, Trouble};
use flexnbd::migration::machine::{ASK_AFTER, RELAY_RETRY_EVERY, RELAY_WAIT_MAX, RETRY_EVERY};
use flexnbd::migration::pace::{CHUNK_MIN, Convergence, SHORT_PAUSE_ATTEMPT, SHORT_PAUSE_DIVISOR};
use flexnbd::migration::plan::Limits;
use flexnbd::migration::wire::{
    Answer, COMMAND, DISK_ID_VERSION, DiskIdMessage, Handover, Has, OPTION, Question, Token,
    VERSION,
};
use flexnbd::nbd::wire::{ErrorCode, PRIVATE_PAYLOAD_MAX};
use flexnbd::server::write_throttle;
use std::time::Duration;

const PAGE: &str = "man/flexnbd-migration.7";
/// The modes for migrations, which must all have an example.
const MIGRATION_MODES: [&str; 5] = ["listen", "mirror", "mirror-speed", "break", "adopt"];
const ID: Id = Id([0x11; 16]);
const TOKEN: Token = Token([0x22; 16]);

fn page() -> Page {
    Page::parse(&read(PAGE))
}

fn remote_address() -> RemoteAddress {
    RemoteAddress::new("PLACE").unwrap()
}

/// A job with the default limits.
fn job() -> Job {
    Job::new(ID, 1 << 30, remote_address(), Provenance::Native)
}

/// The text of a section, on one line.
fn text(page: &Page, place: &str) -> String {
    page.at(place).collect::<Vec<_>>().join(" ")
}

#[test]
fn documented_limits_match_the_program() {
    let page = page();
    let documented = |item: &str| numbers(&page.item_text("LIMITS", item));
    let (job, limits) = (job(), Limits::default());
    let pause = u64::try_from(job.pause.as_millis()).unwrap();
    let (window, most) = (limits.window >> 20, limits.data_max >> 20);
    let delay_max = u64::try_from(write_throttle::DELAY_MAX.as_millis()).unwrap();
    assert_eq!(documented("Smallest disk"), [SIZE_MIN]);
    let aim = [pause / u64::from(SHORT_PAUSE_DIVISOR), pause, SHORT_PAUSE_ATTEMPT.as_secs()];
    assert_eq!(documented("Target of the pause"), aim);
    assert_eq!(documented("Progress timeout"), [job.timeout.as_secs()]);
    assert_eq!(documented("Retry interval"), [RETRY_EVERY.as_secs()]);
    let requests = [window, limits.requests as u64, most, limits.zeroes as u64];
    assert_eq!(documented("Requests in flight"), requests);
    let drain = [DRAIN_MIN.as_millis() as u64, DRAIN_MAX.as_secs()];
    assert_eq!(documented("Closing the gate"), drain);
    assert_eq!(
        documented("Clients wait"),
        [FREEZE_MAX, STALL_MAX].map(|time| time.as_millis() as u64)
    );
    assert_eq!(documented("Acknowledgement"), [ASK_AFTER.as_secs()]);
    let relay = [RELAY_WAIT_MAX.as_secs(), RELAY_RETRY_EVERY.as_millis() as u64];
    assert_eq!(documented("Relay"), relay);
    assert_eq!(documented("Write delay"), [delay_max]);
    let marks = [dirty::BLOCK >> 10, dirty::BITMAP_MAX >> 20, dirty::FINE_MAX >> 40];
    assert_eq!(documented("Dirty bitmap"), marks);
    let silence = [SOURCE_SILENCE, WRITER_SILENCE].map(|silence| silence.as_secs());
    assert_eq!(documented("Silence"), silence);
    assert_eq!(documented("Record"), [RECORD_MAX as u64]);
    assert_eq!(documented("Private payload"), [PRIVATE_PAYLOAD_MAX, Handover::LENGTH as u64]);
    assert_eq!(numbers(&text(&page, "SPEED/Limits")), [0, CHUNK_MIN]);
}

/// The delays by which convergence slows writers down while no pass shrinks, and the number of
/// passes allowed without progress at the longest delay.
fn convergence_delays() -> (Vec<Duration>, u64) {
    let mut convergence = Convergence::new(job().pause);
    let (mut steps, mut passes_at_longest) = (Vec::new(), 0);
    for second in 0..100 {
        convergence.pass_ended(Duration::from_secs(second), 1 << 30, None);
        let delay = convergence.delay();
        if steps.last() != Some(&delay) {
            steps.push(delay);
            passes_at_longest = 0;
        } else {
            passes_at_longest += 1;
        }
        if convergence.may_close_gate(Duration::from_secs(second), 1 << 30, None, None) {
            return (steps, passes_at_longest);
        }
    }
    panic!("convergence never gives up: {steps:?}");
}

#[test]
fn documented_writer_delays_match_the_program() {
    let (steps, passes_at_longest) = convergence_delays();
    let steps: Vec<u64> =
        steps.iter().skip(1).map(|step| u64::try_from(step.as_micros()).unwrap()).collect();
    assert!(steps.windows(2).all(|pair| pair[1] == 2 * pair[0]), "not doubled: {steps:?}");
    let delay_max = u64::try_from(write_throttle::DELAY_MAX.as_millis()).unwrap();
    let expected = [steps[0], steps[steps.len() - 1], delay_max, passes_at_longest];
    assert_eq!(numbers(&text(&page(), "SPEED/Convergence")), expected);
}

#[test]
fn numbers_in_the_text_match_the_program() {
    let page = page();
    let (pause, timeout) = (job().pause.as_millis(), job().timeout.as_secs());
    let pause = u64::try_from(pause).unwrap();
    let catching_up = text(&page, "WHAT HAPPENS/Catching up");
    let aim = [pause / u64::from(SHORT_PAUSE_DIVISOR), SHORT_PAUSE_ATTEMPT.as_secs(), pause];
    assert_eq!(numbers(&catching_up), aim);
    let limit = page.item_text("ENVIRONMENT", "Ev FLEXNBD_MS_REQUEST_LIMIT_SECS");
    assert_eq!(numbers(&limit), [timeout, 1]);
    let lost = "The connection is lost while copying, or the destination hangs";
    let lost = text(&page, &format!("WHEN SOMETHING GOES WRONG/{lost}"));
    assert_eq!(numbers(&lost), [timeout]);
    let doubt = [ASK_AFTER.as_secs(), FREEZE_MAX.as_secs()];
    assert_eq!(numbers(&text(&page, "IN DOUBT"))[..2], doubt);
    let last_copy = [
        STALL_MAX.as_millis() as u64,
        FREEZE_MAX.as_millis() as u64,
        BACKOFF_FIRST.as_secs(),
        BACKOFF_MAX.as_secs(),
        u64::from(OPEN_SHARE),
    ];
    assert_eq!(numbers(&text(&page, "WHAT HAPPENS/The last copy")), last_copy);
    let handover = text(&page, "WHAT HAPPENS/The handover");
    assert_eq!(numbers(&handover), [ASK_AFTER.as_secs()]);
    let records = text(&page, "RECORDS");
    assert!(records.contains(&format!("at most {RECORD_MAX} bytes")), "{records}");
    assert!(records.contains(&format!("at most {REMOTE_ADDRESS_MAX}")), "{records}");
}

/// Every kind of record, by its name in the page.
fn records() -> [(&'static str, Option<Record>); 7] {
    [
        ("none", None),
        ("incoming", Some(Record::Incoming { id: Some(ID) })),
        ("ours (ID)", Some(Record::Ours(Provenance::Arrived(ID)))),
        ("ours (received)", Some(Record::Ours(Provenance::Received))),
        ("ours (adopted)", Some(Record::Ours(Provenance::Adopted))),
        (
            "departing",
            Some(Record::Departing {
                id: ID,
                before: Provenance::Native,
                to: remote_address(),
                from: None,
            }),
        ),
        ("departed", Some(Record::Departed { id: ID, when: 1, to: remote_address() })),
    ]
}

/// The row of a record in the table of verdicts, as the program decides.
fn verdicts(name: &str, record: Option<&Record>) -> String {
    let serve = match for_serve(record) {
        ForServe::Serve(_) => "serves",
        ForServe::Ask { .. } => "asks",
        ForServe::Refuse(_) => "refuses",
    };
    let listen = |overwrite| match for_listen(record, overwrite) {
        ForListen::Accept { .. } => "accepts",
        ForListen::AlreadyArrived(_) => "exits 0",
        ForListen::Refuse(_) => "refuses",
    };
    assert!(for_adopt(record, true).is_ok(), "{name}: adopt --force fails");
    let adopt = if for_adopt(record, false).is_ok() { "yes" } else { "with --force" };
    [name, serve, listen(false), listen(true), adopt].join(" Ta ")
}

#[test]
fn the_table_of_records_matches_the_verdicts() {
    let page = page();
    let rows: Vec<&str> =
        page.items("RECORDS").into_iter().filter(|item| item.contains(" Ta ")).skip(1).collect();
    let expected = records().map(|(name, record)| verdicts(name, record.as_ref()));
    assert_eq!(rows, expected);
}

#[test]
fn example_records_are_valid_and_cover_every_kind() {
    let digits = ID.to_string();
    let mut shown: Vec<&str> = page()
        .literal()
        .iter()
        .filter(|line| ["flexnbd 1 ", "flexnbd 2 "].iter().any(|start| line.starts_with(start)))
        .map(|line| Record::decode(format!("{}\n", line.replace("ID", &digits)).as_bytes()))
        .map(|record| record.unwrap().name())
        .collect();
    shown.dedup();
    let mut kinds: Vec<&str> =
        records().iter().flat_map(|(_, record)| record).map(Record::name).collect();
    kinds.dedup();
    assert_eq!(shown, kinds);
}

#[test]
fn example_of_a_stored_id_is_valid() {
    let page = page();
    let examples = page.literal();
    let lines: Vec<_> = examples.iter().filter(|line| line.starts_with("disk ")).collect();
    let [line] = lines[..] else { panic!("{lines:?}") };
    let id = DiskId([0x11; 16]);
    let stored =
        StoredDiskId::decode(format!("{}\n", line.replace("ID", &id.to_string())).as_bytes());
    assert_eq!(stored, Some(StoredDiskId { id, of: Some(Provenance::Native) }));
    let command = format!("setfattr -x {DISK_ID_ATTRIBUTE} copy.img");
    assert!(examples.iter().any(|line| line.ends_with(&command)), "no `{command}`");
}

#[test]
fn record_paths_match_the_program() {
    let page = page();
    let attribute = format!("Va {}", record_store::ATTRIBUTE);
    let directory = format!("Pa {}", state_directory::SHARED);
    let own = "Pa ~/.local/state/flexnbd".to_owned();
    let disk_id = format!("Va {DISK_ID_ATTRIBUTE}");
    assert_eq!(page.items("FILES"), [attribute, disk_id, directory, own]);
    let command = format!("getfattr --only-values -n {} disk.img", record_store::ATTRIBUTE);
    assert!(
        page.literal().iter().any(|line| line.ends_with(&command)),
        "no example has `{command}`"
    );
}

#[test]
fn documented_environment_variables_are_read() {
    let sources = module_source("daemon") + &module_source("disk");
    for item in page().items("ENVIRONMENT") {
        for variable in item.strip_prefix("Ev ").unwrap().split(" , ") {
            assert!(sources.contains(&format!("\"{variable}\"")), "no module reads {variable}");
        }
    }
}

#[test]
fn documented_stages_match_status() {
    let sources = module_source("daemon") + &module_source("control");
    let arms = sources.lines().filter_map(|line| line.trim().strip_prefix("Stage::"));
    let named = arms.filter_map(|arm| arm.split_once("=> \""));
    let names: Vec<&str> = named.map(|(_, name)| name.trim_end_matches("\",")).collect();
    let page = page();
    let items = page.items("STAGES");
    assert_eq!(items, names.iter().map(|name| format!("Li {name}")).collect::<Vec<_>>());
    for key in ["migration_stage", "migration_passes"] {
        assert!(sources.contains(&format!("\"{key}\"")), "status has no {key}");
    }
}

#[test]
fn documented_obstacles_match_status() {
    let trouble = |trouble| Obstacle::Trouble(trouble);
    let obstacles = [
        trouble(Trouble::Connect(String::new())),
        trouble(Trouble::ReadOnly),
        trouble(Trouble::ErrorReply(5)),
        trouble(Trouble::Local(String::new())),
        Obstacle::Writers,
        Obstacle::Requests(String::new()),
        Obstacle::Flush,
        Obstacle::LastCopy(""),
        Obstacle::Acknowledgement(Trouble::NoProgress(ASK_AFTER)),
        Obstacle::Relay(Trouble::Connect(String::new())),
    ];
    let words = obstacles.map(|obstacle| format!("Li {}", obstacle.word()));
    assert_eq!(page().items("STAGES/Obstacles"), words);
}

/// Replaces every number by `N`.
fn without_numbers(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '0'..='9' if out.ends_with('N') => {}
            '0'..='9' => out.push('N'),
            c => out.push(c),
        }
    }
    out.replace("migration ID", "migration N").replace("N-N-NTN:N:NZ", "TIME")
}

/// The message of every reason for which a copy fails or stops.
fn troubles() -> Vec<String> {
    let reason = || "REASON".to_owned();
    let troubles = [
        Trouble::Connect("cannot connect to ADDRESS: REASON".to_owned()),
        Trouble::Rejected(reason()),
        Trouble::NoGreeting(reason()),
        Trouble::Size { local: 1, remote: 2 },
        Trouble::ReadOnly,
        Trouble::Serving,
        Trouble::BlockSize(512),
        Trouble::Offers("WHAT".to_owned()),
        Trouble::Lost(reason()),
        Trouble::NoProgress(Duration::from_secs(1)),
        Trouble::ErrorReply(5),
        Trouble::Cookie(1),
        Trouble::Record(reason()),
        Trouble::Unreadable("cannot read IMAGE at byte 1: REASON".to_owned()),
        Trouble::Unreadable("a flush of IMAGE has failed: data may be lost".to_owned()),
    ];
    troubles.iter().map(|trouble| without_numbers(&trouble.to_string())).collect()
}

/// Fails unless each message begins with the item of the same index.
fn assert_begin_with(items: &[String], messages: &[String]) {
    assert_eq!(items.len(), messages.len(), "{items:#?}\n{messages:#?}");
    for (item, message) in items.iter().zip(messages) {
        assert!(message.starts_with(item.as_str()), "`{message}` does not begin with `{item}`");
    }
}

#[test]
fn documented_mirror_failures_match_the_messages() {
    let page = page();
    let items = page.items("MESSAGES/Why mirror fails");
    let items: Vec<String> = items.into_iter().map(without_numbers).collect();
    let sources = without_numbers(&module_source("daemon"));
    let is_reply = |item: &&String| sources.contains(item.as_str());
    let (replies, reasons): (Vec<_>, Vec<_>) = items.iter().partition(is_reply);
    assert_eq!(replies.len(), 9, "{replies:#?}");
    assert_begin_with(&reasons.into_iter().cloned().collect::<Vec<_>>(), &troubles());
}

#[test]
fn documented_nbd_error_numbers_match() {
    let item = "the destination answered with NBD error N; see its log";
    let documented = numbers(&page().item_text("MESSAGES/Why mirror fails", item));
    let codes = [ErrorCode::NoSpace, ErrorCode::Io, ErrorCode::NotPermitted];
    assert_eq!(documented, codes.map(|code| u64::from(code.number())));
}

#[test]
fn documented_image_refusals_match_the_messages() {
    let (id, to) = (ID, remote_address());
    let refusals = [
        ownership::OwnershipRefusal::Incomplete,
        ownership::OwnershipRefusal::Departing { id, to: to.clone() },
        ownership::OwnershipRefusal::Departed { id, when: 1, to },
        ownership::OwnershipRefusal::Adopted,
    ];
    let bad = [BadRecord::Garbage(String::new()), BadRecord::Version("2".to_owned())];
    let path = || std::path::PathBuf::from("IMAGE");
    let error = || std::io::Error::from(std::io::ErrorKind::StorageFull);
    let file = Box::new(RecordStoreError::Io { path: path(), source: error() });
    let records = [
        RecordStoreError::Nowhere { image: path(), attribute: error(), file },
        RecordStoreError::NotDeleted { path: path(), why: DeletionError::Io(error()) },
        RecordStoreError::Contradiction { image: path(), file: "FILE".into() },
    ];
    let messages = refusals.iter().map(|refusal| refusal.explain("IMAGE"));
    let messages = messages.chain(records.iter().map(ToString::to_string));
    let messages = messages.chain(bad.iter().map(ToString::to_string));
    let page = page();
    let items = page.items("MESSAGES/Why an image is refused");
    assert_begin_with(
        &items
            .into_iter()
            .map(|item| without_numbers(item).replace("REASON", ""))
            .collect::<Vec<_>>(),
        &messages.map(|message| without_numbers(&message)).collect::<Vec<_>>(),
    );
}

/// The tables of a section that describe messages: offset, length and name of each field.
fn tables(page: &Page, place: &str) -> Vec<Vec<(usize, usize, String)>> {
    let mut tables = Vec::new();
    for item in page.items(place) {
        let columns: Vec<&str> = item.split(" Ta ").collect();
        match columns[..] {
            ["Em offset", "Em length", "Em field"] => tables.push(Vec::new()),
            [offset, length, name] => {
                let (offset, length) = (offset.parse().unwrap(), length.parse().unwrap());
                tables.last_mut().unwrap().push((offset, length, name.to_owned()));
            }
            _ => {}
        }
    }
    tables
}

/// Fails unless a message consists of exactly these fields in the order of the table.
fn assert_fields(bytes: &[u8], table: &[(usize, usize, String)], fields: &[(&str, &[u8])]) {
    let names: Vec<&str> = table.iter().map(|(_, _, name)| name.as_str()).collect();
    assert_eq!(names, fields.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let mut end = 0;
    for ((offset, length, name), (_, expected)) in table.iter().zip(fields) {
        assert_eq!(*offset, end, "offset of {name}");
        end += length;
        assert_eq!(&bytes[*offset..end], *expected, "{name}");
    }
    assert_eq!(end, bytes.len(), "length of the message");
}

#[test]
fn private_messages_match_the_documented_layout() {
    let page = page();
    let option = tables(&page, "PROTOCOL/The private option");
    let command = tables(&page, "PROTOCOL/The private command");
    let ([question, answer, disk_id], [handover]) = (&option[..], &command[..]) else {
        panic!("the page must have four tables");
    };
    let version = VERSION.to_be_bytes();
    let size = 0x0102_0304_0506_0708_u64;
    assert_fields(
        &Question { size, id: ID }.encode(),
        question,
        &[("version", &version), ("disk size", &size.to_be_bytes()), ("migration id", &ID.0)],
    );
    for (listening, has, role, state) in [
        (Some(TOKEN), Has::Nothing, 1, 0),
        (Some(TOKEN), Has::Incomplete, 1, 1),
        (None, Has::Arrived, 2, 2),
    ] {
        let token = listening.map_or([0; 16], |token| token.0);
        let rest: [(&str, &[u8]); 2] = [("zero", &[0, 0]), ("arrival token", &token)];
        let start: [(&str, &[u8]); 3] =
            [("version", &version), ("role", &[role]), ("state", &[state])];
        assert_fields(&Answer { listening, has }.encode(), answer, &[&start[..], &rest].concat());
    }
    assert_fields(
        &DiskIdMessage(DiskId([9; 16])).encode(),
        disk_id,
        &[("version", &DISK_ID_VERSION.to_be_bytes()), ("disk id", &[9; 16])],
    );
    assert_fields(
        &Handover { id: ID, token: TOKEN }.encode(),
        handover,
        &[("version", &version), ("migration id", &ID.0), ("arrival token", &TOKEN.0)],
    );
}

#[test]
fn documented_option_and_command_numbers_match() {
    let page = page();
    let option = text(&page, "PROTOCOL/The private option");
    let documented = option.matches(&format!("0x{OPTION:08X}")).count();
    assert_eq!((documented, option.matches("0x").count()), (2, 2), "{option}");
    let command = text(&page, "PROTOCOL/The private command");
    let documented = command.matches(&format!("0x{COMMAND:04X}")).count();
    assert_eq!((documented, command.matches("0x").count()), (1, 1), "{command}");
    let version = format!("begins with its version, {VERSION}.");
    assert!(text(&page, "PROTOCOL").contains(&version), "the version is not {VERSION}");
    for (item, values) in [("role", vec![1, 2]), ("state", vec![0, 1, 2])] {
        assert_eq!(numbers(&page.item_text("PROTOCOL/The private option", item)), values, "{item}");
    }
}

/// The example commands, as `flexnbd MODE ...`.
fn commands() -> Vec<String> {
    let text = page().literal();
    let starts = text.iter().map(|line| line.strip_prefix("$ ").unwrap_or(line).trim());
    let commands = starts.filter(|line| {
        line.starts_with("flexnbd ") && !line.contains("flexnbd 1 ") && !line.contains("flexnbd 2 ")
    });
    commands.map(|line| line.trim_end_matches("&&").trim().to_owned()).collect()
}

#[test]
fn every_mode_has_a_valid_example_command() {
    let commands = commands();
    let mode = |line: &str| line.split_whitespace().nth(1).unwrap().to_owned();
    for migration_mode in MIGRATION_MODES {
        assert!(
            commands.iter().any(|line| mode(line) == migration_mode),
            "no example of `{migration_mode}`"
        );
    }
    for line in &commands {
        if MODES.contains(&mode(line).as_str()) {
            assert_valid(line);
        } else {
            assert!(MIGRATION_MODES.contains(&mode(line).as_str()), "`{line}` has an unknown mode");
        }
    }
}

//! The record's format, and the decisions that follow from it.

use super::*;
use crate::transition_table::assert_accepted;
use proptest::prelude::*;

const ID: Id = Id([0xab; 16]);

fn destination() -> RemoteAddress {
    RemoteAddress::new("192.0.2.7 4779").unwrap()
}

fn departing() -> Record {
    Record::Departing { id: ID, before: Provenance::Native, to: destination(), from: None }
}

fn departed() -> Record {
    Record::Departed { id: ID, when: 1_700_000_000, to: destination() }
}

#[test]
fn unmoved_disk_is_served_and_may_be_overwritten() {
    assert_eq!(for_serve(None), ForServe::Serve(Provenance::Native));
    assert_eq!(for_listen(None, false), ForListen::Accept { incomplete_copy: None });
}

#[test]
fn incomplete_copy_is_refused_and_received_again() {
    let record = Record::Incoming { id: Some(ID) };
    assert_eq!(for_serve(Some(&record)), ForServe::Refuse(OwnershipRefusal::Incomplete));
    assert_eq!(
        for_listen(Some(&record), false),
        ForListen::Accept { incomplete_copy: Some(Some(ID)) }
    );
}

#[test]
fn arrived_disk_is_served_and_replaced_with_overwrite_only() {
    let record = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Arrived(ID)));
    assert_eq!(for_listen(Some(&record), false), ForListen::AlreadyArrived(Some(ID)));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { incomplete_copy: None });
}

#[test]
fn disk_received_without_an_id_has_arrived() {
    let record = Record::Ours(Provenance::Received);
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Received));
    assert_eq!(for_listen(Some(&record), false), ForListen::AlreadyArrived(None));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { incomplete_copy: None });
}

#[test]
fn adopted_disk_is_served_and_replaced_with_overwrite_only() {
    let record = Record::Ours(Provenance::Adopted);
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Adopted));
    assert_eq!(for_listen(Some(&record), false), ForListen::Refuse(OwnershipRefusal::Adopted));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { incomplete_copy: None });
}

#[test]
fn departing_disk_asks_the_destination_and_is_never_overwritten() {
    let record = departing();
    let refusal = OwnershipRefusal::Departing { id: ID, to: destination() };
    let ask = ForServe::Ask {
        id: ID,
        to: destination(),
        from: None,
        before: Provenance::Native,
        refusal: refusal.clone(),
    };
    assert_eq!(for_serve(Some(&record)), ask);
    for overwrite in [false, true] {
        assert_eq!(for_listen(Some(&record), overwrite), ForListen::Refuse(refusal.clone()));
    }
}

#[test]
fn departed_disk_is_refused_and_may_come_back() {
    let record = departed();
    assert!(matches!(
        for_serve(Some(&record)),
        ForServe::Refuse(OwnershipRefusal::Departed { .. })
    ));
    assert_eq!(for_listen(Some(&record), false), ForListen::Accept { incomplete_copy: None });
}

#[test]
fn doubtful_or_incomplete_disk_needs_force_to_adopt() {
    for record in [departing(), departed(), Record::Incoming { id: None }] {
        assert!(for_adopt(Some(&record), false).is_err());
        assert_eq!(for_adopt(Some(&record), true), Ok(Record::Ours(Provenance::Adopted)));
    }
    assert_eq!(for_adopt(None, false), Ok(Record::Ours(Provenance::Adopted)));
    let arrived = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(for_adopt(Some(&arrived), false), Ok(arrived.clone()), "provenance is lost");
}

#[test]
fn refusal_names_image_record_host_and_command() {
    let refusals = [
        (OwnershipRefusal::Departing { id: ID, to: destination() }, "departing"),
        (OwnershipRefusal::Departed { id: ID, when: 5, to: destination() }, "departed"),
    ];
    for (refusal, name) in refusals {
        let text = refusal.explain("/srv/a.img");
        for part in ["/srv/a.img", name, "192.0.2.7 4779", "flexnbd adopt --force -f /srv/a.img"] {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
    }
    assert!(
        OwnershipRefusal::Incomplete.explain("/srv/a.img").contains("flexnbd listen -f /srv/a.img")
    );
    assert!(OwnershipRefusal::Adopted.explain("/srv/a.img").contains("--overwrite"));
}

#[test]
fn record_of_a_newer_version_is_not_garbage() {
    for version in ["2", "3"] {
        let found = Record::decode(format!("flexnbd {version} something new\n").as_bytes());
        assert_eq!(found, Err(BadRecord::Version(version.to_owned())));
    }
}

#[test]
fn other_spellings_of_a_record_are_garbage() {
    let id = "abababababababababababababababab";
    let foreign = [
        String::new(),
        "\n".to_owned(),
        "flexnbd".to_owned(),
        "flexnbd 1\n".to_owned(),
        "flexnbd 1 ours\n".to_owned(),
        "flexnbd 1 ours title=someone\n".to_owned(),
        "flexnbd 1 ours title=native\n".to_owned(),
        format!("flexnbd 1 ours title={id}"),
        format!("flexnbd 1 ours title={id}\n\n"),
        format!("flexnbd 1 ours title={}\n", id.to_uppercase()),
        format!("flexnbd 1 departed id={id} when=01 to=x\n"),
        format!("flexnbd 1 departed id={id} when=1 to=\n"),
        format!("flexnbd -1 ours title={id}\n"),
    ];
    for text in foreign {
        let found = Record::decode(text.as_bytes());
        assert!(matches!(found, Err(BadRecord::Garbage(_))), "{text:?} was read as {found:?}");
    }
}

#[test]
fn departing_record_keeps_the_local_address() {
    let id = "abababababababababababababababab";
    for ip in ["192.0.2.9", "2001:db8::9"] {
        let from = Some(ip.parse().unwrap());
        let record =
            Record::Departing { id: ID, before: Provenance::Native, to: destination(), from };
        let text =
            format!("flexnbd 2 departing id={id} before=native from={ip} to=192.0.2.7 4779\n");
        assert_eq!(record.encode(), text);
        assert_eq!(Record::decode(text.as_bytes()), Ok(record.clone()));
        assert!(
            matches!(for_serve(Some(&record)), ForServe::Ask { from: asked, .. } if asked == from)
        );
    }
}

#[test]
fn departing_record_without_local_address_has_version_1() {
    let id = "abababababababababababababababab";
    let text = format!("flexnbd 1 departing id={id} before=native to=192.0.2.7 4779\n");
    assert_eq!(departing().encode(), text);
    assert_eq!(Record::decode(text.as_bytes()), Ok(departing()));
    for wrong in [
        text.replace("flexnbd 1", "flexnbd 2"),
        text.replace(" to=", " from=192.0.2.9 to="),
        text.replace("flexnbd 1", "flexnbd 2").replace(" to=", " from=nowhere to="),
        format!("flexnbd 2 ours title={id}\n"),
    ] {
        let found = Record::decode(wrong.as_bytes());
        assert!(found.is_err(), "{wrong:?} was read as {found:?}");
    }
}

#[test]
fn disk_with_a_failed_flush_is_served_until_adopted() {
    let record = Record::FlushFailed { provenance: Provenance::Arrived(ID), since: 1_700_000_000 };
    let id = "abababababababababababababababab";
    let text = format!("flexnbd 2 ours title={id} flush-failed=1700000000\n");
    assert_eq!(record.encode(), text);
    assert_eq!(Record::decode(text.as_bytes()), Ok(record.clone()));
    for wrong in [
        text.replace("flexnbd 2", "flexnbd 1"),
        text.replace("failed=", "failed=0"),
        text.replace(" flush-failed=1700000000", " flush-failed="),
    ] {
        let found = Record::decode(wrong.as_bytes());
        assert!(found.is_err(), "{wrong:?} was read as {found:?}");
    }
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Arrived(ID)));
    assert_eq!(for_listen(Some(&record), false), ForListen::AlreadyArrived(Some(ID)));
    let ours = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(for_adopt(Some(&record), false), Ok(ours), "provenance is lost");
}

#[test]
fn remote_address_has_bounded_length_and_no_control_characters() {
    assert!(RemoteAddress::new(&"x".repeat(REMOTE_ADDRESS_MAX)).is_some());
    assert!(RemoteAddress::new(&"x".repeat(REMOTE_ADDRESS_MAX + 1)).is_none());
    assert!(RemoteAddress::new("").is_none());
    assert!(RemoteAddress::new("two\nlines").is_none());
}

#[test]
fn longest_records_fit_record_max() {
    let to = RemoteAddress::new(&"x".repeat(REMOTE_ADDRESS_MAX)).unwrap();
    let before = Provenance::Arrived(ID);
    let from = Some("0:0:0:0:0:ffff:255.255.255.255".parse().unwrap());
    let longest = Some("1111:2222:3333:4444:5555:6666:7777:8888".parse().unwrap());
    for from in [from, longest] {
        let record = Record::Departing { id: ID, before, to: to.clone(), from };
        assert!(record.encode().len() <= RECORD_MAX);
    }
    assert!(Record::Departed { id: ID, when: u64::MAX, to }.encode().len() <= RECORD_MAX);
}

/// Every shape of record, and none. Two records of one shape differ in values only.
fn all_records() -> Vec<Option<Record>> {
    let arrived = Provenance::Arrived(Id(2_u128.to_be_bytes()));
    let provenances = [Provenance::Native, arrived, Provenance::Received, Provenance::Adopted];
    let (id, to) = (Id(1_u128.to_be_bytes()), RemoteAddress::new("HOST").unwrap());
    let mut records = vec![None];
    records.extend([None, Some(id)].map(|id| Some(Record::Incoming { id })));
    records.extend(provenances.map(|provenance| Some(Record::Ours(provenance))));
    let since = 1_700_000_000;
    records.extend(provenances.map(|provenance| Some(Record::FlushFailed { provenance, since })));
    for from in [None, Some(IpAddr::from([192, 0, 2, 9]))] {
        records.extend(
            provenances.map(|before| Some(Record::Departing { id, before, to: to.clone(), from })),
        );
    }
    records.push(Some(Record::Departed { id, when: 1_700_000_000, to }));
    records
}

fn show_id(id: Id) -> String {
    u128::from_be_bytes(id.0).to_string()
}

fn show_provenance(provenance: Provenance) -> String {
    match provenance {
        Provenance::Native => "native".to_owned(),
        Provenance::Arrived(id) => format!("arrived with {}", show_id(id)),
        Provenance::Received => "received".to_owned(),
        Provenance::Adopted => "adopted".to_owned(),
    }
}

fn show_record(record: Option<&Record>) -> String {
    match record {
        None => "none".to_owned(),
        Some(Record::Incoming { id: None }) => "incoming".to_owned(),
        Some(Record::Incoming { id: Some(id) }) => format!("incoming with {}", show_id(*id)),
        Some(Record::Ours(provenance)) => format!("ours, {}", show_provenance(*provenance)),
        Some(Record::FlushFailed { provenance, .. }) => {
            format!("ours, {}, a flush failed", show_provenance(*provenance))
        }
        Some(Record::Departing { id, before, to, from }) => {
            let from = from.map_or_else(String::new, |from| format!(" from {from}"));
            let before = show_provenance(*before);
            format!("departing with {}{from} to {to}, before {before}", show_id(*id))
        }
        Some(Record::Departed { id, to, .. }) => format!("departed with {} to {to}", show_id(*id)),
    }
}

fn show_refusal(refusal: &OwnershipRefusal) -> String {
    match refusal {
        OwnershipRefusal::Incomplete => "refuse: incomplete".to_owned(),
        OwnershipRefusal::Departing { id, to } => {
            format!("refuse: in doubt, {to} knows of {}", show_id(*id))
        }
        OwnershipRefusal::Departed { id, to, .. } => {
            format!("refuse: departed with {} to {to}", show_id(*id))
        }
        OwnershipRefusal::Adopted => "refuse: adopted".to_owned(),
    }
}

fn show_for_serve(record: Option<&Record>) -> String {
    match for_serve(record) {
        ForServe::Serve(provenance) => format!("serve as {}", show_provenance(provenance)),
        ForServe::Ask { id, to, from, before, refusal } => {
            let from = from.map_or_else(String::new, |from| format!(" from {from}"));
            let (id, before) = (show_id(id), show_provenance(before));
            let refusal = show_refusal(&refusal);
            format!("ask {to}{from}: has {id} arrived? never: restore {before}; else {refusal}")
        }
        ForServe::Refuse(refusal) => show_refusal(&refusal),
    }
}

fn show_for_listen(record: Option<&Record>, overwrite: bool) -> String {
    let id = |id: Option<Id>| id.map_or_else(|| "no id".to_owned(), show_id);
    match for_listen(record, overwrite) {
        ForListen::Accept { incomplete_copy: None } => "accept".to_owned(),
        ForListen::Accept { incomplete_copy: Some(copy) } => {
            format!("accept, over an incomplete copy ({})", id(copy))
        }
        ForListen::AlreadyArrived(arrived) => format!("exit: arrived ({})", id(arrived)),
        ForListen::Refuse(refusal) => show_refusal(&refusal),
    }
}

fn show_for_adopt(record: Option<&Record>, force: bool) -> String {
    match for_adopt(record, force) {
        Ok(next) => format!("record {}", show_record(Some(&next))),
        Err(refusal) => show_refusal(&refusal),
    }
}

/// What a command decides, as text.
type Decide = fn(Option<&Record>) -> String;

#[test]
fn decisions_match_the_accepted_table() {
    let records = all_records();
    let mut table = "# Command | record of the image | decision. Numbers are ids of migrations.\n\
                     # See src/transition_table.rs for how to accept a change.\n"
        .to_owned();
    let commands: [(&str, Decide); 5] = [
        ("serve", show_for_serve),
        ("listen", |record| show_for_listen(record, false)),
        ("listen --overwrite", |record| show_for_listen(record, true)),
        ("adopt", |record| show_for_adopt(record, false)),
        ("adopt --force", |record| show_for_adopt(record, true)),
    ];
    for (command, decide) in commands {
        table.push('\n');
        for record in &records {
            let (shown, decision) = (show_record(record.as_ref()), decide(record.as_ref()));
            table += &format!("{command} | {shown} | {decision}\n");
        }
    }
    assert_accepted("disk/ownership/decisions.txt", &table);
}

fn any_provenance() -> impl Strategy<Value = Provenance> {
    prop_oneof![
        Just(Provenance::Native),
        Just(Provenance::Adopted),
        Just(Provenance::Received),
        any::<[u8; 16]>().prop_map(|id| Provenance::Arrived(Id(id))),
    ]
}

fn any_record() -> impl Strategy<Value = Record> {
    let id = || any::<[u8; 16]>().prop_map(Id);
    let to =
        || "[ -~é]{1,60}".prop_filter_map("a remote address", |text| RemoteAddress::new(&text));
    prop_oneof![
        proptest::option::of(id()).prop_map(|id| Record::Incoming { id }),
        any_provenance().prop_filter_map("a provenance with a record", Provenance::record),
        (any_provenance(), any::<u64>())
            .prop_map(|(provenance, since)| Record::FlushFailed { provenance, since }),
        (id(), any_provenance(), to(), any::<Option<std::net::IpAddr>>())
            .prop_map(|(id, before, to, from)| Record::Departing { id, before, to, from }),
        (id(), any::<u64>(), to()).prop_map(|(id, when, to)| Record::Departed { id, when, to }),
    ]
}

proptest! {
    #[test]
    fn encoded_record_decodes_to_itself(record in any_record()) {
        prop_assert_eq!(Record::decode(record.encode().as_bytes()), Ok(record));
    }

    #[test]
    fn truncated_record_is_an_error(record in any_record(), keep in 0.0..1.0f64) {
        let text = record.encode();
        let cut = &text.as_bytes()[..(text.len() as f64 * keep) as usize];
        prop_assert!(Record::decode(cut).is_err());
    }

    #[test]
    fn decoding_arbitrary_bytes_does_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = Record::decode(&bytes);
    }
}

//! What the record keeps, and what it permits.

use super::*;
use proptest::prelude::*;

const ID: Id = Id([0xab; 16]);

fn place() -> RemoteAddress {
    RemoteAddress::new("192.0.2.7 4779").unwrap()
}

fn departing() -> Record {
    Record::Departing { id: ID, before: Provenance::Native, to: place(), from: None }
}

fn departed() -> Record {
    Record::Departed { id: ID, when: 1_700_000_000, to: place() }
}

#[test]
fn a_disk_that_never_moved_is_served_and_received_into() {
    assert_eq!(for_serve(None), ForServe::Serve(Provenance::Native));
    assert_eq!(for_listen(None, false), ForListen::Accept { holds: None });
}

#[test]
fn an_incomplete_copy_is_not_served_and_starts_over() {
    let record = Record::Incoming { id: Some(ID) };
    assert_eq!(for_serve(Some(&record)), ForServe::Refuse(OwnershipRefusal::Incomplete));
    assert_eq!(for_listen(Some(&record), false), ForListen::Accept { holds: Some(Some(ID)) });
}

#[test]
fn a_disk_that_arrived_is_served_and_another_needs_overwrite() {
    let record = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Arrived(ID)));
    assert_eq!(for_listen(Some(&record), false), ForListen::AlreadyArrived(Some(ID)));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { holds: None });
}

#[test]
fn a_disk_that_arrived_without_an_id_has_arrived_all_the_same() {
    let record = Record::Ours(Provenance::Received);
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Received));
    assert_eq!(for_listen(Some(&record), false), ForListen::AlreadyArrived(None));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { holds: None });
}

#[test]
fn an_adopted_disk_is_served_and_another_needs_overwrite() {
    let record = Record::Ours(Provenance::Adopted);
    assert_eq!(for_serve(Some(&record)), ForServe::Serve(Provenance::Adopted));
    assert_eq!(for_listen(Some(&record), false), ForListen::Refuse(OwnershipRefusal::Adopted));
    assert_eq!(for_listen(Some(&record), true), ForListen::Accept { holds: None });
}

#[test]
fn a_departing_disk_is_served_only_after_asking_and_never_received_into() {
    let record = departing();
    let refusal = OwnershipRefusal::Departing { id: ID, to: place() };
    let (to, unless) = (place(), refusal.clone());
    let ask = ForServe::Ask { id: ID, to, from: None, before: Provenance::Native, unless };
    assert_eq!(for_serve(Some(&record)), ask);
    for overwrite in [false, true] {
        assert_eq!(for_listen(Some(&record), overwrite), ForListen::Refuse(refusal.clone()));
    }
}

#[test]
fn a_departed_disk_is_not_served_and_may_come_home() {
    let record = departed();
    assert!(matches!(
        for_serve(Some(&record)),
        ForServe::Refuse(OwnershipRefusal::Departed { .. })
    ));
    assert_eq!(for_listen(Some(&record), false), ForListen::Accept { holds: None });
}

#[test]
fn what_may_be_elsewhere_or_incomplete_is_adopted_by_force_only() {
    for record in [departing(), departed(), Record::Incoming { id: None }] {
        assert!(for_adopt(Some(&record), false).is_err());
        assert_eq!(for_adopt(Some(&record), true), Ok(Record::Ours(Provenance::Adopted)));
    }
    assert_eq!(for_adopt(None, false), Ok(Record::Ours(Provenance::Adopted)));
    let arrived = Record::Ours(Provenance::Arrived(ID));
    assert_eq!(for_adopt(Some(&arrived), false), Ok(arrived.clone()), "it stays known as arrived");
}

#[test]
fn a_refusal_names_the_image_the_record_the_host_and_the_command() {
    let refusals = [
        (OwnershipRefusal::Departing { id: ID, to: place() }, "departing"),
        (OwnershipRefusal::Departed { id: ID, when: 5, to: place() }, "departed"),
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
fn a_record_of_another_version_is_told_apart_from_garbage() {
    for version in ["2", "3"] {
        let found = Record::decode(format!("flexnbd {version} something new\n").as_bytes());
        assert_eq!(found, Err(BadRecord::Version(version.to_owned())));
    }
}

#[test]
fn what_we_would_not_write_ourselves_is_garbage() {
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
fn a_departing_record_keeps_the_local_address_to_ask_from() {
    let id = "abababababababababababababababab";
    for ip in ["192.0.2.9", "2001:db8::9"] {
        let from = Some(ip.parse().unwrap());
        let record = Record::Departing { id: ID, before: Provenance::Native, to: place(), from };
        let text =
            format!("flexnbd 2 departing id={id} before=native from={ip} to=192.0.2.7 4779\n");
        assert_eq!(record.encode(), text);
        assert_eq!(Record::decode(text.as_bytes()), Ok(record.clone()));
        assert!(
            matches!(for_serve(Some(&record)), ForServe::Ask { from: told, .. } if told == from)
        );
    }
}

#[test]
fn a_departing_record_without_local_address_has_version_1() {
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
fn a_place_fits_a_record_and_holds_no_control_character() {
    assert!(RemoteAddress::new(&"x".repeat(PLACE_MAX)).is_some());
    assert!(RemoteAddress::new(&"x".repeat(PLACE_MAX + 1)).is_none());
    assert!(RemoteAddress::new("").is_none());
    assert!(RemoteAddress::new("two\nlines").is_none());
}

#[test]
fn the_longest_record_fits() {
    let to = RemoteAddress::new(&"x".repeat(PLACE_MAX)).unwrap();
    let before = Provenance::Arrived(ID);
    let from = Some("0:0:0:0:0:ffff:255.255.255.255".parse().unwrap());
    let longest = Some("1111:2222:3333:4444:5555:6666:7777:8888".parse().unwrap());
    for from in [from, longest] {
        let record = Record::Departing { id: ID, before, to: to.clone(), from };
        assert!(record.encode().len() <= RECORD_MAX);
    }
    assert!(Record::Departed { id: ID, when: u64::MAX, to }.encode().len() <= RECORD_MAX);
}

fn any_title() -> impl Strategy<Value = Provenance> {
    prop_oneof![
        Just(Provenance::Native),
        Just(Provenance::Adopted),
        Just(Provenance::Received),
        any::<[u8; 16]>().prop_map(|id| Provenance::Arrived(Id(id))),
    ]
}

fn any_record() -> impl Strategy<Value = Record> {
    let id = || any::<[u8; 16]>().prop_map(Id);
    let to = || "[ -~é]{1,60}".prop_filter_map("a place", |text| RemoteAddress::new(&text));
    prop_oneof![
        proptest::option::of(id()).prop_map(|id| Record::Incoming { id }),
        any_title().prop_filter_map("a title on record", Provenance::record),
        (id(), any_title(), to(), any::<Option<std::net::IpAddr>>())
            .prop_map(|(id, before, to, from)| Record::Departing { id, before, to, from }),
        (id(), any::<u64>(), to()).prop_map(|(id, when, to)| Record::Departed { id, when, to }),
    ]
}

proptest! {
    #[test]
    fn every_record_reads_back_as_it_was_written(record in any_record()) {
        prop_assert_eq!(Record::decode(record.encode().as_bytes()), Ok(record));
    }

    #[test]
    fn a_record_cut_short_is_never_read_as_a_record(record in any_record(), keep in 0.0..1.0f64) {
        let text = record.encode();
        let cut = &text.as_bytes()[..(text.len() as f64 * keep) as usize];
        prop_assert!(Record::decode(cut).is_err());
    }

    #[test]
    fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
        let _ = Record::decode(&bytes);
    }
}

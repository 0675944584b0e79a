//! The bytes of a snapshot, which must not change while [`VERSION`] stays the same: the process after
//! an upgrade reads what the process before it wrote, and refuses unknown or missing names. A field or
//! variant that is renamed in Rust therefore keeps its old name in the bytes (`#[serde(rename)]`).

use super::*;

/// A snapshot of version 1, with every phase, form of replies and purpose of a payload, and each
/// optional field with and without a value.
const GOLDEN: &[u8] = b"\
    FLEXNBDc\x00\x00\x00\x01\x82\xa7promise\x85\xa4disk\x92\x08\x01\xa4name\xa4disk\xa4size\xce\
    \x00\x10\x00\x00\xa5flags\xcd\x05m\xa8oldstyle\xc2\xa8sessions\x97\
    \x84\xa7session\x01\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x00\xa9from_disk\x82\
    \xa6offset\x00\xa6length\x00\xa4held\xc0\xa5phase\x81\xa8Greeting\x84\xacclient_flags\xc0\
    \xa8skipping\x04\xa4form\xa6Simple\xaeallocation_for\xc0\
    \x84\xa7session\x02\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x05reply\xa9from_disk\
    \x82\xa6offset\xcd\x10\x00\xa6length\xcd\x02\x00\xa4held\xc4\x05later\xa5phase\x81\xa8Greeti\
    ng\x85\xacclient_flags\x03\xa8skipping\x04\xa4form\xaaStructured\xaeallocation_for\xa4disk\
    \xaaintroduced\xc3\
    \x84\xa7session\x03\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x00\xa9from_disk\x82\
    \xa6offset\x00\xa6length\x00\xa4held\xc0\xa5phase\x81\xacTransmission\x83\xa4form\xa6Simple\
    \xb3allocation_selected\xc2\xaboutstanding\x83\xa7payload\xc0\xa5reads\x90\xacsaid_goodbye\
    \xc2\
    \x84\xa7session\x04\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x05reply\xa9from_disk\
    \x82\xa6offset\xcd\x10\x00\xa6length\xcd\x02\x00\xa4held\xc4\x05later\xa5phase\x81\xacTransm\
    ission\x84\xa4form\xaaStructured\xb3allocation_selected\xc3\xaaintroduced\xc3\xaboutstanding\
    \x83\xa7payload\x83\xa2to\x83\xa6cookie\x07\xa6offset\xcd\x02\x00\xa7chunked\xc2\xa4left\x05\
    \xa7purpose\x81\xa5Write\x83\xa5range\x82\xa6offset\x00\xa6length\t\xa4rest\x82\xa6offset\
    \x04\xa6length\x05\xa7durable\xc3\xa5reads\x92\x85\xa2to\x83\xa6cookie\xcf\xff\xff\xff\xff\
    \xff\xff\xff\xff\xa6offset\xcd\x02\x00\xa7chunked\xc3\xa4rest\x82\xa6offset\xcd\x10\x00\xa6l\
    ength\xcd \x00\xa5whole\xc3\xa5begun\xc2\xa8attached\xc2\x85\xa2to\x83\xa6cookie\x02\xa6offs\
    et\xcd\x02\x00\xa7chunked\xc3\xa4rest\x82\xa6offset\xcd\x10\x00\xa6length\xcd \x00\xa5whole\
    \xc2\xa5begun\xc3\xa8attached\xc3\xacsaid_goodbye\xc3\
    \x84\xa7session\x05\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x00\xa9from_disk\x82\
    \xa6offset\x00\xa6length\x00\xa4held\xc0\xa5phase\x81\xacTransmission\x83\xa4form\xa8Extende\
    d\xb3allocation_selected\xc2\xaboutstanding\x83\xa7payload\x83\xa2to\x83\xa6cookie\x07\xa6of\
    fset\xcd\x02\x00\xa7chunked\xc2\xa4left\x05\xa7purpose\x81\xaaSkipFailed\x83\xa5range\x82\
    \xa6offset\x00\xa6length\t\xa7durable\xc2\xa5errno\x1c\xa5reads\x90\xacsaid_goodbye\xc2\
    \x84\xa7session\x06\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x05reply\xa9from_disk\
    \x82\xa6offset\xcd\x10\x00\xa6length\xcd\x02\x00\xa4held\xc4\x05later\xa5phase\x81\xacTransm\
    ission\x84\xa4form\xa8Extended\xb3allocation_selected\xc3\xaaintroduced\xc3\xaboutstanding\
    \x83\xa7payload\x83\xa2to\x83\xa6cookie\x07\xa6offset\xcd\x02\x00\xa7chunked\xc2\xa4left\x05\
    \xa7purpose\xa4Skip\xa5reads\x90\xacsaid_goodbye\xc2\
    \x84\xa7session\x07\xa5inbox\xc4\x07request\xa6outbox\x83\xa5bytes\xc4\x00\xa9from_disk\x82\
    \xa6offset\x00\xa6length\x00\xa4held\xc0\xa5phase\x81\xacTransmission\x84\xa4form\xa8Extende\
    d\xb3allocation_selected\xc3\xaaintroduced\xc3\xaboutstanding\x83\xa7payload\x83\xa2to\x83\
    \xa6cookie\x07\xa6offset\xcd\x02\x00\xa7chunked\xc2\xa4left\x05\xa7purpose\x81\xa7Private\
    \x81\xa4data\xc4\x04over\xa5reads\x90\xacsaid_goodbye\xc2";

const SIZE: u64 = 1 << 20;

fn fingerprint() -> ExportFingerprint {
    let (disk, name) = (Some((8, 1)), "disk".to_owned());
    let (minimum_block, payload_max) = (minimum_block_of_file(), payload_max_of_file());
    let (size, flags, oldstyle) = (SIZE, 0x56d, false);
    ExportFingerprint { disk, name, size, flags, oldstyle, minimum_block, payload_max }
}

fn sessions() -> Vec<SessionSnapshot> {
    let range = |offset, length| RangeSnapshot { offset, length };
    let to = |cookie, chunked| RequestSnapshot { cookie, offset: 512, chunked };
    let read = |cookie, whole, begun, announced| ReadSnapshot {
        to: to(cookie, true),
        rest: range(4096, 8192),
        whole,
        begun,
        announced,
    };
    let transmission = |form, introduced, payload, reads, disconnect_received| {
        let pending = PendingSnapshot { payload, reads, disconnect_received };
        PhaseSnapshot::Transmission(TransmissionSnapshot {
            form,
            allocation_selected: introduced,
            introduced,
            pending,
        })
    };
    let payload = |purpose| Some(PayloadSnapshot { to: to(7, false), remaining: 5, purpose });
    let handshake = |client_flags, form, allocation_for, introduced| {
        PhaseSnapshot::Handshake(HandshakeSnapshot {
            client_flags,
            skipping: 4,
            form,
            allocation_for,
            introduced,
        })
    };
    let write = PurposeSnapshot::Write { range: range(0, 9), rest: range(4, 5), durable: true };
    let failed = PurposeSnapshot::SkipFailed { range: range(0, 9), durable: false, errno: 28 };
    let phases = [
        handshake(None, ReplyFormSnapshot::Simple, None, false),
        handshake(Some(3), ReplyFormSnapshot::Structured, Some("disk".to_owned()), true),
        transmission(ReplyFormSnapshot::Simple, false, None, Vec::new(), false),
        transmission(
            ReplyFormSnapshot::Structured,
            true,
            payload(write),
            vec![read(u64::MAX, true, false, false), read(2, false, true, true)],
            true,
        ),
        transmission(ReplyFormSnapshot::Extended, false, payload(failed), Vec::new(), false),
        transmission(
            ReplyFormSnapshot::Extended,
            true,
            payload(PurposeSnapshot::Skip),
            Vec::new(),
            false,
        ),
        transmission(
            ReplyFormSnapshot::Extended,
            true,
            payload(PurposeSnapshot::Private { data: b"over".to_vec() }),
            Vec::new(),
            false,
        ),
    ];
    let unsent = [
        UnsentSnapshot::default(),
        UnsentSnapshot {
            bytes: b"reply".to_vec(),
            announced: range(4096, 512),
            deferred: Some(b"later".to_vec()),
        },
    ];
    (1..)
        .zip(phases)
        .zip(unsent.into_iter().cycle())
        .map(|((session, phase), outbox)| SessionSnapshot {
            session,
            inbox: b"request".to_vec(),
            outbox,
            phase,
            introduction: None,
        })
        .collect()
}

#[test]
fn an_earlier_snapshot_decodes_and_encodes_to_the_same_bytes() {
    let bytes = encode(fingerprint(), sessions()).unwrap();
    assert!(bytes == GOLDEN, "it is now {}", bytes.escape_ascii());
    assert_eq!(decode(GOLDEN, &fingerprint()), Ok(sessions()));
}

#[test]
fn an_introduction_is_a_byte_string_of_its_session() {
    let mut introduced = sessions();
    introduced.truncate(1);
    introduced[0].introduction = Some(b"introduction".to_vec());
    let bytes = encode(fingerprint(), introduced.clone()).unwrap();
    let expected = b"\xacintroduction\xc4\x0cintroduction";
    assert!(bytes.ends_with(expected), "it is {}", bytes.escape_ascii());
    assert_eq!(decode(&bytes, &fingerprint()), Ok(introduced));
}

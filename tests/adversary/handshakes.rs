//! Cases of the handshake: flags, magic numbers, options, their order, and where it breaks off.

use crate::script::{Case, Fate, Step, answers_options};
use harness::raw::*;

const FLAGS: u32 = FIXED_NEWSTYLE | NO_ZEROES;

/// The first bytes of a client, and more.
pub(crate) fn greeted(rest: &[u8]) -> Vec<u8> {
    [&FLAGS.to_be_bytes()[..], rest].concat()
}

/// An option, its number, and valid data for it.
fn options() -> Vec<(&'static str, u32, Vec<u8>)> {
    let export = encode_go(b"", &[INFO_BLOCK_SIZE]);
    let contexts = encode_meta(b"", &[ALLOCATION.as_bytes()]);
    let question = [&1u32.to_be_bytes()[..], &(1u64 << 20).to_be_bytes(), &[7; 16]].concat();
    vec![
        ("LIST", OPT_LIST, vec![]),
        ("PEEK_EXPORT", OPT_PEEK_EXPORT, vec![]),
        ("STARTTLS", OPT_STARTTLS, vec![]),
        ("INFO", OPT_INFO, export),
        ("STRUCTURED_REPLY", OPT_STRUCTURED_REPLY, vec![]),
        ("LIST_META_CONTEXT", OPT_LIST_META_CONTEXT, contexts.clone()),
        ("SET_META_CONTEXT", OPT_SET_META_CONTEXT, contexts),
        ("EXTENDED_HEADERS", OPT_EXTENDED_HEADERS, vec![]),
        ("the private option", OPT_PRIVATE, question),
        ("option 0", 0, vec![]),
        ("option 12", 12, vec![]),
        ("option 2^32-1", u32::MAX, vec![]),
    ]
}

/// A way to spoil the data of an option.
type Damage = (&'static str, fn(&[u8]) -> Vec<u8>);

const DAMAGES: [Damage; 13] = [
    ("with no data", |_| vec![]),
    ("with one byte", |_| vec![0]),
    ("cut short", |data| data[..data.len().saturating_sub(1)].to_vec()),
    ("with a byte more", |data| [data, &[0]].concat()),
    ("with a name of 2^32-1 bytes", |data| [&[0xff; 4], data].concat()),
    ("with a name of 4097 bytes", |_| encode_go(&[b'n'; 4097], &[])),
    ("with a name that is not UTF-8", |_| encode_go(b"\xff\xfe", &[])),
    ("with NUL in the name", |_| encode_go(b"a\0b", &[])),
    ("with an unknown name", |_| encode_go(b"unknown", &[])),
    ("with too large a count", |_| [&[0; 4][..], &[0xff; 2]].concat()),
    ("with a count of 2^32-1", |_| [&[0; 4][..], &[0xff; 4]].concat()),
    ("with 65537 bytes", |_| vec![0; 65_537]),
    ("with 2 MiB", |_| vec![0xa5; 2 << 20]),
];

/// Options that the server has to answer, whatever their data, and go on.
fn damaged_options(cases: &mut Vec<Case>) {
    for (option, number, valid) in options() {
        for (damage, spoil) in DAMAGES {
            let bytes = greeted(&encode_option(number, &spoil(&valid)));
            let name = format!("{option} {damage}");
            cases.push(Case::new(name, vec![Step::Send(bytes)], answers_options()));
        }
        for length in [u32::MAX, (32 << 20) + 1] {
            let bytes = greeted(&encode_option_of_length(number, length, &[]));
            let name = format!("{option} of {length} bytes");
            cases.push(Case::new(name, vec![Step::Send(bytes)], Fate::Closed));
        }
    }
    for (damage, spoil) in &DAMAGES[..11] {
        let bytes = greeted(&encode_option(OPT_GO, &spoil(&encode_go(b"", &[]))));
        cases.push(Case::new(format!("GO {damage}"), vec![Step::Send(bytes)], answers_options()));
    }
    for (damage, spoil) in &DAMAGES[4..] {
        let bytes = greeted(&encode_option(OPT_EXPORT_NAME, &spoil(b"")));
        let name = format!("EXPORT_NAME {damage}");
        cases.push(Case::new(name, vec![Step::Send(bytes)], Fate::Closed));
    }
}

/// Each option after each other one, itself included.
fn pairs_of_options(cases: &mut Vec<Case>) {
    for (first, number, data) in options() {
        for (second, next, more) in options() {
            let both = [encode_option(number, &data), encode_option(next, &more)].concat();
            let name = format!("{second} after {first}");
            cases.push(Case::new(name, vec![Step::Send(greeted(&both))], answers_options()));
        }
    }
}

fn flags_and_magics(cases: &mut Vec<Case>) {
    for flags in [4, 1 << 31, u32::MAX, FLAGS | 8, FLAGS << 16] {
        let steps = vec![Step::Send(flags.to_be_bytes().to_vec())];
        cases.push(Case::new(format!("client flags {flags:#x}"), steps, Fate::Closed));
    }
    for option in [OPT_LIST, OPT_GO, OPT_ABORT, OPT_STRUCTURED_REPLY] {
        let bytes = [&[0; 4][..], &encode_option(option, b"")].concat();
        let name = format!("option {option} without fixed newstyle");
        cases.push(Case::new(name, vec![Step::Send(bytes)], Fate::Closed));
    }
    for bit in 0..16 {
        let mut option = encode_option(OPT_LIST, b"");
        option[bit / 2] ^= 1 << (bit % 8);
        let name = format!("bit {bit} of the magic of an option");
        cases.push(Case::new(name, vec![Step::Send(greeted(&option))], Fate::Closed));
    }
    let others: [(&str, &[u8]); 4] = [
        ("an HTTP request", b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n"),
        ("a TLS hello", &[0x16, 3, 1, 0, 0xc8, 1, 0, 0, 0xc4, 3, 3]),
        ("an SSH greeting", b"SSH-2.0-OpenSSH_9.9\r\n"),
        ("a greeting of a server", b"NBDMAGICIHAVEOPT\0\x03"),
    ];
    for (name, bytes) in others {
        cases.push(Case::new(name, vec![Step::Send(bytes.to_vec())], Fate::Closed));
    }
}

/// The handshake breaks off behind each part of a field.
fn breaks(cases: &mut Vec<Case>) {
    let all = typical_handshake();
    for at in [0, 1, 3, 4, 5, 11, 12, 15, 16, 19, 20, 21, 36, 39, 50, all.len() - 1, all.len()] {
        let start = || Step::Send(all[..at].to_vec());
        let ends = [
            ("and leaves", vec![start()], Fate::Leaves),
            ("and resets", vec![start()], Fate::Resets),
            ("after a greeting, and leaves", vec![Step::Await(18), start()], Fate::Leaves),
            ("and closes its side", vec![start(), Step::HalfClose], Fate::Closed),
            ("then garbage", vec![start(), Step::Send(vec![0xa5; 1024])], Fate::Closed),
        ];
        for (end, steps, fate) in ends {
            cases.push(Case::new(format!("{at} bytes of a handshake {end}"), steps, fate));
        }
    }
}

fn floods(cases: &mut Vec<Case>) {
    let list = encode_option(OPT_LIST, b"");
    let many = greeted(&list.repeat(20_000));
    cases.push(Case::new("20000 options", vec![Step::Send(many)], Fate::Closed).heavy());
    let structured = encode_option(OPT_STRUCTURED_REPLY, b"");
    let queries = vec![&b""[..]; 16_000];
    for (name, option) in
        [("LIST_META_CONTEXT", OPT_LIST_META_CONTEXT), ("SET_META_CONTEXT", OPT_SET_META_CONTEXT)]
    {
        let asked = encode_option(option, &encode_meta(b"", &queries));
        let steps = vec![Step::Send(greeted(&[&structured[..], &asked].concat()))];
        cases.push(Case::new(format!("16000 queries of {name}"), steps, answers_options()).heavy());
    }
    let infos = encode_option(OPT_INFO, &encode_go(b"", &[INFO_NAME; 32_000]));
    let steps = vec![Step::Send(greeted(&infos))];
    cases.push(Case::new("32000 times the same information", steps, answers_options()).heavy());
    let endless = vec![Step::Send(greeted(b"")), Step::Flood(list.repeat(100), 10_000)];
    cases.push(Case::new("options without end", endless, Fate::Resets).heavy());
}

fn slow_and_urgent(cases: &mut Vec<Case>) {
    let structured = encode_option(OPT_STRUCTURED_REPLY, b"");
    let steps = vec![Step::Drip(greeted(&structured))];
    cases.push(Case::new("a handshake byte by byte", steps, answers_options()));
    for at in [0, 2, 4, 12, 20] {
        let bytes = greeted(&structured);
        let steps =
            vec![Step::Send(bytes[..at].to_vec()), Step::Urgent, Step::Send(bytes[at..].to_vec())];
        let name = format!("urgent data after {at} bytes of a handshake");
        cases.push(Case::new(name, steps, answers_options()));
    }
}

/// Messages between two flexnbd, of every length and version.
fn introductions(cases: &mut Vec<Case>) {
    for length in [0, 1, 3, 4, 5, 27, 29, 36, 255, 256, 257, 4096] {
        for version in [0u32, 1, 2, 3, u32::MAX] {
            let mut data = vec![0xee; length];
            let start = length.min(4);
            data[..start].copy_from_slice(&version.to_be_bytes()[..start]);
            let bytes = greeted(&encode_option(OPT_PRIVATE, &data));
            let name = format!("an introduction of version {version} with {length} bytes");
            cases.push(Case::new(name, vec![Step::Send(bytes)], answers_options()));
        }
    }
}

/// All cases of a newstyle handshake.
pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    damaged_options(&mut cases);
    pairs_of_options(&mut cases);
    flags_and_magics(&mut cases);
    breaks(&mut cases);
    floods(&mut cases);
    slow_and_urgent(&mut cases);
    introductions(&mut cases);
    for (name, data) in
        [("ABORT", &b""[..]), ("ABORT with data", b"why"), ("2 MiB of ABORT", &[0; 2 << 20])]
    {
        let bytes = greeted(&encode_option(OPT_ABORT, data));
        cases.push(Case::new(name, vec![Step::Send(bytes)], Fate::Closed));
    }
    cases
}

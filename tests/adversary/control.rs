//! Cases of the control socket. None of them is a valid command that changes something.

use crate::script::{Case, Fate, Step};

/// Commands, and arguments that none of them accepts.
const COMMANDS: [&str; 9] =
    ["status", "acl", "reload", "mirror", "mirror_wait", "mirror_max_bps", "break", "unknown", ""];

/// A name, and what follows the first line.
const ENDS: [(&str, &[u8]); 9] = [
    ("with NUL", b"\0\n\n"),
    ("with an argument that is not UTF-8", b"\xff\xfe\n\n"),
    ("with CR and LF", b"\r\n\r\n"),
    ("with percent signs", b"%s%n%00\n%\n\n"),
    ("with a path", b"../../etc/passwd\n/dev/zero\n\n"),
    ("with great numbers", b"999999999999999999999\n-1\n\n"),
    ("without an end", b"127.0.0.1"),
    ("without a last line", b"x\n"),
    ("with more behind it", b"x\n\nstatus\n\n"),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for command in COMMANDS {
        let mut add = |name: &str, bytes: Vec<u8>| {
            let steps = vec![Step::Send(bytes), Step::HalfClose];
            cases.push(Case::new(format!("{command:?} {name}"), steps, Fate::Closed));
        };
        let of = |rest: &[u8]| [command.as_bytes(), b"\n", rest].concat();
        for (name, rest) in ENDS {
            add(name, of(rest));
        }
        add("with a long line", of(&[b'x'; 300]));
        add("with too many lines", of(&b"x\n".repeat(5000)));
        add("with long lines", of(&[&[b'x'; 256][..], b"\n"].concat().repeat(100)));
        let bytes = [command.as_bytes(), b"\nx\n\n"].concat();
        cases.push(Case::new(
            format!("{command:?} byte by byte"),
            vec![Step::Drip(bytes)],
            Fate::Closed,
        ));
        let part = command.as_bytes().to_vec();
        cases.push(Case::new(
            format!("{command:?} and leaves"),
            vec![Step::Send(part)],
            Fate::Leaves,
        ));
    }
    let endless = vec![Step::Flood(vec![b'x'; 4096], 1000)];
    cases.push(Case::new("a line without end", endless, Fate::Closed));
    let endless = vec![Step::Flood(b"acl\n".to_vec(), 100_000)];
    cases.push(Case::new("lines without end", endless, Fate::Closed));
    cases
}

//! Fuzz target of the control socket (`tests/fuzz`): arbitrary bytes as a command, and as the reply of a
//! server. A parsed value that can be encoded is parsed from its encoding again.

use super::command::{Incoming, LINE_BYTES_MAX, LINES_MAX};
use super::status::{Status, line, pairs, to_json};
use super::{Command, Reply, Summary};

/// A command, or a reply. The first byte chooses; for a command, the second one is the length of fragments.
pub(crate) fn lines(bytes: &[u8]) {
    let Some((choice, rest)) = bytes.split_first() else { return };
    match choice % 3 {
        0 => command(rest),
        1 => reply(rest),
        _ => status(&String::from_utf8_lossy(rest)),
    }
}

/// The command, or the text of the error.
fn parse(bytes: &[u8], fragment: usize) -> Result<Command, String> {
    let mut incoming = Incoming::default();
    for part in bytes.chunks(fragment) {
        if let Some(command) = incoming.feed(part).map_err(|error| error.to_string())? {
            return Ok(command);
        }
    }
    incoming.end().map_err(|error| error.to_string())
}

fn command(bytes: &[u8]) {
    let Some((fragment, bytes)) = bytes.split_first() else { return };
    let parsed = parse(bytes, bytes.len().max(1));
    assert_eq!(parsed, parse(bytes, usize::from(*fragment) + 1), "in fragments");
    let Ok(command) = parsed else { return };
    let shown = command.to_string();
    assert!(shown.len() <= LINE_BYTES_MAX * LINES_MAX, "{} bytes in a log line", shown.len());
    if let Ok(encoded) = command.to_wire() {
        assert_eq!(parse(&encoded, encoded.len()), Ok(command));
    }
}

fn reply(bytes: &[u8]) {
    let Ok(reply) = Reply::from_wire(bytes) else { return };
    let encoded = reply.to_wire();
    assert_eq!(encoded.iter().position(|byte| *byte == b'\n'), Some(encoded.len() - 1));
    assert_eq!(Reply::from_wire(&encoded), Ok(reply));
}

fn status(text: &str) {
    if let Ok(status) = Status::from_line(text) {
        assert_eq!(Status::from_line(&status.to_string()), Ok(status));
    }
    if let Ok(summary) = Summary::from_line(text) {
        assert_eq!(Summary::from_line(&summary.to_string()), Ok(summary));
    }
    let Ok(found) = pairs(text) else { return };
    let named: Vec<(&str, String)> =
        found.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    assert_eq!(pairs(&line(&named)).as_ref(), Ok(&found));
    let json = to_json(text).unwrap_or_default();
    let parsed: Result<serde_json::Value, _> = serde_json::from_str(&json);
    assert!(parsed.is_ok(), "{json} is no JSON");
}

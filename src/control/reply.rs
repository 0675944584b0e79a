//! The reply of the control socket: one line with a code and a text. Pure.

use std::fmt;

/// The code of a command that was executed.
pub const SUCCESS: u32 = 0;
/// The code of a valid command that was refused.
pub const REFUSED: u32 = 1;
/// The code of a missing command.
pub const MISSING_COMMAND: u32 = 9;
/// The code of an unknown command.
pub const UNKNOWN_COMMAND: u32 = 10;

/// A reply on the control socket, `N: text`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    code: u32,
    text: String,
}

impl Reply {
    /// A reply with any code. Line breaks in `text` become spaces, since a reply is one line.
    #[must_use]
    pub fn new(code: u32, text: impl Into<String>) -> Self {
        let text = text.into();
        let text = if text.contains(['\n', '\r']) { text.replace(['\n', '\r'], " ") } else { text };
        Self { code, text }
    }

    /// `0: text`.
    #[must_use]
    pub fn success(text: impl Into<String>) -> Self {
        Self::new(SUCCESS, text)
    }

    /// `1: text`.
    #[must_use]
    pub fn refused(text: impl Into<String>) -> Self {
        Self::new(REFUSED, text)
    }

    /// The code; 0 is success.
    #[must_use]
    pub fn code(&self) -> u32 {
        self.code
    }

    /// The text, without code and line break.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the command was executed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.code == SUCCESS
    }

    /// The exit status of a program that got this reply: the code, or 255 if it is larger.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        u8::try_from(self.code).unwrap_or(u8::MAX)
    }

    /// Encodes the reply, with the line break.
    #[must_use]
    pub fn to_wire(&self) -> Vec<u8> {
        format!("{self}\n").into_bytes()
    }

    /// Parses one line, with or without its line break.
    ///
    /// The code must be a number and followed by a colon. The text may be missing, lack the space
    /// in front, or not be UTF-8.
    ///
    /// # Errors
    ///
    /// [`NotAReply`] if the line does not begin with a number and a colon.
    pub fn from_wire(line: &[u8]) -> Result<Self, NotAReply> {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_end_matches(['\n', '\r']);
        let not_a_reply = || NotAReply(line.to_owned());
        let (number, text) = line.split_once(':').ok_or_else(not_a_reply)?;
        if !number.bytes().all(|b| b.is_ascii_digit()) {
            return Err(not_a_reply());
        }
        let code = number.parse().map_err(|_| not_a_reply())?;
        Ok(Self::new(code, text.strip_prefix(' ').unwrap_or(text)))
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.text)
    }
}

/// A line that is not a reply. Holds the line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} does not begin with a number and a colon")]
pub struct NotAReply(pub String);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_reply_is_encoded_as_code_and_text() {
        assert_eq!(Reply::success("updated").to_wire(), b"0: updated\n");
        assert_eq!(Reply::new(10, "unknown command").to_wire(), b"10: unknown command\n");
    }

    #[test]
    fn a_reply_is_one_line_whatever_its_text() {
        assert_eq!(Reply::refused("a\nb\r\nc").to_wire(), b"1: a b  c\n");
    }

    #[test]
    fn code_must_be_a_number_text_may_be_anything() {
        assert_eq!(Reply::from_wire(b"0:ok\n"), Ok(Reply::success("ok")));
        assert_eq!(Reply::from_wire(b"1:"), Ok(Reply::refused("")));
        assert_eq!(Reply::from_wire(b"1:  two spaces\r\n"), Ok(Reply::refused(" two spaces")));
        assert_eq!(Reply::from_wire(b"0: \xff\n"), Ok(Reply::success("\u{fffd}")));
        for bad in ["", ":", "0", "-1: x", "+1: x", "1 : x", "x: y", "4294967296: too big"] {
            assert_eq!(Reply::from_wire(bad.as_bytes()), Err(NotAReply(bad.to_owned())), "{bad}");
        }
    }

    #[test]
    fn the_exit_status_is_the_code_up_to_255() {
        assert_eq!(Reply::new(9, "").exit_status(), 9);
        assert_eq!(Reply::new(255, "").exit_status(), 255);
        assert_eq!(Reply::new(256, "").exit_status(), 255);
    }

    proptest! {
        #[test]
        fn every_reply_round_trips(code: u32, text in "[^\r\n]*") {
            let reply = Reply::new(code, text);
            prop_assert_eq!(Reply::from_wire(&reply.to_wire()), Ok(reply));
        }

        #[test]
        fn parsing_never_panics(line: Vec<u8>) {
            let _ = Reply::from_wire(&line);
        }
    }
}

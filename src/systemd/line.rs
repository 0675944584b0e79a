//! One event → one line of the log on stderr, in the format of flexnbd(1), "LOGGING".
//! Pure: time, process and thread are given to it.

use tracing::Level;

/// The field that makes an error one that ends the program.
pub const FATAL: &str = "fatal";
/// The field that holds the text.
const MESSAGE: &str = "message";
/// The field by which the journal knows the kind of an event; of no use on stderr.
const MESSAGE_ID: &str = "message_id";
/// The kernel's number for what went wrong, which the text says in words.
const ERRNO: &str = "errno";

/// How bad it is, as the letter in the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// For those who work on the program.
    Debug,
    /// What is going on.
    Info,
    /// Something went wrong with a request, and we coped.
    Warning,
    /// Something went wrong.
    Error,
    /// What went wrong ends the program.
    Fatal,
}

impl Severity {
    /// Of an event of this level.
    #[must_use]
    pub fn of(level: Level, is_fatal: bool) -> Self {
        match level {
            Level::ERROR if is_fatal => Self::Fatal,
            Level::ERROR => Self::Error,
            Level::WARN => Self::Warning,
            Level::INFO => Self::Info,
            _ => Self::Debug,
        }
    }

    fn letter(self) -> char {
        match self {
            Self::Debug => 'D',
            Self::Info => 'I',
            Self::Warning => 'W',
            Self::Error => 'E',
            Self::Fatal => 'F',
        }
    }
}

/// What a line tells besides the event itself.
#[derive(Clone, Copy, Debug)]
pub struct LineContext<'a> {
    /// When, in milliseconds of the monotonic clock.
    pub milliseconds: u64,
    /// How bad.
    pub severity: Severity,
    /// In which process.
    pub pid: u32,
    /// In which thread.
    pub thread: &'a str,
    /// In which source file.
    pub file: &'a str,
    /// In which of its lines.
    pub line: u32,
}

/// The line, with its line break. `fields` is the event's text and what it says besides.
#[must_use]
pub fn format(about: &LineContext<'_>, fields: &EventFields) -> String {
    let LineContext { milliseconds, pid, file, line, .. } = about;
    let (letter, thread) =
        (about.severity.letter(), about.thread.replace(char::is_whitespace, "_"));
    let mut out = format!("{milliseconds}:{letter}:{pid} {thread} {file}:{line}: ");
    push_escaped(&mut out, &fields.message);
    for (name, value) in &fields.others {
        let is_plain =
            !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '"');
        let quoted = if is_plain { value.clone() } else { format!("{value:?}") };
        out.push(' ');
        out.push_str(name);
        out.push('=');
        push_escaped(&mut out, &quoted);
    }
    out.push('\n');
    out
}

/// Control characters would break the line, or the terminal it is shown on.
fn push_escaped(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

/// How the names of fields begin that only the journal keeps.
const JOURNAL_FIELD: &str = "flexnbd.";

/// What an event says, taken down field by field.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventFields {
    message: String,
    others: Vec<(&'static str, String)>,
}

impl EventFields {
    /// Adds a field of the event.
    pub fn note(&mut self, name: &'static str, value: String) {
        match name {
            MESSAGE => self.message = value,
            FATAL | MESSAGE_ID | ERRNO => {}
            // The words say these; as fields they are for the journal.
            _ if name.starts_with(JOURNAL_FIELD) => {}
            _ => self.others.push((name, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABOUT: LineContext<'_> = LineContext {
        milliseconds: 1234,
        severity: Severity::Warning,
        pid: 42,
        thread: "main",
        file: "src/daemon.rs",
        line: 7,
    };

    fn fields(message: &str, others: &[(&'static str, &str)]) -> EventFields {
        let others = others.iter().map(|&(name, value)| (name, value.to_owned())).collect();
        EventFields { message: message.to_owned(), others }
    }

    #[test]
    fn a_line_looks_as_the_manual_says() {
        assert_eq!(
            format(&ABOUT, &fields("something is odd", &[])),
            "1234:W:42 main src/daemon.rs:7: something is odd\n"
        );
    }

    #[test]
    fn each_severity_has_its_letter_and_they_are_in_order() {
        let all = [
            Severity::of(Level::TRACE, false),
            Severity::of(Level::DEBUG, false),
            Severity::of(Level::INFO, false),
            Severity::of(Level::WARN, false),
            Severity::of(Level::ERROR, false),
            Severity::of(Level::ERROR, true),
        ];
        assert_eq!(all.map(Severity::letter), ['D', 'D', 'I', 'W', 'E', 'F']);
        assert!(all.is_sorted());
        assert_eq!(Severity::of(Level::WARN, true), Severity::Warning);
    }

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let line = format(&ABOUT, &fields("a\nb\x1b[31m", &[("why", "c\nd")]));
        assert_eq!(line, "1234:W:42 main src/daemon.rs:7: a\\nb\\u{1b}[31m why=\"c\\nd\"\n");
    }

    #[test]
    fn further_fields_follow_and_keep_their_names() {
        let fields = fields(
            "refused",
            &[("client", "10.0.0.1:4"), ("reason", "not welcome"), ("empty", "")],
        );
        assert!(
            format(&ABOUT, &fields)
                .ends_with("refused client=10.0.0.1:4 reason=\"not welcome\" empty=\"\"\n")
        );
    }

    #[test]
    fn a_threads_name_is_one_word() {
        let about = LineContext { thread: "my thread", ..ABOUT };
        assert!(format(&about, &fields("", &[])).starts_with("1234:W:42 my_thread src/"));
    }
}

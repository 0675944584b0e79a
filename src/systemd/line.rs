//! The lines of the log on stderr, in the format of flexnbd(1), "LOGGING": one for each event.
//! Pure: time, process and thread are arguments.

use tracing::Level;

/// The field of an error that ends the program.
pub const FATAL: &str = "fatal";
/// The field that holds the text.
pub const MESSAGE: &str = "message";
/// Fields that only the journal keeps: the kind of the event, and the error number, which the text
/// says in words.
const JOURNAL_FIELDS: [&str; 2] = ["message_id", "errno"];
/// Prefix of further fields that only the journal keeps; the text says the same in words.
const JOURNAL_PREFIX: &str = "flexnbd.";

/// Severity of an event, shown as a letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// For developers.
    Debug,
    /// Normal operation.
    Info,
    /// A request or a client failed; the server goes on.
    Warning,
    /// An error.
    Error,
    /// An error that ends the program.
    Fatal,
}

impl Severity {
    /// The severity of an event of this level.
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

/// Where and when an event was logged.
#[derive(Clone, Copy, Debug)]
pub struct LineContext<'a> {
    /// Time in milliseconds of the monotonic clock.
    pub milliseconds: u64,
    /// Severity.
    pub severity: Severity,
    /// Process id.
    pub pid: u32,
    /// Name of the thread.
    pub thread: &'a str,
    /// Source file.
    pub file: &'a str,
    /// Line in the source file.
    pub line: u32,
}

/// Formats an event with its fields as a line, with the line break.
#[must_use]
pub fn format<'a>(
    context: &LineContext<'_>,
    fields: impl Iterator<Item = (&'static str, &'a str)>,
) -> String {
    let LineContext { milliseconds, pid, file, line, .. } = context;
    let (letter, thread) =
        (context.severity.letter(), context.thread.replace(char::is_whitespace, "_"));
    let mut out = format!("{milliseconds}:{letter}:{pid} {thread} {file}:{line}: ");
    let mut others = String::new();
    for (name, value) in fields {
        if name == MESSAGE {
            push_escaped(&mut out, value);
        } else if is_shown(name) {
            push_field(&mut others, name, value);
        }
    }
    out + &others + "\n"
}

fn is_shown(name: &str) -> bool {
    name != FATAL && !JOURNAL_FIELDS.contains(&name) && !name.starts_with(JOURNAL_PREFIX)
}

fn push_field(out: &mut String, name: &str, value: &str) {
    let is_plain = !value.is_empty() && !value.contains(|c: char| c.is_whitespace() || c == '"');
    let quoted = if is_plain { value.to_owned() } else { format!("{value:?}") };
    out.push(' ');
    out.push_str(name);
    out.push('=');
    push_escaped(out, &quoted);
}

/// Appends `text` with its control characters escaped: they could break the line, or the terminal.
fn push_escaped(out: &mut String, text: &str) {
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONTEXT: LineContext<'_> = LineContext {
        milliseconds: 1234,
        severity: Severity::Warning,
        pid: 42,
        thread: "main",
        file: "src/daemon.rs",
        line: 7,
    };

    fn line(context: &LineContext<'_>, fields: &[(&'static str, &str)]) -> String {
        format(context, fields.iter().copied())
    }

    #[test]
    fn a_line_has_the_format_of_the_manual() {
        let line = line(&CONTEXT, &[(MESSAGE, "something is odd")]);
        assert_eq!(line, "1234:W:42 main src/daemon.rs:7: something is odd\n");
    }

    #[test]
    fn severities_are_ordered_and_have_letters() {
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
    fn control_characters_are_escaped() {
        let line = line(&CONTEXT, &[(MESSAGE, "a\nb\x1b[31m"), ("why", "c\nd")]);
        assert_eq!(line, "1234:W:42 main src/daemon.rs:7: a\\nb\\u{1b}[31m why=\"c\\nd\"\n");
    }

    #[test]
    fn further_fields_follow_the_text() {
        let fields =
            [("client", "10.0.0.1:4"), (MESSAGE, "refused"), ("reason", "not welcome"), ("no", "")];
        let line = line(&CONTEXT, &fields);
        assert!(line.ends_with(": refused client=10.0.0.1:4 reason=\"not welcome\" no=\"\"\n"));
    }

    #[test]
    fn fields_for_the_journal_are_not_shown() {
        let fields =
            [(MESSAGE, "x"), ("message_id", "0"), ("errno", "28"), ("flexnbd.client", "::1")];
        assert!(line(&CONTEXT, &fields).ends_with(": x\n"));
    }

    #[test]
    fn spaces_in_a_thread_name_are_replaced() {
        let context = LineContext { thread: "my thread", ..CONTEXT };
        assert!(line(&context, &[]).starts_with("1234:W:42 my_thread src/"));
    }
}

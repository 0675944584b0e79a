//! What was not understood, in one clear sentence and the usage line.
//! Decides nothing: it says again, shorter, what the parser found.

use super::MODES;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::error::Error;
use std::fmt;

/// A command line that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError {
    /// The mode it is about; none when there is no such mode, or none was given.
    pub mode: Option<&'static str>,
    /// What is wrong: one sentence, without a full stop.
    pub sentence: String,
    /// How to do it right: the usage of the mode, without the word "Usage".
    pub usage: String,
}

/// Two lines: who says it and what is wrong, then the usage.
impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = self.mode.map_or_else(String::new, |mode| format!(" {mode}"));
        writeln!(f, "flexnbd{mode}: {}", self.sentence)?;
        write!(f, "Usage: {}", self.usage)
    }
}

impl Error for UsageError {}

/// What the parser's error says, as one sentence.
pub(super) fn sentence(error: &clap::Error) -> String {
    let argument = shown(error, ContextKind::InvalidArg);
    // `[ACL_ENTRY]...` is its place in the usage; it is called ACL_ENTRY.
    let argument = argument.trim_start_matches('[').trim_end_matches("]...");
    let value = shown(error, ContextKind::InvalidValue);
    match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            format!("a mode is missing; {}", the_modes())
        }
        ErrorKind::InvalidSubcommand => unknown_mode(&shown(error, ContextKind::InvalidSubcommand)),
        ErrorKind::UnknownArgument => unknown_argument(error, argument),
        ErrorKind::MissingRequiredArgument if argument.contains(" and ") => {
            format!("{argument} are missing")
        }
        ErrorKind::MissingRequiredArgument => format!("{argument} is missing"),
        ErrorKind::InvalidValue if value.is_empty() => format!("{argument} needs a value"),
        ErrorKind::ValueValidation => match error.source() {
            Some(source) => format!("{argument}: {source}"),
            None => format!("{argument}: `{value}` is not what it may be"),
        },
        ErrorKind::ArgumentConflict => {
            let other = shown(error, ContextKind::PriorArg);
            format!("{argument} cannot go with {other}")
        }
        ErrorKind::TooManyValues => format!("{argument} takes no value, not `{value}`"),
        ErrorKind::InvalidUtf8 => "an argument is not valid UTF-8".to_owned(),
        _ => first_paragraph(&error.render().to_string()),
    }
}

/// Names the modes there are.
pub(super) fn unknown_mode(name: &str) -> String {
    format!("unknown mode `{name}`; {}", the_modes())
}

fn the_modes() -> String {
    match MODES.split_last() {
        Some((last, others)) => format!("the modes are {} and {last}", others.join(", ")),
        None => "there are none".to_owned(),
    }
}

fn unknown_argument(error: &clap::Error, argument: &str) -> String {
    if !argument.starts_with('-') {
        return format!("`{argument}` has no meaning here");
    }
    match shown(error, ContextKind::SuggestedArg) {
        hint if hint.is_empty() => format!("unknown option `{argument}`"),
        hint => format!("unknown option `{argument}`; perhaps {hint} is meant"),
    }
}

/// A detail of the error; `--addr <ADDR>` becomes `--addr ADDR`, as in the manual.
fn shown(error: &clap::Error, kind: ContextKind) -> String {
    let text = match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(" and "),
        _ => String::new(),
    };
    text.replace(['<', '>'], "")
}

/// For kinds that should not come up: the parser's own words, on one line.
fn first_paragraph(text: &str) -> String {
    let text = text.trim_start_matches("error: ");
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

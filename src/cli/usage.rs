//! Usage errors: rewrites the errors of clap as one sentence with the mode's usage line.

use super::MODES;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use std::error::Error;

/// An invalid command line. Printed as two lines: the program and the sentence, then the usage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "flexnbd{}: {sentence}\nUsage: {usage}",
    .mode.map_or_else(String::new, |mode| format!(" {mode}"))
)]
pub struct UsageError {
    /// The mode; `None` if it is missing or unknown.
    pub mode: Option<&'static str>,
    /// The error in one sentence, without a full stop.
    pub sentence: String,
    /// The usage of the mode, without the word "Usage".
    pub usage: String,
}

/// Describes the parser's error in one sentence.
pub(super) fn sentence(error: &clap::Error) -> String {
    let argument = context(error, ContextKind::InvalidArg);
    // clap names it as in the usage: `[ACL_ENTRY]...`.
    let argument = argument.trim_start_matches('[').trim_end_matches("]...");
    let value = context(error, ContextKind::InvalidValue);
    match error.kind() {
        ErrorKind::MissingSubcommand | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            format!("a mode is missing; {}", list_of_modes())
        }
        ErrorKind::InvalidSubcommand => {
            unknown_mode(&context(error, ContextKind::InvalidSubcommand))
        }
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
            let other = context(error, ContextKind::PriorArg);
            format!("{argument} cannot go with {other}")
        }
        ErrorKind::TooManyValues => format!("{argument} takes no value, not `{value}`"),
        ErrorKind::InvalidUtf8 => "an argument is not valid UTF-8".to_owned(),
        _ => first_paragraph(&error.render().to_string()),
    }
}

/// Describes an unknown mode, and lists all modes.
pub(super) fn unknown_mode(name: &str) -> String {
    format!("unknown mode `{name}`; {}", list_of_modes())
}

fn list_of_modes() -> String {
    match MODES.split_last() {
        Some((last, others)) => format!("the modes are {} and {last}", others.join(", ")),
        None => "there are none".to_owned(),
    }
}

fn unknown_argument(error: &clap::Error, argument: &str) -> String {
    if !argument.starts_with('-') {
        return format!("`{argument}` has no meaning here");
    }
    match context(error, ContextKind::SuggestedArg) {
        hint if hint.is_empty() => format!("unknown option `{argument}`"),
        hint => format!("unknown option `{argument}`; perhaps {hint} is meant"),
    }
}

/// One value of the error's context; `--addr <ADDR>` becomes `--addr ADDR`, as in the manual.
fn context(error: &clap::Error, kind: ContextKind) -> String {
    let text = match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        Some(ContextValue::Strings(texts)) => texts.join(" and "),
        _ => String::new(),
    };
    text.replace(['<', '>'], "")
}

/// The parser's own text on one line, for kinds of errors that should not occur.
fn first_paragraph(text: &str) -> String {
    let text = text.trim_start_matches("error: ");
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

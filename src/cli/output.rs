//! Writes the result of a command to standard output or standard error, and chooses the exit
//! status.
//! Never panics when the reader has closed its end.

use crate::control::status::to_json;
use std::io::{self, Write};
use std::process::ExitCode;

/// The command failed.
pub(super) const EXIT_FAILURE: u8 = 1;
/// The command line is invalid.
pub(super) const EXIT_USAGE: u8 = 2;
/// The configuration is invalid (`EX_CONFIG` of sysexits.h); the service manager need not retry.
pub(super) const EXIT_CONFIG: u8 = 78;

/// Prints one text to standard output; fails if it cannot be written.
pub(super) fn print(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has closed the pipe on purpose, so this is not an error to report.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(EXIT_FAILURE),
        Err(error) => {
            print_error(&format!("flexnbd: cannot write to standard output: {error}"), EXIT_FAILURE)
        }
    }
}

/// Prints one text to standard error, and returns `status`.
pub(super) fn print_error(text: &str, status: u8) -> ExitCode {
    // If standard error is closed, only the exit status can report the error.
    let _ = writeln!(io::stderr(), "{}", text.trim_end_matches('\n'));
    ExitCode::from(status)
}

/// Formats a status line of `key=value` pairs as JSON, or returns it unchanged.
///
/// # Errors
/// A message for the operator: the line does not consist of pairs.
pub(super) fn format_status(line: &str, json: bool) -> Result<String, String> {
    if json { to_json(line).map_err(|error| error.to_string()) } else { Ok(line.to_owned()) }
}

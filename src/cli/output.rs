//! What a command tells, where it goes, and the exit status that goes with it.
//! A reader that has gone away is never a reason to panic.

use std::io::{self, Write};
use std::process::ExitCode;

/// It did not work.
pub(super) const EXIT_FAILURE: u8 = 1;
/// The command line cannot be meant.
pub(super) const EXIT_USAGE: u8 = 2;
/// The configuration is wrong (`EX_CONFIG` of sysexits.h); a service manager need not try again.
pub(super) const EXIT_CONFIG: u8 = 78;

/// Writes one text to standard output. Success, unless it could not be written.
pub(super) fn say(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match writeln!(out, "{}", text.trim_end_matches('\n')).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read it had enough; there is nobody to tell.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(EXIT_FAILURE),
        Err(error) => {
            complain(&format!("flexnbd: cannot write to standard output: {error}"), EXIT_FAILURE)
        }
    }
}

/// Writes one text to standard error, and returns `status`.
pub(super) fn complain(text: &str, status: u8) -> ExitCode {
    // With standard error gone, the status alone must tell.
    let _ = writeln!(io::stderr(), "{}", text.trim_end_matches('\n'));
    ExitCode::from(status)
}

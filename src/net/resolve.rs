//! Finds the addresses of a host within a time limit.
//! The resolver has none of ours, so it runs on a thread, which goes on when nothing waits for it any more.

use super::{Address, Remote};
use crate::memory_reserve::check_thread_headroom;
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// The addresses of the host, at least one, in the order in which to try them.
///
/// # Errors
/// The host is unknown, or it is not found within `timeout`; the error names it.
pub fn resolve_within(remote: &Remote, timeout: Duration) -> io::Result<Vec<Address>> {
    let Remote::Host { host, .. } = remote else { return remote.resolve() };
    if host.parse::<std::net::IpAddr>().is_ok() {
        return remote.resolve();
    }
    let for_thread = remote.clone();
    within(timeout, move || for_thread.resolve()).unwrap_or_else(|| {
        let why = format!(
            "cannot find the address of host `{host}`: no answer within {} s",
            timeout.as_secs_f32()
        );
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    })
}

/// The outcome of `work`, which runs on a thread; `None` if it takes longer than `timeout`.
fn within<T: Send + 'static>(
    timeout: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Option<io::Result<T>> {
    let (sender, outcome) = mpsc::channel();
    let run = move || {
        // Nothing may wait for it any more.
        let _ = sender.send(work());
    };
    let builder = thread::Builder::new().name("resolving".into());
    if let Err(error) = check_thread_headroom().and_then(|()| builder.spawn(run)) {
        return Some(Err(error));
    }
    match outcome.recv_timeout(timeout) {
        Ok(outcome) => Some(outcome),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => {
            Some(Err(io::Error::other("the resolver has failed")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn an_address_is_its_own_answer() {
        for text in ["127.0.0.1", "::1"] {
            let remote = Remote::parse(text, Some(9)).unwrap();
            // No thread is needed, and so no time.
            assert_eq!(resolve_within(&remote, Duration::ZERO).unwrap(), remote.resolve().unwrap());
        }
        let unix = Remote::Unix("/x".into());
        assert_eq!(resolve_within(&unix, Duration::ZERO).unwrap(), [Address::Unix("/x".into())]);
    }

    #[test]
    fn a_name_that_is_no_name_is_an_error() {
        let remote = Remote::Host { host: "a..b".to_owned(), port: 9 };
        let error = resolve_within(&remote, LONG).unwrap_err().to_string();
        assert!(error.starts_with("cannot find the address of host `a..b`: "), "{error}");
    }

    #[test]
    fn a_resolver_that_hangs_is_not_waited_for() {
        let (_release, released) = mpsc::channel::<()>();
        let hang = move || Ok(released.recv().is_ok());
        assert!(within(Duration::from_millis(20), hang).is_none());
        assert_eq!(within(LONG, || Ok(7)).unwrap().unwrap(), 7);
    }
}

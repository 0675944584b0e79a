//! What an operator wants for the clients of a disk that moves: the words of `mirror` ⇄ [`RelayRequest`].

use super::CommandError;
use crate::net::Remote;
use crate::net::tls::{TlsMode, TlsTarget};

const RELAY: &str = "relay";
const NO_RELAY: &str = "no-relay";
const SECONDS: &str = "relay-for=";
const ADDRESS: &str = "relay-to=";
const EXPORT: &str = "relay-export=";
const TLS: &str = "relay-tls=";
const HOSTNAME: &str = "relay-tls-hostname=";
/// Longest time to relay, in seconds: a year, so that a deadline can be represented.
pub const RELAY_SECONDS_MAX: u64 = 365 * 24 * 3600;

/// What becomes of the clients of a disk that moves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RelayRequest {
    /// What the configuration of the server says.
    #[default]
    AsConfigured,
    /// They are disconnected.
    No,
    /// They stay, and the source passes their requests on.
    Yes(RelayOptions),
}

/// How to pass requests of clients on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RelayOptions {
    /// For at most so many seconds, from 1 to [`RELAY_SECONDS_MAX`].
    pub seconds_max: Option<u64>,
    /// The address where the destination serves the disk, if it is not that of the migration.
    pub to: Option<Remote>,
    /// The name of the export there; empty for the default.
    pub export: String,
    /// Whether to connect to that address with TLS, and the name of the server.
    pub tls: TlsTarget,
}

impl RelayRequest {
    /// The words of the request.
    pub(super) fn words(&self) -> Vec<String> {
        match self {
            Self::AsConfigured => Vec::new(),
            Self::No => vec![NO_RELAY.to_owned()],
            Self::Yes(RelayOptions { seconds_max, to, export, tls }) => {
                let mut words = vec![RELAY.to_owned()];
                words.extend(seconds_max.map(|seconds| format!("{SECONDS}{seconds}")));
                words.extend(to.as_ref().map(|to| format!("{ADDRESS}{to}")));
                words.extend((!export.is_empty()).then(|| format!("{EXPORT}{export}")));
                words.extend((tls.mode != TlsMode::Off).then(|| format!("{TLS}{}", tls.mode)));
                words.extend(tls.hostname.as_ref().map(|name| format!("{HOSTNAME}{name}")));
                words
            }
        }
    }

    /// Takes one word.
    ///
    /// # Errors
    /// The word has no meaning, or contradicts an earlier one.
    pub(super) fn take(&mut self, word: &str) -> Result<(), CommandError> {
        match (word, &mut *self) {
            (RELAY, Self::AsConfigured) => *self = Self::Yes(RelayOptions::default()),
            (NO_RELAY, Self::AsConfigured) => *self = Self::No,
            (word, Self::Yes(options)) => return options.take(word),
            _ => return Err(CommandError::BadMirrorWord),
        }
        Ok(())
    }
}

impl RelayOptions {
    fn take(&mut self, word: &str) -> Result<(), CommandError> {
        let bad = CommandError::BadMirrorWord;
        if let Some(seconds) = word.strip_prefix(SECONDS).filter(|_| self.seconds_max.is_none()) {
            let seconds = seconds.parse().map_err(|_| CommandError::BadRelaySeconds)?;
            if !(1..=RELAY_SECONDS_MAX).contains(&seconds) {
                return Err(CommandError::BadRelaySeconds);
            }
            self.seconds_max = Some(seconds);
        } else if let Some(address) = word.strip_prefix(ADDRESS).filter(|_| self.to.is_none()) {
            self.to = Some(remote(address).ok_or(CommandError::BadRelayAddress)?);
        } else if let Some(export) = word.strip_prefix(EXPORT).filter(|_| self.export.is_empty()) {
            export.clone_into(&mut self.export);
        } else if let Some(mode) = word.strip_prefix(TLS).filter(|_| self.tls.mode == TlsMode::Off)
        {
            self.tls.mode = mode.parse().map_err(|_| CommandError::BadTls)?;
        } else if let Some(name) = word
            .strip_prefix(HOSTNAME)
            .filter(|name| !name.is_empty() && self.tls.hostname.is_none())
        {
            self.tls.hostname = Some(name.to_owned());
        } else {
            return Err(bad);
        }
        Ok(())
    }
}

/// The inverse of the display of a [`Remote`].
fn remote(text: &str) -> Option<Remote> {
    if text.starts_with('/') {
        return Remote::parse(text, None).ok();
    }
    let (host, port) = text.rsplit_once(':')?;
    Remote::parse(host, Some(port.parse().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(words: &[&str]) -> Result<RelayRequest, CommandError> {
        let mut request = RelayRequest::default();
        words.iter().try_for_each(|word| request.take(word)).map(|()| request)
    }

    #[test]
    fn words_of_a_request_parse_back() {
        let remotes = ["host.example:7", "[::1]:7", "/run/a b.sock"].map(remote);
        for to in remotes.into_iter().chain([None]) {
            let tls = TlsTarget { mode: TlsMode::Require, hostname: Some("h".to_owned()) };
            let export = "a=b".to_owned();
            let options = RelayOptions { seconds_max: Some(9), to, export, tls };
            for request in [
                RelayRequest::AsConfigured,
                RelayRequest::No,
                RelayRequest::Yes(RelayOptions::default()),
                RelayRequest::Yes(options),
            ] {
                let words = request.words();
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                assert_eq!(taken(&words), Ok(request));
            }
        }
    }

    #[test]
    fn contradictory_words_are_refused() {
        for words in [
            &["relay", "no-relay"][..],
            &["no-relay", "relay"],
            &["relay", "relay"],
            &["relay-for=3"],
            &["relay", "relay-for=3", "relay-for=3"],
            &["relay", "relays"],
        ] {
            assert_eq!(taken(words), Err(CommandError::BadMirrorWord), "{words:?}");
        }
    }

    #[test]
    fn seconds_are_from_one_to_a_year() {
        let seconds = |text: &str| taken(&["relay", text]);
        for good in ["relay-for=1", "relay-for=31536000"] {
            assert!(seconds(good).is_ok());
        }
        for bad in ["relay-for=0", "relay-for=31536001", "relay-for=", "relay-for=x"] {
            assert_eq!(seconds(bad), Err(CommandError::BadRelaySeconds), "{bad}");
        }
    }

    #[test]
    fn address_needs_a_port_or_is_a_path() {
        for bad in ["relay-to=host", "relay-to=host:0", "relay-to=host:x", "relay-to="] {
            assert_eq!(taken(&["relay", bad]), Err(CommandError::BadRelayAddress), "{bad}");
        }
    }
}

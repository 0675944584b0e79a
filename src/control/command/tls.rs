//! TLS with the destination of a migration: the words of `mirror` ⇄ [`MirrorTls`].

use super::CommandError;
use crate::net::tls::{TlsFile, TlsFiles, TlsMode};

const MODE: &str = "tls=";
const CA: &str = "tls-ca=";
const CERT: &str = "tls-cert=";
const KEY: &str = "tls-key=";
const HOSTNAME: &str = "tls-hostname=";

/// What an operator wants of the connection to a destination. The server that executes the command reads
/// the files, and uses its own in place of missing ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorTls {
    /// Whether to use TLS; `None`: if the server requires it of its own clients.
    pub mode: Option<TlsMode>,
    /// The certificates; all paths are absolute.
    pub files: TlsFiles,
    /// The name that the destination's certificate must have, if not its address.
    pub hostname: Option<String>,
}

impl MirrorTls {
    /// The words of the request.
    pub(super) fn words(&self) -> impl Iterator<Item = String> + use<> {
        let word =
            |name: &'static str, value: Option<String>| value.map(|value| name.to_owned() + &value);
        let file = |name, file: &Option<TlsFile>| word(name, file.as_ref().map(TlsFile::to_string));
        let words = [
            word(MODE, self.mode.map(|mode| mode.to_string())),
            file(CA, &self.files.ca),
            file(CERT, &self.files.cert),
            file(KEY, &self.files.key),
            word(HOSTNAME, self.hostname.clone()),
        ];
        words.into_iter().flatten()
    }

    /// Takes one word; returns whether it is about TLS.
    ///
    /// # Errors
    /// The word contradicts an earlier one, or its value is invalid.
    pub(super) fn take(&mut self, word: &str) -> Result<bool, CommandError> {
        let Some((name, value)) =
            word.split_inclusive('=').next().map(|name| (name, &word[name.len()..]))
        else {
            return Ok(false);
        };
        match name {
            MODE => set(&mut self.mode, value.parse().map_err(|_| CommandError::BadTls)?)?,
            CA => set(&mut self.files.ca, file(value)?)?,
            CERT => set(&mut self.files.cert, file(value)?)?,
            KEY => set(&mut self.files.key, file(value)?)?,
            HOSTNAME if !value.is_empty() => set(&mut self.hostname, value.to_owned())?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn set<T>(place: &mut Option<T>, value: T) -> Result<(), CommandError> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(CommandError::BadMirrorWord),
    }
}

/// A path that means the same in every directory, or a credential.
fn file(value: &str) -> Result<TlsFile, CommandError> {
    match value.parse() {
        Ok(TlsFile::Path(path)) if !path.is_absolute() => Err(CommandError::BadTls),
        Ok(file) => Ok(file),
        Err(_) => Err(CommandError::BadTls),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(words: &[&str]) -> Result<MirrorTls, CommandError> {
        let mut tls = MirrorTls::default();
        for word in words {
            assert!(tls.take(word)?, "{word}");
        }
        Ok(tls)
    }

    #[test]
    fn words_of_tls_parse_back() {
        let file = |path: &str| path.parse().ok();
        let full = MirrorTls {
            mode: Some(TlsMode::Require),
            files: TlsFiles { cert: file("/c=d"), key: file("credential:k"), ca: file("/a b") },
            hostname: Some("h".to_owned()),
        };
        for tls in [full, MirrorTls::default()] {
            let words: Vec<String> = tls.words().collect();
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            assert_eq!(taken(&words), Ok(tls));
        }
    }

    #[test]
    fn invalid_values_and_repetitions_are_refused() {
        for word in ["tls=yes", "tls=", "tls-ca=a.pem", "tls-cert=", "tls-key=./k"] {
            assert_eq!(taken(&[word]), Err(CommandError::BadTls), "{word}");
        }
        let twice = ["tls=on", "tls=off"];
        assert_eq!(taken(&twice), Err(CommandError::BadMirrorWord));
    }

    #[test]
    fn other_words_are_left_to_others() {
        for word in ["relay", "relay-to=h:1", "tls", "tls-hostname=", "xtls=on", ""] {
            assert_eq!(MirrorTls::default().take(word), Ok(false), "{word}");
        }
    }
}

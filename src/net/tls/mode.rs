//! Whether the connections of a server or client are encrypted. Pure.

use std::fmt;
use std::str::FromStr;

/// Whether a server or client uses TLS (`--tls`; "TLS" in the NBD specification: NOTLS, SELECTIVETLS,
/// FORCEDTLS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlsMode {
    /// Never.
    #[default]
    Off,
    /// If the peer wants it as well. Protects from readers of the network only, because an attacker who can change
    /// its packets can also prevent TLS.
    On,
    /// Always; a peer without TLS gets nothing.
    Require,
}

impl TlsMode {
    const ALL: [Self; 3] = [Self::Off, Self::On, Self::Require];

    /// The word of the command line and of configuration files.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Require => "require",
        }
    }
}

impl fmt::Display for TlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

impl FromStr for TlsMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mode = Self::ALL.into_iter().find(|mode| mode.word().eq_ignore_ascii_case(text));
        mode.ok_or_else(|| format!("`{text}` is none of off, on and require"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_parse_back_in_any_case() {
        for mode in TlsMode::ALL {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(mode.word().to_uppercase().parse(), Ok(mode));
        }
    }

    #[test]
    fn other_words_are_refused() {
        for text in ["", "yes", "required", "1", " on"] {
            let error = text.parse::<TlsMode>().unwrap_err();
            assert_eq!(error, format!("`{text}` is none of off, on and require"));
        }
    }
}

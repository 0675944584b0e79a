//! The names of PEM files and of credentials. Pure: [`super::pem_files`] reads them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// What a name begins with that means a credential.
const CREDENTIAL: &str = "credential:";

/// The name of a PEM file: a path, or `credential:NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsFile {
    /// A file.
    Path(PathBuf),
    /// A credential of this unit.
    Credential(String),
}

/// The PEM files of a server or client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate, and those of its issuers up to the last below the root.
    pub cert: Option<TlsFile>,
    /// The private key of the certificate; it is in the file of the certificate if this is missing.
    pub key: Option<TlsFile>,
    /// The authorities whose certificates peers may present.
    pub ca: Option<TlsFile>,
}

impl fmt::Display for TlsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Credential(name) => write!(f, "{CREDENTIAL}{name}"),
        }
    }
}

impl FromStr for TlsFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix(CREDENTIAL) {
            Some(name) => Ok(Self::Credential(name.to_owned())),
            None if text.is_empty() => Err("the path is empty".to_owned()),
            None => Ok(Self::Path(text.into())),
        }
    }
}

impl TlsFiles {
    /// Whether no file is named.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether one of the names means a credential, which only the process of the unit can read.
    #[must_use]
    pub fn has_credential(&self) -> bool {
        let files = [&self.cert, &self.key, &self.ca];
        files.into_iter().any(|file| matches!(file, Some(TlsFile::Credential(_))))
    }

    /// Merges these files with `fallback`, which provides missing ones. A key belongs to its certificate.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        let key = if self.cert.is_some() { self.key } else { self.key.or(fallback.key) };
        Self { cert: self.cert.or(fallback.cert), key, ca: self.ca.or(fallback.ca) }
    }

    /// The same files with paths relative to `directory` made absolute.
    #[must_use]
    pub fn relative_to(self, directory: &Path) -> Self {
        let absolute = |file: Option<TlsFile>| {
            file.map(|file| match file {
                TlsFile::Path(path) => TlsFile::Path(directory.join(path)),
                credential @ TlsFile::Credential(_) => credential,
            })
        };
        Self { cert: absolute(self.cert), key: absolute(self.key), ca: absolute(self.ca) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Option<TlsFile> {
        Some(TlsFile::Path(text.into()))
    }

    #[test]
    fn names_parse_back() {
        for name in ["/etc/a.pem", "a.pem", "credential:a.pem", "./credential:a"] {
            let file: TlsFile = name.parse().unwrap();
            assert_eq!(file.to_string(), name);
            assert_eq!(matches!(file, TlsFile::Credential(_)), name.starts_with("credential:"));
        }
    }

    #[test]
    fn keys_stay_with_their_certificates() {
        let cert = TlsFiles { cert: path("c"), ..TlsFiles::default() };
        let all = TlsFiles { cert: path("C"), key: path("K"), ca: path("A") };
        let merged = TlsFiles { cert: path("c"), key: None, ca: path("A") };
        assert_eq!(cert.or(all.clone()), merged);
        let key = TlsFiles { key: path("k"), ..TlsFiles::default() };
        assert_eq!(key.or(all.clone()), TlsFiles { key: path("k"), ..all.clone() });
        assert_eq!(TlsFiles::default().or(all.clone()), all);
    }

    #[test]
    fn only_paths_are_made_absolute() {
        let files = TlsFiles { cert: path("c"), key: path("/k"), ca: "credential:a".parse().ok() };
        let absolute = files.relative_to(Path::new("/dir"));
        let expected =
            TlsFiles { cert: path("/dir/c"), key: path("/k"), ca: "credential:a".parse().ok() };
        assert_eq!(absolute, expected);
    }
}

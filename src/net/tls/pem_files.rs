//! Reads certificates and private keys: PEM files, or credentials that the service manager has passed
//! (`LoadCredential=` of systemd.exec(5)).

use super::error::TlsError;
use super::file::{TlsFile, TlsFiles};
use crate::small_file::{self, ReadError};
use libsystemd::credentials::CredentialsLoader;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// Longest file, in bytes. A list of all public certificate authorities has 220 KiB.
pub(super) const FILE_BYTES_MAX: u64 = 4 << 20;
/// The permission of all users to read a file.
const READ_BY_OTHERS: u32 = 0o004;

/// The directory of the credentials of this process, if the service manager has passed any.
#[must_use]
pub fn credentials_directory() -> Option<PathBuf> {
    CredentialsLoader::path_from_env()
}

impl TlsFiles {
    /// The paths of the files, as far as they are known.
    pub fn paths(&self) -> impl Iterator<Item = PathBuf> {
        let files = [&self.cert, &self.key, &self.ca];
        files.into_iter().flatten().filter_map(|file| match file {
            TlsFile::Path(path) => Some(path.clone()),
            TlsFile::Credential(name) => Some(credentials_directory()?.join(name)),
        })
    }
}

impl TlsFile {
    /// The certificates of the file, at least one.
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let pem = self.read()?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        match certificates {
            Ok(found) if found.is_empty() => Err(TlsError::NoCertificate(self.clone())),
            Ok(found) => Ok(found),
            Err(error) => {
                let why = pem_error(&error);
                Err(TlsError::BadCertificate { file: self.clone(), why })
            }
        }
    }

    /// The first private key of the file.
    pub(super) fn private_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let pem = self.read()?;
        PrivateKeyDer::from_pem_slice(&pem).map_err(|error| match error {
            _ if is_encrypted(&pem) => TlsError::EncryptedKey(self.clone()),
            pem::Error::NoItemsFound => TlsError::NoKey(self.clone()),
            error => TlsError::BadKey { file: self.clone(), why: pem_error(&error) },
        })
    }

    /// Whether every user of the host may read the file. Not known of a credential, which only the service
    /// may read.
    pub(super) fn is_readable_by_all(&self) -> bool {
        match self {
            Self::Path(path) => fs::metadata(path)
                .is_ok_and(|metadata| metadata.permissions().mode() & READ_BY_OTHERS != 0),
            Self::Credential(_) => false,
        }
    }

    fn read(&self) -> Result<Vec<u8>, TlsError> {
        let unreadable = |why: String| TlsError::Unreadable { file: self.clone(), why };
        let path = match self {
            Self::Path(path) => path.clone(),
            Self::Credential(name) => {
                if name.is_empty() || name.contains('/') || name.starts_with('.') {
                    return Err(unreadable("this is no name of a credential".to_owned()));
                }
                let directory = credentials_directory();
                directory.ok_or_else(|| TlsError::NoCredentials(self.clone()))?.join(name)
            }
        };
        small_file::read(&path, FILE_BYTES_MAX).map_err(|error| match error {
            ReadError::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                TlsError::Forbidden { file: self.clone(), user: nix::unistd::geteuid().as_raw() }
            }
            error => unreadable(self.explain(&error)),
        })
    }

    fn explain(&self, error: &ReadError) -> String {
        let kind = match error {
            ReadError::Io(error) => error.kind(),
            ReadError::NotRegular | ReadError::TooLong(_) => return format!("it is {error}"),
        };
        match (kind, self) {
            (io::ErrorKind::NotFound, Self::Path(_)) => "it does not exist".to_owned(),
            (io::ErrorKind::NotFound, Self::Credential(name)) => {
                format!("the unit has no such credential; add LoadCredential={name}:PATH to it")
            }
            _ => error.to_string(),
        }
    }
}

fn is_encrypted(pem: &[u8]) -> bool {
    let has = |marker: &[u8]| pem.windows(marker.len()).any(|window| window == marker);
    has(b"-----BEGIN ENCRYPTED PRIVATE KEY-----") || has(b"Proc-Type: 4,ENCRYPTED")
}

fn pem_error(error: &pem::Error) -> String {
    match error {
        pem::Error::MissingSectionEnd { .. } => "the line -----END is missing".to_owned(),
        pem::Error::IllegalSectionStart { .. } => "a line -----BEGIN is incomplete".to_owned(),
        _ => "it is not valid base64".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credential_names_cannot_leave_their_directory() {
        for name in ["", "../a", "a/b", ".", ".."] {
            let error = TlsFile::Credential(name.to_owned()).read().unwrap_err();
            assert!(error.to_string().ends_with("this is no name of a credential"), "{error}");
        }
    }
}

//! An instance of the service: its name, its control socket, and its configuration in
//! `/etc/flexnbd`, which the generator turns into systemd units. Such a configuration may contain
//! only paths and addresses that a unit file can express; [`check`] refuses all others.
//! Pure, except that tests select another directory by an environment variable.

use super::settings::Settings;
use crate::net::tls::TlsFile;
use crate::net::{Address, Remote};
use crate::systemd::unit::normalized_path;
use std::env;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// The directory of the service's configurations.
pub const CONFIG_DIRECTORY: &str = "/etc/flexnbd";
/// The environment variable by which tests select another directory.
const CONFIG_DIRECTORY_VARIABLE: &str = "FLEXNBD_CONFIGURATIONS";
/// Longest path of a unix socket, in bytes (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory of the control sockets of the service's instances.
const RUN_DIRECTORY: &str = "/run/flexnbd";
/// Longest name of an instance, in bytes, so that `/run/flexnbd/NAME.sock` fits into a socket
/// address (107 bytes, unix(7)).
pub const INSTANCE_BYTES_MAX: usize = 89;

/// The name of an instance: a file name without a path separator, so that its control socket always
/// lies in the run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance(String);

/// An invalid instance name; holds the name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstanceError {
    /// Empty, hidden, or with a slash, space or control character in it.
    #[error(
        "`{0}` is not the name of an instance, which is a word without / and without a dot at its \
         beginning"
    )]
    NotAName(String),
    /// Longer than [`INSTANCE_BYTES_MAX`].
    #[error("`{0}` is longer than the {INSTANCE_BYTES_MAX} bytes of a name")]
    TooLong(String),
}

impl Instance {
    /// The path of its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        Path::new(RUN_DIRECTORY).join(format!("{}.sock", self.0))
    }
}

impl FromStr for Instance {
    type Err = InstanceError;

    fn from_str(text: &str) -> Result<Self, InstanceError> {
        let is_invalid = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        if text.is_empty() || text.starts_with('.') || text.contains(is_invalid) {
            return Err(InstanceError::NotAName(text.to_owned()));
        }
        if text.len() > INSTANCE_BYTES_MAX {
            return Err(InstanceError::TooLong(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// The directory of the service's configurations, or the one that a test has selected.
#[must_use]
pub fn config_directory() -> PathBuf {
    env::var_os(CONFIG_DIRECTORY_VARIABLE).unwrap_or_else(|| CONFIG_DIRECTORY.into()).into()
}

/// Whether this file is a configuration of the service.
#[must_use]
pub fn is_service_config(file: &Path) -> bool {
    file.parent().is_some_and(|directory| directory == config_directory())
}

/// Checks that units can express the settings.
///
/// # Errors
/// A sentence for the operator that begins with the key.
pub fn check(settings: &Settings) -> Result<(), String> {
    listen_address(settings)?;
    if settings.upstream.to.is_empty() {
        image(settings)?;
    }
    upstream_sockets(settings)?;
    tls_files(settings)?;
    match &settings.sock {
        Some(path) => normalized_path(path).map(drop).map_err(|why| format!("SOCK: {why}")),
        None => Ok(()),
    }
}

/// The normalized path of the image.
///
/// # Errors
/// As [`check`].
pub fn image(settings: &Settings) -> Result<String, String> {
    let path = settings.file.as_deref().ok_or("there is no FILE=")?;
    normalized_path(path).map_err(|why| format!("FILE: {why}"))
}

/// The normalized paths of the upstream's unix sockets.
///
/// # Errors
/// As [`check`].
pub fn upstream_sockets(settings: &Settings) -> Result<Vec<String>, String> {
    let paths = settings.upstream.to.iter().filter_map(|target| match &target.remote {
        Remote::Unix(path) => Some(path),
        Remote::Host { .. } => None,
    });
    paths.map(|path| normalized_path(path).map_err(|why| format!("TO: {why}"))).collect()
}

/// Checks that the paths of certificates and keys mean the same in every directory.
fn tls_files(settings: &Settings) -> Result<(), String> {
    let (tls, to) = (&settings.tls, &settings.upstream.tls.files);
    let files = [
        ("TLS_CERT", &tls.tls_cert),
        ("TLS_KEY", &tls.tls_key),
        ("TLS_CA", &tls.tls_ca),
        ("TO_TLS_CERT", &to.cert),
        ("TO_TLS_KEY", &to.key),
        ("TO_TLS_CA", &to.ca),
    ];
    for (key, file) in files {
        if let Some(TlsFile::Path(path)) = file {
            normalized_path(path).map_err(|why| format!("{key}: {why}"))?;
        }
    }
    Ok(())
}

/// The value of `ListenStream=` in the socket unit; `None` if the configuration has no address.
///
/// # Errors
/// As [`check`].
pub fn listen_address(settings: &Settings) -> Result<Option<String>, String> {
    match settings.address().map_err(|error| error.with_keys())? {
        None => Ok(None),
        Some(Address::Tcp(address)) if address.port() == 0 => {
            Err("PORT: a socket unit needs a port that is not 0".to_owned())
        }
        Some(Address::Tcp(address)) => Ok(Some(address.to_string())),
        Some(Address::Unix(path)) => {
            let path = normalized_path(&path).map_err(|why| format!("ADDR: {why}"))?;
            // `ListenStream=` takes no quotes: systemd would read \ as a continuation, and trim a
            // space.
            if path.len() > SOCKET_PATH_BYTES_MAX || path.ends_with(['\\', ' ']) {
                return Err(format!("ADDR: a socket unit cannot listen on {path}"));
            }
            Ok(Some(path))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::config;

    fn check_text(text: &str) -> Result<(), String> {
        check(&config::parse(Path::new("disk.conf"), text).unwrap())
    }

    #[test]
    fn settings_that_units_cannot_express_are_refused() {
        for (text, refused) in [
            ("FILE=/a\nADDR=::\nPORT=0", "PORT: a socket unit needs a port that is not 0"),
            ("FILE=a", "FILE: a: a path in a unit begins with /"),
            ("FILE=/a/../b", "FILE: /a/../b: a path with .. in it cannot be in a unit"),
            ("FILE=/a\nSOCK=b", "SOCK: b: a path in a unit begins with /"),
            ("FILE=/a\nADDR=/a\\", "ADDR: a socket unit cannot listen on /a\\"),
            ("FILE=/a\nPORT=7", "PORT needs ADDR as well"),
            ("PORT=7\nADDR=::", "there is no FILE="),
            ("TO=nbd+unix:///?socket=a", "TO: a: a path in a unit begins with /"),
            ("FILE=/a\nTLS_CERT=c", "TLS_CERT: c: a path in a unit begins with /"),
            ("TO=nbds://a\nTO_TLS_CA=c", "TO_TLS_CA: c: a path in a unit begins with /"),
        ] {
            assert_eq!(check_text(text), Err(refused.to_owned()), "{text}");
        }
        let path = |bytes: usize| format!("FILE=/a\nADDR=/{}", "x".repeat(bytes - 1));
        assert_eq!(check_text(&path(107)), Ok(()));
        assert!(check_text(&path(108)).is_err());
    }
}

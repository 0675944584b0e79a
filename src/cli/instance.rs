//! Additional checks of the configurations in `/etc/flexnbd`, which the generator turns into
//! systemd units: they must contain only paths and addresses that a unit file can express.
//! Pure, except that tests select another directory by an environment variable.

use super::settings::Settings;
use crate::net::Address;
use crate::systemd::unit::plain;
use std::env;
use std::path::{Path, PathBuf};

/// The directory of the service's configurations.
pub const CONFIG_DIRECTORY: &str = "/etc/flexnbd";
/// The environment variable by which tests select another directory.
const CONFIG_DIRECTORY_VARIABLE: &str = "FLEXNBD_CONFIGURATIONS";
/// Longest path of a unix socket, in bytes (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

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
    image(settings)?;
    match &settings.sock {
        Some(path) => plain(path).map(drop).map_err(|why| format!("SOCK: {why}")),
        None => Ok(()),
    }
}

/// The normalized path of the image.
///
/// # Errors
/// As [`check`].
pub fn image(settings: &Settings) -> Result<String, String> {
    let path = settings.file.as_deref().ok_or("there is no FILE=")?;
    plain(path).map_err(|why| format!("FILE: {why}"))
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
            let path = plain(&path).map_err(|why| format!("ADDR: {why}"))?;
            // `ListenStream=` has no quotes: \ would continue the line, and a space would be trimmed.
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
        ] {
            assert_eq!(check_text(text), Err(refused.to_owned()), "{text}");
        }
        let path = |bytes: usize| format!("FILE=/a\nADDR=/{}", "x".repeat(bytes - 1));
        assert_eq!(check_text(&path(107)), Ok(()));
        assert!(check_text(&path(108)).is_err());
    }
}

//! What a configuration in `/etc/flexnbd` may say, which becomes units of the service: more is
//! refused there than in a file that is given to a server started by hand.
//! Pure but for one variable, by which tests have another directory.

use super::settings::Settings;
use crate::net::Address;
use crate::systemd::unit::plain;
use std::env;
use std::path::{Path, PathBuf};

/// Where the configurations of the service are.
pub const CONFIGURATIONS: &str = "/etc/flexnbd";
/// Names another directory for them, in tests.
const CONFIGURATIONS_VARIABLE: &str = "FLEXNBD_CONFIGURATIONS";
/// Longest path of a unix socket, in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory of the configurations of the service.
#[must_use]
pub fn configurations() -> PathBuf {
    env::var_os(CONFIGURATIONS_VARIABLE).unwrap_or_else(|| CONFIGURATIONS.into()).into()
}

/// Whether this configuration is one of the service.
#[must_use]
pub fn is_of_the_service(file: &Path) -> bool {
    file.parent().is_some_and(|directory| directory == configurations())
}

/// Checks what only the service refuses.
///
/// # Errors
/// A sentence for the operator, which begins with the key.
pub fn check(settings: &Settings) -> Result<(), String> {
    place(settings)?;
    image(settings)?;
    match &settings.sock {
        Some(path) => plain(path).map(drop).map_err(|why| format!("SOCK: {why}")),
        None => Ok(()),
    }
}

/// The path of the image, in its shortest form.
///
/// # Errors
/// As [`check`].
pub fn image(settings: &Settings) -> Result<String, String> {
    let path = settings.file.as_deref().ok_or("there is no FILE=")?;
    plain(path).map_err(|why| format!("FILE: {why}"))
}

/// What the socket unit listens on; nothing if the configuration leaves it to that.
///
/// # Errors
/// As [`check`].
pub fn place(settings: &Settings) -> Result<Option<String>, String> {
    match settings.address().map_err(|error| error.in_keys())? {
        None => Ok(None),
        Some(Address::Tcp(address)) if address.port() == 0 => {
            Err("PORT: a socket unit needs a port that is not 0".to_owned())
        }
        Some(Address::Tcp(address)) => Ok(Some(address.to_string())),
        Some(Address::Unix(path)) => {
            let path = plain(&path).map_err(|why| format!("ADDR: {why}"))?;
            // Not quoted there: the line would go on, or end earlier.
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

    fn checked(text: &str) -> Result<(), String> {
        check(&config::parse(Path::new("disk.conf"), text).unwrap())
    }

    #[test]
    fn configurations_of_the_service_refuse_what_units_cannot_say() {
        for (text, refused) in [
            ("FILE=/a\nADDR=::\nPORT=0", "PORT: a socket unit needs a port that is not 0"),
            ("FILE=a", "FILE: a: a path in a unit begins with /"),
            ("FILE=/a/../b", "FILE: /a/../b: a path with .. in it cannot be in a unit"),
            ("FILE=/a\nSOCK=b", "SOCK: b: a path in a unit begins with /"),
            ("FILE=/a\nADDR=/a\\", "ADDR: a socket unit cannot listen on /a\\"),
            ("FILE=/a\nPORT=7", "PORT needs ADDR as well"),
            ("PORT=7\nADDR=::", "there is no FILE="),
        ] {
            assert_eq!(checked(text), Err(refused.to_owned()), "{text}");
        }
        let path = |bytes: usize| format!("FILE=/a\nADDR=/{}", "x".repeat(bytes - 1));
        assert_eq!(checked(&path(107)), Ok(()));
        assert!(checked(&path(108)).is_err());
    }
}

//! The sandbox exceptions that a service needs for its image, or for the sockets of its upstream.
//! Pure.

use super::Line;
use flexnbd::cli::instance;
use flexnbd::cli::settings::Settings;
use flexnbd::systemd::unit::{device_unit, quoted};
use std::path::Path;

/// `StateDirectory=` of the services.
pub(crate) const STATE: &str = "/var/lib/flexnbd";

/// The kind of image, judged by the path, since the image itself may not exist yet.
pub(crate) enum Image {
    Device(String),
    File { path: String, directory: String },
}

impl Image {
    pub(crate) fn of(settings: &Settings) -> Result<Self, String> {
        let path = instance::image(settings)?;
        if path.starts_with("/dev/") && !path.starts_with("/dev/shm/") {
            return Ok(Self::Device(path));
        }
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned();
        Ok(Self::File { path, directory })
    }
}

/// The sandbox exceptions that the image needs.
pub(crate) fn access(image: Option<&Image>, read_only: bool) -> Vec<Line> {
    match image {
        None => Vec::new(),
        Some(Image::Device(path)) => device_access(path, read_only),
        Some(Image::File { path, directory }) if directory.is_empty() => file_access(path),
        Some(Image::File { directory, .. }) => file_access(directory),
    }
}

fn device_access(path: &str, read_only: bool) -> Vec<Line> {
    let rights = if read_only { "r" } else { "rw" };
    vec![
        ("Unit", format!("After={}", device_unit(path))),
        ("Service", "PrivateDevices=no".to_owned()),
        ("Service", format!("DeviceAllow={} {rights}", quoted(path))),
        // `PrivateUsers=` would map the group to nobody.
        ("Service", "PrivateUsers=no".to_owned()),
        ("Service", "SupplementaryGroups=disk".to_owned()),
    ]
}

/// The sandbox exceptions that the unix sockets of an upstream need, by their paths. A socket needs no write
/// access to its file system.
pub(crate) fn socket_access(paths: &[String]) -> Vec<Line> {
    let mut lines = Vec::new();
    for path in paths {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        if !directory.is_empty() {
            lines.push(("Unit", format!("RequiresMountsFor={}", quoted(directory))));
        }
    }
    for path in paths {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        lines.extend(hidden_access(directory, &quoted(&format!("-{directory}"))));
    }
    lines
}

/// Grants write access to the image's directory, where the image is created and deleted. A disk that
/// is served read-only needs it too, since a migration writes its ownership record to the image.
fn file_access(directory: &str) -> Vec<Line> {
    // Optional (-), since the program reports a missing image better than systemd does.
    let optional = quoted(&format!("-{directory}"));
    let mut lines = vec![("Unit", format!("RequiresMountsFor={}", quoted(directory)))];
    if !is_below(directory, &[STATE]) {
        lines.push(("Service", format!("ReadWritePaths={optional}")));
    }
    lines.extend(hidden_access(directory, &optional));
    lines
}

/// Makes a directory visible that the sandbox hides otherwise; `optional` is its quoted form.
fn hidden_access(directory: &str, optional: &str) -> Vec<Line> {
    let mut lines = Vec::new();
    if is_below(directory, &["/home", "/root", "/run/user"]) {
        // Hides everything else there.
        lines.push(("Service", "ProtectHome=tmpfs".to_owned()));
        lines.push(("Service", format!("BindPaths={optional}")));
    }
    if is_below(directory, &["/tmp", "/var/tmp"]) {
        lines.push(("Service", "PrivateTmp=no".to_owned()));
    }
    lines
}

fn is_below(directory: &str, parents: &[&str]) -> bool {
    parents.iter().any(|parent| Path::new(directory).starts_with(parent))
}

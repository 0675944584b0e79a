//! Fuzz target of the generator (`tests/fuzz`): an arbitrary configuration sets only the settings of units that
//! the generator knows, whatever its paths and addresses contain.

use super::generate;
use std::path::Path;

/// The settings that the generator writes.
const SETTINGS: [&str; 19] = [
    "After",
    "Before",
    "BindPaths",
    "DeviceAllow",
    "Environment",
    "FileDescriptorStoreMax",
    "IPAddressAllow",
    "IPAddressDeny",
    "ListenStream",
    "PrivateDevices",
    "PrivateTmp",
    "PrivateUsers",
    "ProtectHome",
    "ReadWritePaths",
    "Requires",
    "RequiresMountsFor",
    "SupplementaryGroups",
    "TasksMax",
    "Wants",
];

/// The units of a configuration file with this text.
pub(crate) fn configuration(text: &str) {
    let generated = generate("disk", Path::new("/etc/flexnbd/disk.conf"), Ok(text));
    for (path, text) in &generated.files {
        assert!(path.ends_with(".d/00-flexnbd-disk.conf") && !path.starts_with('/'), "{path}");
        for line in text.lines().filter(|line| !line.is_empty()) {
            let is_section = ["[Unit]", "[Service]", "[Socket]"].contains(&line);
            let is_setting = line.split_once('=').is_some_and(|(key, value)| {
                SETTINGS.contains(&key) && !value.contains(char::is_control)
            });
            assert!(line.starts_with("# Made by ") || is_section || is_setting, "{line:?}");
            assert!(!line.ends_with('\\'), "{line:?} goes on in the next line");
        }
    }
    for (path, target) in &generated.links {
        assert!(!path.contains("..") && target.starts_with("/usr/lib/systemd/system/"), "{path}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_pass() {
        for file in std::fs::read_dir("tests/fuzz/seeds/configuration").unwrap() {
            configuration(&String::from_utf8_lossy(&std::fs::read(file.unwrap().path()).unwrap()));
        }
    }
}

//! What the generator of units makes of a configuration, for those who hold a text against it.
//! Never judges it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// The instance whose configuration it is.
pub(crate) const INSTANCE: &str = "disk";

/// What was made of one configuration.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Generated {
    /// Path below the generator's directory → text, or where a link leads.
    pub(crate) made: BTreeMap<String, String>,
    /// What it complained of.
    pub(crate) told: String,
}

impl Generated {
    /// The settings of all drop-ins, without sections and comments.
    pub(crate) fn settings(&self) -> Vec<&str> {
        let lines = self.made.values().flat_map(|text| text.lines());
        lines.filter(|line| line.contains('=') && !line.starts_with('#')).collect()
    }
}

/// Runs the generator on this configuration alone.
pub(crate) fn generate(configuration: &str) -> Generated {
    let root = tempfile::tempdir().unwrap();
    let place = |name: &str| {
        let path = root.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (etc, outcome) = (place("etc"), place("outcome"));
    std::fs::write(etc.join(format!("{INSTANCE}.conf")), configuration).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
        .args([&outcome, &outcome, &outcome])
        .env("FLEXNBD_CONFIGURATIONS", &etc)
        .env_remove("SYSTEMD_SCOPE")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "the generator ended with {}", output.status);
    let told = String::from_utf8(output.stderr).unwrap();
    // The comment in each file names the directory, which is another one each time.
    let plain = |text: String| text.replace(root.path().to_str().unwrap(), "");
    let mut made = BTreeMap::new();
    collect(&outcome, &outcome, &mut made);
    Generated {
        made: made.into_iter().map(|(path, text)| (path, plain(text))).collect(),
        told: plain(told),
    }
}

fn collect(root: &Path, directory: &Path, made: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if path.is_symlink() {
            made.insert(name, std::fs::read_link(&path).unwrap().to_str().unwrap().to_owned());
        } else if path.is_dir() {
            collect(root, &path, made);
        } else {
            made.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
}

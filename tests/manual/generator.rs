//! Runs the systemd generator on a configuration, for tests that compare its output with a text.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

/// The name of the instance.
pub(crate) const INSTANCE: &str = "disk";

/// The output for one configuration.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Generated {
    /// The text of a file or the target of a link, by its path below the output directory.
    pub(crate) files: BTreeMap<String, String>,
    /// The errors on stderr.
    pub(crate) errors: String,
}

impl Generated {
    /// The settings of all drop-ins, without sections and comments.
    pub(crate) fn settings(&self) -> Vec<&str> {
        let lines = self.files.values().flat_map(|text| text.lines());
        lines.filter(|line| line.contains('=') && !line.starts_with('#')).collect()
    }
}

/// Runs the generator with only this configuration.
pub(crate) fn generate(configuration: &str) -> Generated {
    let root = tempfile::tempdir().unwrap();
    let create_directory = |name: &str| {
        let path = root.path().join(name);
        std::fs::create_dir(&path).unwrap();
        path
    };
    let (etc, outcome) = (create_directory("etc"), create_directory("outcome"));
    std::fs::write(etc.join(format!("{INSTANCE}.conf")), configuration).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_flexnbd-generator"))
        .args([&outcome, &outcome, &outcome])
        .env("FLEXNBD_CONFIGURATIONS", &etc)
        .env_remove("SYSTEMD_SCOPE")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(output.status.success(), "the generator exited with {}", output.status);
    let errors = String::from_utf8(output.stderr).unwrap();
    // The comment in each file names the temporary directory.
    let without_directory = |text: String| text.replace(root.path().to_str().unwrap(), "");
    let mut files = BTreeMap::new();
    collect(&outcome, &outcome, &mut files);
    Generated {
        files: files.into_iter().map(|(path, text)| (path, without_directory(text))).collect(),
        errors: without_directory(errors),
    }
}

fn collect(root: &Path, directory: &Path, files: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        if path.is_symlink() {
            files.insert(name, std::fs::read_link(&path).unwrap().to_str().unwrap().to_owned());
        } else if path.is_dir() {
            collect(root, &path, files);
        } else {
            files.insert(name, std::fs::read_to_string(&path).unwrap());
        }
    }
}

//! Inside a machine: commands, and what its kernel has logged.

use std::process::Command;

/// The lowest severity of a kernel message that counts as an error, see syslog(2).
const ERROR: u32 = 3;
/// Bits of a message's prefix that hold its severity.
const SEVERITY_MASK: u32 = 7;

/// Runs a line of bash that must succeed; returns its stdout and stderr.
#[track_caller]
pub(crate) fn ok(line: &str) -> String {
    let (succeeded, text) = sh(line);
    assert!(succeeded, "{line}: {text}");
    text
}

/// Runs a line of bash. Returns whether it succeeded, and its stdout and stderr.
pub(crate) fn sh(line: &str) -> (bool, String) {
    let output = Command::new("bash")
        .args(["-c", &format!("set -o pipefail; exec 2>&1; {line}")])
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The kernel's messages since a moment.
pub(crate) struct KernelLog {
    messages_before: usize,
}

impl KernelLog {
    pub(crate) fn from_now() -> KernelLog {
        KernelLog { messages_before: messages().len() }
    }

    /// Fails if the kernel has logged an error, such as a failed request of a block device.
    #[track_caller]
    pub(crate) fn assert_no_error(&self) {
        let new = messages().split_off(self.messages_before);
        let errors: Vec<_> = new.iter().filter(|message| severity(message) <= ERROR).collect();
        assert!(errors.is_empty(), "{errors:#?} in {new:#?}");
    }
}

fn messages() -> Vec<String> {
    ok("dmesg --raw || dmesg -r").lines().map(str::to_owned).collect()
}

/// The severity of a line such as `<3>[  1.234567] message`.
#[track_caller]
fn severity(message: &str) -> u32 {
    let number = message.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    let number = number.and_then(|(number, _)| number.parse::<u32>().ok());
    number.unwrap_or_else(|| panic!("{message:?} has no severity")) & SEVERITY_MASK
}

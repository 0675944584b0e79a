//! What goes into unit files (systemd.syntax(7)), and a word to the log for a program that runs
//! before there is one. Never reads or writes a unit.

use libsystemd::logging::{Priority, journal_send};
use libsystemd::unit::escape_path;
use std::env;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Set for generators by the service manager that runs them (systemd.generator(7)).
const SCOPE_VARIABLE: &str = "SYSTEMD_SCOPE";
/// Who says it, in the journal.
const IDENTIFIER: &str = "SYSLOG_IDENTIFIER";
/// Where the log is before the journal is there (and no place at all in a container).
const KERNEL_LOG: &str = "/dev/kmsg";

/// Whether the units of a template can have this instance name, as it is.
#[must_use]
pub fn is_instance_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

/// The unit of the device at this path.
#[must_use]
pub fn device_unit(path: &str) -> String {
    format!("{}.device", escape_path(path))
}

/// An absolute path in its shortest form.
///
/// # Errors
/// Why no unit can name it: units take no relative paths, no `..` and no control characters.
pub fn plain(path: &Path) -> Result<String, String> {
    let refused = |why| Err(format!("{}: {why}", path.display()));
    if !path.is_absolute() {
        return refused("a path in a unit begins with /");
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return refused("a path with .. in it cannot be in a unit");
    }
    let shortest: PathBuf = path.components().collect();
    match shortest.to_str() {
        Some(text) if !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => refused("such characters cannot be in a unit"),
    }
}

/// A word of a setting, in which nothing is special any more; it has no control characters.
#[must_use]
pub fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", unspecific(&escaped))
}

/// Text in which `%` is just that.
#[must_use]
pub fn unspecific(text: &str) -> String {
    text.replace('%', "%%")
}

/// Says something to whoever started this program: on stderr, or, since nobody sees a generator's
/// stderr, in the journal or the kernel's log.
pub fn warn(program: &str, line: &str) {
    let fields = [(IDENTIFIER, program)].into_iter();
    let told = if env::var_os(SCOPE_VARIABLE).is_none() {
        writeln!(io::stderr(), "{program}: {line}")
    } else if journal_send(Priority::Warning, line, fields).is_ok() {
        Ok(())
    } else {
        let marked = format!("<{}>{program}: {line}\n", Priority::Warning as u8);
        let kernel_log = OpenOptions::new().write(true).open(KERNEL_LOG);
        // Of which a container has none.
        let told = kernel_log.and_then(|mut log| log.write_all(marked.as_bytes()));
        told.or_else(|_| writeln!(io::stderr(), "{program}: {line}"))
    };
    // Nobody is left to be told that nothing can be said.
    drop(told);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_names_are_those_of_systemd() {
        for name in ["disk", "a-b_c.d:e@f", "\\x2d", "-", "7"] {
            assert!(is_instance_name(name), "{name}");
        }
        for name in ["", "a b", "a/b", "ä", "a%b", "a\nb", "a*"] {
            assert!(!is_instance_name(name), "{name}");
        }
    }

    #[test]
    fn a_device_has_the_unit_that_systemd_gives_it() {
        assert_eq!(device_unit("/dev/vg/my-disk"), "dev-vg-my\\x2ddisk.device");
        assert_eq!(device_unit("//dev///sda"), "dev-sda.device");
    }

    #[test]
    fn paths_are_as_short_as_can_be_and_have_nothing_odd_in_them() {
        assert_eq!(plain(Path::new("/a//./b c/")), Ok("/a/b c".to_owned()));
        assert_eq!(plain(Path::new("a")), Err("a: a path in a unit begins with /".to_owned()));
        for path in ["/a/../b", "/a\nb", "/a\u{7f}"] {
            let why = plain(Path::new(path)).unwrap_err();
            assert!(why.ends_with("cannot be in a unit"), "{why}");
        }
    }

    #[test]
    fn nothing_is_special_in_quotes() {
        assert_eq!(quoted("/srv/a b"), "\"/srv/a b\"");
        assert_eq!(quoted("a\"b\\c%d$e"), "\"a\\\"b\\\\c%%d$e\"");
    }
}

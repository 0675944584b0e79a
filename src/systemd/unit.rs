//! Values of unit files (systemd.syntax(7)), and warnings of generators, which run before the log is
//! available. Never reads or writes a unit.

use libsystemd::logging::{Priority, journal_send};
use libsystemd::unit::escape_path;
use std::env;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

/// Set by the service manager that runs a generator (systemd.generator(7)).
const SCOPE_VARIABLE: &str = "SYSTEMD_SCOPE";
/// The journal field with the name of the program.
const IDENTIFIER: &str = "SYSLOG_IDENTIFIER";
/// The kernel's log, in use before the journal; a container has none.
const KERNEL_LOG: &str = "/dev/kmsg";

/// Whether the name can be an instance of a template unit without escaping.
#[must_use]
pub fn is_instance_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
}

/// The device unit of a path.
#[must_use]
pub fn device_unit(path: &str) -> String {
    format!("{}.device", escape_path(path))
}

/// Normalizes an absolute path for a unit.
///
/// # Errors
/// Why no unit can contain it: units accept no relative paths, no `..` and no control characters.
pub fn normalized_path(path: &Path) -> Result<String, String> {
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

/// Quotes a word without control characters, so that none of its characters is special.
#[must_use]
pub fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", escape_specifiers(&escaped))
}

/// Escapes `%`, which would begin a specifier.
#[must_use]
pub fn escape_specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// Writes a warning to stderr; in a generator, whose stderr is lost, to the journal or the kernel's log.
pub fn warn(program: &str, line: &str) {
    let fields = [(IDENTIFIER, program)].into_iter();
    let written = if env::var_os(SCOPE_VARIABLE).is_none() {
        writeln!(io::stderr(), "{program}: {line}")
    } else if journal_send(Priority::Warning, line, fields).is_ok() {
        Ok(())
    } else {
        let marked = format!("<{}>{program}: {line}\n", Priority::Warning as u8);
        let kernel_log = OpenOptions::new().write(true).open(KERNEL_LOG);
        let written = kernel_log.and_then(|mut log| log.write_all(marked.as_bytes()));
        written.or_else(|_| writeln!(io::stderr(), "{program}: {line}"))
    };
    // A failure cannot be reported anywhere.
    drop(written);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instance_names_have_the_characters_of_systemd() {
        for name in ["disk", "a-b_c.d:e@f", "\\x2d", "-", "7"] {
            assert!(is_instance_name(name), "{name}");
        }
        for name in ["", "a b", "a/b", "ä", "a%b", "a\nb", "a*"] {
            assert!(!is_instance_name(name), "{name}");
        }
    }

    #[test]
    fn device_units_are_named_as_by_systemd() {
        assert_eq!(device_unit("/dev/vg/my-disk"), "dev-vg-my\\x2ddisk.device");
        assert_eq!(device_unit("//dev///sda"), "dev-sda.device");
    }

    #[test]
    fn paths_are_normalized_or_refused() {
        assert_eq!(normalized_path(Path::new("/a//./b c/")), Ok("/a/b c".to_owned()));
        assert_eq!(
            normalized_path(Path::new("a")),
            Err("a: a path in a unit begins with /".to_owned())
        );
        for path in ["/a/../b", "/a\nb", "/a\u{7f}"] {
            let why = normalized_path(Path::new(path)).unwrap_err();
            assert!(why.ends_with("cannot be in a unit"), "{why}");
        }
    }

    #[test]
    fn special_characters_are_quoted() {
        assert_eq!(quoted("/srv/a b"), "\"/srv/a b\"");
        assert_eq!(quoted("a\"b\\c%d$e"), "\"a\\\"b\\\\c%%d$e\"");
    }
}

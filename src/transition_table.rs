//! Compares a table of decisions, which a test computes, with the copy in the source tree.
//!
//! The copy is kept beside the module that decides, so that a commit that changes a decision shows
//! the change as a diff. `FLEXNBD_ACCEPT=1` rewrites the copy instead of comparing it.

use std::fmt::Write;
use std::path::Path;
use std::{env, fs, thread};

/// The environment variable that makes a test rewrite its table.
const ACCEPT_VARIABLE: &str = "FLEXNBD_ACCEPT";

/// Fails with a diff unless the file at `path`, relative to `src`, holds exactly `table`.
#[track_caller]
pub(crate) fn assert_accepted(path: &str, table: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path);
    if env::var_os(ACCEPT_VARIABLE).is_some_and(|value| value == "1") {
        fs::write(&file, table).unwrap();
        return;
    }
    let accepted = fs::read_to_string(&file).unwrap_or_default();
    let changed = diff(&accepted, table);
    let test = thread::current().name().unwrap_or_default().to_owned();
    assert!(
        changed.is_empty(),
        "src/{path} (-) is not what the code decides (+):\n{changed}\
         If the change is intended, accept it and commit the file:\n\
         {ACCEPT_VARIABLE}=1 cargo test --lib {test}",
    );
}

/// The lines that only one of the two texts has, in their order.
fn diff(accepted: &str, found: &str) -> String {
    let (old, new): (Vec<&str>, Vec<&str>) = (accepted.lines().collect(), found.lines().collect());
    // `common[i][j]` is the length of the longest common subsequence of `old[i..]` and `new[j..]`.
    let mut common = vec![vec![0; new.len() + 1]; old.len() + 1];
    for (i, line) in old.iter().enumerate().rev() {
        for (j, other) in new.iter().enumerate().rev() {
            let without = common[i + 1][j].max(common[i][j + 1]);
            common[i][j] = if line == other { common[i + 1][j + 1] + 1 } else { without };
        }
    }
    let (mut i, mut j, mut text) = (0, 0, String::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if i < old.len() && (j == new.len() || common[i + 1][j] >= common[i][j + 1]) {
            writeln!(text, "- {}", old[i]).unwrap();
            i += 1;
        } else {
            writeln!(text, "+ {}", new[j]).unwrap();
            j += 1;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn diff_shows_changed_lines_only() {
        assert_eq!(diff("a\nb\nc\n", "a\nc\nd\n"), "- b\n+ d\n");
        assert_eq!(diff("", "a\n"), "+ a\n");
        assert_eq!(diff("a\n", "a\n"), "");
    }
}

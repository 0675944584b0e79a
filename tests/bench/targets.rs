//! What is wanted of flexnbd, beside what a run showed.
//! Pure, and without consequences: a benchmark ends well whether or not a target is met.

use serde::Serialize;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Target {
    pub(super) of: &'static str,
    pub(super) wanted: &'static str,
    pub(super) seen: String,
    pub(super) met: bool,
}

/// Prints a table; nothing when there is nothing.
pub(super) fn print(targets: &[Target]) {
    if targets.is_empty() {
        return;
    }
    println!("\ntargets");
    for Target { of, wanted, seen, met } in targets {
        println!("  {:8} {of}: {seen}; wanted: {wanted}", if *met { "met" } else { "NOT MET" });
    }
}

//! A test that runs itself again elsewhere, in a lab session or a virtual machine: its test binary
//! executes there for that one test.

use std::any::type_name;
use std::io::Write as _;
use std::process::Output;

/// Prefix of a line that is printed even if the test passes.
const REPORT_PREFIX: &str = "\u{2}report: ";

/// The name of the test function whose body is the closure `F`.
#[track_caller]
pub fn test_name<F: FnOnce()>() -> &'static str {
    let path = type_name::<F>();
    let name = path.split_once("::").map_or(path, |(_, name)| name);
    name.strip_suffix("::{{closure}}").expect("the body is a closure of the test")
}

/// The arguments that make a test binary run the test `name` and print its output.
pub fn arguments(name: &str) -> [&str; 4] {
    ["--exact", name, "--nocapture", "--test-threads=1"]
}

/// Inside: prints a line that is shown even if the test passes.
pub fn report(text: &str) {
    println!("\n{REPORT_PREFIX}{text}");
}

/// Outside: fails unless the test `name` has passed inside, and prints its reports.
#[track_caller]
pub fn assert_passed(name: &str, output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    let text = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let passed = output.status.success() && text.contains("1 passed");
    assert!(passed, "{name} exited with {}:\n{text}", output.status);
    for line in text.lines().filter_map(|line| line.strip_prefix(REPORT_PREFIX)) {
        let _ = writeln!(std::io::stderr(), "{name}: {line}");
    }
}

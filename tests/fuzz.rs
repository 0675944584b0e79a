//! Builds the fuzz targets of `tests/fuzz` with libFuzzer, and runs each for a while from its seeds.
//!
//! The instrumentation is a pass of LLVM that every toolchain has, so that no nightly is needed. Options:
//! `FLEXNBD_FUZZ_SECONDS` is the time for each target, in seconds.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use harness::{env_number, project_path, require_tool, temp_dir};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::thread;

/// Time for each target, in seconds.
const SECONDS: u64 = 20;
/// Time limit for the target with a known mistake, in seconds. It takes a few.
const PLANTED_SECONDS: u64 = 120;
/// Time limit for one input, in seconds.
const INPUT_SECONDS: u64 = 20;
/// Most memory of a target, in MiB, with the fuzzer's own. Memory for one input has a lower limit
/// (`tests/fuzz/src/lib.rs`).
const MEMORY_MIB: u64 = 1024;
/// The target with a known mistake.
const PLANTED: &str = "planted";
/// What `cargo fuzz build --sanitizer none` passes.
const FLAGS: [&str; 5] = [
    "--cfg fuzzing -Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];

/// The triple of this host.
fn host() -> String {
    let version = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap().to_owned()
}

/// Builds all targets, and returns their directory.
fn build() -> PathBuf {
    let (host, directory) = (host(), project_path("target/fuzz"));
    let built = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--package", "flexnbd-fuzz", "--bins", "--profile", "fuzz"])
        // With a target, the flags do not apply to build scripts and procedural macros.
        .args(["--target", &host, "--target-dir"])
        .arg(&directory)
        .env("RUSTFLAGS", FLAGS.join(" "))
        .current_dir(project_path("."))
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    directory.join(host).join("fuzz")
}

fn targets() -> Vec<String> {
    let files = fs::read_dir(project_path("tests/fuzz/targets")).unwrap();
    let names = files.map(|file| file.unwrap().path().file_stem().unwrap().to_owned());
    let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name != PLANTED);
    names.sort();
    names
}

/// How a target ended.
struct Fuzzed {
    found: bool,
    output: String,
    /// The inputs that failed.
    inputs: Vec<PathBuf>,
}

/// Fuzzes a target for so many seconds, in a directory for its files.
fn fuzz(program: &Path, seeds: Option<&Path>, seconds: u64, directory: &Path) -> Fuzzed {
    let (corpus, failed) = (directory.join("corpus"), directory.join("failed"));
    fs::create_dir_all(&corpus).unwrap();
    fs::create_dir_all(&failed).unwrap();
    let run = Command::new(program)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-timeout={INPUT_SECONDS}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-artifact_prefix={}/", failed.display()))
        .arg(corpus)
        .args(seeds)
        // Where targets put files.
        .env("TMPDIR", directory)
        .output()
        .unwrap();
    let inputs = fs::read_dir(failed).unwrap().map(|file| file.unwrap().path()).collect();
    let output = String::from_utf8_lossy(&run.stderr).into_owned();
    Fuzzed { found: !run.status.success(), output, inputs }
}

/// The failure of a target: what it printed, and the input, to be kept as a seed.
fn describe(name: &str, Fuzzed { output, inputs, .. }: &Fuzzed) -> String {
    let start = output.find("panicked at").or_else(|| output.find("==ERROR")).unwrap_or(0);
    let text: String = output[start..].lines().take(40).map(|line| format!("{line}\n")).collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let inputs = inputs.iter().map(|path| hex(&fs::read(path).unwrap()));
    let inputs: String = inputs.map(|hex| format!("echo {hex} | xxd -r -p >input\n")).collect();
    format!("{name} fails:\n{text}{inputs}")
}

#[test]
fn no_input_breaks_a_promise() {
    if !require_tool("c++") {
        return;
    }
    let (programs, directory) = (build(), temp_dir());
    let planted = directory.path().join(PLANTED);
    let planted = fuzz(&programs.join(PLANTED), None, PLANTED_SECONDS, &planted);
    assert!(planted.output.contains("a known mistake"), "{}", planted.output);

    let seconds = env_number("FLEXNBD_FUZZ_SECONDS").unwrap_or(SECONDS);
    let (waiting, failures) = (Mutex::new(targets()), Mutex::new(Vec::new()));
    assert!(waiting.lock().unwrap().len() >= 9);
    let work = || {
        loop {
            let Some(name) = waiting.lock().unwrap().pop() else { return };
            let seeds = project_path("tests/fuzz/seeds").join(&name);
            let own = directory.path().join(&name);
            let fuzzed = fuzz(&programs.join(&name), Some(&seeds), seconds, &own);
            println!("{name}: {}", fuzzed.output.lines().last().unwrap_or_default());
            if fuzzed.found {
                failures.lock().unwrap().push(describe(&name, &fuzzed));
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(work))));
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

//! See `flexnbd::fuzz_tests::configuration`; and the generator with the same text.
#![no_main]

#[allow(dead_code, reason = "the program's main function")]
#[path = "../../../src/generator.rs"]
mod generator;

fn configuration(bytes: &[u8]) {
    flexnbd::fuzz_tests::configuration(bytes);
    generator::fuzz_tests::configuration(&String::from_utf8_lossy(bytes));
}

fuzz::target!(configuration);

//! See `flexnbd::fuzz_tests::replies`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::replies);

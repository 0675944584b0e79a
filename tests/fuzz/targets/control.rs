//! See `flexnbd::fuzz_tests::control`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::control);

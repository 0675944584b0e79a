//! See `flexnbd::fuzz_tests::words`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::words);

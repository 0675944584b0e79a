//! See `flexnbd::fuzz_tests::snapshot`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::snapshot);

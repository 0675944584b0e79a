//! See `flexnbd::fuzz_tests::ownership`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::ownership);

//! See `flexnbd::fuzz_tests::requests`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::requests);

//! See `flexnbd::fuzz_tests::handshake_client`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::handshake_client);

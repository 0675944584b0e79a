//! See `flexnbd::fuzz_tests::handshake_server`.
#![no_main]

fuzz::target!(flexnbd::fuzz_tests::handshake_server);

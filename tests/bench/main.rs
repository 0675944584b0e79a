//! Tests the benchmark command: that its parts decide rightly, and that it measures at all.
//! Measures nothing itself; that is `cargo bench --bench peers`.

#[path = "peers.rs"]
#[allow(dead_code, reason = "the command's own main is not run here")]
mod peers;

//! The file of `src/systemd` that a modelled file uses.

#[path = "../../../src/systemd/log_limit.rs"]
pub mod log_limit;

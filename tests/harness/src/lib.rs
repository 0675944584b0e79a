//! Helpers shared by the tests in `tests/*.rs`: `flexnbd` processes, an NBD client that checks
//! every reply, other programs, images, mounts, and the hosts, clients and links of migrations.
//! Never uses the library under test, and never ends a process that it has not started itself.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a fixture that cannot go on fails the test that uses it"
)]

pub mod clients;
mod endpoint;
mod files;
pub mod fio;
pub mod host;
pub mod image;
pub mod manager;
pub mod mount;
pub mod nested;
pub mod package;
pub mod pki;
mod program;
mod proto;
pub mod proxy;
pub mod raw;
mod served;
mod server;
pub mod session;
mod tools;
mod wait;
pub mod writers;

pub use endpoint::{Endpoint, free_port, unused_loopback_address};
pub use files::{
    FILE_SYSTEMS, GIB, KIB, MIB, allocated, noise, read_at, sparse_file, sparse_image, temp_dir,
    temp_dir_in, write_at,
};
pub use program::{Outcome, Peer, Program, Running, wait_for_exit};
pub use served::{Served, Style, Transport, for_each_transport_and_style};
pub use server::{Builder, Resources, Server, StderrReader};
pub use tempfile::TempDir;
pub use tools::{
    compile, env_number, failing_fsync, flexnbd, project_path, require_root, require_tool,
    require_tools, restore_default_signals, run, skip,
};
pub use wait::{TIMEOUT, poll_until, wait_until};

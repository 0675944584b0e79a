//! Images on the file systems that people keep disks on, each mounted from a file of its own: what
//! a client does to its bytes must leave its neighbours' bytes alone, whatever the file system does.
//! Never leaves anything mounted.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, too: what cannot go on fails the test"
)]

#[path = "file_systems/holes.rs"]
mod holes;
#[path = "file_systems/mounted.rs"]
mod mounted;
#[path = "file_systems/neighbours.rs"]
mod neighbours;
#[path = "file_systems/unable.rs"]
mod unable;
#[path = "file_systems/unreadable.rs"]
mod unreadable;

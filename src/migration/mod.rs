//! Moving a disk to another host while its clients keep using it.
//! What decides is pure and lives here: [`machine`] is the source's whole life, [`arrival`] the
//! destination's; [`plan`] says which range goes next, [`pace`] how fast, [`wire`] how the two
//! sides introduce themselves. None of it connects, reads a clock, touches a disk or logs.

pub mod arrival;
pub mod destination;
pub mod job;
pub mod link;
pub mod machine;
pub mod pace;
pub mod plan;
pub mod source;
pub mod spans;
pub mod wire;

//! Moving a disk to another host while its clients keep using it.
//!
//! What decides is pure: [`machine`] is the source's whole life, [`arrival`] the destination's;
//! [`plan`] says which range goes next, [`pace`] how fast, [`freeze`] how long clients may wait,
//! [`wire`] how the two sides introduce
//! themselves. None of these connects, reads a clock, touches a disk or logs, so that
//! `tests/simulation` can play them against each other by the thousand. [`source`] carries out
//! what the machine decides, over a [`link`]; [`destination`] asks the arrival before it acts.
//!
//! The source is a loop: the action's result is the next event, and orders are given between two
//! steps.
//!
//! ```text
//! let mut event = Event::Begin;
//! loop {
//!     take_orders();
//!     let action = machine.step(now(), event);
//!     report(machine.news() …);
//!     if let Action::End(outcome) = action { return outcome }
//!     event = carry_out(action);
//! }
//! ```

pub mod arrival;
pub mod destination;
pub mod freeze;
pub mod job;
pub mod link;
pub mod machine;
pub mod pace;
pub mod plan;
pub mod range_set;
pub mod source;
pub mod trouble;
pub mod wire;

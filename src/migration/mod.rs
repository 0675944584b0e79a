//! Live migration: moves a disk to another host while its clients keep using it.
//!
//! The decisions are pure: [`machine`] is the state machine of the source, [`arrival`] that of the
//! destination; [`plan`] selects the next range to copy, [`pace`] limits the speed, [`freeze`]
//! bounds the time that clients wait, [`wire`] encodes the messages that NBD does not have. None of
//! these connects, reads a clock, touches a disk or logs, so `tests/simulation` can run thousands
//! of migrations. [`source`] carries out the machine's actions, over a [`link`]; [`destination`]
//! asks the arrival before it acts.
//!
//! After the handover the sessions at the source end, or the source relays: the owner of the process connects
//! to the destination's disk ([`relay`]), which takes the place of the image.
//!
//! The source is a loop: the result of each action is the next event, and operators' requests are
//! taken between two steps.
//!
//! ```text
//! let mut event = Event::Begin;
//! loop {
//!     take_requests();
//!     let action = machine.step(now(), event);
//!     report(machine.news());
//!     if let Action::End(outcome) = action { return outcome }
//!     event = execute(action);
//! }
//! ```

pub mod arrival;
pub mod destination;
pub mod freeze;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
pub mod job;
pub mod link;
pub mod machine;
pub mod pace;
pub mod plan;
pub mod range_set;
pub mod relay;
pub mod source;
pub mod trouble;
pub mod wire;

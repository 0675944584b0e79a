//! Data integrity. Under a mixed load: fio verifies its data while other clients write, flush, trim
//! and zero. Under contention: concurrent reads and writes of several sessions are linearizable, also
//! across restarts, kills and a migration.
//!
//! A failure of the latter names its seed; `FLEXNBD_SEED=N` repeats its requests.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and their helpers fail by panicking")]

#[path = "integrity/exhaustive.rs"]
mod exhaustive;
#[path = "integrity/history.rs"]
mod history;
#[path = "integrity/linearizability.rs"]
mod linearizability;
#[path = "integrity/mixed_load.rs"]
mod mixed_load;
#[path = "integrity/register.rs"]
mod register;
#[path = "integrity/requests.rs"]
mod requests;
#[path = "integrity/sessions.rs"]
mod sessions;
#[path = "integrity/stamp.rs"]
mod stamp;

//! The files of `src/disk` that are modelled.

mod atomic_words;
/// Stands for `src/disk/backend.rs`.
mod backend {
    /// The errno of a failed system call.
    pub(super) fn errno_of(error: &std::io::Error) -> i32 {
        error.raw_os_error().unwrap()
    }
}
#[path = "../../../src/disk/buffer.rs"]
pub mod buffer;
#[path = "../../../src/disk/dirty.rs"]
pub mod dirty;
pub mod dirty_models;
#[path = "../../../src/disk/flush_errors.rs"]
mod flush_errors;
pub mod flush_models;
#[path = "../../../src/disk/gate.rs"]
pub mod gate;
pub mod gate_models;
#[path = "../../../src/disk/io_queue.rs"]
pub mod io_queue;
#[path = "../../../src/disk/op.rs"]
pub mod op;
#[path = "../../../src/disk/overlap.rs"]
pub mod overlap;
pub mod overlap_models;

pub use flush_errors::FlushObserver;
pub use io_queue::Notifier;

//! The exported bytes: the disk, its gate, its I/O, and its ownership record.
//! Knows no network, no protocol and no log; errors go to the caller as `io::Error`.
//!
//! [`Disk::enter`] passes the gate and yields a [`Visit`], through which a session accesses the
//! bytes. Hold a visit during disk work, never while waiting for a peer: whatever closes the gate
//! waits for all visits.
//!
//! A visit itself reads and writes bytes in the page cache. I/O that may take long, and everything
//! durable, is submitted as an operation ([`inflight`]), which keeps the visit and executes
//! asynchronously.

mod atomic_words;
mod backend;
mod backends;
mod blocking;
mod buffer;
mod deletion;
mod detect_zeros;
mod direct_backend;
pub mod dirty;
#[expect(clippy::module_inception, reason = "the file of the type `Disk`")]
mod disk;
mod extents;
mod features;
mod file_backend;
mod file_system;
mod flush_errors;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz_tests;
mod gate;
pub mod inflight;
mod io_queue;
mod lock;
#[cfg(test)]
pub(crate) mod memory_backend;
#[cfg(test)]
mod model_tests;
#[cfg(test)]
pub(crate) mod mutation;
mod op;
mod open;
mod overlap;
pub mod ownership;
pub mod part_sizes;
mod persistent_id;
pub mod record_store;
#[cfg(test)]
pub(crate) mod slow_backend;
pub mod state_directory;
mod state_entries;
mod syscalls;
mod thread_pool;
mod uring;
pub mod write_behind;

pub use backend::{Backend, Identity, PageCache, SocketTransfer, errno_of};
pub use buffer::Buffer;
pub use deletion::{DeletionError, PathTarget};
pub use detect_zeros::is_zero;
pub use direct_backend::DirectBackend;
pub use disk::{Copier, Disk, ExchangeError, Visit};
pub use features::{FeatureFlags, Features};
pub use file_backend::FileBackend;
pub use file_system::HolePolicy;
pub use flush_errors::FlushObserver;
pub use gate::{Expired, Gate, NoEntry, Pass, StillBusy};
pub use io_queue::{Completion, IoQueue, Notifier, OpId};
pub use lock::{Holders, LockKind};
pub use op::{Extent, Op, Returned, Zeroing};
pub use open::{Access, OpenError, SECTOR, image_size};
pub use overlap::Change;

#[cfg(test)]
mod tests;

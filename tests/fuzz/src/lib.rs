//! What all fuzz targets share: the entry point of libFuzzer, and a limit of memory.
//!
//! libFuzzer's own limits of memory need AddressSanitizer, or count only pages that were touched. So an
//! allocator counts what the target requests: a few bytes of a peer must not reserve gigabytes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

pub use libfuzzer_sys::fuzz_target;

/// Most bytes that one input may make the target allocate beyond what it held before. The largest that a peer
/// can cause is the buffer for the longest list of extents, 16 MiB, which is copied once.
pub const ALLOCATED_MAX: usize = 64 << 20;

/// Bytes that are allocated.
static ALLOCATED: AtomicUsize = AtomicUsize::new(0);
/// At so many bytes the process aborts.
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator with a limit.
struct LimitedAllocator;

#[global_allocator]
static ALLOCATOR: LimitedAllocator = LimitedAllocator;

impl LimitedAllocator {
    fn count(bytes: usize) {
        let allocated = ALLOCATED.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if allocated > LIMIT.load(Ordering::Relaxed) {
            // libFuzzer keeps the input and shows the backtrace.
            LIMIT.store(usize::MAX, Ordering::Relaxed);
            eprintln!("one input allocates {bytes} bytes, {allocated} in all");
            std::process::abort();
        }
    }
}

// SAFETY: every call is passed on to `System`, which keeps the contract, with the same arguments.
unsafe impl GlobalAlloc for LimitedAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size());
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, allocated: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.dealloc(allocated, layout) };
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size());
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, allocated: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist until the bytes are copied.
        Self::count(size);
        ALLOCATED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's contract is that of `System`.
        unsafe { System.realloc(allocated, layout, size) }
    }
}

/// Runs a target with the limit of memory.
pub fn run(target: fn(&[u8]), bytes: &[u8]) {
    LIMIT.store(ALLOCATED.load(Ordering::Relaxed) + ALLOCATED_MAX, Ordering::Relaxed);
    target(bytes);
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}

/// The entry point of a target, which is a function of bytes.
#[macro_export]
macro_rules! target {
    ($target:path) => {
        $crate::fuzz_target!(|bytes: &[u8]| $crate::run($target, bytes));
    };
}

//! The global allocator of the server: the system's, with a reserve for small allocations.
//!
//! Rust aborts the process when an allocation fails that cannot report its failure, and nearly all
//! small ones cannot: an error text, the name of a thread, an entry of a table. A limit on memory
//! (RLIMIT_AS, strict overcommit) would then end every client because of one. Large buffers are
//! therefore allocated fallibly (`try_reserve`), which ends one session; small allocations that the
//! system refuses come from a fixed reserve, so that this session can end in order. The reserve is
//! part of the program's zeroed data and takes no pages before it is used.
//!
//! A starting thread allocates where neither Rust nor the C library can report a failure (the
//! alternate signal stack, the registration of destructors), and a failure aborts the process. So we
//! start threads on behalf of peers only after [`check_thread_headroom`].

use linked_list_allocator::Heap;
use memmap2::MmapMut;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::io;
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Size of the reserve in bytes: 16 KiB for each of 128 clients. It is counted against RLIMIT_AS
/// and the commit limit from the start of the process.
pub const RESERVE_SIZE: usize = 2 << 20;

/// The longest allocation in bytes that the reserve serves. A longer one fails, so that a buffer
/// cannot take the memory that error paths need.
pub const RESERVED_ALLOCATION_MAX: usize = 8 << 10;

/// Free memory in bytes that starting a thread requires, besides its stack.
pub const THREAD_HEADROOM: usize = 1 << 20;

/// Checks that a thread can start without running out of memory before it runs our code.
///
/// Another thread can take the memory in between; the check makes an abort unlikely, not impossible.
///
/// # Errors
///
/// The error of mmap(2) if less than [`THREAD_HEADROOM`] is left.
pub fn check_thread_headroom() -> io::Result<()> {
    MmapMut::map_anon(THREAD_HEADROOM).map(drop)
}

#[repr(C, align(4096))]
struct Memory<const SIZE: usize>(UnsafeCell<[u8; SIZE]>);

/// The [`System`] allocator with a reserve of `SIZE` bytes.
pub struct ReservingAllocator<const SIZE: usize> {
    memory: Memory<SIZE>,
    heap: Mutex<Option<Heap>>,
}

// SAFETY: `memory` is reached only through `heap`, which hands out each byte of it once and is
// locked while it does.
unsafe impl<const SIZE: usize> Sync for ReservingAllocator<SIZE> {}

impl<const SIZE: usize> ReservingAllocator<SIZE> {
    /// An allocator whose reserve is untouched. It must not be moved once it has allocated, which
    /// [`GlobalAlloc`] demands of every allocator.
    pub const fn new() -> Self {
        Self { memory: Memory(UnsafeCell::new([0; SIZE])), heap: Mutex::new(None) }
    }

    /// The heap in the reserve. The lock neither allocates nor panics.
    fn heap(&self) -> MutexGuard<'_, Option<Heap>> {
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn allocate_reserved(&self, layout: Layout) -> *mut u8 {
        if layout.size() > RESERVED_ALLOCATION_MAX {
            return null_mut();
        }
        let mut heap = self.heap();
        let heap = heap.get_or_insert_with(|| {
            // SAFETY: `memory` has `SIZE` bytes, lives as long as the heap, and belongs to it alone.
            unsafe { Heap::new(self.memory.0.get().cast(), SIZE) }
        });
        heap.allocate_first_fit(layout).map_or(null_mut(), NonNull::as_ptr)
    }

    fn is_reserved(&self, allocation: *mut u8) -> bool {
        allocation.addr().wrapping_sub(self.memory.0.get().addr()) < SIZE
    }

    /// # Safety
    ///
    /// `allocation` came from `allocate_reserved` with the same layout, and is not used afterwards.
    unsafe fn free_reserved(&self, allocation: *mut u8, layout: Layout) {
        if let (Some(heap), Some(allocation)) = (&mut *self.heap(), NonNull::new(allocation)) {
            // SAFETY: the caller's promise; an address in the reserve was allocated by this heap.
            unsafe { heap.deallocate(allocation, layout) }
        }
    }
}

impl<const SIZE: usize> Default for ReservingAllocator<SIZE> {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: allocations are the system's or the heap's, which lie apart; each is returned to the one
// that made it, with the layout that it was made with.
unsafe impl<const SIZE: usize> GlobalAlloc for ReservingAllocator<SIZE> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let allocation = unsafe { System.alloc(layout) };
        if allocation.is_null() { self.allocate_reserved(layout) } else { allocation }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        let mut allocation = unsafe { System.alloc_zeroed(layout) };
        if allocation.is_null() {
            allocation = self.allocate_reserved(layout);
            if !allocation.is_null() {
                // SAFETY: the heap just handed out this many bytes.
                unsafe { allocation.write_bytes(0, layout.size()) };
            }
        }
        allocation
    }

    unsafe fn dealloc(&self, allocation: *mut u8, layout: Layout) {
        if self.is_reserved(allocation) {
            // SAFETY: the caller's promise.
            unsafe { self.free_reserved(allocation, layout) }
        } else {
            // SAFETY: the caller's promise; it is not from the reserve.
            unsafe { System.dealloc(allocation, layout) }
        }
    }

    unsafe fn realloc(&self, allocation: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !self.is_reserved(allocation) {
            // SAFETY: the caller's promise; it is not from the reserve.
            let moved = unsafe { System.realloc(allocation, layout, new_size) };
            if !moved.is_null() {
                return moved;
            }
        }
        // SAFETY: the caller promises a size that is valid for this alignment.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        // SAFETY: `new_size` is not zero, as the caller promises.
        let moved = unsafe { self.alloc(new_layout) };
        if !moved.is_null() {
            // SAFETY: both have at least this many bytes, and the new one is apart from the old one,
            // which is freed with its own layout.
            unsafe {
                allocation.copy_to_nonoverlapping(moved, layout.size().min(new_size));
                self.dealloc(allocation, layout);
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn reserve_serves_small_allocations_only() {
        let allocator = ReservingAllocator::<65536>::new();
        let longest = allocator.allocate_reserved(layout(RESERVED_ALLOCATION_MAX));
        assert!(allocator.is_reserved(longest));
        assert!(allocator.allocate_reserved(layout(RESERVED_ALLOCATION_MAX + 1)).is_null());
    }

    #[test]
    fn exhausted_reserve_fails_and_recovers() {
        let allocator = ReservingAllocator::<65536>::new();
        let mut taken = Vec::new();
        loop {
            let next = allocator.allocate_reserved(layout(1000));
            if next.is_null() {
                break;
            }
            // SAFETY: it has 1000 bytes.
            unsafe { next.write_bytes(7, 1000) };
            taken.push(next);
        }
        assert!(taken.len() > 60, "{}", taken.len());
        for allocation in taken {
            // SAFETY: allocated above with this layout.
            unsafe { allocator.dealloc(allocation, layout(1000)) };
        }
        assert!(!allocator.allocate_reserved(layout(8000)).is_null());
    }

    #[test]
    fn reallocation_moves_out_of_the_reserve_with_its_bytes() {
        let allocator = ReservingAllocator::<65536>::new();
        let small = allocator.allocate_reserved(layout(100));
        // SAFETY: it has 100 bytes, then 100 000, of which the first 100 were written.
        unsafe {
            small.write_bytes(9, 100);
            let large = allocator.realloc(small, layout(100), 100_000);
            assert!(!allocator.is_reserved(large));
            assert_eq!(std::slice::from_raw_parts(large, 100), [9; 100]);
            let shrunk = allocator.realloc(large, layout(100_000), 10);
            assert_eq!(std::slice::from_raw_parts(shrunk, 10), [9; 10]);
            allocator.dealloc(shrunk, layout(10));
        }
        assert!(allocator.is_reserved(allocator.allocate_reserved(layout(8000))));
    }

    #[test]
    fn addresses_beside_the_reserve_are_not_in_it() {
        let allocator = ReservingAllocator::<4096>::new();
        let start = allocator.memory.0.get().cast::<u8>();
        assert!(allocator.is_reserved(start));
        assert!(allocator.is_reserved(start.wrapping_add(4095)));
        assert!(!allocator.is_reserved(start.wrapping_add(4096)));
        assert!(!allocator.is_reserved(start.wrapping_sub(1)));
    }
}

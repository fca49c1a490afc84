//! An allocator that counts the allocations of one thread, for the claim that echoing allocates nothing. Only the
//! program's unit tests include it (src/echod/lib.rs).

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

/// The thread to count for; 0: none.
static WHOSE: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

impl Counting {
    fn count(&self) {
        let whose = WHOSE.load(Ordering::Relaxed);
        if whose != 0 && nix::unistd::gettid().as_raw() == whose {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: each call is passed on to the system's allocator unchanged; counting touches two atomics and no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count();
        // SAFETY: as the caller promised.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// How often the thread `tid` allocates while `what` runs.
pub fn allocations_of(tid: i32, what: impl FnOnce()) -> u64 {
    ALLOCATIONS.store(0, Ordering::Relaxed);
    WHOSE.store(tid, Ordering::SeqCst);
    what();
    WHOSE.store(0, Ordering::SeqCst);
    ALLOCATIONS.load(Ordering::Relaxed)
}

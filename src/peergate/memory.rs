//! When freed memory goes back to the system.

use crate::sys;

/// Makes the C library return memory to the system when it is freed, for allocations of `bytes` and more.
///
/// For a service that runs for months and whose connections hold buffers at times. glibc raises its threshold when such a
/// buffer is freed (mallopt(3), M_MMAP_THRESHOLD) and keeps the memory of the busiest moment, in pieces. The price is a
/// few microseconds for each such allocation. Call it before there is a second thread. Has no effect with another C
/// library.
pub fn return_memory(bytes: usize) {
    sys::map_allocations_from(bytes);
}

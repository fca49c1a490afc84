//! What memory goes back to the system.

use crate::sys;

/// Has the C library give memory back to the system as soon as it is freed, where `bytes` or more were allocated at once.
///
/// For a service that runs for months and whose connections hold buffers now and then. glibc takes what is allocated in
/// such sizes once for a hint to keep them (mallopt(3), M_MMAP_THRESHOLD), so that what the busiest moment needed stays
/// with the process, and the gaps between what is in use grow with time. The price is a few microseconds for each such
/// allocation. To be called before there is a second thread; has no effect with another C library.
pub fn return_memory(bytes: usize) {
    sys::map_allocations_from(bytes);
}

//! Intel and AMD.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod probe;

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

/// Asks for a line of memory that is read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    // SAFETY: SSE is part of x86-64, and a prefetch of any address is allowed: it changes nothing that a program could see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

//! Intel and AMD.

pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod probe;

use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};

/// Whether this core, where it has much to do with each line, gets memory into its first-level cache in time only if it was asked to have
/// it in the second before.
///
/// Measured: so on Zen 4. On Zen 5 asking once is enough. AVX-VNNI came between the two.
#[inline(always)]
pub(crate) fn is_fetched_in_steps() -> bool {
    !is_x86_feature_detected!("avxvnni")
}

/// Asks for a line of memory that is read later, into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_early<T>(address: *const T) {
    // SAFETY: as below.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
}

/// Asks for a line of memory that is read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    // SAFETY: SSE is part of x86-64, and a prefetch of any address is allowed: it changes nothing that a program could see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
}

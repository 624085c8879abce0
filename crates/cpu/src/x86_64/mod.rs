//! Intel and AMD.

pub(crate) mod amx;
pub(crate) mod avx2;
pub(crate) mod avx512;
pub(crate) mod probe;

use std::{
    arch::x86_64::{__cpuid, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch},
    sync::OnceLock,
};

use crate::memory::Fetch;

/// How weights are asked for that one row meets, `in_order` if lines are read as they lie in memory.
///
/// Measured: what is read in order AMD's cores fetch well on their own (Zen 4, Zen 5), and asking takes its place. Of what is not, Zen 4 gets it into the
/// first-level cache in time only if it was asked to have it in the second before; on Zen 5, which AVX-VNNI came with, asking once is enough. Intel's cores are to be asked
/// in both cases, and read from several pages at a time faster than from one (Emerald Rapids).
#[inline(always)]
pub(crate) fn fetched_for_one(in_order: bool) -> Fetch {
    match (is_amd(), in_order) {
        (true, true) => Fetch::No,
        (true, false) if is_x86_feature_detected!("avxvnni") => Fetch::AtOnce,
        (true, false) => Fetch::InSteps,
        (false, _) => Fetch::InPages,
    }
}

/// Whether AMD made it: asked once, since virtual machines take long to answer.
fn is_amd() -> bool {
    static VENDOR: OnceLock<[u8; 4]> = OnceLock::new();
    *VENDOR.get_or_init(vendor) == *b"Auth"
}

/// The first letters of who made it.
fn vendor() -> [u8; 4] {
    __cpuid(0).ebx.to_le_bytes()
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

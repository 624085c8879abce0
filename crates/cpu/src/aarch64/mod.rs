//! Arm.

pub(crate) mod neon;
pub(crate) mod probe;

use std::arch::asm;

use crate::memory::Fetch;

/// How weights are asked for that one row meets. Not measured on any of these.
#[inline(always)]
pub(crate) fn fetched_for_one(_: bool) -> Fetch {
    Fetch::AtOnce
}

/// Asks for a line of memory that is read later, into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_early<T>(address: *const T) {
    // SAFETY: as below.
    unsafe {
        asm!("prfm pldl2keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags))
    };
}

/// Asks for a line of memory that is read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    // SAFETY: a prefetch of any address is allowed, and changes nothing that a program could see.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags))
    };
}

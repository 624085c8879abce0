//! Arm.

pub(crate) mod neon;
pub(crate) mod probe;

use std::arch::asm;

/// Asks for a line of memory that is read soon.
#[inline(always)]
pub(crate) fn prefetch<T>(address: *const T) {
    // SAFETY: a prefetch of any address is allowed, and changes nothing that a program could see.
    unsafe {
        asm!("prfm pldl1keep, [{}]", in(reg) address, options(readonly, nostack, preserves_flags))
    };
}

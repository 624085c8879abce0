//! AMX: a unit that multiplies matrices of bytes, beside AVX-512, which does everything else.
//!
//! It has eight registers of up to 16 rows of 64 bytes. One instruction takes 64 columns of 16 rows of activations, and the same columns of 16 rows of
//! weights, four of a row together and the rows side by side, which is how words lie in a [tile](crate::tile). It adds their products to 256 sums of
//! 32 bits, in 16 cycles: eight times what VNNI does. Integer sums are exact, so they are the same here as everywhere.
//!
//! What it cannot do is to scale a part of a sum. Weights whose scales are integers have them multiplied in before ([`superblocks`]); for others the sums
//! are taken out, block by block, and scaled by AVX-512 ([`blocks`]).
//!
//! Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, "Programming with Intel Advanced Matrix Extensions".

mod blocks;
mod superblocks;

use std::{
    arch::{
        asm,
        x86_64::{__cpuid_count, __m512i, _mm512_load_si512},
    },
    sync::OnceLock,
};

use apr_tensor::block::*;

use super::avx512::{self, Avx512};
use crate::{
    activation::{MATRIX, Q8KMatrix, Q8Matrix},
    generic::{LANES, Simd, kernels},
    kernels::{Kernels, TileKernel},
    tile::{Line, ROWS},
};

/// Whether this machine can run [`KERNELS`], and this process may.
pub(crate) fn is_available() -> bool {
    static IS_PERMITTED: OnceLock<bool> = OnceLock::new();
    avx512::is_available() && has_amx() && *IS_PERMITTED.get_or_init(is_permitted)
}

/// Bits 24 and 25 of EDX in leaf 7, which machines with AVX-512 have: AMX-TILE and AMX-INT8.
fn has_amx() -> bool {
    __cpuid_count(7, 0).edx >> 24 & 0b11 == 0b11
}

/// Linux saves these registers for processes that have asked for it, then for all their threads.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    /// Of the kernel's `asm/prctl.h`.
    const ARCH_REQ_XCOMP_PERM: libc::c_int = 0x1023;
    /// The registers, among all that a thread has.
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;

    // SAFETY: no memory is passed, and nothing changes but what the kernel keeps room for.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// Those of AVX-512, and for many rows of activations the ones of this module.
macro_rules! with_matrices {
    ($($type:ident: $multiply:path, $activation:ty;)*) => {
        Kernels {
            $($type: TileKernel {
                many: Some(kernels! {
                    @fn ["avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"] $multiply,
                    (tile: &[Line], x: &[$activation], out: &mut [[f32; ROWS]])
                }),
                ..avx512::KERNELS.$type
            },)*
            ..avx512::KERNELS
        }
    };
}

pub(crate) static KERNELS: Kernels = with_matrices! {
    Q4_0: blocks::products::<Q4_0>, Q8Matrix;
    Q4_1: blocks::products::<Q4_1>, Q8Matrix;
    Q5_0: blocks::products::<Q5_0>, Q8Matrix;
    Q5_1: blocks::products::<Q5_1>, Q8Matrix;
    Q8_0: blocks::products::<Q8_0>, Q8Matrix;
    IQ4_NL: blocks::products::<IQ4_NL>, Q8Matrix;
    Q2_K: superblocks::products::<Q2_K>, Q8KMatrix;
    Q3_K: superblocks::products::<Q3_K>, Q8KMatrix;
    Q4_K: superblocks::products::<Q4_K>, Q8KMatrix;
    Q5_K: superblocks::products::<Q5_K>, Q8KMatrix;
    Q6_K: superblocks::products::<Q6_K>, Q8KMatrix;
    IQ4_XS: superblocks::products::<IQ4_XS>, Q8KMatrix;
};

/// A register of sums: those of 16 rows of weights for each row of activations.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[i32; LANES]; MATRIX]);

impl Sums {
    const ZERO: Self = Self([[0; LANES]; MATRIX]);

    #[inline(always)]
    fn row(&self, n: usize) -> __m512i {
        // SAFETY: a row is 64 bytes, and aligned to as many; this runs only within kernels.
        unsafe { _mm512_load_si512(self.0[n].as_ptr().cast()) }
    }
}

/// The shapes of the registers, as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Registers 0 to 3 hold sums, 4 holds so many columns of activations, 5 to 7 the same of weights.
const fn shapes(columns: u8) -> Shapes {
    let mut row_bytes = [0; 16];
    let mut rows = [0; 16];
    let mut i = 0;
    while i < 8 {
        row_bytes[i] = if i == 4 { columns as u16 } else { 64 };
        rows[i] = if i > 4 { columns / 4 } else { MATRIX as u8 };
        i += 1;
    }
    Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
}

/// The unit, in use. When it is dropped the registers are as if they had never been used, so that nobody has to save them.
struct Unit;

impl Unit {
    #[inline(always)]
    fn shaped(shapes: &'static Shapes) -> Self {
        // SAFETY: kernels run only where the unit is. It reads 64 bytes, and sets all registers to 0.
        unsafe {
            asm!(
                "ldtilecfg [{}]", in(reg) shapes,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly)
            );
        }
        Self
    }
}

impl Drop for Unit {
    #[inline(always)]
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, nomem)
            );
        }
    }
}

/// What [`chains`] does in a round, for [`crate::probe`]: 64 products and sums for each of 256 sums, in each chain.
pub(crate) const CHAINS_OPS: u64 = 2 * 64 * 256 * 4;

/// Multiplies what lies in registers.
#[inline(always)]
pub(crate) fn chains(rounds: usize, out: &mut f32) {
    let _unit = Unit::shaped(&const { shapes(64) });
    let (ones, mut sums) = ([Line([1; 64]); MATRIX], [Sums::ZERO; 4]);
    // SAFETY: this runs only where the unit is. It reads 16 lines of ones, and writes all sums.
    unsafe {
        asm!(
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "tileloadd tmm4, [{ones} + {line}]",
            "tileloadd tmm5, [{ones} + {line}]",
            "2:",
            "tdpbssd tmm0, tmm4, tmm5", "tdpbssd tmm1, tmm4, tmm5",
            "tdpbssd tmm2, tmm4, tmm5", "tdpbssd tmm3, tmm4, tmm5",
            "dec {rounds}",
            "jnz 2b",
            "tilestored [{sums} + {line}], tmm0",
            "tilestored [{sums} + {line} + 1024], tmm1",
            "tilestored [{sums} + {line} + 2048], tmm2",
            "tilestored [{sums} + {line} + 3072], tmm3",
            ones = in(reg) ones.as_ptr(),
            sums = in(reg) sums.as_mut_ptr(),
            line = in(reg) 64usize,
            rounds = inout(reg) rounds.max(1) => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _,
            options(nostack)
        );
    }
    for sums in sums {
        for sum in sums.0.as_flattened() {
            *out += *sum as f32;
        }
    }
}

/// The half `half` of a row of products.
#[inline(always)]
fn load_half(row: &[f32; ROWS], half: usize) -> <Avx512 as Simd>::Part {
    Avx512::load(&row.as_chunks::<LANES>().0[half])
}

#[inline(always)]
fn store_half(products: <Avx512 as Simd>::Part, row: &mut [f32; ROWS], half: usize) {
    row.as_chunks_mut::<LANES>().0[half] = Avx512::store(products);
}

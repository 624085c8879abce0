//! Sums in a fixed order: [`LANES`] lanes, then a tree.

use half::{f16, slice::HalfFloatSliceExt, vec::HalfBitsVecExt};

use super::Simd;

/// Lanes of every float sum: element `i` goes to lane `i % LANES`, whatever the width of a register.
pub(crate) const LANES: usize = 16;

/// Sums the lanes as a tree: lane `i` takes lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
#[inline(always)]
pub(crate) fn sum<T: Copy + std::ops::AddAssign>(mut lanes: [T; LANES]) -> T {
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for i in 0..width {
            let other = lanes[i + width];
            lanes[i] += other;
        }
    }
    lanes[0]
}

/// A value that dot products read: f32, or f16 widened exactly.
pub(crate) trait Element: Copy + Default + Send + Sync + 'static {
    /// Zeros, in memory that the operating system need not provide before it is written.
    fn zeros(len: usize) -> Vec<Self>;

    /// Rounds `x` to this type, to the nearest, ties to even.
    fn narrow(x: &[f32], out: &mut [Self]);

    fn load<S: Simd>(x: &[Self; LANES]) -> S::Lanes;
}

impl Element for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    fn narrow(x: &[f32], out: &mut [Self]) {
        out.copy_from_slice(x);
    }

    #[inline(always)]
    fn load<S: Simd>(x: &[Self; LANES]) -> S::Lanes {
        S::load(x)
    }
}

impl Element for f16 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    fn narrow(x: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(x);
    }

    #[inline(always)]
    fn load<S: Simd>(x: &[Self; LANES]) -> S::Lanes {
        S::load_f16(x)
    }
}

/// Fewer than [`LANES`] elements, filled up with zeros.
#[inline(always)]
pub(crate) fn padded<E: Element>(tail: &[E]) -> [E; LANES] {
    let mut lanes = [E::default(); LANES];
    lanes[..tail.len()].copy_from_slice(tail);
    lanes
}

/// Little-endian f16 bytes, exactly.
#[inline(always)]
pub(crate) fn widen_f16<S: Simd>(bytes: &[u8], out: &mut [f32]) {
    let (halves, _) = bytes.as_chunks::<2>();
    let (chunks, tail) = halves.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        let mut halves = [f16::ZERO; LANES];
        for (half, &bytes) in halves.iter_mut().zip(x) {
            *half = f16::from_le_bytes(bytes);
        }
        *out = S::store(S::load_f16(&halves));
    }
    for (&x, out) in tail.iter().zip(out_tail) {
        *out = f16::from_le_bytes(x).to_f32();
    }
}

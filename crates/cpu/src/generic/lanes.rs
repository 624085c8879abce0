//! Sums in a fixed order: [`LANES`] lanes, then a tree.

use half::{f16, vec::HalfBitsVecExt};

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

    fn load<S: Simd>(x: &[Self; LANES]) -> S::Lanes;
}

impl Element for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
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

/// The dot products of `x` with `T` rows: in each lane `fma` in ascending order from 0, then the tree of [`sum`].
///
/// A last group of fewer than [`LANES`] elements is filled up with zeros on both sides.
#[inline(always)]
pub(crate) fn dot<S: Simd, E: Element, const T: usize>(x: &[f32], rows: [&[E]; T]) -> [f32; T] {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [S::splat(0.0); T];
    for (i, x) in chunks.iter().enumerate() {
        let x = S::load(x);
        for t in 0..T {
            let row = rows[t][i * LANES..].first_chunk().expect("rows are as long as x");
            acc[t] = S::fma(x, E::load::<S>(row), acc[t]);
        }
    }
    if !tail.is_empty() {
        let (x, start) = (S::load(&padded(tail)), chunks.len() * LANES);
        for t in 0..T {
            let row = padded(&rows[t][start..][..tail.len()]);
            acc[t] = S::fma(x, E::load::<S>(&row), acc[t]);
        }
    }
    let mut out = [0.0; T];
    for t in 0..T {
        out[t] = sum(S::store(acc[t]));
    }
    out
}

/// `x` against one row after the other: a [`dot`] each, four at a time.
#[inline(always)]
pub(crate) fn dots<S: Simd, E: Element>(x: &[f32], rows: &[E], out: &mut [f32]) {
    let row = |t: usize| &rows[t * x.len()..][..x.len()];
    let (fours, rest) = out.as_chunks_mut::<4>();
    for (t, out) in fours.iter_mut().enumerate() {
        *out = dot::<S, E, 4>(x, [row(4 * t), row(4 * t + 1), row(4 * t + 2), row(4 * t + 3)]);
    }
    for (t, out) in rest.iter_mut().enumerate() {
        [*out] = dot::<S, E, 1>(x, [row(4 * fours.len() + t)]);
    }
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

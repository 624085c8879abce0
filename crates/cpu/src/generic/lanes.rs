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

    fn widen<S: Simd>(x: &[Self; LANES]) -> [f32; LANES];
}

impl Element for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    #[inline(always)]
    fn widen<S: Simd>(x: &[Self; LANES]) -> [f32; LANES] {
        *x
    }
}

impl Element for f16 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }

    #[inline(always)]
    fn widen<S: Simd>(x: &[Self; LANES]) -> [f32; LANES] {
        S::widen_f16(x)
    }
}

/// Fewer than [`LANES`] elements, filled up with zeros.
#[inline(always)]
pub(crate) fn padded<E: Element>(tail: &[E]) -> [E; LANES] {
    let mut lanes = [E::default(); LANES];
    lanes[..tail.len()].copy_from_slice(tail);
    lanes
}

/// `acc[i] = a[i] * b[i] + acc[i]`, fused.
#[inline(always)]
pub(crate) fn fma(acc: &mut [f32; LANES], a: &[f32; LANES], b: &[f32; LANES]) {
    for i in 0..LANES {
        acc[i] = a[i].mul_add(b[i], acc[i]);
    }
}

/// The dot products of `x` with `T` rows: in each lane `fma` in ascending order from 0, then the tree of [`sum`].
///
/// A last group of fewer than [`LANES`] elements is filled up with zeros on both sides.
#[inline(always)]
pub(crate) fn dot<S: Simd, E: Element, const T: usize>(x: &[f32], rows: [&[E]; T]) -> [f32; T] {
    let (chunks, tail) = x.as_chunks::<LANES>();
    let mut acc = [[0.0; LANES]; T];
    for (i, x) in chunks.iter().enumerate() {
        for t in 0..T {
            let row = rows[t][i * LANES..].first_chunk().expect("rows are as long as x");
            fma(&mut acc[t], x, &E::widen::<S>(row));
        }
    }
    if !tail.is_empty() {
        let x = padded(tail);
        for t in 0..T {
            let row = padded(&rows[t][chunks.len() * LANES..][..tail.len()]);
            fma(&mut acc[t], &x, &E::widen::<S>(&row));
        }
    }
    acc.map(sum)
}

/// One row of weights against each row of `x`: a [`dot`] each.
#[inline(always)]
pub(crate) fn dots(w: &[f32], x: &[f32], out: &mut [f32]) {
    use super::scalar::Scalar; // nothing to widen
    const T: usize = 4;
    let row = |t: usize| &x[t * w.len()..][..w.len()];
    let (groups, rest) = out.as_chunks_mut::<T>();
    for (g, out) in groups.iter_mut().enumerate() {
        *out = dot::<Scalar, f32, T>(w, std::array::from_fn(|t| row(g * T + t)));
    }
    for (t, out) in rest.iter_mut().enumerate() {
        [*out] = dot::<Scalar, f32, 1>(w, [row(groups.len() * T + t)]);
    }
}

/// Little-endian f16 bytes, exactly.
#[inline(always)]
pub(crate) fn widen_f16<S: Simd>(bytes: &[u8], out: &mut [f32]) {
    let (halves, _) = bytes.as_chunks::<2>();
    let (chunks, tail) = halves.as_chunks::<LANES>();
    let (outs, out_tail) = out.as_chunks_mut::<LANES>();
    for (x, out) in chunks.iter().zip(outs) {
        *out = S::widen_f16(&x.map(f16::from_le_bytes));
    }
    for (&x, out) in tail.iter().zip(out_tail) {
        *out = f16::from_le_bytes(x).to_f32();
    }
}

//! Dot products of float weights with activations as they are.
//!
//! The contract: element `i` goes to lane `i % LANES`, in each lane `fma` in ascending order from 0, then the tree of
//! [`sum`](super::lanes::sum). A last group of fewer than [`LANES`] elements is filled up with zeros on both sides.
//!
//! Some rows of weights meet some rows of activations at a time, so that each number is loaded once for several products.

use super::{LANES, Simd, lanes::padded};
use crate::tile::{FETCH_AHEAD, ROWS};

/// A stored type of floats, little-endian, widened exactly.
pub(crate) trait Float {
    /// [`LANES`] elements.
    type Group;

    /// The bytes of whole groups, and of what is left.
    fn groups(bytes: &[u8]) -> (&[Self::Group], &[u8]);

    fn load<S: Simd>(group: &Self::Group) -> S::Lanes;
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct BF16;

impl Float for F32 {
    type Group = [u8; 4 * LANES];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> (&[Self::Group], &[u8]) {
        bytes.as_chunks()
    }

    #[inline(always)]
    fn load<S: Simd>(group: &Self::Group) -> S::Lanes {
        S::load_f32(group)
    }
}

impl Float for F16 {
    type Group = [u8; 2 * LANES];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> (&[Self::Group], &[u8]) {
        bytes.as_chunks()
    }

    #[inline(always)]
    fn load<S: Simd>(group: &Self::Group) -> S::Lanes {
        S::load_halves(group)
    }
}

impl Float for BF16 {
    type Group = [u8; 2 * LANES];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> (&[Self::Group], &[u8]) {
        bytes.as_chunks()
    }

    #[inline(always)]
    fn load<S: Simd>(group: &Self::Group) -> S::Lanes {
        S::load_bf16(group)
    }
}

/// Rows of activations that meet some rows of weights at a time, if there are as many.
const GROUP: usize = 6;

/// Columns, in groups of [`LANES`], that all rows of weights go through before the next ones come: so few that the activations
/// stay in the first-level cache.
const STRETCH: usize = 32;

/// `N` rows of activations, [`LANES`] columns of one after those of the other: rows as they are may lie so far apart that
/// they throw each other out of the cache.
type Packed<const N: usize> = [[f32; LANES]; N];

/// At most [`ROWS`] rows of weights, one after the other, against each row of `x`.
#[inline(always)]
pub(crate) fn products<S: Simd, F: Float>(w: &[u8], x: &[&[f32]], out: &mut [[f32; ROWS]]) {
    if x.first().is_none_or(|x| x.is_empty()) {
        out.fill([0.0; ROWS]);
    } else if S::REGISTERS * S::PARTS >= 16 {
        blocks::<S, F, 4>(w, x, out);
    } else {
        blocks::<S, F, 2>(w, x, out);
    }
}

/// The same with blocks of `R` rows of weights and [`GROUP`] rows of activations, which are then taken one by one.
#[inline(always)]
fn blocks<S: Simd, F: Float, const R: usize>(w: &[u8], x: &[&[f32]], out: &mut [[f32; ROWS]]) {
    let row_bytes = x[0].len() * size_of::<F::Group>() / LANES;
    let (groups, rest) = x.as_chunks::<GROUP>();
    let (outs, out) = out.as_chunks_mut::<GROUP>();
    let mut sums = [[S::splat(0.0); GROUP]; ROWS];
    let mut packed = [[[0.0; LANES]; GROUP]; STRETCH];
    for (g, (x, out)) in groups.iter().zip(outs).enumerate() {
        let count = x[0].len() / LANES;
        let next = groups.get(g + 1).unwrap_or(x);
        for from in (0..count).step_by(STRETCH) {
            let packed = &mut packed[..STRETCH.min(count - from)];
            for n in 0..GROUP {
                let next = next[n][from * LANES..].as_ptr();
                let x = &x[n].as_chunks().0[from..][..packed.len()];
                for (i, (packed, x)) in packed.iter_mut().zip(x).enumerate() {
                    packed[n] = *x;
                    S::prefetch(next.wrapping_add(i * LANES));
                }
            }
            add_products::<S, F, R, GROUP>(w, row_bytes, packed, from, g == 0, &mut sums);
        }
        finish::<S, F, GROUP>(w, row_bytes, *x, &mut sums, out);
    }
    let mut sums = [[S::splat(0.0)]; ROWS];
    for (&x, out) in rest.iter().zip(out) {
        let (columns, _) = x.as_chunks::<LANES>();
        add_products::<S, F, R, 1>(w, row_bytes, columns.as_chunks().0, 0, false, &mut sums);
        finish::<S, F, 1>(w, row_bytes, [x], &mut sums, std::array::from_mut(out));
    }
}

/// Adds the products of all rows of weights, in the columns from group `from` on, to `sums`, which begin with group 0.
///
/// With `fetch` the rows after those in use are asked for: they are read for the first time.
#[inline(always)]
fn add_products<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[Packed<N>],
    from: usize,
    fetch: bool,
    sums: &mut [[S::Lanes; N]; ROWS],
) {
    let rows = w.len() / row_bytes;
    let mut r = 0;
    while r + R <= rows {
        let sums = sums[r..].first_chunk_mut().expect("there are no more rows than sums");
        block::<S, F, R, N>(&w[r * row_bytes..], row_bytes, x, from, fetch, sums);
        r += R;
    }
    while r < rows {
        let sums = std::array::from_mut(&mut sums[r]);
        block::<S, F, 1, N>(&w[r * row_bytes..], row_bytes, x, from, fetch, sums);
        r += 1;
    }
}

/// The same for the first `R` rows of `w`.
#[inline(always)]
fn block<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[Packed<N>],
    from: usize,
    fetch: bool,
    sums: &mut [[S::Lanes; N]; R],
) {
    let mut rows: [&[F::Group]; R] = [&[]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &F::groups(&w[r * row_bytes..][..row_bytes]).0[from..][..x.len()];
    }
    if fetch {
        for row in rows {
            for group in row {
                S::prefetch(std::ptr::from_ref(group).wrapping_byte_add(2 * R * row_bytes));
            }
        }
    }
    if from == 0 {
        *sums = [[S::splat(0.0); N]; R];
    }
    if N == 1 {
        // Each number is read once, from memory, which wants many sums at a time.
        return add_share::<S, F, All, R, N>(rows, x, sums);
    }
    add_share::<S, F, Part<0>, R, N>(rows, x, sums);
    if S::PARTS > 1 {
        add_share::<S, F, Part<1>, R, N>(rows, x, sums);
    }
    if S::PARTS > 2 {
        add_share::<S, F, Part<2>, R, N>(rows, x, sums);
        add_share::<S, F, Part<3>, R, N>(rows, x, sums);
    }
}

/// Which of the [`LANES`] lanes a loop takes. A block of sums in registers is the larger, and its operands are loaded the less
/// often, the fewer registers each sum takes.
trait Share<S: Simd> {
    type Lanes: Copy;

    fn of(lanes: S::Lanes) -> Self::Lanes;
    fn fma(a: Self::Lanes, b: Self::Lanes, c: Self::Lanes) -> Self::Lanes;
    fn put(share: Self::Lanes, lanes: &mut S::Lanes);
}

/// All of them.
struct All;

/// Those of one register.
struct Part<const I: usize>;

impl<S: Simd> Share<S> for All {
    type Lanes = S::Lanes;

    #[inline(always)]
    fn of(lanes: S::Lanes) -> S::Lanes {
        lanes
    }

    #[inline(always)]
    fn fma(a: S::Lanes, b: S::Lanes, c: S::Lanes) -> S::Lanes {
        S::fma(a, b, c)
    }

    #[inline(always)]
    fn put(share: S::Lanes, lanes: &mut S::Lanes) {
        *lanes = share;
    }
}

impl<S: Simd, const I: usize> Share<S> for Part<I> {
    type Lanes = S::Part;

    #[inline(always)]
    fn of(lanes: S::Lanes) -> S::Part {
        S::part(lanes, I)
    }

    #[inline(always)]
    fn fma(a: S::Part, b: S::Part, c: S::Part) -> S::Part {
        S::fma_part(a, b, c)
    }

    #[inline(always)]
    fn put(share: S::Part, lanes: &mut S::Lanes) {
        S::set_part(lanes, I, share);
    }
}

/// Adds the products of one share of the lanes, of `R` rows of weights and `N` of activations.
#[inline(always)]
fn add_share<S: Simd, F: Float, L: Share<S>, const R: usize, const N: usize>(
    w: [&[F::Group]; R],
    x: &[Packed<N>],
    sums: &mut [[S::Lanes; N]; R],
) {
    let mut acc = [[L::of(S::splat(0.0)); N]; R];
    for r in 0..R {
        for n in 0..N {
            acc[r][n] = L::of(sums[r][n]);
        }
    }
    for (i, x) in x.iter().enumerate() {
        let mut weights = [L::of(S::splat(0.0)); R];
        for r in 0..R {
            weights[r] = L::of(F::load::<S>(&w[r][i]));
            if N == 1 {
                S::prefetch(std::ptr::from_ref(&w[r][i]).wrapping_byte_add(FETCH_AHEAD));
            }
        }
        for n in 0..N {
            let x = L::of(S::load(&x[n]));
            for r in 0..R {
                acc[r][n] = L::fma(weights[r], x, acc[r][n]);
            }
        }
    }
    for r in 0..R {
        for n in 0..N {
            L::put(acc[r][n], &mut sums[r][n]);
        }
    }
}

/// Adds the products of the columns after the last whole group, and sums the lanes.
#[inline(always)]
fn finish<S: Simd, F: Float, const N: usize>(
    w: &[u8],
    row_bytes: usize,
    x: [&[f32]; N],
    sums: &mut [[S::Lanes; N]; ROWS],
    out: &mut [[f32; ROWS]; N],
) {
    if x[0].len() < LANES {
        *sums = [[S::splat(0.0); N]; ROWS];
    }
    let rows = w.len() / row_bytes;
    let sums = &mut sums[..rows];
    if !x[0].len().is_multiple_of(LANES) {
        for (w, sums) in w.chunks_exact(row_bytes).zip(&mut *sums) {
            let mut bytes = [0; 4 * LANES];
            let (_, tail) = F::groups(w);
            bytes[..tail.len()].copy_from_slice(tail);
            let weights = F::load::<S>(&F::groups(&bytes).0[0]);
            for n in 0..N {
                let x = S::load(&padded(x[n].as_chunks::<LANES>().1));
                sums[n] = S::fma(weights, x, sums[n]);
            }
        }
    }
    let (fours, rest) = sums.as_chunks::<4>();
    for n in 0..N {
        let (out, out_rest) = out[n][..rows].as_chunks_mut::<4>();
        for (out, sums) in out.iter_mut().zip(fours) {
            *out = S::sums([sums[0][n], sums[1][n], sums[2][n], sums[3][n]]);
        }
        for (out, sums) in out_rest.iter_mut().zip(rest) {
            *out = S::sum(sums[n]);
        }
    }
}

//! Dot products of float weights with activations as they are.
//!
//! The contract: element `i` goes to lane `i % LANES`, in each lane `fma` in ascending order from 0, then the tree of
//! [`sum`](super::lanes::sum). A last group of fewer than [`LANES`] elements is filled up with zeros on both sides.
//!
//! Some rows of weights meet some rows of activations at a time, so that each number is loaded once for several products.

use super::{LANES, Simd};
use crate::{
    activation::{Floats, GROUP},
    memory::{Fetch, fetch_after, fetched_for_one, prefetch},
    tile::ROWS,
};

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
        let mut lanes = S::splat(0.0);
        for i in 0..S::PARTS {
            S::set_part(&mut lanes, i, S::load_halves(group, i));
        }
        lanes
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

/// The most columns, in groups of [`LANES`], that all rows of weights go through before the next ones come: so few that the
/// activations stay in the first-level cache.
const STRETCH: usize = 64;

/// At most [`ROWS`] rows of weights of `cols` columns, one after the other, against each row of `x`, which is
/// [packed](crate::activation::pack).
#[inline(always)]
pub(crate) fn products<S: Simd, F: Float>(
    w: &[u8],
    cols: usize,
    x: &[Floats],
    out: &mut [[f32; ROWS]],
) {
    let many = S::REGISTERS * S::PARTS >= 16;
    match (cols, out.len()) {
        (0, _) => out.fill([0.0; ROWS]),
        // One row after the other, as they lie in memory: that is one stream, which is faster than several.
        (_, 1) => blocks::<S, F, 1, 1>(w, cols, x, out),
        _ if many => blocks::<S, F, 4, GROUP>(w, cols, x, out),
        _ => blocks::<S, F, 2, GROUP>(w, cols, x, out),
    }
}

/// The same with blocks of `R` rows of weights and `N` of activations.
#[inline(always)]
fn blocks<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    cols: usize,
    x: &[Floats],
    out: &mut [[f32; ROWS]],
) {
    let row_bytes = cols * size_of::<F::Group>() / LANES;
    let (whole, groups) = (cols / LANES, cols.div_ceil(LANES));
    // One row is read once, and its weights are best read as they lie.
    let stretches = if N == 1 { 1 } else { whole.div_ceil(STRETCH).max(1) };
    let stretch = whole.div_ceil(stretches).max(1);
    let mut sums = [[S::splat(0.0); N]; ROWS];
    for (g, (x, out)) in x.chunks_exact(groups * N).zip(out.chunks_mut(N)).enumerate() {
        let (x, last) = x.as_chunks().0.split_at(whole);
        for (i, x) in x.chunks(stretch).enumerate() {
            add_products::<S, F, R, N>(w, row_bytes, x, i * stretch, g == 0, &mut sums);
        }
        if whole == 0 {
            sums = [[S::splat(0.0); N]; ROWS];
        }
        finish::<S, F, N>(w, row_bytes, last.first(), &mut sums, out);
    }
}

/// Adds the products of all rows of weights, in the columns from group `from` on, to `sums`, which begin with group 0.
///
/// With `fetch` the rows after those in use are asked for: they are read for the first time.
#[inline(always)]
fn add_products<S: Simd, F: Float, const R: usize, const N: usize>(
    w: &[u8],
    row_bytes: usize,
    x: &[[Floats; N]],
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
    x: &[[Floats; N]],
    from: usize,
    fetch: bool,
    sums: &mut [[S::Lanes; N]; R],
) {
    let mut rows: [&[F::Group]; R] = [&[]; R];
    for (r, row) in rows.iter_mut().enumerate() {
        *row = &F::groups(&w[r * row_bytes..][..row_bytes]).0[from..][..x.len()];
    }
    if fetch && N > 1 {
        for row in rows {
            for group in row {
                prefetch(std::ptr::from_ref(group).wrapping_byte_add(2 * R * row_bytes));
            }
        }
    }
    let begins = from == 0;
    if N == 1 {
        // Each number is read once, and memory takes longer than any sum.
        return add_share::<S, F, All, R, N>(rows, x, begins, fetched_for_one(true), sums);
    }
    add_share::<S, F, Part<0>, R, N>(rows, x, begins, Fetch::No, sums);
    if S::PARTS > 1 {
        add_share::<S, F, Part<1>, R, N>(rows, x, begins, Fetch::No, sums);
    }
    if S::PARTS > 2 {
        add_share::<S, F, Part<2>, R, N>(rows, x, begins, Fetch::No, sums);
        add_share::<S, F, Part<3>, R, N>(rows, x, begins, Fetch::No, sums);
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

/// Adds the products of one share of the lanes, of `R` rows of weights and `N` of activations: to zeros where a row begins. What comes after the weights is
/// asked for as `fetch` says.
#[inline(always)]
fn add_share<S: Simd, F: Float, L: Share<S>, const R: usize, const N: usize>(
    w: [&[F::Group]; R],
    x: &[[Floats; N]],
    begins: bool,
    fetch: Fetch,
    sums: &mut [[S::Lanes; N]; R],
) {
    let mut acc = [[L::of(S::splat(0.0)); N]; R];
    if !begins {
        for r in 0..R {
            for n in 0..N {
                acc[r][n] = L::of(sums[r][n]);
            }
        }
    }
    for (i, x) in x.iter().enumerate() {
        let mut weights = [L::of(S::splat(0.0)); R];
        for r in 0..R {
            fetch_after(&w[r][i], fetch);
            weights[r] = L::of(F::load::<S>(&w[r][i]));
        }
        for n in 0..N {
            let x = L::of(S::load(&x[n].0));
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

/// Adds the products of the columns after the last whole group, if there are any, and sums the lanes.
#[inline(always)]
fn finish<S: Simd, F: Float, const N: usize>(
    w: &[u8],
    row_bytes: usize,
    x: Option<&[Floats; N]>,
    sums: &mut [[S::Lanes; N]; ROWS],
    out: &mut [[f32; ROWS]],
) {
    let rows = w.len() / row_bytes;
    let sums = &mut sums[..rows];
    if let Some(x) = x {
        for (w, sums) in w.chunks_exact(row_bytes).zip(&mut *sums) {
            let mut bytes = [0; 4 * LANES];
            let (_, tail) = F::groups(w);
            bytes[..tail.len()].copy_from_slice(tail);
            let weights = F::load::<S>(&F::groups(&bytes).0[0]);
            for n in 0..N {
                sums[n] = S::fma(weights, S::load(&x[n].0), sums[n]);
            }
        }
    }
    let (fours, rest) = sums.as_chunks::<4>();
    for (n, out) in out.iter_mut().enumerate() {
        let (out, out_rest) = out[..rows].as_chunks_mut::<4>();
        for (out, sums) in out.iter_mut().zip(fours) {
            *out = S::sums([sums[0][n], sums[1][n], sums[2][n], sums[3][n]]);
        }
        for (out, sums) in out_rest.iter_mut().zip(rest) {
            *out = S::sum(sums[n]);
        }
    }
}

//! A tile of queries against one head's cached keys and values.
//!
//! The rows of a tile are all the queries that read the same keys and values: of the heads that share them, and of
//! neighbouring positions. What is loaded, and widened from f16, meets all rows while it lies in a register. How rows, keys and
//! channels are cut into registers changes no bit, since no sum is shared: a score and a channel of a result have a
//! lane each, and no lane meets another one.

use super::{LANES, Simd, lanes::Element};
use crate::memory::prefetch;

/// Blocks of keys that all rows of a tile meet before the next ones are read: part of a first-level cache.
const SPAN_BLOCKS: usize = 8;

/// The same of values.
const SPAN_VALUES: usize = 64;

/// How many bytes ahead of its use memory is asked for: what is read while the slowest of it arrives.
const AHEAD: usize = 8 << 10;

/// The most rows whose accumulators are kept in registers.
const MAX_ROWS: usize = 8;

/// Calls `$tile` with the number of rows as a constant, and with as many vectors for each as registers hold.
macro_rules! in_registers {
    ($tile:ident::<$simd:ident, $element:ident>, $rows:expr, $args:tt) => {
        match ($rows, $simd::REGISTERS) {
            (1, _) => in_registers!(@call $tile::<$simd, $element, 1, 4> $args),
            (2, 8..) => in_registers!(@call $tile::<$simd, $element, 2, 4> $args),
            (2, _) => in_registers!(@call $tile::<$simd, $element, 2, 2> $args),
            (3, 12..) => in_registers!(@call $tile::<$simd, $element, 3, 4> $args),
            (3, _) => in_registers!(@call $tile::<$simd, $element, 3, 1> $args),
            (4, 16..) => in_registers!(@call $tile::<$simd, $element, 4, 4> $args),
            (4, _) => in_registers!(@call $tile::<$simd, $element, 4, 1> $args),
            (5, 10..) => in_registers!(@call $tile::<$simd, $element, 5, 2> $args),
            (5, _) => in_registers!(@call $tile::<$simd, $element, 5, 1> $args),
            (6, 12..) => in_registers!(@call $tile::<$simd, $element, 6, 2> $args),
            (6, _) => in_registers!(@call $tile::<$simd, $element, 6, 1> $args),
            (7, _) => in_registers!(@call $tile::<$simd, $element, 7, 2> $args),
            (8, _) => in_registers!(@call $tile::<$simd, $element, 8, 2> $args),
            (rows, _) => unreachable!("{rows} rows at once"),
        }
    };
    (@call $tile:ident::<$simd:ident, $element:ident, $rows:literal, $vectors:literal> ($($arg:expr),*)) => {
        $tile::<$simd, $element, $rows, $vectors>($($arg),*)
    };
}

/// Cuts `rows` into parts of nearly the same size that registers hold, and calls `$body` with the first row and
/// the number of rows of each.
macro_rules! for_parts {
    ($simd:ident, $rows:expr, |$first:ident, $count:ident| $body:expr) => {
        let (rows, mut $first) = ($rows, 0);
        let mut parts = rows.div_ceil(MAX_ROWS.min($simd::REGISTERS));
        while parts > 0 {
            let $count = (rows - $first).div_ceil(parts);
            $body;
            $first += $count;
            parts -= 1;
        }
    };
}

/// The scaled scores of `rows` queries, `[head_dim, rows]`, and all keys, `[blocks, head_dim, LANES]`: `[rows, positions]`.
///
/// A score is `fma` over ascending channels from 0, then times `scale`. Positions of the last block that hold no key get scores of
/// whatever lies there, and no other score depends on them.
#[inline(always)]
pub(crate) fn scores<S: Simd, E: Element>(
    queries: &[f32],
    rows: usize,
    keys: &[E],
    scale: f32,
    out: &mut [f32],
) {
    let head_dim = queries.len() / rows;
    let keys = keys.as_chunks::<LANES>().0;
    let blocks = keys.len() / head_dim;
    let positions = out.len() / rows;
    for start in (0..blocks).step_by(SPAN_BLOCKS) {
        let end = blocks.min(start + SPAN_BLOCKS);
        let keys = &keys[start * head_dim..end * head_dim];
        for_parts!(S, rows, |first, count| {
            let out = &mut out[first * positions..(first + count) * positions];
            let queries = Queries { all: queries, rows, first };
            in_registers!(scores_of::<S, E>, count, (queries, keys, scale, start * LANES, out));
        });
    }
}

/// Some rows of queries, `[head_dim, rows]`.
#[derive(Clone, Copy)]
struct Queries<'a> {
    all: &'a [f32],
    rows: usize,
    first: usize,
}

/// The scores of `R` queries and `keys`, from position `start` on.
#[inline(always)]
fn scores_of<S: Simd, E: Element, const R: usize, const G: usize>(
    queries: Queries<'_>,
    keys: &[[E; LANES]],
    scale: f32,
    mut start: usize,
    out: &mut [f32],
) {
    let head_dim = queries.all.len() / queries.rows;
    let mut groups = keys.chunks_exact(G * head_dim);
    for keys in &mut groups {
        let scores = chains::<S, E, R, G>(queries, keys);
        store::<S, R, G>(scores, scale, start, out);
        start += G * LANES;
    }
    for keys in groups.remainder().chunks_exact(head_dim) {
        let scores = chains::<S, E, R, 1>(queries, keys);
        store::<S, R, 1>(scores, scale, start, out);
        start += LANES;
    }
}

/// The sums over channels of `R` queries and `G` blocks of keys.
#[inline(always)]
fn chains<S: Simd, E: Element, const R: usize, const G: usize>(
    queries: Queries<'_>,
    keys: &[[E; LANES]],
) -> [[S::Lanes; G]; R] {
    let head_dim = keys.len() / G;
    let mut blocks = [keys; G];
    for (g, block) in blocks.iter_mut().enumerate() {
        *block = &keys[g * head_dim..][..head_dim];
    }
    let mut acc = [[S::splat(0.0); G]; R];
    for (c, queries) in (0..head_dim).zip(queries.all[queries.first..].chunks(queries.rows)) {
        let queries = queries.first_chunk::<R>().expect("there are as many rows");
        let mut keys = [S::splat(0.0); G];
        for g in 0..G {
            prefetch(blocks[g].as_ptr().wrapping_byte_add(AHEAD).wrapping_add(c));
            keys[g] = E::load::<S>(&blocks[g][c]);
        }
        for r in 0..R {
            let query = S::splat(queries[r]);
            for g in 0..G {
                acc[r][g] = S::fma(query, keys[g], acc[r][g]);
            }
        }
    }
    acc
}

#[inline(always)]
fn store<S: Simd, const R: usize, const G: usize>(
    scores: [[S::Lanes; G]; R],
    scale: f32,
    start: usize,
    out: &mut [f32],
) {
    let positions = out.len() / R;
    for r in 0..R {
        for g in 0..G {
            let mut lanes = S::store(scores[r][g]);
            for x in &mut lanes {
                *x *= scale;
            }
            out[r * positions + start + g * LANES..][..LANES].copy_from_slice(&lanes);
        }
    }
}

/// The weighted sums of values, `[positions, width]`, of which row `r` sees the first `seen[r]`; weights are `[rows, positions]`, the
/// result is `[rows, width]`. The width is a multiple of [`LANES`].
///
/// A sum is `fma` over ascending positions from 0. Values and weights beyond what a row sees do not enter it.
#[inline(always)]
pub(crate) fn weighted_sums<S: Simd, E: Element>(
    weights: &[f32],
    seen: &[usize],
    values: &[E],
    out: &mut [f32],
) {
    let rows = seen.len();
    let (width, stride) = (out.len() / rows, weights.len() / rows);
    out.fill(0.0);
    for (span, values) in values.chunks(SPAN_VALUES * width).enumerate() {
        let start = span * SPAN_VALUES;
        for_parts!(S, rows, |first, count| {
            let seen = &seen[first..first + count];
            let weights = &weights[first * stride..(first + count) * stride];
            let out = &mut out[first * width..(first + count) * width];
            in_registers!(add_span::<S, E>, count, (weights, start, seen, values, out));
        });
    }
}

/// Adds `values`, which are those from position `start` on, to the sums of `R` rows.
#[inline(always)]
fn add_span<S: Simd, E: Element, const R: usize, const G: usize>(
    weights: &[f32],
    start: usize,
    seen: &[usize],
    values: &[E],
    out: &mut [f32],
) {
    let (width, stride) = (out.len() / R, weights.len() / R);
    let len = values.len() / width;
    let mut rows = [Row { weights, seen: 0 }; R];
    for r in 0..R {
        rows[r].weights = &weights[r * stride + start..][..len];
        rows[r].seen = seen[r].saturating_sub(start).min(len);
    }
    let mut channel = 0;
    while channel + G * LANES <= width {
        add_channels::<S, E, R, G>(rows, &values[channel..], width, &mut out[channel..]);
        channel += G * LANES;
    }
    while channel < width {
        add_channels::<S, E, R, 1>(rows, &values[channel..], width, &mut out[channel..]);
        channel += LANES;
    }
}

/// A row's weights of a span of positions, and how many of these it sees.
#[derive(Clone, Copy)]
struct Row<'a> {
    weights: &'a [f32],
    seen: usize,
}

/// The first `G` vectors of channels of [`add_span`].
#[inline(always)]
fn add_channels<S: Simd, E: Element, const R: usize, const G: usize>(
    rows: [Row<'_>; R],
    values: &[E],
    width: usize,
    out: &mut [f32],
) {
    let mut acc = [[S::splat(0.0); G]; R];
    let (mut common, len) = (usize::MAX, rows[0].weights.len());
    for r in 0..R {
        common = common.min(rows[r].seen);
        let out = out[r * width..].as_chunks::<LANES>().0;
        for g in 0..G {
            acc[r][g] = S::load(&out[g]);
        }
    }
    let mut values = values.chunks(width);
    for (j, value) in (0..common).zip(&mut values) {
        for g in 0..G {
            prefetch(value.as_ptr().wrapping_byte_add(AHEAD).wrapping_add(g * LANES));
        }
        let value = load::<S, E, G>(value);
        for r in 0..R {
            let weight = S::splat(rows[r].weights[j]);
            for g in 0..G {
                acc[r][g] = S::fma(weight, value[g], acc[r][g]);
            }
        }
    }
    // Positions that only some rows see.
    for (j, value) in (common..len).zip(&mut values) {
        let value = load::<S, E, G>(value);
        for r in 0..R {
            if j < rows[r].seen {
                let weight = S::splat(rows[r].weights[j]);
                for g in 0..G {
                    acc[r][g] = S::fma(weight, value[g], acc[r][g]);
                }
            }
        }
    }
    for r in 0..R {
        let out = out[r * width..].as_chunks_mut::<LANES>().0;
        for g in 0..G {
            out[g] = S::store(acc[r][g]);
        }
    }
}

#[inline(always)]
fn load<S: Simd, E: Element, const G: usize>(x: &[E]) -> [S::Lanes; G] {
    let x = &x.as_chunks::<LANES>().0[..G];
    let mut lanes = [S::splat(0.0); G];
    for g in 0..G {
        lanes[g] = E::load::<S>(&x[g]);
    }
    lanes
}

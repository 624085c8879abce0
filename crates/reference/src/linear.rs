//! Products with a matrix: the one loop of the reference that has to be quick.
//!
//! An output is the dot product of a row of activations and a dequantised row of weights. Element `i` goes to lane
//! `i % LANES`; the lanes are added in order, and then what is left of the row. That order depends on the length of the
//! row alone, so the bits do not depend on how many rows there are, on threads or on the machine. What is done for speed
//! leaves it alone: a row of weights is dequantised once for all activations, numbers in registers are used twice,
//! and the loop is compiled a second time for wider vectors.

use apr_model::Result;
use apr_tensor::{
    DType, Stored,
    activation::{ActivationType, Q8Row},
};
use rayon::prelude::*;

use crate::{Activations, Real, Tensor};

/// Activations `[n, in]` that meet a matrix, and what they are rounded to before.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a, F> {
    /// The activations.
    pub x: &'a Tensor<F>,
    /// What they are rounded to, by the type of the weights.
    pub activations: &'a Activations,
}

/// `x W^T` for each of `operands`, and what `of_row` makes of each row of `w`: of the part, the row in it and its values.
pub fn products<F: Real, T: Send>(
    operands: &[Operand<'_, F>],
    w: &[Stored],
    of_row: impl Fn(&Stored, usize, &[f32]) -> Result<T> + Sync,
) -> Result<(Vec<Tensor<F>>, Vec<T>)> {
    let out: usize = w.iter().map(|part| part.shape().rows()).sum();
    let mut results: Vec<_> =
        operands.iter().map(|operand| Tensor::zeros([operand.x.shape[0], out])).collect();
    let mut of_rows = Vec::with_capacity(out);
    for part in w {
        let x: Vec<Rounded<F>> = operands
            .iter()
            .flat_map(|Operand { x, activations }| {
                x.rows().map(|row| Rounded::new(row, activations.of(part.dtype())))
            })
            .collect();
        let rows = part.shape().rows();
        for first in (0..rows).step_by(BAND) {
            let band = first..rows.min(first + BAND);
            let tiles: Vec<Vec<F>>;
            let starts = band.clone().into_par_iter().step_by(TILE);
            let computed = starts.map_init(
                || Buffers::new(part.shape().cols()),
                |buffers, row| {
                    let rows = row..band.end.min(row + TILE);
                    let mut of_rows = Vec::with_capacity(rows.len());
                    for (i, row) in rows.clone().enumerate() {
                        part.dequantize_row(row, &mut buffers.stored)?;
                        of_rows.push(of_row(part, row, &buffers.stored)?);
                        let wide = buffers.stored.iter().map(|&w| F::of(w.into()));
                        buffers.wide[i].clear();
                        buffers.wide[i].extend(wide);
                    }
                    let mut y = vec![F::of(0.0); rows.len() * x.len()];
                    tile(&buffers.wide[..rows.len()], &x, &mut y);
                    for (row, y) in rows.zip(y.chunks_exact_mut(x.len().max(1))) {
                        for (y, x) in y.iter_mut().zip(&x) {
                            *y = *y + x.min_correction(part.dtype(), part.row_bytes(row));
                        }
                    }
                    Ok((y, of_rows))
                },
            );
            let said: Vec<Vec<T>>;
            (tiles, said) = computed.collect::<Result<Vec<_>>>()?.into_iter().unzip();
            let column = of_rows.len();
            of_rows.extend(said.into_iter().flatten());
            let mut before = 0;
            for y in &mut results {
                let first_row = before;
                before += y.shape[0];
                y.data.par_chunks_exact_mut(out).enumerate().for_each(|(i, y)| {
                    let columns = y[column..][..band.len()].chunks_mut(TILE);
                    for (y, tile) in columns.zip(&tiles) {
                        let of_x = tile[first_row + i..].iter().step_by(x.len());
                        y.iter_mut().zip(of_x).for_each(|(y, &value)| *y = value);
                    }
                });
            }
        }
    }
    Ok((results, of_rows))
}

/// Rows of weights whose products are in memory a second time, transposed.
const BAND: usize = 1024;

/// Rows of weights, and rows of activations, that meet in registers.
const TILE: usize = 2;

/// The lanes that a sum of products is kept in: enough to keep a processor busy.
const LANES: usize = 8;

struct Buffers<F> {
    stored: Vec<f32>,
    wide: [Vec<F>; TILE],
}

impl<F> Buffers<F> {
    fn new(cols: usize) -> Self {
        Self { stored: vec![0.0; cols], wide: [const { Vec::new() }; TILE] }
    }
}

/// The products of at most [`TILE`] rows `w` with all rows `x`: `y` is `[w, x]`.
fn tile<F: Real>(w: &[Vec<F>], x: &[Rounded<F>], y: &mut [F]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2<F: Real>(w: &[Vec<F>], x: &[Rounded<F>], y: &mut [F]) {
            plain(w, x, y);
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2.
            return unsafe { avx2(w, x, y) };
        }
    }
    plain(w, x, y)
}

#[inline(always)]
fn plain<F: Real>(w: &[Vec<F>], x: &[Rounded<F>], y: &mut [F]) {
    let (n, mut j) = (x.len(), 0);
    if let [w0, w1] = w {
        for pair in x.as_chunks::<TILE>().0 {
            let products = dots([w0, w1], pair.each_ref().map(|x| &x.row[..]));
            y[j..j + TILE].copy_from_slice(&products[0]);
            y[n + j..n + j + TILE].copy_from_slice(&products[1]);
            j += TILE;
        }
    }
    for (i, w) in w.iter().enumerate() {
        for (j, x) in x.iter().enumerate().skip(j) {
            y[i * n + j] = dot(w, &x.row);
        }
    }
}

/// The sum of the products of two slices of one length, in lanes.
pub fn dot<F: Real>(x: &[F], y: &[F]) -> F {
    let [[dot]] = dots([x], [y]);
    dot
}

/// Each of `x` with each of `y`.
#[inline(always)]
fn dots<F: Real, const N: usize, const M: usize>(x: [&[F]; N], y: [&[F]; M]) -> [[F; M]; N] {
    let (x, y) = (x.map(|x| x.as_chunks::<LANES>()), y.map(|y| y.as_chunks::<LANES>()));
    let chunks = x.iter().chain(&y).map(|(chunks, _)| chunks.len()).min().unwrap_or(0);
    let (xs, ys) = (x.map(|(x, _)| &x[..chunks]), y.map(|(y, _)| &y[..chunks]));
    let mut lanes = [[[F::of(0.0); LANES]; M]; N];
    for c in 0..chunks {
        for (lanes, x) in lanes.iter_mut().zip(xs) {
            for (lanes, y) in lanes.iter_mut().zip(ys) {
                for lane in 0..LANES {
                    lanes[lane] = lanes[lane] + x[c][lane] * y[c][lane];
                }
            }
        }
    }
    let mut dots = [[F::of(0.0); M]; N];
    for (i, (_, x)) in x.into_iter().enumerate() {
        for (j, (_, y)) in y.into_iter().enumerate() {
            dots[i][j] = total(&lanes[i][j], x, y);
        }
    }
    dots
}

/// The sum of `lanes` and of what is left of a row. A call of its own: seeing it, the compiler would rather have the sums
/// than the lanes side by side in a vector.
#[inline(never)]
fn total<F: Real>(lanes: &[F; LANES], x: &[F], y: &[F]) -> F {
    lanes.iter().copied().chain(x.iter().zip(y).map(|(&x, &y)| x * y)).sum()
}

/// A row of activations as an engine holds it that rounds them.
pub(crate) struct Rounded<F> {
    pub(crate) row: Vec<F>,
    quantized: Option<Q8Row>,
}

impl<F: Real> Rounded<F> {
    pub(crate) fn new(row: &[F], kind: ActivationType) -> Self {
        if kind == ActivationType::F32 {
            return Self { row: row.to_vec(), quantized: None };
        }
        // Engines round activations that they hold in f32.
        let single: Vec<f32> = row.iter().map(|&x| x.wide() as f32).collect();
        let mut wide = vec![0.0f64; single.len()];
        kind.round_row(&single, &mut wide);
        let row = wide.into_iter().map(F::of).collect();
        Self { row, quantized: kind.quantize_row(&single) }
    }

    /// What the engine's dot product has beyond the sum of products; see [`Q8Row::min_correction`].
    fn min_correction(&self, dtype: DType, weights: &[u8]) -> F {
        F::of(self.quantized.as_ref().map_or(0.0, |q| q.min_correction(dtype, weights)))
    }
}

#[cfg(test)]
mod tests {
    use apr_tensor::Bytes;

    use super::*;

    fn matrix(rows: usize, cols: usize, seed: usize) -> Vec<f32> {
        (0..rows * cols)
            .map(|i| ((i * 2_654_435 + seed * 97) % 1_000) as f32 / 313.0 - 1.6)
            .collect()
    }

    #[test]
    fn an_output_is_summed_in_lanes_whatever_else_is_multiplied() {
        // An odd number of everything, more than one band, and a row that is no multiple of the lanes.
        let (n, rows, cols) = (5, BAND + 3, 19);
        let w = matrix(rows, cols, 1);
        let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
        let part = Stored::new(DType::F32, [rows, cols].into(), Bytes::from(bytes)).unwrap();
        let x = [2, 3].map(|seed| {
            let data = matrix(n, cols, seed).into_iter().map(f64::from).collect();
            Tensor { shape: vec![n, cols], data }
        });
        let operands = x.each_ref().map(|x| Operand { x, activations: &Activations::Plain });
        let (y, first) = products(&operands, &[part], |_, _, row| Ok(row[0])).unwrap();
        for (x, y) in x.iter().zip(&y) {
            for (x, y) in x.rows().zip(y.rows()) {
                for (w, &y) in w.chunks(cols).zip(y) {
                    let product = |i: usize| x[i] * f64::from(w[i]);
                    let lanes = (0..LANES).map(|lane| product(lane) + product(lane + LANES));
                    let sum: f64 = lanes.chain((2 * LANES..cols).map(product)).sum();
                    assert_eq!(y.to_bits(), sum.to_bits());
                }
            }
        }
        assert!(first.iter().copied().eq(w.iter().copied().step_by(cols)));
    }
}

//! `x W^T`: rows of weights against rows of activations.
//!
//! The loops go over tiles of token rows, then weight rows, then the token rows of the tile, so that a weight row is
//! read from memory once per tile and unpacked once per block, and a tile of activations stays in the cache. Decode is the
//! same code with one row. No sum crosses a tile, so no bit depends on it.

use crate::{
    Cpu, Tensor, Weight,
    activation::Block8,
    kernels::IntegerKernel,
    pool::{Columns, Strip},
    weight::{Part, Product},
};

/// The most token rows in a tile.
const TILE_ROWS: usize = 64;

/// The most bytes of activations in a tile: part of a core's second-level cache.
const TILE_BYTES: usize = 256 << 10;

impl Cpu {
    pub(crate) fn multiply(&self, x: &Tensor, w: &Weight) -> Tensor {
        assert_eq!(x.width(), w.cols, "activations are as wide as the matrix");
        for part in &w.parts {
            self.round_for(part, x);
        }
        let n = x.rows();
        let mut out = vec![0.0; n * w.rows];
        let columns = Columns { count: w.rows, granule: 1, cost: n * w.cols };
        self.pool.fill(&mut out, columns, |mut strip| {
            for part in &w.parts {
                self.multiply_part(x, part, &mut strip);
            }
        });
        Tensor::new([n, w.rows], out)
    }

    /// Rounds `x` as `part` wants it, unless another weight already did.
    fn round_for(&self, part: &Part, x: &Tensor) {
        match part.product {
            Product::Integer(IntegerKernel::Blocks(_)) => {
                x.rounded.q8_0.get_or_init(|| self.round(x, self.kernels.quantize_q8_0));
            }
            Product::Integer(IntegerKernel::Superblocks(_)) => {
                x.rounded.q8_k.get_or_init(|| self.round(x, self.kernels.quantize_q8_k));
            }
            Product::Float => {}
        }
    }

    fn round<A: Block8>(&self, x: &Tensor, kernel: fn(&[f32], &mut [A])) -> Vec<A> {
        let mut out = vec![A::ZERO; x.values().len() / A::LEN];
        let columns = Columns { count: out.len(), granule: 1, cost: A::LEN };
        self.pool.fill(&mut out, columns, |mut strip| {
            let blocks = strip.columns();
            kernel(&x.values()[blocks.start * A::LEN..blocks.end * A::LEN], strip.row(0));
        });
        out
    }

    fn multiply_part(&self, x: &Tensor, part: &Part, strip: &mut Strip<'_, f32>) {
        let n = x.rows();
        match part.product {
            Product::Integer(IntegerKernel::Blocks(kernel)) => {
                let x = x.rounded.q8_0.get().expect("rounded before");
                tiles(x, n, part, strip, |row, x, out| kernel(part.row_bytes(row), x, out));
            }
            Product::Integer(IntegerKernel::Superblocks(kernel)) => {
                let x = x.rounded.q8_k.get().expect("rounded before");
                tiles(x, n, part, strip, |row, x, out| kernel(part.row_bytes(row), x, out));
            }
            Product::Float => {
                let mut wide = vec![0.0; x.width()];
                tiles(x.values(), n, part, strip, |row, x, out| {
                    part.widen(row, self.kernels, &mut wide);
                    (self.kernels.dots)(&wide, x, out);
                });
            }
        }
    }
}

/// Calls `kernel` with each weight row that `part` and `strip` share and each tile of the `n` rows of `x`.
fn tiles<A>(
    x: &[A],
    n: usize,
    part: &Part,
    strip: &mut Strip<'_, f32>,
    mut kernel: impl FnMut(usize, &[A], &mut [f32]),
) {
    let columns = strip.columns();
    let rows = part.rows.start.max(columns.start)..part.rows.end.min(columns.end);
    let width = x.len() / n;
    let tile = (TILE_BYTES / size_of_val(&x[..width]).max(1)).clamp(1, TILE_ROWS);
    let mut column = [0.0; TILE_ROWS];
    for (i, x) in x.chunks(tile * width).enumerate() {
        let column = &mut column[..x.len() / width];
        for row in rows.clone() {
            kernel(row, x, column);
            for (t, &y) in column.iter().enumerate() {
                strip.row(i * tile + t)[row - columns.start] = y;
            }
        }
    }
}

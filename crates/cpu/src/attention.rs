//! Causal attention, one query row of one head at a time.
//!
//! A thread needs one row of scores, `[kv]`, whatever the number of queries: the `[heads, n, kv]` tensors exist only if
//! somebody asked for them. Spilled rows are copied out of that row and replaced rows are copied into it, between the
//! same kernels; so asking changes no arithmetic.

use std::sync::{Mutex, PoisonError};

use apr_model::{Attended, AttentionInner, Inner};

use crate::{Cpu, Kv, Tensor, pool::Columns};

impl Cpu {
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        kv: &Kv,
        scale: f64,
        inner: AttentionInner<Tensor>,
    ) -> Attended<Tensor> {
        let [n, heads, head_dim] = *q.shape() else { panic!("queries have heads") };
        let (len, group) = (kv.len(), heads / kv.shape.heads);
        let shape = [heads, n, len];
        let scores = InnerRows::new(&inner.scores, shape);
        let softmax = InnerRows::new(&inner.softmax, shape);

        // Head by head, so that a chunk of the job reads the keys of few heads.
        let mut out = self.tensor([heads, n, head_dim]);
        let columns =
            Columns { count: heads * n * head_dim, granule: head_dim, cost: 2 * len * head_dim };
        self.pool.fill(out.values_mut(), columns, |mut strip| {
            let first = strip.columns().start / head_dim;
            let mut row = self.memory.scratch(len);
            for (i, out) in strip.row(0).chunks_exact_mut(head_dim).enumerate() {
                let unit = first + i;
                let (head, query) = (unit / n, unit % n);
                let keys = kv.head(head / group, self.kernels);
                let row = &mut row[..len - n + query + 1];
                let q = &q.values()[(query * heads + head) * head_dim..][..head_dim];
                keys.scores(q, scale as f32, row);
                scores.exchange(unit, row);
                (self.kernels.softmax)(row);
                softmax.exchange(unit, row);
                keys.weighted_sum(row, out);
            }
        });

        let out = match n {
            1 => out.with_shape([n, heads * head_dim]),
            _ => {
                let mut by_row = self.tensor([n, heads * head_dim]);
                swap_outer(out.values(), heads, n, head_dim, by_row.values_mut());
                by_row
            }
        };
        Attended { scores: scores.spilled(shape), softmax: softmax.spilled(shape), out }
    }
}

/// `[a, b, width]` as `[b, a, width]`.
fn swap_outer(x: &[f32], a: usize, b: usize, width: usize, out: &mut [f32]) {
    for (i, row) in x.chunks_exact(width).enumerate() {
        let (i, j) = (i / b, i % b);
        out[(j * a + i) * width..][..width].copy_from_slice(row);
    }
}

/// One row after the other of an inner value that somebody asked for, or of one that nobody did.
struct InnerRows<'a> {
    /// The rows to be handed out, each behind its own lock: threads write them in any order. Zeros where masked.
    spill: Option<Vec<Mutex<Vec<f32>>>>,
    replace: Option<&'a Tensor>,
    len: usize,
}

impl<'a> InnerRows<'a> {
    fn new(inner: &'a Inner<Tensor>, shape: [usize; 3]) -> Self {
        let [heads, n, len] = shape;
        let replace = inner.replace.as_ref();
        if let Some(replace) = replace {
            assert_eq!(replace.shape(), shape, "a replacement has the shape of what it replaces");
        }
        let rows = || (0..heads * n).map(|_| Mutex::new(vec![0.0; len])).collect();
        Self { spill: inner.spill.then(rows), replace, len }
    }

    /// Keeps the visible part `row` of row number `index`, if asked for; then replaces it, if asked for.
    fn exchange(&self, index: usize, row: &mut [f32]) {
        if let Some(rows) = &self.spill {
            let mut kept = rows[index].lock().unwrap_or_else(PoisonError::into_inner);
            kept[..row.len()].copy_from_slice(row);
        }
        if let Some(replacement) = self.replace {
            row.copy_from_slice(&replacement.values()[index * self.len..][..row.len()]);
        }
    }

    fn spilled(self, shape: [usize; 3]) -> Option<Tensor> {
        let rows = self.spill?.into_iter();
        let rows = rows.flat_map(|row| row.into_inner().unwrap_or_else(PoisonError::into_inner));
        Some(Tensor::new(shape, rows.collect()))
    }
}

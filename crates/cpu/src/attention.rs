//! Causal attention, one tile of queries at a time.
//!
//! The rows of a tile read the same keys and values: they are the heads that share these, at one position or, where there
//! are few such heads, at several. A thread needs the scores of one tile, `[rows, kv]`, whatever the number of queries:
//! the `[heads, n, kv]` tensors exist only if somebody asked for them. Spilled rows are copied out of the tile and
//! replaced rows are copied into it, between the same kernels; so asking changes no arithmetic. Nor does the cut
//! into tiles: no sum is shared by two rows.

use std::{
    cell::RefCell,
    ops::Range,
    sync::{Mutex, PoisonError},
};

use apr_model::{Attended, AttentionInner, Inner};

use crate::{Cpu, Kv, Tensor, generic::LANES, pool::Columns};

/// The most rows of a tile, and how many it has where there are enough queries.
const TILE_ROWS: usize = 8;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { floats: Vec::new(), seen: Vec::new() }) };
}

/// What a thread needs for a tile, kept for the next one.
struct Scratch {
    /// Queries, scores, results.
    floats: Vec<f32>,
    /// How many positions each row sees.
    seen: Vec<usize>,
}

/// What all tiles read.
struct Job<'a> {
    q: &'a Tensor,
    kv: &'a Kv,
    scale: f32,
    scores: InnerRows<'a>,
    softmax: InnerRows<'a>,
}

/// How queries are cut into tiles.
struct Cut {
    /// Heads of a tile, fewer in the last tile of a group.
    heads: usize,
    /// Tiles of a group of heads, at each of its positions.
    shares: usize,
    /// Positions of a tile, fewer in the last one.
    positions: usize,
}

/// Heads that share keys and values, at some positions.
struct Tile {
    heads: Range<usize>,
    /// Rows of the queries.
    rows: Range<usize>,
}

impl Cpu {
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        kv: &Kv,
        scale: f64,
        inner: AttentionInner<Tensor>,
    ) -> Attended<Tensor> {
        let [n, heads, head_dim] = *q.shape() else { panic!("queries have heads") };
        let shape = [heads, n, kv.len()];
        let (scores, softmax) =
            (InnerRows::new(&inner.scores, shape), InnerRows::new(&inner.softmax, shape));
        let job = Job { q, kv, scale: scale as f32, scores, softmax };
        let cut = job.cut(self.pool.threads());

        let tile_len = cut.positions * cut.heads * head_dim;
        let mut tiles = self.tensor([job.tiles(&cut), tile_len]);
        let columns = Columns {
            count: tiles.values().len(),
            granule: tile_len,
            cost: cut.positions * cut.heads * kv.len() * 2 * head_dim,
        };
        self.pool.fill(tiles.values_mut(), columns, |mut strip| {
            let first = strip.columns().start / tile_len;
            for (i, out) in strip.row(0).chunks_exact_mut(tile_len).enumerate() {
                let tile = job.tile(&cut, first + i);
                SCRATCH.with_borrow_mut(|scratch| self.attend_tile(&job, &tile, scratch, out));
            }
        });

        let mut out = self.tensor([n, heads * head_dim]);
        for (i, from) in tiles.values().chunks_exact(tile_len).enumerate() {
            let Tile { heads: of, rows } = job.tile(&cut, i);
            for (row, from) in rows.zip(from.chunks_exact(of.len() * head_dim)) {
                let to = (row * heads + of.start) * head_dim;
                out.values_mut()[to..to + from.len()].copy_from_slice(from);
            }
        }
        let Job { scores, softmax, .. } = job;
        Attended { scores: scores.spilled(shape), softmax: softmax.spilled(shape), out }
    }

    /// The results of `tile`: `[positions, heads, head_dim]`.
    fn attend_tile(&self, job: &Job<'_>, tile: &Tile, scratch: &mut Scratch, out: &mut [f32]) {
        let Job { q, kv, scale, .. } = *job;
        let [n, heads, head_dim] = *q.shape() else { panic!("queries have heads") };
        let (at_once, width) = (tile.heads.len(), kv.width());
        let rows = tile.rows.len() * at_once;
        // Row by row of the tile: the row of the queries, and the head.
        let place = |r: usize| (tile.rows.start + r / at_once, tile.heads.start + r % at_once);

        let Scratch { floats, seen } = scratch;
        seen.clear();
        seen.extend((0..rows).map(|r| kv.len() - n + place(r).0 + 1));
        let positions = seen.iter().max().expect("a tile has rows").next_multiple_of(LANES);
        let len = rows * (head_dim + positions + width);
        floats.resize(floats.len().max(len), 0.0);
        let (queries, rest) = floats[..len].split_at_mut(rows * head_dim);
        let (scores, sums) = rest.split_at_mut(rows * positions);

        for r in 0..rows {
            let (row, head) = place(r);
            let q = &q.values()[(row * heads + head) * head_dim..][..head_dim];
            for (queries, &x) in queries.chunks_exact_mut(rows).zip(q) {
                queries[r] = x;
            }
        }
        let keys = kv.head(tile.heads.start / (heads / kv.shape.heads), self.kernels);
        keys.scores(queries, rows, scale, scores);
        for (r, row) in scores.chunks_exact_mut(positions).enumerate() {
            let (query, head) = place(r);
            let (index, row) = (head * n + query, &mut row[..seen[r]]);
            job.scores.exchange(index, row);
            (self.kernels.softmax)(row);
            job.softmax.exchange(index, row);
        }
        keys.weighted_sums(scores, seen, sums);
        for (sum, out) in sums.chunks_exact(width).zip(out.chunks_exact_mut(head_dim)) {
            out.copy_from_slice(&sum[..head_dim]);
        }
    }
}

impl Job<'_> {
    /// Tiles of the largest size, but for as many as there are threads.
    fn cut(&self, threads: usize) -> Cut {
        let (n, groups) = (self.q.rows(), self.kv.shape.heads);
        let group = self.q.shape()[1] / groups;
        let shares =
            threads.div_ceil((n * groups).max(1)).min(group).max(group.div_ceil(TILE_ROWS));
        let heads = group.div_ceil(shares);
        let shares = group.div_ceil(heads);
        let positions =
            (TILE_ROWS / heads).min((n * groups * shares).div_ceil(threads)).clamp(1, n.max(1));
        Cut { heads, shares, positions }
    }

    fn tiles(&self, cut: &Cut) -> usize {
        self.q.rows().div_ceil(cut.positions) * self.kv.shape.heads * cut.shares
    }

    /// Tile number `index`. The last positions see most and come first, so that threads end at about the same time.
    fn tile(&self, cut: &Cut, index: usize) -> Tile {
        let groups = self.kv.shape.heads;
        let group = self.q.shape()[1] / groups;
        let (positions, share) = (index / (groups * cut.shares), index % (groups * cut.shares));
        let end = self.q.rows() - positions * cut.positions;
        let first_of_group = share / cut.shares * group;
        let first = first_of_group + share % cut.shares * cut.heads;
        Tile {
            heads: first..(first + cut.heads).min(first_of_group + group),
            rows: end.saturating_sub(cut.positions)..end,
        }
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

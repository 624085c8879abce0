//! Where two tensors differ by more than rounding: which rows, which columns, how much of them.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use super::{
    rows::{Reader, Rows},
    steps::{BLOCK, blocks},
};

/// The blocks of 32 neighbouring elements that rounding does not explain.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Damage {
    /// How many there are.
    pub blocks: u64,
    /// Of how many.
    pub of_blocks: u64,
    /// How many of them are zero throughout in the file under test, and not in the reference.
    pub zeroed: u64,
    /// How many of them have a NaN or an infinity in the file under test.
    pub not_finite: u64,
    /// The rows that have some.
    pub rows: Extent,
    /// The columns that they cover.
    pub columns: Extent,
    /// Their share of the squared difference.
    #[serde(serialize_with = "crate::metrics::number")]
    pub share: f64,
}

/// Some of the rows or columns of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Extent {
    pub first: usize,
    pub last: usize,
    pub count: usize,
    /// How many the tensor has.
    pub of: usize,
}

impl Extent {
    fn of(some: &BTreeSet<usize>, of: usize) -> Self {
        let edge = |index: Option<&usize>| index.copied().unwrap_or_default();
        Self { first: edge(some.first()), last: edge(some.last()), count: some.len(), of }
    }

    /// Whether none between the first and the last is missing.
    pub fn contiguous(&self) -> bool {
        self.count == self.last - self.first + 1
    }

    fn describe(&self, f: &mut fmt::Formatter<'_>, one: &str) -> fmt::Result {
        let Self { first, last, count, of } = *self;
        match count {
            1 => write!(f, "{one} {first}"),
            _ if count == of => write!(f, "all {of} {one}s"),
            _ if self.contiguous() => write!(f, "{one}s {first} to {last}"),
            _ => write!(f, "{count} of {of} {one}s from {first} to {last}"),
        }
    }
}

impl Damage {
    /// The damage, and the rows that have some.
    pub(super) fn of(a: &dyn Rows, b: &dyn Rows) -> (Self, Vec<usize>) {
        let [rows, cols] = a.dims();
        let mut found = Self::default();
        let (mut bad_rows, mut bad_columns) = (BTreeSet::new(), BTreeSet::new());
        let (mut inside, mut total) = (0.0, 0.0);
        each_block(a, b, |row, block| {
            found.of_blocks += 1;
            total += block.squares;
            if block.explained {
                return;
            }
            inside += block.squares;
            found.blocks += 1;
            found.zeroed += u64::from(block.zeroed);
            found.not_finite += u64::from(block.not_finite);
            bad_rows.insert(row);
            bad_columns.extend(block.columns);
        });
        found.rows = Extent::of(&bad_rows, rows);
        found.columns = Extent::of(&bad_columns, cols);
        found.share = if total > 0.0 { inside / total } else { 0.0 };
        (found, bad_rows.into_iter().collect())
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { blocks, of_blocks, zeroed, not_finite, rows, columns, share } = self;
        if *blocks == 0 {
            return f.write_str("spread evenly: no block stands out");
        }
        rows.describe(f, "row")?;
        f.write_str(", ")?;
        columns.describe(f, "column")?;
        write!(f, " ({blocks} of {of_blocks} blocks")?;
        match *zeroed {
            0 => {}
            n if n == *blocks => f.write_str(", zeroed in A")?,
            n => write!(f, ", {n} zeroed in A")?,
        }
        match *not_finite {
            // A difference that is no number has no shares.
            0 => write!(f, ", {:.0} % of the difference)", 100.0 * share),
            n if n == *blocks => f.write_str(", with NaN or infinity in A)"),
            n => write!(f, ", {n} with NaN or infinity in A)"),
        }
    }
}

/// A block of a row, as damage sees it.
struct Block {
    columns: std::ops::Range<usize>,
    explained: bool,
    zeroed: bool,
    not_finite: bool,
    squares: f64,
}

fn each_block(a: &dyn Rows, b: &dyn Rows, mut visit: impl FnMut(usize, Block)) {
    let [rows, cols] = a.dims();
    let mut read = Reader::new(cols);
    for row in 0..rows {
        let [a, b, steps] = read.row([a, b], [row; 2]);
        for (col, error) in blocks(a, b, steps) {
            let columns = col..cols.min(col + BLOCK);
            let (a, b) = (&a[columns.clone()], &b[columns.clone()]);
            let finite = a.iter().chain(b).all(|x| x.is_finite());
            let zero = |values: &[f32]| values.iter().all(|&x| x == 0.0);
            let squares = a.iter().zip(b).map(|(&a, &b)| f64::from(a - b).powi(2)).sum();
            let (explained, zeroed) = (finite && error.explained(), zero(a) && !zero(b));
            let not_finite = a.iter().any(|x| !x.is_finite());
            visit(row, Block { columns, explained, zeroed, not_finite, squares });
        }
    }
}

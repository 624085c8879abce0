//! The bytes of a tensor, piece by piece: moved, or dequantised and quantised row by row on all cores.
//!
//! A piece is bounded, whatever the size of the tensor, so a model need not fit in memory. Rows do not depend on each
//! other, so neither threads nor the size of a piece change a bit.

use apr_tensor::{DType, Stored, quantize_row};
use rayon::prelude::*;

use crate::{Error, Importance, Planned, Result};

/// Bytes that are moved at once.
const MOVED: usize = 8 << 20;

/// Numbers that are recoded at once.
const RECODED: usize = 2 << 20;

/// What recoding has changed: squares of numbers and of their errors, each times how much its column matters.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Change {
    /// Of the numbers.
    pub signal: f64,
    /// Of the errors.
    pub noise: f64,
}

impl Change {
    /// The root mean square error over the root mean square: 0 if nothing was changed.
    pub fn relative_rmse(self) -> f64 {
        if self.noise == 0.0 { 0.0 } else { (self.noise / self.signal).sqrt() }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.signal += other.signal;
        self.noise += other.noise;
    }
}

/// Who takes the bytes of a tensor: a piece, and of how many bytes of the source it was made.
pub(crate) type Sink<'a> = dyn FnMut(&[u8], u64) -> Result<()> + 'a;

/// Hands all bytes of `tensor` to `sink`.
pub(crate) fn stream(
    tensor: &Planned,
    importance: Option<&Importance>,
    sink: &mut Sink<'_>,
) -> Result<Change> {
    let mut change = Change::default();
    let mut rows_before = 0;
    for index in 0..tensor.parts.len() {
        let part = tensor.part(index)?;
        if part.dtype() == tensor.dtype {
            moved(&part, sink)?;
        } else {
            let recoder = Recoder::new(tensor, importance, &part, rows_before);
            change.add(recoder.recode(sink)?);
        }
        rows_before += part.shape().rows();
    }
    Ok(change)
}

fn moved(part: &Stored, sink: &mut Sink<'_>) -> Result<()> {
    if part.bytes().is_empty() {
        return sink(&[], 0);
    }
    for piece in part.bytes().chunks(MOVED) {
        sink(piece, piece.len() as u64)?;
        part.bytes().release();
    }
    Ok(())
}

/// Writes a part of a tensor in the tensor's type.
struct Recoder<'a> {
    tensor: &'a Planned,
    part: &'a Stored,
    /// A row for each matrix of the tensor.
    importance: Option<&'a [f32]>,
    /// Rows of the tensor before those of the part.
    rows_before: usize,
    cols: usize,
    row_bytes: usize,
}

impl<'a> Recoder<'a> {
    fn new(
        tensor: &'a Planned,
        importance: Option<&'a Importance>,
        part: &'a Stored,
        rows_before: usize,
    ) -> Self {
        let cols = part.shape().cols();
        let importance = importance.and_then(|importance| importance.of(tensor.role));
        let row_bytes = tensor.dtype.row_bytes(cols).expect("planned in whole blocks");
        Self { tensor, part, importance, rows_before, cols, row_bytes }
    }

    fn recode(&self, sink: &mut Sink<'_>) -> Result<Change> {
        let rows = self.part.shape().rows();
        let mut change = Change::default();
        if rows == 0 || self.cols == 0 {
            sink(&[], 0)?;
            return Ok(change);
        }
        let at_once = (RECODED / self.cols).max(1);
        let source_row = self.part.bytes().len() / rows;
        let mut piece = vec![0; at_once.min(rows) * self.row_bytes];
        for first in (0..rows).step_by(at_once) {
            let count = at_once.min(rows - first);
            let piece = &mut piece[..count * self.row_bytes];
            let changes: Vec<Change> = piece
                .par_chunks_exact_mut(self.row_bytes)
                .enumerate()
                .map_init(
                    || (vec![0.0; self.cols], vec![0.0; self.cols]),
                    |(values, back), (row, out)| self.row(first + row, values, back, out),
                )
                .collect::<Result<_>>()?;
            // One after the other: a sum in another order would have other bits.
            changes.into_iter().for_each(|row| change.add(row));
            sink(piece, (count * source_row) as u64)?;
            self.part.bytes().release();
        }
        Ok(change)
    }

    fn row(
        &self,
        row: usize,
        values: &mut [f32],
        back: &mut [f32],
        out: &mut [u8],
    ) -> Result<Change> {
        let dtype = self.tensor.dtype;
        let refused = |reason| {
            let (tensor, row) = (self.tensor.name.clone(), self.rows_before + row);
            Error::Row { tensor, row, reason }
        };
        self.part.dequantize_row(row, values).map_err(refused)?;
        if dtype == DType::F32 {
            // Exact, a NaN or an infinity included.
            for (out, x) in out.as_chunks_mut().0.iter_mut().zip(&*values) {
                *out = x.to_le_bytes();
            }
            return Ok(Change::default());
        }
        let importance = self.importance_of(row);
        quantize_row(dtype, values, importance, out).map_err(refused)?;
        apr_tensor::dequantize(dtype, out, back).map_err(refused)?;
        let mut change = Change::default();
        for (column, (&x, &y)) in values.iter().zip(&*back).enumerate() {
            let weight = importance.map_or(1.0, |importance| f64::from(importance[column]));
            let (x, error) = (f64::from(x), f64::from(x) - f64::from(y));
            change.signal += weight * x * x;
            change.noise += weight * error * error;
        }
        Ok(change)
    }

    /// The importance of the columns in the matrix that `row` belongs to.
    fn importance_of(&self, row: usize) -> Option<&'a [f32]> {
        let rows_of_matrix = (self.tensor.shape.rows() / self.tensor.matrices()).max(1);
        let matrix = (self.rows_before + row) / rows_of_matrix;
        self.importance?.chunks_exact(self.cols).nth(matrix)
    }
}

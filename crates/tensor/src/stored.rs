//! A tensor as its file holds it.

use std::ops::Range;

use crate::{Bytes, DType, Error, Result, Shape, block, dtype::APR_Q8_HEADER};

/// A tensor in its stored type: the bytes of the file, not a copy, and what they mean.
#[derive(Clone, Debug)]
pub struct Stored {
    dtype: DType,
    shape: Shape,
    bytes: Bytes,
}

impl Stored {
    /// A tensor over `bytes`, whose length must be exactly what `dtype` and `shape` ask for.
    pub fn new(dtype: DType, shape: Shape, bytes: Bytes) -> Result<Self> {
        let expected = dtype.tensor_bytes(&shape);
        if expected != Some(bytes.len()) {
            return Err(Error::Length { dtype, shape, expected, found: bytes.len() });
        }
        Ok(Self { dtype, shape, bytes })
    }

    /// The stored type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape, row-major (`[out, in]` for a weight).
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// All bytes as stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The same bytes under another shape, which must ask for as many.
    pub fn with_shape(&self, shape: impl Into<Shape>) -> Result<Self> {
        Self::new(self.dtype, shape.into(), self.bytes.clone())
    }

    /// The bytes of row `row`. Those of an `AprQ8` row do not include the scale of its tensor.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_bytes(&self, row: usize) -> &[u8] {
        assert!(row < self.shape.rows(), "row {row} of a tensor of shape {}", self.shape);
        &self.body()[self.row_range(row..row + 1)]
    }

    /// Writes the numbers that row `row` stands for to `out`, which must be as long as a row.
    ///
    /// Their f32 bits are the definition of the stored type: the same as those of ggml and of the
    /// `gguf` Python package. `F64` and 64- and 32-bit integers are rounded to the nearest f32.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let bytes = self.row_bytes(row);
        let Some(scale) = self.tensor_scale() else {
            return block::dequantize(self.dtype, bytes, out);
        };
        block::dequantize(DType::I8, bytes, out)?;
        out.iter_mut().for_each(|x| *x *= scale);
        Ok(())
    }

    /// Writes the [step](block::steps) of each element of row `row` to `out`, which must be as long as a row.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn row_steps(&self, row: usize, out: &mut [f32]) -> Result<()> {
        let bytes = self.row_bytes(row);
        let Some(scale) = self.tensor_scale() else {
            return block::steps(self.dtype, bytes, out);
        };
        out.fill(scale.abs());
        Ok(())
    }

    /// All numbers of the tensor, row-major. Prefer [`dequantize_row`](Self::dequantize_row) for
    /// large ones.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let cols = self.shape.cols();
        let mut out = vec![0.0; self.shape.elements()];
        if cols > 0 {
            for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                self.dequantize_row(row, out)?;
            }
        }
        Ok(out)
    }

    /// A copy with the rows in another order: row `r` of it is row `source_of(r)` of this one.
    ///
    /// Works on stored bytes, hence for every type, and loses nothing.
    ///
    /// # Panics
    /// If `source_of` names a row that does not exist.
    #[must_use]
    pub fn permute_rows(&self, source_of: impl Fn(usize) -> usize) -> Self {
        if self.body().is_empty() {
            return self.clone();
        }
        let mut bytes = Vec::with_capacity(self.bytes.len());
        bytes.extend_from_slice(self.header());
        for row in 0..self.shape.rows() {
            bytes.extend_from_slice(self.row_bytes(source_of(row)));
        }
        Self { dtype: self.dtype, shape: self.shape.clone(), bytes: bytes.into() }
    }

    /// Some of the rows, as a matrix. Shares the bytes, except for `AprQ8`, whose scale has to be
    /// copied along.
    ///
    /// # Panics
    /// If `rows` reaches beyond the tensor.
    #[must_use]
    pub fn slice_rows(&self, rows: Range<usize>) -> Self {
        assert!(
            rows.start <= rows.end && rows.end <= self.shape.rows(),
            "rows {rows:?} of a tensor of shape {}",
            self.shape
        );
        let shape = [rows.len(), self.shape.cols()].into();
        let range = self.row_range(rows);
        let bytes = match self.header() {
            [] => self.bytes.slice(range).expect("rows lie inside their tensor"),
            header => [header, &self.body()[range]].concat().into(),
        };
        Self { dtype: self.dtype, shape, bytes }
    }

    /// The bytes before the first row.
    fn header(&self) -> &[u8] {
        &self.bytes[..self.header_len()]
    }

    /// The bytes of all rows.
    fn body(&self) -> &[u8] {
        &self.bytes[self.header_len()..]
    }

    fn header_len(&self) -> usize {
        if self.dtype == DType::AprQ8 { APR_Q8_HEADER } else { 0 }
    }

    /// The scale that all elements of an `AprQ8` tensor share.
    fn tensor_scale(&self) -> Option<f32> {
        self.header().first_chunk().map(|&scale| f32::from_le_bytes(scale))
    }

    fn row_range(&self, rows: Range<usize>) -> Range<usize> {
        let row = self.dtype.row_bytes(self.shape.cols()).expect("checked by `new`");
        rows.start * row..rows.end * row
    }
}

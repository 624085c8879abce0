//! One recorded value, loaded.

use apr_model::{Axes, Site};
use apr_tensor::{Bytes, DType, Shape};
use half::{bf16, f16};

/// A recorded value of one step: its bytes where they lie, and what they mean.
#[derive(Clone, Debug)]
pub struct CaptureTensor {
    pub(crate) site: Site,
    pub(crate) shape: Vec<usize>,
    pub(crate) axes: Axes,
    pub(crate) dtype: DType,
    pub(crate) positions: Option<Vec<usize>>,
    pub(crate) bytes: Bytes,
}

impl CaptureTensor {
    /// What was recorded.
    pub fn site(&self) -> Site {
        self.site
    }

    /// Row-major dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// What the dimensions mean.
    pub fn axes(&self) -> Axes {
        self.axes
    }

    /// The stored type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The position of each row, where the capture knows it.
    pub fn positions(&self) -> Option<&[usize]> {
        self.positions.as_deref()
    }

    /// The stored bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The number of rows, that is of token positions.
    pub fn rows(&self) -> usize {
        self.shape[self.axes.row_axis()]
    }

    /// How many pieces a row is stored in: one, or one per head.
    pub fn pieces(&self) -> usize {
        self.shape[..self.axes.row_axis()].iter().product()
    }

    /// Elements of one piece of a row.
    pub fn piece_len(&self) -> usize {
        self.shape[self.axes.row_axis() + 1..].iter().product()
    }

    /// The stored bytes of piece `piece` of row `row`.
    ///
    /// # Panics
    /// If there is no such piece or row.
    pub fn piece_bytes(&self, piece: usize, row: usize) -> &[u8] {
        assert!(piece < self.pieces() && row < self.rows(), "no piece {piece} of row {row}");
        let len = self.piece_len() * self.dtype.block_bytes();
        let start = (piece * self.rows() + row) * len;
        &self.bytes[start..start + len]
    }

    /// Appends the elements of piece `piece` of row `row` to `out`.
    ///
    /// # Panics
    /// If there is no such piece or row.
    pub fn read_piece(&self, piece: usize, row: usize, out: &mut Vec<f64>) {
        decode(self.dtype, self.piece_bytes(piece, row), out);
    }

    /// All elements, row-major; exact but for I64 beyond 2^53.
    pub fn to_f64(&self) -> Vec<f64> {
        let mut values = Vec::with_capacity(self.bytes.len() / self.dtype.block_bytes());
        decode(self.dtype, &self.bytes, &mut values);
        values
    }

    /// All elements, row-major, rounded to F32 where they are stored in a wider type.
    pub fn to_f32(&self) -> Vec<f32> {
        match self.dtype {
            DType::F32 => chunks(&self.bytes, f32::from_le_bytes).collect(),
            _ => self.to_f64().into_iter().map(|value| value as f32).collect(),
        }
    }
}

pub(crate) const PLAIN_NAMES: &str = "F64, F32, F16, BF16, I64, I32";

/// The types that occur in captures and in what is imported as one.
pub(crate) fn plain_dtype(name: &str) -> Option<DType> {
    use DType::{BF16, F16, F32, F64, I32, I64};
    [F64, F32, F16, BF16, I64, I32].into_iter().find(|dtype| dtype.name() == name)
}

/// The bytes of a tensor, if no product of its dimensions overflows: not even beside a zero.
pub(crate) fn checked_bytes(dtype: DType, shape: &[usize]) -> Option<u64> {
    shape.iter().try_fold(dtype.block_bytes(), |n, &d| n.checked_mul(d.max(1)))?;
    dtype.tensor_bytes(&Shape::new(shape)).map(|bytes| bytes as u64)
}

/// Appends the elements in `bytes` to `out`. `dtype` is one of the plain types that captures hold.
fn decode(dtype: DType, bytes: &[u8], out: &mut Vec<f64>) {
    match dtype {
        DType::F64 => out.extend(chunks(bytes, f64::from_le_bytes)),
        DType::F32 => out.extend(chunks(bytes, |b| f64::from(f32::from_le_bytes(b)))),
        DType::F16 => out.extend(chunks(bytes, |b| f16::from_le_bytes(b).to_f64())),
        DType::BF16 => out.extend(chunks(bytes, |b| bf16::from_le_bytes(b).to_f64())),
        DType::I32 => out.extend(chunks(bytes, |b| f64::from(i32::from_le_bytes(b)))),
        DType::I64 => out.extend(chunks(bytes, |b| i64::from_le_bytes(b) as f64)),
        other => unreachable!("{other} does not occur in captures; types are checked on opening"),
    }
}

fn chunks<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<N>().0.iter().map(move |&chunk| read(chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_plain_type_decodes_to_its_value() {
        let cases: [(DType, Vec<u8>); 6] = [
            (DType::F64, (-1.5f64).to_le_bytes().to_vec()),
            (DType::F32, (-1.5f32).to_le_bytes().to_vec()),
            (DType::F16, f16::from_f32(-1.5).to_le_bytes().to_vec()),
            (DType::BF16, bf16::from_f32(-1.5).to_le_bytes().to_vec()),
            (DType::I32, (-3i32).to_le_bytes().to_vec()),
            (DType::I64, (-3i64).to_le_bytes().to_vec()),
        ];
        for (dtype, bytes) in cases {
            let mut out = Vec::new();
            decode(dtype, &bytes, &mut out);
            let expected = if matches!(dtype, DType::I32 | DType::I64) { -3.0 } else { -1.5 };
            assert_eq!(out, [expected], "{dtype}");
        }
    }

    #[test]
    fn a_row_of_scores_is_one_piece_per_head() {
        // [2 heads, 3 rows, 2 keys], each element its own index.
        let bytes: Vec<u8> = (0..12u8).flat_map(|i| f32::from(i).to_le_bytes()).collect();
        let tensor = CaptureTensor {
            site: "layers.0.attn_scores".parse().unwrap(),
            shape: vec![2, 3, 2],
            axes: Axes::HeadRowKey,
            dtype: DType::F32,
            positions: None,
            bytes: bytes.into(),
        };
        assert_eq!((tensor.rows(), tensor.pieces(), tensor.piece_len()), (3, 2, 2));
        let mut row = Vec::new();
        tensor.read_piece(0, 1, &mut row);
        tensor.read_piece(1, 1, &mut row);
        assert_eq!(row, [2.0, 3.0, 8.0, 9.0]);
        assert_eq!(tensor.to_f32()[11], 11.0);
    }
}

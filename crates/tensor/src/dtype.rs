//! Every type a tensor can be stored in, with the size of its blocks.

use std::fmt;

use crate::{Shape, block};

/// How the elements of a tensor are stored. Names are ggml's; `AprQ4` and `AprQ8` are the `.apr`
/// container's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
#[allow(missing_docs, non_camel_case_types, reason = "the field's own names say it")]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q8_1,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_K,
    IQ2_XXS,
    IQ2_XS,
    IQ3_XXS,
    IQ1_S,
    IQ4_NL,
    IQ3_S,
    IQ2_S,
    IQ4_XS,
    IQ1_M,
    TQ1_0,
    TQ2_0,
    MXFP4,
    AprQ4,
    AprQ8,
}

/// One row of the type table: type, name, ggml's type number, elements per block, bytes per block.
type Row = (DType, &'static str, Option<u32>, usize, usize);

const TABLE: &[Row] = &[
    (DType::F64, "F64", Some(28), 1, 8),
    (DType::F32, "F32", Some(0), 1, 4),
    (DType::F16, "F16", Some(1), 1, 2),
    (DType::BF16, "BF16", Some(30), 1, 2),
    (DType::I64, "I64", Some(27), 1, 8),
    (DType::I32, "I32", Some(26), 1, 4),
    (DType::I16, "I16", Some(25), 1, 2),
    (DType::I8, "I8", Some(24), 1, 1),
    (DType::U8, "U8", None, 1, 1),
    (DType::Bool, "BOOL", None, 1, 1),
    (DType::Q4_0, "Q4_0", Some(2), 32, 18),
    (DType::Q4_1, "Q4_1", Some(3), 32, 20),
    (DType::Q5_0, "Q5_0", Some(6), 32, 22),
    (DType::Q5_1, "Q5_1", Some(7), 32, 24),
    (DType::Q8_0, "Q8_0", Some(8), 32, 34),
    (DType::Q8_1, "Q8_1", Some(9), 32, 36),
    (DType::Q2_K, "Q2_K", Some(10), 256, 84),
    (DType::Q3_K, "Q3_K", Some(11), 256, 110),
    (DType::Q4_K, "Q4_K", Some(12), 256, 144),
    (DType::Q5_K, "Q5_K", Some(13), 256, 176),
    (DType::Q6_K, "Q6_K", Some(14), 256, 210),
    (DType::Q8_K, "Q8_K", Some(15), 256, 292),
    (DType::IQ2_XXS, "IQ2_XXS", Some(16), 256, 66),
    (DType::IQ2_XS, "IQ2_XS", Some(17), 256, 74),
    (DType::IQ3_XXS, "IQ3_XXS", Some(18), 256, 98),
    (DType::IQ1_S, "IQ1_S", Some(19), 256, 50),
    (DType::IQ4_NL, "IQ4_NL", Some(20), 32, 18),
    (DType::IQ3_S, "IQ3_S", Some(21), 256, 110),
    (DType::IQ2_S, "IQ2_S", Some(22), 256, 82),
    (DType::IQ4_XS, "IQ4_XS", Some(23), 256, 136),
    (DType::IQ1_M, "IQ1_M", Some(29), 256, 56),
    (DType::TQ1_0, "TQ1_0", Some(34), 256, 54),
    (DType::TQ2_0, "TQ2_0", Some(35), 256, 66),
    (DType::MXFP4, "MXFP4", Some(39), 32, 17),
    (DType::AprQ4, "APR_Q4", None, 32, 18),
    (DType::AprQ8, "APR_Q8", None, 1, 1),
];

/// Bytes before the elements of an `AprQ8` tensor: its one f32 scale.
pub(crate) const APR_Q8_HEADER: usize = 4;

impl DType {
    /// All types, in the order of the table.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// The name that users know, e.g. `Q4_K`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// ggml's number of this type, if ggml has it.
    pub fn ggml_id(self) -> Option<u32> {
        self.row().2
    }

    /// The type with this number in ggml.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        TABLE.iter().find(|row| row.2 == Some(id)).map(|row| row.0)
    }

    /// Elements per block: a row must hold whole blocks.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of one row of `cols` elements; `None` if `cols` is no whole number of blocks, or on
    /// overflow.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Bytes of a whole tensor; `None` if a row is no whole number of blocks, or on overflow.
    pub fn tensor_bytes(self, shape: &Shape) -> Option<usize> {
        shape.checked_elements()?;
        let body = self.row_bytes(shape.cols())?.checked_mul(shape.rows())?;
        body.checked_add(if self == Self::AprQ8 { APR_Q8_HEADER } else { 0 })
    }

    /// Whether tensors of this type can be read as numbers.
    pub fn can_dequantize(self) -> bool {
        self == Self::AprQ8 || block::codec(self).is_some()
    }

    /// Whether several elements share a scale.
    pub fn is_quantized(self) -> bool {
        self.block_len() > 1 || self == Self::AprQ8
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "{}", row.1);
        }
    }

    #[test]
    fn ggml_ids_are_unique_and_round_trip() {
        for dtype in DType::all() {
            if let Some(id) = dtype.ggml_id() {
                assert_eq!(DType::from_ggml_id(id), Some(dtype));
            }
        }
    }

    #[test]
    fn a_row_that_is_no_whole_number_of_blocks_has_no_size() {
        assert_eq!(DType::Q4_K.row_bytes(896), None);
        assert_eq!(DType::Q5_0.row_bytes(896), Some(28 * 22));
        assert_eq!(DType::AprQ8.tensor_bytes(&[2, 3].into()), Some(10));
        assert_eq!(DType::F32.tensor_bytes(&[usize::MAX, 2].into()), None);
    }
}

//! Matrices as their file stores them.

use std::ops::Range;

use apr_model::{Error, Result};
use apr_tensor::{Bytes, DType, Stored};

use crate::{
    Activations,
    kernels::{IntegerKernel, Kernels},
};

/// The types that are multiplied as they are stored.
const DIRECT: [DType; 15] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q2_K,
    DType::Q3_K,
    DType::Q4_K,
    DType::Q5_K,
    DType::Q6_K,
    DType::IQ4_NL,
    DType::IQ4_XS,
];

/// The types that are turned into another one on load, without loss: `AprQ4` into Q4_0, which has the same numbers in
/// another order, the others into F32 (of an F64 the nearest).
const CONVERTED: [DType; 3] = [DType::AprQ4, DType::AprQ8, DType::F64];

/// A matrix `[out, in]`: its parts one after the other, each in its stored type, in the file's memory.
#[derive(Debug)]
pub struct Weight {
    pub(crate) parts: Vec<Part>,
    /// The length of a row.
    pub(crate) cols: usize,
    /// The rows of all parts.
    pub(crate) rows: usize,
}

/// Some rows of a matrix, all of one type.
#[derive(Debug)]
pub(crate) struct Part {
    stored: Stored,
    /// The type in the file: not the one that is multiplied, if the part was converted.
    pub(crate) file_type: DType,
    /// Which rows of the matrix these are.
    pub(crate) rows: Range<usize>,
    pub(crate) product: Product,
}

/// How a row is multiplied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Product {
    /// With activations rounded to 8 bits.
    Integer(IntegerKernel),
    /// Widened to f32, with activations as they are.
    Float,
}

impl Weight {
    pub(crate) fn new(
        parts: &[Stored],
        kernels: &Kernels,
        activations: Activations,
    ) -> Result<Self> {
        let is_supported = |dtype| DIRECT.contains(&dtype) || CONVERTED.contains(&dtype);
        let unsupported = || Error::weight_type("cpu", parts, is_supported);
        let cols = parts.first().map_or(0, |part| part.shape().cols());
        let mut weight = Self { parts: Vec::with_capacity(parts.len()), cols, rows: 0 };
        for part in parts {
            assert_eq!(part.shape().cols(), cols, "parts of one matrix have rows of one length");
            let stored = direct(part)?.ok_or_else(unsupported)?;
            let rows = weight.rows..weight.rows + stored.shape().rows();
            weight.rows = rows.end;
            let product = match (activations, kernels.integer(stored.dtype())) {
                (Activations::Native, Some(kernel)) => Product::Integer(kernel),
                _ => Product::Float,
            };
            weight.parts.push(Part { stored, file_type: part.dtype(), rows, product });
        }
        Ok(weight)
    }

    /// The part that holds row `row`.
    pub(crate) fn part_of(&self, row: usize) -> &Part {
        self.parts_of(row..row + 1).next().expect("a row of the matrix")
    }

    /// The parts that hold some of `rows`.
    pub(crate) fn parts_of(&self, rows: Range<usize>) -> impl Iterator<Item = &Part> {
        let first = self.parts.partition_point(|part| part.rows.end <= rows.start);
        self.parts[first..].iter().take_while(move |part| part.rows.start < rows.end)
    }
}

impl Part {
    /// The type that is multiplied.
    pub(crate) fn dtype(&self) -> DType {
        self.stored.dtype()
    }

    /// The bytes of a row of the matrix.
    pub(crate) fn row_bytes(&self, row: usize) -> &[u8] {
        self.stored.row_bytes(row - self.rows.start)
    }

    /// The numbers that a row of the matrix stands for.
    pub(crate) fn widen(&self, row: usize, kernels: &Kernels, out: &mut [f32]) {
        if self.dtype() == DType::F16 {
            (kernels.widen_f16)(self.row_bytes(row), out);
        } else {
            let read = self.stored.dequantize_row(row - self.rows.start, out);
            read.expect("types that cannot be read are refused on load");
        }
    }
}

/// `stored` in a type that is multiplied directly; `None` if there is none for it.
fn direct(stored: &Stored) -> Result<Option<Stored>> {
    let shape = stored.shape().clone();
    Ok(match stored.dtype() {
        dtype if DIRECT.contains(&dtype) => Some(stored.clone()),
        DType::AprQ4 => {
            let mut bytes = stored.bytes().to_vec();
            bytes.as_chunks_mut::<18>().0.iter_mut().for_each(neighbours_to_halves);
            Some(Stored::new(DType::Q4_0, shape, Bytes::from(bytes))?)
        }
        DType::AprQ8 | DType::F64 => {
            let bytes: Vec<u8> = stored.to_f32()?.into_iter().flat_map(f32::to_le_bytes).collect();
            Some(Stored::new(DType::F32, shape, Bytes::from(bytes))?)
        }
        _ => None,
    })
}

/// Reorders the nibbles of a block from (0, 1), (2, 3).. to Q4_0's (0, 16), (1, 17)..
fn neighbours_to_halves(block: &mut [u8; 18]) {
    let old = *block;
    let nibble = |i: usize| (old[2 + i / 2] >> (4 * (i % 2))) & 0xf;
    for i in 0..16 {
        block[2 + i] = nibble(i) | nibble(16 + i) << 4;
    }
}

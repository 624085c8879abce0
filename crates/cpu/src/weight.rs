//! Matrices, quantised ones in tiles.

use std::{cell::RefCell, ops::Range};

use apr_model::{Error, Result};
use apr_tensor::{Bytes, DType, Stored, block};
use zerocopy::IntoBytes;

use crate::{
    Activations, Cpu,
    kernels::{FloatKernel, IntegerKernel, Kernels},
    tile::{Layout, Line, ROWS, Tiles},
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

/// A matrix `[out, in]`: its parts one after the other, each in its stored type.
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
    form: Form,
    /// The type that is multiplied.
    pub(crate) dtype: DType,
    /// The type in the file: not the one that is multiplied, if the part was converted.
    pub(crate) file_type: DType,
    /// Which rows of the matrix these are.
    pub(crate) rows: Range<usize>,
    pub(crate) product: Product,
}

/// Where the numbers are.
#[derive(Debug)]
enum Form {
    /// In the file's memory, row after row.
    Stored(Stored),
    /// In ours, 16 rows side by side.
    Tiles(Tiles),
}

/// How a row is multiplied.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Product {
    /// In tiles, with activations rounded to 8 bits.
    Integer(IntegerKernel),
    /// Row after row, with activations as they are.
    Float(FloatKernel),
}

impl Weight {
    pub(crate) fn new(parts: &[Stored], cpu: &Cpu) -> Result<Self> {
        let is_supported = |dtype| DIRECT.contains(&dtype) || CONVERTED.contains(&dtype);
        let unsupported = || Error::weight_type("cpu", parts, is_supported);
        let cols = parts.first().map_or(0, |part| part.shape().cols());
        let mut weight = Self { parts: Vec::with_capacity(parts.len()), cols, rows: 0 };
        for part in parts {
            assert_eq!(part.shape().cols(), cols, "parts of one matrix have rows of one length");
            let stored = direct(part)?.ok_or_else(unsupported)?;
            let (dtype, file_type) = (stored.dtype(), part.dtype());
            let rows = weight.rows..weight.rows + stored.shape().rows();
            weight.rows = rows.end;
            let product = match (cpu.activations, cpu.kernels.integer(dtype)) {
                (Activations::Native, Some(kernel)) => Product::Integer(kernel),
                _ => Product::Float(cpu.kernels.float(dtype).unwrap_or(cpu.kernels.F32)),
            };
            let form = match (product, Layout::of(dtype)) {
                (Product::Integer(_), Some(layout)) if cpu.repack => {
                    let refused = |source| Error::Memory { bytes: stored.bytes().len(), source };
                    Form::Tiles(Tiles::of(&stored, layout, cpu).map_err(refused)?)
                }
                _ => Form::Stored(stored),
            };
            weight.parts.push(Part { form, dtype, file_type, rows, product });
        }
        Ok(weight)
    }

    /// The memory that its numbers lie in.
    pub(crate) fn memory(&self) -> impl Iterator<Item = &[u8]> {
        self.parts.iter().map(|part| match &part.form {
            Form::Tiles(tiles) => tiles.lines().as_bytes(),
            Form::Stored(stored) => stored.bytes(),
        })
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
    /// Calls `f` with tile number `index` of this part. Where there are no more rows the last one stands again.
    pub(crate) fn with_tile<R>(&self, index: usize, f: impl FnOnce(&[Line]) -> R) -> R {
        thread_local! {
            static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
        }

        let stored = match &self.form {
            Form::Tiles(tiles) => return f(tiles.tile(index)),
            Form::Stored(stored) => stored,
        };
        let layout = Layout::of(self.dtype).expect("only types of blocks are multiplied in tiles");
        let last = stored.shape().rows() - 1;
        let row = |r: usize| stored.row_bytes((index * ROWS + r).min(last));
        let rows: [&[u8]; ROWS] = std::array::from_fn(row);
        SCRATCH.with_borrow_mut(|scratch| {
            let len = rows[0].len() / layout.bytes * layout.lines();
            if scratch.len() < len {
                scratch.resize(len, Line::ZERO);
            }
            layout.interleave(rows, &mut scratch[..len]);
            f(&scratch[..len])
        })
    }

    /// Calls `f` with the rows of tile number `index` of this part, one after the other, in a type of floats.
    pub(crate) fn with_floats<R>(
        &self,
        index: usize,
        kernels: &Kernels,
        f: impl FnOnce(&[u8]) -> R,
    ) -> R {
        thread_local! {
            static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }

        let Form::Stored(stored) = &self.form else { unreachable!("floats are not put in tiles") };
        let rows = index * ROWS..((index + 1) * ROWS).min(stored.shape().rows());
        let row_bytes = stored.bytes().len() / stored.shape().rows();
        if kernels.float(self.dtype).is_some() {
            return f(&stored.bytes()[rows.start * row_bytes..rows.end * row_bytes]);
        }
        let cols = stored.shape().cols();
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() < rows.len() * cols {
                scratch.resize(rows.len() * cols, 0.0);
            }
            let wide = &mut scratch[..rows.len() * cols];
            for (row, out) in rows.zip(wide.chunks_exact_mut(cols)) {
                stored
                    .dequantize_row(row, out)
                    .expect("types that cannot be read are refused on load");
            }
            f(wide.as_bytes())
        })
    }

    /// The numbers that a row of the matrix stands for.
    pub(crate) fn widen(&self, row: usize, kernels: &Kernels, out: &mut [f32]) {
        thread_local! {
            static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }

        let row = row - self.rows.start;
        let read = match &self.form {
            Form::Stored(stored) if self.dtype == DType::F16 => {
                (kernels.widen_f16)(stored.row_bytes(row), out);
                return;
            }
            Form::Stored(stored) => stored.dequantize_row(row, out),
            Form::Tiles(tiles) => SCRATCH.with_borrow_mut(|scratch| {
                tiles.read_row(row, scratch);
                block::dequantize(self.dtype, scratch, out)
            }),
        };
        read.expect("types that cannot be read are refused on load");
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

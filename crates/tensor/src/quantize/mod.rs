//! Writing weights in fewer bits: rows of numbers to ggml's block types and to narrower floats.
//!
//! What a block means is defined in [`block`](crate::block); here is the choice of a good one.
//!
//! The largest value of a block could decide its scale, and with the plainest types it does. But it
//! is one value, and all of them make the error: with a scale a little off, most may fall nearer to
//! a code. So the types of few bits *search*. They try some scales around the one of the largest
//! value, round under each, fit the scale (and the minimum) to the codes by least squares, and keep
//! what leaves the smallest weighted error (`search.rs`). The types of 256 elements then round the
//! scales of their sub-blocks to a few bits, and make up for that as far as they can
//! (`super_block.rs`).
//!
//! The weight of an error says how much it matters (`weighted.rs`). It grows with the magnitude of
//! the value; and where there is an *importance* for each column, it is multiplied with that: the
//! mean square of the activations that the column meets, which llama.cpp calls `imatrix`.
//!
//! The result depends on the row alone: no threads and no fused arithmetic, so the bits are the
//! same on every machine. Rows may be quantised in parallel.
//!
//! Refused: NaN and infinities, and values for which a scale would be infinite in half precision.
//! Values so small that their scale is zero in half precision become zeros.

mod iq4;
mod k_quants;
mod legacy;
mod plain;
mod search;
mod super_block;
mod weighted;

use zerocopy::IntoBytes;

use crate::{
    DType, Error, Result,
    block::{
        AprQ4, Block, IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0,
    },
};

/// Writes one row of weights to `out` in the given type.
///
/// `values` must be whole blocks, and `out` exactly their size ([`DType::row_bytes`]). `importance`
/// is one weight per column, not negative; a row of zeros says nothing and counts as none, and a
/// single zero as very little. Types that only round ([`DType::F16`], [`DType::Q8_0`], ...) do not
/// look at it.
///
/// An [`AprQ8`](DType::AprQ8) tensor shares one scale, which a row cannot know: see [`AprQ8Scale`].
///
/// ```
/// # use apr_tensor::{DType, dequantize, quantize_row};
/// let row: Vec<f32> = (0..32).map(|i| i as f32 / 31.0).collect();
/// let (mut block, mut back) = ([0; 20], [0.0; 32]);
/// quantize_row(DType::Q4_1, &row, None, &mut block)?;
/// dequantize(DType::Q4_1, &block, &mut back)?;
/// assert!(row.iter().zip(back).all(|(x, y)| (x - y).abs() < 0.5 / 15.0 + 1e-3));
/// # Ok::<(), apr_tensor::Error>(())
/// ```
pub fn quantize_row(
    dtype: DType,
    values: &[f32],
    importance: Option<&[f32]>,
    out: &mut [u8],
) -> Result<()> {
    let writer = writer(dtype).ok_or(Error::NotQuantizable(dtype))?;
    check(dtype, values, out)?;
    let row = Row { values, importance: Importance::new(values, importance)? };
    writer(&row, out)
}

/// Whether [`quantize_row`] can write this type.
pub fn can_quantize(dtype: DType) -> bool {
    writer(dtype).is_some()
}

/// The scale of an [`AprQ8`](DType::AprQ8) tensor: 8 bits for each element, one scale for all.
///
/// The tensor is its [bytes](Self::to_le_bytes) and then its rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AprQ8Scale(f32);

impl AprQ8Scale {
    /// The scale of a tensor whose largest magnitude is `amax`.
    pub fn of_largest(amax: f32) -> Self {
        Self(amax / 127.0)
    }

    /// The head of the tensor.
    pub fn to_le_bytes(self) -> [u8; 4] {
        self.0.to_le_bytes()
    }

    /// Writes one row of the tensor; elements beyond the largest magnitude are cut off at it.
    pub fn quantize_row(self, values: &[f32], out: &mut [u8]) -> Result<()> {
        check(DType::AprQ8, values, out)?;
        for (out, &x) in out.iter_mut().zip(values) {
            *out = plain::round_to_i8(x, self.0) as u8;
        }
        Ok(())
    }
}

fn check(dtype: DType, values: &[f32], out: &[u8]) -> Result<()> {
    let expected = dtype.row_bytes(values.len());
    if expected != Some(out.len()) {
        let (shape, found) = ([values.len()].into(), out.len());
        return Err(Error::Length { dtype, shape, expected, found });
    }
    // All are looked at before the first is searched for: the usual answer comes from vector code.
    if values.iter().fold(true, |all, x| all & x.is_finite()) {
        return Ok(());
    }
    let index = values.iter().position(|x| !x.is_finite()).expect("one of them is not finite");
    Err(Error::NotFinite { index, value: values[index] })
}

type Writer = fn(&Row, &mut [u8]) -> Result<()>;

/// The one list of types that can be written.
fn writer(dtype: DType) -> Option<Writer> {
    Some(match dtype {
        DType::F32 => plain::f32,
        DType::F16 => plain::f16,
        DType::BF16 => plain::bf16,
        DType::Q4_0 => blocks::<Q4_0>,
        DType::Q4_1 => blocks::<Q4_1>,
        DType::Q5_0 => blocks::<Q5_0>,
        DType::Q5_1 => blocks::<Q5_1>,
        DType::Q8_0 => blocks::<Q8_0>,
        DType::Q2_K => blocks::<Q2_K>,
        DType::Q3_K => blocks::<Q3_K>,
        DType::Q4_K => blocks::<Q4_K>,
        DType::Q5_K => blocks::<Q5_K>,
        DType::Q6_K => blocks::<Q6_K>,
        DType::IQ4_NL => blocks::<IQ4_NL>,
        DType::IQ4_XS => blocks::<IQ4_XS>,
        DType::AprQ4 => blocks::<AprQ4>,
        _ => return None,
    })
}

/// A row to quantise.
struct Row<'a> {
    values: &'a [f32],
    importance: Option<Importance<'a>>,
}

/// How much each column matters.
#[derive(Clone, Copy)]
struct Importance<'a> {
    columns: &'a [f32],
    /// What makes their mean one, so that no sum of weights overflows.
    unit: f32,
    /// The mean square of the values of the row.
    mean_square: f64,
}

impl<'a> Importance<'a> {
    /// `None` if all columns are of no importance.
    fn new(row: &[f32], columns: Option<&'a [f32]>) -> Result<Option<Self>> {
        let Some(columns) = columns else { return Ok(None) };
        let (expected, found) = (row.len(), columns.len());
        if expected != found {
            return Err(Error::ImportanceLength { expected, found });
        }
        if let Some(index) = columns.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
            return Err(Error::Importance { index, value: columns[index] });
        }
        let mean = |values: &[f32], of: fn(f64) -> f64| {
            values.iter().map(|&x| of(x.into())).sum::<f64>() / expected as f64
        };
        let unit = (1.0 / mean(columns, |x| x)) as f32;
        let mean_square = mean(row, |x| x * x);
        Ok(unit.is_finite().then_some(Self { columns, unit, mean_square }))
    }

    /// An importance in units of the mean, and never zero: a block of columns without any would
    /// have no best scale.
    fn relative(&self, column: f32) -> f32 {
        const LEAST: f32 = 1e-6;
        (column * self.unit).max(LEAST)
    }
}

/// A block to quantise, and what its row says about it.
struct Input<'a> {
    values: &'a [f32],
    importance: Option<Importance<'a>>,
}

/// A block type that can be written.
trait Quantize: Block + IntoBytes {
    /// The block for these values, finite and [`LEN`](Block::LEN) of them; `None` if a scale
    /// overflows.
    fn quantize(input: &Input) -> Option<Self>;
}

fn blocks<B: Quantize>(row: &Row, out: &mut [u8]) -> Result<()> {
    let starts = (0..row.values.len()).step_by(B::LEN);
    for (start, out) in starts.zip(out.chunks_exact_mut(size_of::<B>())) {
        let range = start..start + B::LEN;
        let importance =
            row.importance.map(|all| Importance { columns: &all.columns[range.clone()], ..all });
        let values = &row.values[range];
        let Some(block) = B::quantize(&Input { values, importance }) else {
            let magnitudes = values.iter().map(|x| x.abs()).enumerate();
            let (largest, _) = magnitudes.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
            let (dtype, index, value) = (B::DTYPE, start + largest, values[largest]);
            return Err(Error::TooLarge { dtype, index, value });
        };
        block.write_to(out).expect("a chunk is as long as a block");
    }
    Ok(())
}

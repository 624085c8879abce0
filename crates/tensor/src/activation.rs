//! How llama.cpp rounds activations before it multiplies them with a stored weight.
//!
//! A quantised engine does not multiply with the activations that its graph shows: the type of the
//! weight decides the type that they are rounded to first ([`ActivationType::for_weight`]), which
//! costs 1e-2 where f32 accumulation costs 1e-7. The rounding is a function of the data, so it can
//! be computed instead of being called noise. This module is its scalar definition; fast kernels
//! are tested against it.
//!
//! The definition is that of the x86 code of ggml's CPU backend, in f32, ties to even. (Its
//! portable code multiplies with `1 / d` instead of `127 / amax` and rounds ties away from zero:
//! another arithmetic.)
//!
//! Where ggml's result is accidental, ours is defined:
//! - A block with a NaN or an infinity gets a NaN scale and quants of zero, so that whatever is
//!   computed from it is NaN. ggml's Q8_K takes a NaN for zero, and its Q8_0 depends on the order
//!   of the operands of a maximum.
//! - A block so small that `127 / amax` overflows gets quants of zero; its scale rounds to zero
//!   anyway.
//! - A Q8_0 or Q8_1 scale beyond the range of f16 is infinite, as in ggml.

use std::fmt;

use half::{bf16, f16};

use crate::{
    DType,
    block::{Block, Q4_1, Q5_1},
};

/// The type that activations are rounded to. Names are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(non_camel_case_types, reason = "the names of the field")]
pub enum ActivationType {
    /// Not rounded.
    F32,
    /// Rounded to half precision.
    F16,
    /// Rounded to bfloat16.
    BF16,
    /// Blocks of 32: 8 bits each, a scale in f16.
    Q8_0,
    /// As `Q8_0`, and the sum of each block in f16.
    Q8_1,
    /// Blocks of 256: 8 bits each, a scale in f32.
    Q8_K,
}

impl ActivationType {
    /// llama.cpp's choice for weights of this type; `F32` for types that llama.cpp does not
    /// multiply with.
    pub fn for_weight(weight: DType) -> Self {
        match weight {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 | DType::IQ4_NL | DType::MXFP4 => Self::Q8_0,
            DType::Q4_1 | DType::Q5_1 => Self::Q8_1,
            DType::Q2_K
            | DType::Q3_K
            | DType::Q4_K
            | DType::Q5_K
            | DType::Q6_K
            | DType::IQ4_XS
            | DType::IQ2_XXS
            | DType::IQ2_XS
            | DType::IQ2_S
            | DType::IQ3_XXS
            | DType::IQ3_S
            | DType::IQ1_S
            | DType::IQ1_M
            | DType::TQ1_0
            | DType::TQ2_0 => Self::Q8_K,
            DType::F64
            | DType::F32
            | DType::I64
            | DType::I32
            | DType::I16
            | DType::I8
            | DType::U8
            | DType::Bool
            | DType::Q8_1
            | DType::Q8_K
            | DType::AprQ4
            | DType::AprQ8 => Self::F32,
        }
    }

    /// The name that users know, e.g. `Q8_K`.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q8_1 => "Q8_1",
            Self::Q8_K => "Q8_K",
        }
    }

    /// How many neighbours share a scale; a row must hold whole blocks.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q8_1 => 32,
            Self::Q8_K => 256,
        }
    }

    /// The row in 8-bit blocks; `None` for the float types.
    ///
    /// # Panics
    /// If `row` is no whole number of blocks.
    pub fn quantize_row(self, row: &[f32]) -> Option<Q8Row> {
        let mut quantized = Q8Row::new(self)?;
        quantized.quantize(row);
        Some(quantized)
    }

    /// Writes to `out` what is left of `row` after rounding, exactly: the products of scales and
    /// quants do not always fit in f32.
    ///
    /// # Panics
    /// If `row` is no whole number of blocks, or `out` is not as long.
    pub fn round_row(self, row: &[f32], out: &mut [f64]) {
        assert_eq!(row.len(), out.len(), "a rounded row is as long as the row");
        let each = |round: fn(f32) -> f64, out: &mut [f64]| {
            out.iter_mut().zip(row).for_each(|(out, &x)| *out = round(x));
        };
        match self.quantize_row(row) {
            Some(quantized) => quantized.dequantize(out),
            None if self == Self::F16 => each(|x| f16::from_f32(x).into(), out),
            None if self == Self::BF16 => each(|x| bf16::from_f32(x).into(), out),
            None => each(f64::from, out),
        }
    }
}

impl fmt::Display for ActivationType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Length of the groups of which [`Q8Row::sums`] holds the sums.
pub const SUM_GROUP: usize = 16;

/// A row of activations in 8-bit blocks: element `i` is `scales[i / block_len] * quants[i]`.
///
/// ```
/// # use apr_tensor::activation::ActivationType;
/// let mut x = [0.0; 32];
/// x[..3].copy_from_slice(&[127.0, 0.5, -2.6]);
/// let row = ActivationType::Q8_0.quantize_row(&x).unwrap();
/// assert_eq!(row.scales(), [1.0]);
/// assert_eq!(row.quants()[..3], [127, 0, -3]); // ties to even
/// ```
#[derive(Clone, Debug)]
pub struct Q8Row {
    kind: ActivationType,
    quants: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i16>,
    scaled_sums: Vec<f32>,
}

impl Q8Row {
    /// An empty row; `None` for the float types.
    pub fn new(kind: ActivationType) -> Option<Self> {
        let (quants, scales, sums, scaled_sums) = Default::default();
        (kind.block_len() > 1).then_some(Self { kind, quants, scales, sums, scaled_sums })
    }

    /// Replaces the contents by `row`, keeping the buffers.
    ///
    /// # Panics
    /// If `row` is no whole number of blocks.
    pub fn quantize(&mut self, row: &[f32]) {
        let block_len = self.kind.block_len();
        assert!(row.len().is_multiple_of(block_len), "{} is no multiple of {block_len}", row.len());
        self.scales.clear();
        self.scaled_sums.clear();
        self.quants.resize(row.len(), 0);
        match self.kind {
            ActivationType::Q8_K => {
                for (x, q) in row.as_chunks().0.iter().zip(self.quants.as_chunks_mut().0) {
                    self.scales.push(quantize_q8_k(x, q));
                }
            }
            kind => {
                for (x, q) in row.as_chunks().0.iter().zip(self.quants.as_chunks_mut().0) {
                    let (scale, scaled_sum) = quantize_q8_1(x, q);
                    self.scales.push(scale);
                    if kind == ActivationType::Q8_1 {
                        self.scaled_sums.push(scaled_sum);
                    }
                }
            }
        }
        self.sums.clear();
        self.sums.extend(self.quants.chunks_exact(SUM_GROUP).map(sum));
    }

    /// The type of the blocks.
    pub fn kind(&self) -> ActivationType {
        self.kind
    }

    /// The 8-bit numbers, from -127 to 127.
    pub fn quants(&self) -> &[i8] {
        &self.quants
    }

    /// One scale per block; for Q8_0 and Q8_1 an f16 widened.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The sum of each [`SUM_GROUP`] quants, exactly.
    pub fn sums(&self) -> &[i16] {
        &self.sums
    }

    /// For Q8_1 the sum of each block times its scale, as ggml stores it: rounded to f16 on its
    /// own. Empty otherwise.
    pub fn scaled_sums(&self) -> &[f32] {
        &self.scaled_sums
    }

    /// Writes scales times quants to `out`, exactly.
    ///
    /// # Panics
    /// If `out` is not as long as the row.
    pub fn dequantize(&self, out: &mut [f64]) {
        assert_eq!(self.quants.len(), out.len(), "a rounded row is as long as the row");
        let block_len = self.kind.block_len();
        let blocks = self.quants.chunks_exact(block_len).zip(&self.scales);
        for ((quants, &scale), out) in blocks.zip(out.chunks_exact_mut(block_len)) {
            for (out, &q) in out.iter_mut().zip(quants) {
                *out = f64::from(scale) * f64::from(q);
            }
        }
    }

    /// What ggml's dot product with a row of stored weights has beyond the sum of products of the
    /// dequantised numbers.
    ///
    /// It multiplies the minimum of a Q4_1 or Q5_1 block with the [scaled sum](Self::scaled_sums),
    /// which has been rounded apart from the quants that it is the sum of. Zero for all other
    /// weights.
    ///
    /// # Panics
    /// If `weights` does not hold as many elements as this row, for those two types.
    pub fn min_correction(&self, weight: DType, weights: &[u8]) -> f64 {
        match weight {
            _ if self.kind != ActivationType::Q8_1 => 0.0,
            DType::Q4_1 => self.correct_mins(Q4_1::slice_of(weights).iter().map(|b| b.m.to_f32())),
            DType::Q5_1 => self.correct_mins(Q5_1::slice_of(weights).iter().map(|b| b.m.to_f32())),
            _ => 0.0,
        }
    }

    fn correct_mins(&self, mins: impl ExactSizeIterator<Item = f32>) -> f64 {
        assert_eq!(mins.len(), self.scaled_sums.len(), "one minimum for each block of Q8_1");
        let blocks = self.scaled_sums.iter().zip(&self.scales).zip(self.sums.as_chunks::<2>().0);
        blocks
            .zip(mins)
            .map(|(((&scaled, &scale), &[first, second]), min)| {
                let exact = f64::from(scale) * f64::from(first + second);
                f64::from(min) * (f64::from(scaled) - exact)
            })
            .sum()
    }
}

/// Rounds a block to Q8_0 and returns its scale.
pub fn quantize_q8_0(x: &[f32; 32], quants: &mut [i8; 32]) -> f32 {
    quantize_q8_1(x, quants).0
}

/// Rounds a block to Q8_1 and returns its scale and its scaled sum.
pub fn quantize_q8_1(x: &[f32; 32], quants: &mut [i8; 32]) -> (f32, f32) {
    let scale = if x.iter().all(|x| x.is_finite()) {
        let amax = x.iter().fold(0.0, |max: f32, x| max.max(x.abs()));
        quantize_by(127.0 / amax, x, quants);
        amax / 127.0
    } else {
        quants.fill(0);
        f32::NAN
    };
    let through_f16 = |x: f32| f16::from_f32(x).to_f32();
    (through_f16(scale), through_f16(scale * f32::from(sum(quants))))
}

/// Rounds a block to Q8_K and returns its scale, whose sign is opposite to that of the (first)
/// largest magnitude.
pub fn quantize_q8_k(x: &[f32; 256], quants: &mut [i8; 256]) -> f32 {
    if !x.iter().all(|x| x.is_finite()) {
        quants.fill(0);
        return f32::NAN;
    }
    let max = x.iter().fold(0.0, |max: f32, &x| if x.abs() > max.abs() { x } else { max });
    let inverse = -127.0 / max;
    quantize_by(inverse, x, quants);
    // Zero, not -0, for a block of zeros, as in ggml.
    if max == 0.0 { 0.0 } else { 1.0 / inverse }
}

/// `round(x * inverse)`; zeros if the block is zero or too small to have an `inverse`.
fn quantize_by(inverse: f32, x: &[f32], quants: &mut [i8]) {
    if !inverse.is_finite() {
        quants.fill(0);
        return;
    }
    for (q, &x) in quants.iter_mut().zip(x) {
        *q = (x * inverse).round_ties_even() as i8;
    }
}

fn sum(quants: &[i8]) -> i16 {
    quants.iter().map(|&q| i16::from(q)).sum()
}

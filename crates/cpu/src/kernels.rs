//! The table of kernels of one instruction set, chosen once when the backend is made.
//!
//! A kernel's contract is in the doc comment of its generic form; every table keeps it by bits.

use apr_tensor::DType;
use half::f16;

use crate::{
    activation::{Block8, Floats, Q8, Q8K},
    tile::{Line, ROWS},
};

/// The products of each row of a tile with as many rows of activations as `out` has elements.
type Products<A> = fn(tile: &[Line], activations: &[A], out: &mut [[f32; ROWS]]);

/// A tile of weights against activations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TileKernel<A: Block8> {
    /// One row.
    pub(crate) one: fn(tile: &[Line], activations: &[A], out: &mut [f32; ROWS]),
    /// Several rows, which are [packed](Block8::Packed).
    pub(crate) several: Products<A::Packed>,
    /// Many rows, in [matrices](Block8::Matrix), where hardware multiplies those.
    pub(crate) many: Option<Products<A::Matrix>>,
}

/// At most [`ROWS`] rows of weights of `cols` columns, one after the other, against as many rows of activations as `out` has
/// elements, which are [packed](crate::activation::pack).
pub(crate) type FloatKernel =
    fn(weights: &[u8], cols: usize, activations: &[Floats], out: &mut [[f32; ROWS]]);

/// See [`generic::elementwise::rotate`](crate::generic::elementwise::rotate).
pub(crate) type RotateKernel =
    fn(x: &[f32], head_dim: usize, cos: &[f64], sin: &[f64], out: &mut [f32]);

/// The integer kernel of a stored type, by the activations that it reads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum IntegerKernel {
    /// Q8_0.
    Blocks(TileKernel<Q8>),
    /// Q8_K.
    Superblocks(TileKernel<Q8K>),
}

/// Scores of several rows of queries, `[head_dim, rows]`.
pub(crate) type Scores<E> =
    fn(queries: &[f32], rows: usize, keys: &[E], scale: f32, out: &mut [f32]);

/// Sums of values for several rows of weights, each of which sees a number of positions.
pub(crate) type WeightedSums<E> =
    fn(weights: &[f32], seen: &[usize], values: &[E], out: &mut [f32]);

/// Attention over one head's cache in type `E`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionKernels<E> {
    /// See [`generic::attention::scores`](crate::generic::attention::scores).
    pub(crate) scores: Scores<E>,
    /// See [`generic::attention::weighted_sums`](crate::generic::attention::weighted_sums).
    pub(crate) weighted_sums: WeightedSums<E>,
}

/// All kernels of one instruction set.
#[derive(Debug)]
#[allow(non_snake_case, reason = "the names of the block types")]
pub(crate) struct Kernels {
    pub(crate) Q4_0: TileKernel<Q8>,
    pub(crate) Q4_1: TileKernel<Q8>,
    pub(crate) Q5_0: TileKernel<Q8>,
    pub(crate) Q5_1: TileKernel<Q8>,
    pub(crate) Q8_0: TileKernel<Q8>,
    pub(crate) IQ4_NL: TileKernel<Q8>,
    pub(crate) Q2_K: TileKernel<Q8K>,
    pub(crate) Q3_K: TileKernel<Q8K>,
    pub(crate) Q4_K: TileKernel<Q8K>,
    pub(crate) Q5_K: TileKernel<Q8K>,
    pub(crate) Q6_K: TileKernel<Q8K>,
    pub(crate) IQ4_XS: TileKernel<Q8K>,
    pub(crate) F32: FloatKernel,
    pub(crate) F16: FloatKernel,
    pub(crate) BF16: FloatKernel,
    pub(crate) widen_f16: fn(bytes: &[u8], out: &mut [f32]),
    pub(crate) quantize_q8_0: fn(x: &[f32], out: &mut [Q8]),
    pub(crate) quantize_q8_k: fn(x: &[f32], out: &mut [Q8K]),
    pub(crate) rms_norm: fn(x: &[f32], w: &[f32], eps: f64, out: &mut [f32]),
    pub(crate) silu: fn(x: &[f32], out: &mut [f32]),
    pub(crate) swiglu: fn(up: &[f32], gate: &mut [f32]),
    pub(crate) add: fn(x: &[f32], sum: &mut [f32]),
    pub(crate) multiply: fn(x: &[f32], y: &[f32], out: &mut [f32]),
    pub(crate) add_weighted: fn(x: &[f32], weight: f32, sum: &mut [f32]),
    pub(crate) rotate: RotateKernel,
    pub(crate) softmax: fn(x: &mut [f32]),
    pub(crate) attention_f16: AttentionKernels<f16>,
    pub(crate) attention_f32: AttentionKernels<f32>,
}

impl Kernels {
    /// The kernel for float weights of type `dtype`; `None` if they are to be widened to f32 first.
    pub(crate) fn float(&self, dtype: DType) -> Option<FloatKernel> {
        Some(match dtype {
            DType::F32 => self.F32,
            DType::F16 => self.F16,
            DType::BF16 => self.BF16,
            _ => return None,
        })
    }

    /// Whether it has kernels for [many](TileKernel::many) rows.
    pub(crate) fn multiply_matrices(&self) -> bool {
        self.Q8_0.many.is_some()
    }

    /// The integer kernel for weights of type `dtype`; `None` if they are multiplied as f32.
    pub(crate) fn integer(&self, dtype: DType) -> Option<IntegerKernel> {
        use IntegerKernel::{Blocks, Superblocks};
        Some(match dtype {
            DType::Q4_0 => Blocks(self.Q4_0),
            DType::Q4_1 => Blocks(self.Q4_1),
            DType::Q5_0 => Blocks(self.Q5_0),
            DType::Q5_1 => Blocks(self.Q5_1),
            DType::Q8_0 => Blocks(self.Q8_0),
            DType::IQ4_NL => Blocks(self.IQ4_NL),
            DType::Q2_K => Superblocks(self.Q2_K),
            DType::Q3_K => Superblocks(self.Q3_K),
            DType::Q4_K => Superblocks(self.Q4_K),
            DType::Q5_K => Superblocks(self.Q5_K),
            DType::Q6_K => Superblocks(self.Q6_K),
            DType::IQ4_XS => Superblocks(self.IQ4_XS),
            _ => return None,
        })
    }
}

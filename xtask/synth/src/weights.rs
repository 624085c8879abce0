//! Random weights, in whatever type.
//!
//! A quantiser that searches would take hours for billions of weights. So of each type and each length of a row there is a
//! stock of [`STOCK`] pieces, normally distributed numbers that the real quantiser has written, and a row is a random
//! sequence of them. Blocks are what a quantiser would write, with scales as they would be; what is not random is
//! that each block occurs more than once. No kernel takes shortcuts over that, but a compressor would.

use std::collections::BTreeMap;

use apr_convert::{Planned, Put, Result};
use apr_model::{LayerRole, Role};
use apr_tensor::{DType, quantize_row};

use crate::random::Random;

/// How many pieces there are to choose from: a row of a few of them is hardly ever drawn twice.
const STOCK: usize = 4096;

/// Fewest weights of a piece.
const PIECE: usize = 32;

/// Bytes that are written at once.
const AT_ONCE: usize = 1 << 20;

/// The standard deviation of biases, small beside that of what they are added to.
const BIAS: f32 = 0.1;

/// Makes the bytes of tensors.
#[derive(Debug)]
pub(crate) struct Weights {
    seed: u64,
    stocks: BTreeMap<(DType, usize), Stock>,
}

impl Weights {
    /// The weights of `seed`. Those of a tensor depend on the seed, its name, its type and its shape alone.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, stocks: BTreeMap::new() }
    }

    /// Hands the bytes of `tensor` to `put`.
    pub(crate) fn write(&mut self, tensor: &Planned, put: &mut Put<'_>) -> Result<()> {
        let mut random = Random::new(self.seed, &tensor.name);
        let (dtype, cols) = (tensor.dtype, tensor.shape.cols());
        if tensor.shape.dims().len() < 2 {
            let values: Vec<f32> = (0..cols).map(|_| in_vector(tensor.role, &mut random)).collect();
            return put(&written(dtype, &values)?);
        }
        let seed = self.seed;
        let stock = match self.stocks.entry((dtype, cols)) {
            std::collections::btree_map::Entry::Occupied(there) => there.into_mut(),
            std::collections::btree_map::Entry::Vacant(free) => {
                free.insert(Stock::new(seed, dtype, cols)?)
            }
        };
        let row_bytes = dtype.row_bytes(cols).expect("planned in whole blocks");
        let mut bytes = Vec::with_capacity(AT_ONCE + row_bytes);
        for _ in 0..tensor.shape.rows() {
            stock.append_row(row_bytes, &mut random, &mut bytes);
            if bytes.len() >= AT_ONCE {
                put(&bytes)?;
                bytes.clear();
            }
        }
        // What is left; a tensor without weights is one part that is empty.
        if !bytes.is_empty() || row_bytes == 0 {
            put(&bytes)?;
        }
        Ok(())
    }
}

/// A weight of a norm or of a bias.
fn in_vector(role: Role, random: &mut Random) -> f32 {
    use LayerRole::{AttnKBias, AttnQBias, AttnVBias};
    match role {
        Role::Layer(_, AttnQBias | AttnKBias | AttnVBias) => BIAS * random.normal(),
        _ => 1.0,
    }
}

/// Pieces of rows of one length in one type.
#[derive(Debug)]
struct Stock {
    piece_bytes: usize,
    bytes: Vec<u8>,
}

impl Stock {
    /// Numbers of variance `1 / cols`: the product of such a row and what a norm returns has variance 1, however long it is.
    fn new(seed: u64, dtype: DType, cols: usize) -> Result<Self> {
        let mut random = Random::new(seed, &format!("{dtype} {cols}"));
        let scale = (cols as f32).sqrt().recip();
        let piece = dtype.block_len().max(PIECE);
        let piece_bytes = dtype.row_bytes(piece).expect("blocks are powers of two");
        let mut bytes = Vec::with_capacity(STOCK * piece_bytes);
        for _ in 0..STOCK {
            let values: Vec<f32> = (0..piece).map(|_| scale * random.normal()).collect();
            bytes.extend(written(dtype, &values)?);
        }
        Ok(Self { piece_bytes, bytes })
    }

    /// Appends a row of random pieces, the last of which is cut where the row ends.
    fn append_row(&self, row_bytes: usize, random: &mut Random, out: &mut Vec<u8>) {
        let end = out.len() + row_bytes;
        while out.len() < end {
            let first = random.next() as usize % STOCK * self.piece_bytes;
            let len = self.piece_bytes.min(end - out.len());
            out.extend_from_slice(&self.bytes[first..first + len]);
        }
    }
}

/// `values` in the type `dtype`.
fn written(dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = vec![0; dtype.row_bytes(values.len()).expect("whole blocks")];
    quantize_row(dtype, values, None, &mut bytes)?;
    Ok(bytes)
}

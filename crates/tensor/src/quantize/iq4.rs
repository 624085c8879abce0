//! 4 bits through a table: IQ4_NL and IQ4_XS.

use super::{
    Input, Quantize,
    search::{Codes, Integers, each, inverse, scale},
    super_block::Symmetric,
    weighted::{Spread, Weight, Weighted},
};
use crate::block::{IQ4_NL, IQ4_VALUES, IQ4_XS};

impl Quantize for IQ4_NL {
    fn quantize(input: &Input) -> Option<Self> {
        let block = Weighted::<32, 1>::new(input, Weight::Square, Spread::Block { times: 2.0 });
        let ([x], [w]) = (&block.x, &block.w);
        let (d, unit) = block.half(scale(x, w, Table))?;
        let inverse = inverse(unit);
        Some(Self { d, qs: nibbles(&each(|i| Table.nearest(x[i] * inverse))) })
    }
}

impl Quantize for IQ4_XS {
    fn quantize(input: &Input) -> Option<Self> {
        let block = Weighted::<32, 8>::new(input, Weight::Square, Spread::Block { times: 2.0 });
        let scale_codes = Integers { low: -32.0, high: 31.0 };
        let Symmetric { d, scales, codes } = Symmetric::fit(&block, Table, scale_codes)?;
        let mut packed = Self { d, scales_h: [0; 2], scales_l: [0; 4], qs: [0; 128] };
        let mut high = 0;
        for (i, scale) in scales.into_iter().enumerate() {
            let scale = (scale + 32.0) as u8;
            packed.scales_l[i / 2] |= (scale & 0xf) << (4 * (i % 2));
            high |= u16::from(scale >> 4) << (2 * i);
        }
        packed.scales_h = high.to_le_bytes();
        for (qs, values) in packed.qs.as_chunks_mut().0.iter_mut().zip(&codes) {
            *qs = nibbles(values);
        }
        Some(packed)
    }
}

/// [`IQ4_VALUES`].
#[derive(Clone, Copy)]
struct Table;

impl Codes for Table {
    fn ends(self) -> [f32; 2] {
        [IQ4_VALUES[0].into(), IQ4_VALUES[15].into()]
    }

    fn reach(self) -> f32 {
        9.0
    }

    /// Without a search in the table, so that a loop over numbers can run in lanes.
    #[inline(always)]
    fn nearest(self, x: f32) -> f32 {
        let [mut value, _] = self.ends();
        for pair in IQ4_VALUES.array_windows() {
            let [low, high] = pair.map(f32::from);
            value += if x > (low + high) / 2.0 { high - low } else { 0.0 };
        }
        value
    }
}

/// The places in the table of 32 of its values, the first 16 in the low nibbles.
fn nibbles(values: &[f32; 32]) -> [u8; 16] {
    let place = |value: f32| IQ4_VALUES.partition_point(|&v| f32::from(v) < value) as u8;
    std::array::from_fn(|j| place(values[j]) | place(values[16 + j]) << 4)
}

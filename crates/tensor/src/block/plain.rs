//! Types of one element per block: floats of other widths, and integers.

use half::f16;

use super::Codec;

/// Rounded to the nearest f32, whose step it has.
pub(super) const F64: Codec = Codec {
    dequantize: |bytes, out| convert(bytes, out, |b| f64::from_le_bytes(b) as f32),
    steps: |bytes, out| convert(bytes, out, |b| ulp(f64::from_le_bytes(b) as f32)),
};

pub(super) const F32: Codec = Codec {
    dequantize: |bytes, out| convert(bytes, out, f32::from_le_bytes),
    steps: |bytes, out| convert(bytes, out, |b| ulp(f32::from_le_bytes(b))),
};

pub(super) const F16: Codec = Codec {
    dequantize: |bytes, out| convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
    steps: |bytes, out| convert(bytes, out, |b| f16_ulp(u16::from_le_bytes(b))),
};

/// A bf16 is the upper half of an f32. Done by hand, because `half` sets the quiet bit of NaNs.
pub(super) const BF16: Codec = Codec {
    dequantize: |bytes, out| convert(bytes, out, |b| bf16(u16::from_le_bytes(b))),
    steps: |bytes, out| {
        convert(bytes, out, |b| bf16_ulp(u16::from_le_bytes(b)));
    },
};

pub(super) const I64: Codec = integer(|bytes, out| {
    convert(bytes, out, |b| i64::from_le_bytes(b) as f32);
});

pub(super) const I32: Codec = integer(|bytes, out| {
    convert(bytes, out, |b| i32::from_le_bytes(b) as f32);
});

pub(super) const I16: Codec = integer(|bytes, out| {
    convert(bytes, out, |b| i16::from_le_bytes(b).into());
});

pub(super) const I8: Codec = integer(|bytes, out| {
    convert(bytes, out, |b| i8::from_le_bytes(b).into());
});

pub(super) const U8: Codec = integer(|bytes, out| {
    convert(bytes, out, |b| u8::from_le_bytes(b).into());
});

pub(super) const BOOL: Codec = integer(|bytes, out| {
    convert(bytes, out, |[b]| if b == 0 { 0.0 } else { 1.0 });
});

/// Whole numbers are one apart.
const fn integer(dequantize: super::Reader) -> Codec {
    Codec { dequantize, steps: |_, out| out.fill(1.0) }
}

fn ulp(x: f32) -> f32 {
    gap(x.to_bits() & 0x7fff_ffff, f32::from_bits)
}

/// The distance from the f16 with these bits to the next of larger magnitude.
pub(super) fn f16_ulp(bits: u16) -> f32 {
    gap(u32::from(bits & 0x7fff), |bits| f16::from_bits(bits as u16).to_f32())
}

fn bf16_ulp(bits: u16) -> f32 {
    gap(u32::from(bits & 0x7fff), |bits| bf16(bits as u16))
}

/// The distance from the float with these bits, without its sign, to the next; for the largest to the one before, so that
/// what does not fit is not taken for rounding.
fn gap(bits: u32, value: impl Fn(u32) -> f32) -> f32 {
    let (at, above) = (value(bits), value(bits + 1));
    if above.is_finite() || bits == 0 { above - at } else { at - value(bits - 1) }
}

fn bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = value(element);
    }
}

//! Types of one element per block: floats of other widths, and integers.

use half::f16;

pub(super) fn f64(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| f64::from_le_bytes(b) as f32);
}

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, f32::from_le_bytes);
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| f16::from_le_bytes(b).to_f32());
}

/// A bf16 is the upper half of an f32. Done by hand, because `half` sets the quiet bit of NaNs.
pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
}

pub(super) fn i64(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| i64::from_le_bytes(b) as f32);
}

pub(super) fn i32(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| i32::from_le_bytes(b) as f32);
}

pub(super) fn i16(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| i16::from_le_bytes(b).into());
}

pub(super) fn i8(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| i8::from_le_bytes(b).into());
}

pub(super) fn u8(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |b| u8::from_le_bytes(b).into());
}

pub(super) fn bool(bytes: &[u8], out: &mut [f32]) {
    convert(bytes, out, |[b]| if b == 0 { 0.0 } else { 1.0 });
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (elements, _) = bytes.as_chunks();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = value(element);
    }
}

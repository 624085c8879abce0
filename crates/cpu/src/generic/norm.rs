//! RMSNorm (Zhang and Sennrich 2019).

use super::{LANES, lanes::sum};

/// `x / sqrt(mean(x^2) + eps) * w`.
///
/// Squares are summed in f64 in lanes like those of [float products](super::float) (each square is exact); root, quotient and
/// products are f64 too, and the result is rounded to f32 once.
#[inline(always)]
pub(crate) fn rms_norm(x: &[f32], w: &[f32], eps: f64, out: &mut [f32]) {
    let mut lanes = [0.0; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(tail) {
        *lane += f64::from(x) * f64::from(x);
    }
    let scale = 1.0 / (sum(lanes) / x.len() as f64 + eps).sqrt();
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *out = (f64::from(x) * scale * f64::from(w)) as f32;
    }
}

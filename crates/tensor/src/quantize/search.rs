//! The search for the scale, or the scale and the minimum, of some numbers that are to share one.
//!
//! For given codes the best scale is a least-squares fit; for a given scale the best codes are the
//! nearest. Both together have no closed form, and going back and forth between them ends at the
//! nearest local optimum. So codes come from a fan of scales around those that map the largest
//! number to the last code, and each proposal is scored by what its fit explains. The fan is
//! narrow: with a wide one an important number would win the scale that is best for it, and the
//! large ones that are cut off then would not matter.
//!
//! Sums run in eight lanes, added in a fixed order. Numbers are expected around one
//! ([`Weighted`](super::weighted::Weighted) sees to it), so that no square overflows.

/// Lanes of a sum; lengths are multiples of it.
const LANES: usize = 8;

/// What a proposal must explain more by, so that rounding does not choose: sub-blocks of equal
/// numbers get equal scales.
const CLEARLY: f32 = 1.0 + 4.0 * f32::EPSILON;

/// The numbers that codes stand for, in units of their scale.
pub(super) trait Codes: Copy {
    /// The first and the last.
    fn ends(self) -> [f32; 2];

    /// How far the fan reaches to both sides of an end: less than the gap before it.
    fn reach(self) -> f32;

    /// The nearest to `x`, which need not be finite.
    fn nearest(self, x: f32) -> f32;
}

/// The integers from `low` to `high`.
#[derive(Clone, Copy)]
pub(super) struct Integers {
    pub(super) low: f32,
    pub(super) high: f32,
}

impl Codes for Integers {
    fn ends(self) -> [f32; 2] {
        [self.low, self.high]
    }

    fn reach(self) -> f32 {
        0.9
    }

    #[inline]
    fn nearest(self, x: f32) -> f32 {
        // Adding this leaves no bits for a fraction: as `round_ties_even`, which is a call on
        // processors without an instruction for it.
        const SHIFT: f32 = 1.5 * (1 << 23) as f32;
        (x.clamp(self.low, self.high) + SHIFT) - SHIFT
    }
}

/// Weights times squared errors of `x` as `scale * code + shift`.
#[inline]
pub(super) fn error<const N: usize>(
    x: &[f32; N],
    w: &[f32; N],
    (scale, shift): (f32, f32),
    codes: impl Codes,
) -> f32 {
    let inverse = inverse(scale);
    let [error] = sums::<N, 1>(|i| {
        let x = x[i] - shift;
        let diff = x - scale * codes.nearest(x * inverse);
        [w[i] * diff * diff]
    });
    error
}

/// The scale with which codes leave about the smallest weighted error of `x`.
#[inline(always)]
pub(super) fn scale<const N: usize>(x: &[f32; N], w: &[f32; N], codes: impl Codes) -> f32 {
    const STEPS: i32 = 3;
    let (min, max) = extremes(x);
    let inverse_of_largest = inverse(if -min > max { min } else { max });
    let wx: [f32; N] = each(|i| w[i] * x[i]);
    let (mut best, mut most_explained) = (0.0, 0.0);
    for end in codes.ends() {
        for step in -STEPS..=STEPS {
            let offset = codes.reach() / STEPS as f32 * step as f32;
            let inverse = (end + offset) * inverse_of_largest;
            let [xq, qq] = sums::<N, 2>(|i| {
                let q = codes.nearest(x[i] * inverse);
                [wx[i] * q, w[i] * q * q]
            });
            let explained = if qq > 0.0 { xq * xq / qq } else { 0.0 };
            if explained > most_explained * CLEARLY {
                (best, most_explained) = (xq / qq, explained);
            }
        }
    }
    best
}

/// The scale and the minimum, at most zero, with which integers from 0 to `top` leave about the
/// smallest weighted error of `x`.
///
/// Each proposal starts from the best minimum so far, so that both are searched in one walk.
#[inline(always)]
pub(super) fn scale_and_min<const N: usize>(x: &[f32; N], w: &[f32; N], top: f32) -> (f32, f32) {
    const STEPS: i32 = 6;
    let (min, max) = extremes(x);
    let min = min.min(0.0);
    let [total, sum] = sums::<N, 2>(|i| [w[i], w[i] * x[i]]);
    if max <= min || total <= 0.0 {
        return (0.0, min);
    }
    let codes = Integers { low: 0.0, high: top };
    // About the mean, so that no difference of large sums is taken.
    let mean = sum / total;
    let centred: [f32; N] = each(|i| w[i] * (x[i] - mean));
    let (mut best, mut most_explained) = ((0.0, min), 0.0);
    for step in -STEPS..=STEPS {
        let offset = step as f32 / STEPS as f32;
        let (_, origin) = best;
        let inverse = (top + offset) / (max - origin);
        let [q1, q2, xq] = sums::<N, 3>(|i| {
            let q = codes.nearest((x[i] - origin) * inverse);
            let wq = w[i] * q;
            [wq, wq * q, centred[i] * q]
        });
        let variance = q2 - q1 * (q1 / total);
        let scale = xq / variance;
        let min = mean - scale * (q1 / total);
        let (fit, explained) = if variance > 1e-6 * q2 && min <= 0.0 {
            ((scale, min), total * mean * mean + xq * scale)
        } else if q2 > 0.0 {
            let xq = xq + mean * q1;
            ((xq / q2, 0.0), xq * xq / q2)
        } else {
            continue;
        };
        if explained > most_explained * CLEARLY {
            (best, most_explained) = (fit, explained);
        }
    }
    best
}

/// The sums of `K` terms of each index.
#[inline(always)]
pub(super) fn sums<const N: usize, const K: usize>(terms: impl Fn(usize) -> [f32; K]) -> [f32; K] {
    const { assert!(N.is_multiple_of(LANES)) };
    // Two loops without branches, which compilers turn into vector code; of one they do not.
    let mut all = [[0.0; N]; K];
    for i in 0..N {
        for (all, term) in all.iter_mut().zip(terms(i)) {
            all[i] = term;
        }
    }
    let mut out = [0.0; K];
    for (out, terms) in out.iter_mut().zip(&all) {
        let mut l = [0.0; LANES];
        for terms in terms.as_chunks::<LANES>().0 {
            for (lane, term) in l.iter_mut().zip(terms) {
                *lane += term;
            }
        }
        *out = ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
    }
    out
}

/// As [`std::array::from_fn`], in a loop that compilers turn into vector code.
#[inline(always)]
pub(super) fn each<const N: usize>(of: impl Fn(usize) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (i, out) in out.iter_mut().enumerate() {
        *out = of(i);
    }
    out
}

/// The smallest and the largest number.
#[inline]
pub(super) fn extremes<const N: usize>(x: &[f32; N]) -> (f32, f32) {
    let (mut min, mut max) = ([x[0]; LANES], [x[0]; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for ((min, max), &x) in min.iter_mut().zip(&mut max).zip(x) {
            *min = if x < *min { x } else { *min };
            *max = if x > *max { x } else { *max };
        }
    }
    (min.into_iter().fold(x[0], f32::min), max.into_iter().fold(x[0], f32::max))
}

/// `1 / x`, and zero for what is too small to have an inverse.
#[inline]
pub(super) fn inverse(x: f32) -> f32 {
    let inverse = 1.0 / x;
    if inverse.is_finite() { inverse } else { 0.0 }
}

//! Blocks of 256: sub-blocks whose scales (and minima) are small integers times a scale (and a
//! minimum) of the block.
//!
//! Each sub-block is searched by itself, and its scale rounded to an integer in a unit that suits
//! all. This moves the scales away from where they were best, so each sub-block then looks among
//! the neighbours of its integers, with its numbers rounded anew under each; and at last the unit
//! is fitted to all codes by least squares.

use super::{
    search::{self, Codes, Integers, error, inverse, sums},
    weighted::Weighted,
};
use crate::block::Half;

/// A block without minima: numbers are `d * scale * code`.
pub(super) struct Symmetric<const S: usize, const B: usize> {
    pub(super) d: Half,
    /// Integers.
    pub(super) scales: [f32; B],
    /// What the codes stand for.
    pub(super) codes: [[f32; S]; B],
}

impl<const S: usize, const B: usize> Symmetric<S, B> {
    /// `None` if `d` overflows.
    #[inline(always)]
    pub(super) fn fit(
        block: &Weighted<S, B>,
        codes: impl Codes,
        scale_codes: Integers,
    ) -> Option<Self> {
        let each = || block.x.iter().zip(&block.w);
        let error_of = |x: &_, w: &_, scale: f32| error(x, w, (scale, 0.0), codes);
        let mut free = [0.0; B];
        let mut costs = [0.0; B];
        for (((x, w), free), cost) in each().zip(&mut free).zip(&mut costs) {
            *free = search::scale(x, w, codes);
            [_, *cost] = moments(x, w, *free, codes);
        }
        let (mut d, mut unit) = block.half(search::scale(&free, &costs, scale_codes))?;
        let mut scales = free.map(|scale| scale_codes.nearest(scale * inverse(unit)));
        for ((x, w), scale) in each().zip(&mut scales) {
            let around = [0.0, -1.0, 1.0].map(|step| scale_codes.nearest(*scale + step));
            *scale = best_of(around, |scale| error_of(x, w, unit * scale));
        }

        let [mut xq, mut qq] = [0.0; 2];
        for ((x, w), scale) in each().zip(scales) {
            let [sub_xq, sub_qq] = moments(x, w, unit * scale, codes);
            xq += scale * sub_xq;
            qq += scale * scale * sub_qq;
        }
        let total = |unit: f32| -> f32 {
            each().zip(scales).map(|((x, w), scale)| error_of(x, w, unit * scale)).sum()
        };
        if let Some((half, fitted)) = block.half(xq * inverse(qq))
            && total(fitted) < total(unit)
        {
            (d, unit) = (half, fitted);
        }

        let codes = std::array::from_fn(|sub| {
            let (x, inverse) = (&block.x[sub], inverse(unit * scales[sub]));
            search::each(|i| codes.nearest(x[i] * inverse))
        });
        Some(Self { d, scales, codes })
    }
}

/// Weighted sums of `x * code` and of `code^2` under a scale.
#[inline(always)]
fn moments<const S: usize>(x: &[f32; S], w: &[f32; S], scale: f32, codes: impl Codes) -> [f32; 2] {
    let inverse = inverse(scale);
    sums::<S, 2>(|i| {
        let q = codes.nearest(x[i] * inverse);
        [w[i] * x[i] * q, w[i] * q * q]
    })
}

/// A block with minima: numbers are `d * scale * code - dmin * min`.
pub(super) struct Affine<const S: usize, const B: usize> {
    pub(super) d: Half,
    pub(super) dmin: Half,
    pub(super) scales: [u8; B],
    pub(super) mins: [u8; B],
    /// Integers.
    pub(super) codes: [[f32; S]; B],
}

impl<const S: usize, const B: usize> Affine<S, B> {
    /// Codes reach from 0 to `top`, scales and minima from 0 to `most`. `None` if `d` or `dmin`
    /// overflows.
    #[inline(always)]
    pub(super) fn fit(block: &Weighted<S, B>, top: f32, most: f32) -> Option<Self> {
        let (codes, integers) =
            (Integers { low: 0.0, high: top }, Integers { low: 0.0, high: most });
        let each = || block.x.iter().zip(&block.w);
        let error_of = |x: &_, w: &_, scale: f32, min: f32| error(x, w, (scale, -min), codes);
        let mut free = [(0.0, 0.0); B];
        for ((x, w), free) in each().zip(&mut free) {
            *free = search::scale_and_min(x, w, top);
        }
        let weights = block.w.each_ref().map(|w| sums::<S, 1>(|i| [w[i]])[0]);
        let (free_scales, free_mins) = (free.map(|(scale, _)| scale), free.map(|(_, min)| -min));
        let (mut d, mut unit) = block.half(search::scale(&free_scales, &weights, integers))?;
        let (mut dmin, mut min_unit) = block.half(search::scale(&free_mins, &weights, integers))?;
        let mut scales = free_scales.map(|scale| integers.nearest(scale * inverse(unit)));
        let mut mins = free_mins.map(|min| integers.nearest(min * inverse(min_unit)));
        for (((x, w), scale), min) in each().zip(&mut scales).zip(&mut mins) {
            let at = |s, m| (integers.nearest(*scale + s), integers.nearest(*min + m));
            let around = [at(0.0, 0.0), at(-1.0, 0.0), at(1.0, 0.0), at(0.0, -1.0), at(0.0, 1.0)];
            (*scale, *min) =
                best_of(around, |(scale, min)| error_of(x, w, unit * scale, min_unit * min));
        }

        let total = |unit: f32, min_unit: f32| -> f32 {
            let each = each().zip(scales).zip(mins);
            each.map(|(((x, w), scale), min)| error_of(x, w, unit * scale, min_unit * min)).sum()
        };
        // The normal equations of d and dmin.
        let [mut ss, mut sm, mut mm, mut sx, mut mx] = [0.0; 5];
        for (((x, w), scale), min) in each().zip(scales).zip(mins) {
            let (inverse, shift) = (inverse(unit * scale), min_unit * min);
            let [q0, q1, q2, x1, xq] = sums::<S, 5>(|i| {
                let q = codes.nearest((x[i] + shift) * inverse);
                let (wx, wq) = (w[i] * x[i], w[i] * q);
                [w[i], wq, wq * q, wx, wx * q]
            });
            ss += scale * scale * q2;
            sm += scale * min * q1;
            mm += min * min * q0;
            sx += scale * xq;
            mx += min * x1;
        }
        let determinant = ss * mm - sm * sm;
        if determinant > 1e-6 * ss * mm
            && let Some((half, fitted)) = block.half((sx * mm - mx * sm) / determinant)
            && let Some((min_half, min_fitted)) = block.half((sx * sm - mx * ss) / determinant)
            && total(fitted, min_fitted) < total(unit, min_unit)
        {
            (d, unit, dmin, min_unit) = (half, fitted, min_half, min_fitted);
        }

        let codes = std::array::from_fn(|sub| {
            let (x, shift) = (&block.x[sub], min_unit * mins[sub]);
            let inverse = inverse(unit * scales[sub]);
            search::each(|i| codes.nearest((x[i] + shift) * inverse))
        });
        Some(Self { d, dmin, scales: scales.map(|s| s as u8), mins: mins.map(|m| m as u8), codes })
    }
}

/// The first of `choices` that has the smallest error.
#[inline(always)]
fn best_of<T: Copy, const N: usize>(choices: [T; N], error: impl Fn(T) -> f32) -> T {
    let mut best = (choices[0], error(choices[0]));
    for &choice in &choices[1..] {
        let error = error(choice);
        if error < best.1 {
            best = (choice, error);
        }
    }
    best.0
}

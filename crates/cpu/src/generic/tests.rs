//! Every kernel of every instruction set against its scalar twin, by bits, at lengths around those of vectors.
//! (The twin itself is tested against the f64 reference in `tests/reference.rs`.)

use apr_tensor::activation::{quantize_q8_0, quantize_q8_k};
use half::f16;

use super::{LANES, lanes::Element, scalar};
use crate::{
    Isa,
    activation::{Block8, Q8, Q8K},
    kernels::{AttentionKernels, Kernels},
};

const LENGTHS: [usize; 13] = [0, 1, 7, 8, 9, 15, 16, 17, 31, 33, 64, 129, 272];

/// Values that round in every way there is: large, small, subnormal, zeros of both signs.
fn values(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let value = |bits: u32| match bits % 32 {
        0 => 0.0,
        1 => -0.0,
        2 => f32::from_bits(bits >> 9),
        3 => (bits as f32 / 1e9 - 2.0) * 50.0,
        _ => bits as f32 / 2e9 - 1.0,
    };
    (0..len).map(|_| value(next())).collect()
}

fn halves(x: &[f32]) -> Vec<f16> {
    x.iter().map(|&x| f16::from_f32(x)).collect()
}

/// Bits, with all NaNs alike: their payloads are outside the contract.
fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

/// Fails unless `run` gives the same bits with the kernels of every instruction set.
fn assert_twins(what: &str, run: impl Fn(&Kernels) -> Vec<f32>) {
    let expected = bits(&run(&scalar::KERNELS));
    for isa in Isa::available() {
        let found = bits(&run(isa.kernels().unwrap()));
        assert!(found == expected, "{what} on {isa}: {found:x?} for {expected:x?}");
    }
}

#[test]
fn float_kernels_are_their_twins_at_every_length() {
    for len in LENGTHS {
        let (x, w) = (values(1, len), values(2, len));
        assert_twins(&format!("silu of {len}"), |k| {
            let mut out = vec![0.0; len];
            (k.silu)(&x, &mut out);
            out
        });
        assert_twins(&format!("softmax of {len}"), |k| {
            let mut x = x.clone();
            (k.softmax)(&mut x);
            x
        });
        assert_twins(&format!("rms_norm of {len}"), |k| {
            let mut out = vec![0.0; len];
            (k.rms_norm)(&x, &w, 1e-5, &mut out);
            out
        });
        for rows in [1, 3, 4, 5, 9] {
            let x = values(3, rows * len);
            assert_twins(&format!("{rows} dots of {len}"), |k| {
                let mut out = vec![f32::NAN; rows];
                (k.dots)(&w, &x, &mut out);
                out
            });
        }
    }
}

#[test]
fn a_dot_product_is_lanes_then_a_tree() {
    for len in LENGTHS {
        let (w, x) = (values(4, len), values(5, len));
        let mut lanes = [0f32; LANES];
        for (i, (w, x)) in w.iter().zip(&x).enumerate() {
            lanes[i % LANES] = x.mul_add(*w, lanes[i % LANES]);
        }
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
        }
        for isa in Isa::available() {
            let mut out = [f32::NAN];
            (isa.kernels().unwrap().dots)(&w, &x, &mut out);
            assert_eq!(out, [lanes[0]], "{isa}, {len}");
        }
    }
}

#[test]
fn attention_kernels_are_their_twins_at_every_width() {
    fn check<E: Element>(of: fn(&[f32]) -> Vec<E>, get: fn(&Kernels) -> AttentionKernels<E>) {
        for width in LENGTHS.into_iter().filter(|&width| width > 0) {
            for keys in [1, 2, 5, 17] {
                let (q, weights) = (values(6, width), values(7, keys));
                let (k, v) = (of(&values(8, keys * width)), of(&values(9, keys * width)));
                assert_twins(&format!("{keys} scores of {width}"), |kernels| {
                    let mut out = vec![0.0; keys];
                    (get(kernels).scores)(&q, &k, 0.125, &mut out);
                    out
                });
                assert_twins(&format!("weighted sum of {keys} values of {width}"), |kernels| {
                    let mut out = vec![f32::NAN; width];
                    (get(kernels).weighted_sum)(&weights, &v, &mut out);
                    out
                });
            }
        }
    }
    check(halves, |k| k.attention_f16);
    check(<[f32]>::to_vec, |k| k.attention_f32);
}

#[test]
fn f16_is_widened_exactly_for_every_bit_pattern() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let bytes: Vec<u8> = all.iter().flat_map(|x| x.to_le_bytes()).collect();
    let exact: Vec<f32> = all.iter().map(|x| x.to_f32()).collect();
    for isa in Isa::available() {
        for start in [0, 1, 15] {
            let mut out = vec![0.0; all.len() - start];
            (isa.kernels().unwrap().widen_f16)(&bytes[2 * start..], &mut out);
            assert!(bits(&out) == bits(&exact[start..]), "{isa}");
        }
    }
}

/// Rows of 256 activations that are rounded in a special way, and some that are not.
fn rows_to_round() -> Vec<Vec<f32>> {
    let mut rows: Vec<_> = (0..20).map(|seed| values(seed, 256)).collect();
    let constants =
        [0.0, -0.0, 1.0, -3e38, f32::MAX, 1e-38, f32::from_bits(1), 65504.0 * 127.0, 9e6];
    rows.extend(constants.map(|x| vec![x; 256]));
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 31, 100, 255] {
            let mut row = values(77, 256);
            row[place] = bad;
            rows.push(row);
        }
    }
    // The largest magnitude twice, with either sign first; ties between integers.
    for first in [5.0, -5.0] {
        let mut row = values(78, 256).into_iter().map(|x| x.clamp(-1.0, 1.0)).collect::<Vec<_>>();
        (row[40], row[200]) = (first, -first);
        rows.push(row);
    }
    rows.push((0..256).map(|i| (i - 128) as f32 / 2.0).map(|x| x.clamp(-63.5, 63.5)).collect());
    rows
}

#[test]
fn activations_are_rounded_as_their_definition_says() {
    for x in rows_to_round() {
        for isa in Isa::available() {
            let kernels = isa.kernels().unwrap();
            let mut blocks = [Q8::ZERO; 8];
            (kernels.quantize_q8_0)(&x, &mut blocks);
            for (found, x) in blocks.iter().zip(x.as_chunks().0) {
                let mut qs = [0; 32];
                let d = quantize_q8_0(x, &mut qs);
                assert_eq!((bits(&[found.d]), found.qs), (bits(&[d]), qs), "{isa} {x:?}");
                assert_eq!(found.sum, qs.iter().map(|&q| i32::from(q)).sum::<i32>());
            }
            let mut block = [Q8K::ZERO];
            (kernels.quantize_q8_k)(&x, &mut block);
            let [found] = block;
            let mut qs = [0; 256];
            let d = quantize_q8_k(x.as_slice().try_into().unwrap(), &mut qs);
            assert_eq!((bits(&[found.d]), found.qs), (bits(&[d]), qs), "{isa} {x:?}");
            for (sum, qs) in found.sums.iter().zip(qs.as_chunks::<16>().0) {
                assert_eq!(i32::from(*sum), qs.iter().map(|&q| i32::from(q)).sum::<i32>());
            }
        }
    }
}

#[test]
fn integer_products_are_exact_at_their_extremes() {
    // Every weight, scale and activation at its largest: the sums that are nearest to overflow.
    let block =
        |bytes: &[u8], len: usize| -> Vec<u8> { bytes.iter().copied().cycle().take(len).collect() };
    for (byte, a) in [(0xff, 127), (0xff, -127), (0x7f, -127), (0x80, 127), (0x00, -127)] {
        let x = Q8 { d: 1.0, sum: 32 * i32::from(a), qs: [a; 32] };
        let xk = Q8K { d: 1.0, sums: [16 * i16::from(a); 16], qs: [a; 256] };
        assert_twins(&format!("{byte:#x} times {a}"), |k| {
            let mut out = Vec::new();
            let small = [
                (k.Q4_0, 18),
                (k.Q4_1, 20),
                (k.Q5_0, 22),
                (k.Q5_1, 24),
                (k.Q8_0, 34),
                (k.IQ4_NL, 18),
            ];
            for (kernel, len) in small {
                let mut w = block(&[byte], len);
                w[..2].copy_from_slice(&f16::ONE.to_le_bytes());
                let mut y = [0.0];
                kernel(&w, &[x], &mut y);
                out.extend(y);
            }
            let large = [
                (k.Q2_K, 84, 80),
                (k.Q3_K, 110, 108),
                (k.Q4_K, 144, 0),
                (k.Q5_K, 176, 0),
                (k.Q6_K, 210, 208),
                (k.IQ4_XS, 136, 0),
            ];
            for (kernel, len, d) in large {
                let mut w = block(&[byte], len);
                w[d..d + 2].copy_from_slice(&f16::ONE.to_le_bytes());
                let mut y = [0.0];
                kernel(&w, &[xk], &mut y);
                out.extend(y);
            }
            out
        });
    }
}

//! Every kernel of every instruction set against its scalar twin, by bits, at lengths around those of vectors.
//! (The twin itself is tested against the f64 reference in `tests/reference.rs`.)

use apr_tensor::{
    DType,
    activation::{quantize_q8_0, quantize_q8_k},
};
use half::f16;

use super::{LANES, Simd, lanes::Element, scalar};
use crate::{
    Isa,
    activation::{Block8, Floats, MATRIX, Q8, Q8K, Rows, pack, packed_len},
    kernels::{AttentionKernels, IntegerKernel, Kernels, TileKernel},
    memory::Plain,
    tile::{Layout, Line, ROWS},
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
        assert_twins(&format!("add of {len}"), |k| {
            let mut sum = w.clone();
            (k.add)(&x, &mut sum);
            sum
        });
        assert_twins(&format!("multiply of {len}"), |k| {
            let mut out = vec![f32::NAN; len];
            (k.multiply)(&x, &w, &mut out);
            out
        });
        assert_twins(&format!("swiglu of {len}"), |k| {
            let mut gate = x.clone();
            (k.swiglu)(&w, &mut gate);
            gate
        });
        assert_twins(&format!("add_weighted of {len}"), |k| {
            let mut sum = w.clone();
            (k.add_weighted)(&x, 0.3, &mut sum);
            sum
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
    }
}

/// Weights `[rows, len]` in a type of floats, and the numbers that they are.
fn weights(dtype: DType, rows: usize, len: usize) -> (Vec<u8>, Vec<f32>) {
    let w = values(4, rows * len);
    match dtype {
        DType::F16 => {
            let halves = halves(&w);
            let bytes = halves.iter().flat_map(|x| x.to_le_bytes()).collect();
            (bytes, halves.iter().map(|x| x.to_f32()).collect())
        }
        DType::BF16 => {
            let bytes = w.iter().flat_map(|x| x.to_le_bytes()[2..].to_vec()).collect();
            (bytes, w.iter().map(|x| f32::from_bits(x.to_bits() >> 16 << 16)).collect())
        }
        _ => (w.iter().flat_map(|x| x.to_le_bytes()).collect(), w),
    }
}

#[test]
fn a_product_of_floats_is_lanes_then_a_tree_for_any_number_of_rows() {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        // The last is several stretches, and a tail.
        for len in LENGTHS.into_iter().filter(|&len| len > 0).chain([2137]) {
            for (rows, n) in [(1, 1), (2, 3), (3, 6), (4, 7), (5, 13), (ROWS, 2)] {
                let (bytes, w) = weights(dtype, rows, len);
                let x = values(5, n * len);
                let mut packed = vec![Floats::UNWRITTEN; packed_len(n, len)];
                pack(&x.chunks_exact(len).collect::<Vec<_>>(), &mut packed);
                let dot = |r: usize, n: usize| {
                    let mut lanes = [0f32; LANES];
                    for i in 0..len {
                        let (w, x) = (w[r * len + i], x[n * len + i]);
                        lanes[i % LANES] = w.mul_add(x, lanes[i % LANES]);
                    }
                    for width in [8, 4, 2, 1] {
                        for i in 0..width {
                            lanes[i] += lanes[i + width];
                        }
                    }
                    lanes[0]
                };
                for isa in Isa::available() {
                    let kernel = isa.kernels().unwrap().float(dtype).unwrap();
                    let mut out = vec![[f32::NAN; ROWS]; n];
                    kernel(&bytes, len, &packed, &mut out);
                    for (n, out) in out.iter().enumerate() {
                        let expected: Vec<f32> = (0..rows).map(|r| dot(r, n)).collect();
                        let found = &out[..rows];
                        assert_eq!(bits(found), bits(&expected), "{dtype} {isa} {rows} {n} {len}");
                        assert!(out[rows..].iter().all(|x| x.is_nan()), "{isa}: too many rows");
                    }
                }
            }
        }
    }
}

#[test]
fn swiglu_is_silu_and_then_a_product() {
    let (gate, up) = (values(11, 4000), values(12, 4000));
    for isa in Isa::available() {
        let kernels = isa.kernels().unwrap();
        let [mut silu, mut product] = [0; 2].map(|_| vec![f32::NAN; gate.len()]);
        let mut fused = gate.clone();
        (kernels.silu)(&gate, &mut silu);
        (kernels.multiply)(&silu, &up, &mut product);
        (kernels.swiglu)(&up, &mut fused);
        assert!(bits(&fused) == bits(&product), "{isa}");
    }
}

#[test]
fn each_head_of_a_row_is_turned_by_pairs_and_no_product_is_fused() {
    for (heads, head_dim, pairs) in [(1, 2, 1), (3, 64, 32), (2, 128, 64), (5, 80, 19), (2, 9, 4)] {
        let x = values(13, heads * head_dim);
        let angles: Vec<f64> = (0..pairs).map(|i| i as f64 * 0.37).collect();
        let cos: Vec<f64> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f64> = angles.iter().map(|a| a.sin()).collect();
        let mut expected = x.clone();
        for head in expected.chunks_exact_mut(head_dim) {
            for i in 0..pairs {
                let (cos, sin, a, b) = (cos[i] as f32, sin[i] as f32, head[i], head[i + pairs]);
                (head[i], head[i + pairs]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; x.len()];
            (isa.kernels().unwrap().rotate)(&x, head_dim, &cos, &sin, &mut out);
            assert!(bits(&out) == bits(&expected), "{isa}: {heads} heads of {head_dim}");
        }
    }
}

/// Blocks of keys as the cache has them, `[blocks, head_dim, LANES]`, with whatever there is beyond the last key.
fn blocks(keys: &[f32], head_dim: usize, beyond: f32) -> Vec<f32> {
    let count = keys.len() / head_dim;
    let key =
        |position: usize, c| if position < count { keys[position * head_dim + c] } else { beyond };
    let block = |start| {
        (0..head_dim)
            .flat_map(move |c| (start..start + LANES).map(move |position| key(position, c)))
    };
    (0..count).step_by(LANES).flat_map(block).collect()
}

const HEAD_DIMS: [usize; 9] = [1, 7, 16, 40, 64, 80, 96, 128, 129];

#[test]
fn a_score_is_a_chain_over_channels_whatever_else_is_in_the_tile() {
    fn check<E: Element>(of: fn(&[f32]) -> Vec<E>, get: fn(&Kernels) -> AttentionKernels<E>) {
        for head_dim in HEAD_DIMS {
            for count in [1usize, 15, 16, 17, 64, 65, 150] {
                let keys = values(8, count * head_dim);
                let stored = of(&blocks(&keys, head_dim, f32::NAN));
                // As the cache has them.
                let mut exact = vec![[0.0; LANES]; stored.len() / LANES];
                for (exact, stored) in exact.iter_mut().zip(stored.as_chunks().0) {
                    *exact = scalar::Scalar::store(E::load::<scalar::Scalar>(stored));
                }
                for rows in 1..=9 {
                    let queries = values(6, head_dim * rows);
                    let positions = count.next_multiple_of(LANES);
                    let mut expected = vec![0.0; rows * count];
                    for (i, score) in expected.iter_mut().enumerate() {
                        let (row, position) = (i / count, i % count);
                        for c in 0..head_dim {
                            let key = exact[position / LANES * head_dim + c][position % LANES];
                            *score = queries[c * rows + row].mul_add(key, *score);
                        }
                        *score *= 0.3;
                    }
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; rows * positions];
                        (get(isa.kernels().unwrap()).scores)(
                            &queries, rows, &stored, 0.3, &mut out,
                        );
                        let found: Vec<f32> =
                            out.chunks(positions).flat_map(|row| row[..count].to_vec()).collect();
                        let what = format!("{rows} rows of {head_dim} and {count} keys on {isa}");
                        assert!(bits(&found) == bits(&expected), "{what}");
                    }
                }
            }
        }
    }
    check(halves, |k| k.attention_f16);
    check(<[f32]>::to_vec, |k| k.attention_f32);
}

#[test]
fn a_weighted_sum_is_a_chain_over_the_positions_that_its_row_sees() {
    fn check<E: Element>(of: fn(&[f32]) -> Vec<E>, get: fn(&Kernels) -> AttentionKernels<E>) {
        for width in HEAD_DIMS.map(|head_dim| head_dim.next_multiple_of(LANES)) {
            for count in [1usize, 2, 17, 64, 65, 150] {
                for rows in 1..=9 {
                    let positions = count.next_multiple_of(LANES);
                    // Row `r` does not see the last `r % 4` positions; what is there must not enter.
                    let seen: Vec<usize> =
                        (0..rows).map(|r| (count - 1).saturating_sub(r % 4) + 1).collect();
                    let mut weights = values(7, rows * positions);
                    for (row, &seen) in weights.chunks_mut(positions).zip(&seen) {
                        row[seen..].fill(f32::NAN);
                    }
                    let stored = of(&values(9, count * width));
                    let mut exact = Vec::new();
                    for stored in stored.as_chunks().0 {
                        exact.extend(scalar::Scalar::store(E::load::<scalar::Scalar>(stored)));
                    }
                    let mut expected = vec![0.0; rows * width];
                    for (i, sum) in expected.iter_mut().enumerate() {
                        let (row, c) = (i / width, i % width);
                        for j in 0..seen[row] {
                            *sum = weights[row * positions + j].mul_add(exact[j * width + c], *sum);
                        }
                    }
                    for isa in Isa::available() {
                        let mut out = vec![f32::NAN; rows * width];
                        let kernels = get(isa.kernels().unwrap());
                        (kernels.weighted_sums)(&weights, &seen, &stored, &mut out);
                        let what = format!("{rows} rows of {count} values of {width} on {isa}");
                        assert!(bits(&out) == bits(&expected), "{what}");
                    }
                }
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
            let mut blocks = [Q8::UNWRITTEN; 8];
            (kernels.quantize_q8_0)(&x, &mut blocks);
            for (found, x) in blocks.iter().zip(x.as_chunks().0) {
                let mut qs = [0; 32];
                let d = quantize_q8_0(x, &mut qs);
                assert_eq!(bits(&found.d), bits(&[d]), "{isa} {x:?}");
                assert_eq!(found.qs.as_flattened().as_flattened(), qs, "{isa} {x:?}");
                assert_eq!(found.sum[0], qs.iter().map(|&q| i32::from(q)).sum::<i32>());
            }
            let mut block = [Q8K::UNWRITTEN];
            (kernels.quantize_q8_k)(&x, &mut block);
            let [found] = block;
            let mut qs = [0; 256];
            let d = quantize_q8_k(x.as_slice().try_into().unwrap(), &mut qs);
            assert_eq!(bits(&found.d), bits(&[d]), "{isa} {x:?}");
            assert_eq!(found.qs.as_flattened().as_flattened(), qs, "{isa} {x:?}");
            let sum =
                |i: usize, n: usize| qs[i * n..][..n].iter().map(|&q| i16::from(q)).sum::<i16>();
            for (pair, first) in [0, 1, 4, 5, 8, 9, 12, 13].into_iter().enumerate() {
                assert_eq!(found.sums.of_16[pair], [[sum(first, 16), sum(first + 2, 16)]]);
            }
            for (pair, first) in [0, 1, 4, 5].into_iter().enumerate() {
                assert_eq!(found.sums.of_32[pair], [[sum(first, 32), sum(first + 2, 32)]]);
            }
        }
    }
}

/// A tile of `blocks` blocks a row of type `dtype`, with bytes from `byte(row, place)` and finite scales.
fn tile(dtype: DType, blocks: usize, byte: impl Fn(usize, usize) -> u8) -> Vec<Line> {
    let layout = Layout::of(dtype).unwrap();
    let scales: &[usize] = match dtype {
        DType::Q4_1 | DType::Q5_1 | DType::Q4_K | DType::Q5_K => &[0, 2],
        DType::Q2_K => &[80, 82],
        DType::Q3_K => &[108],
        DType::Q6_K => &[208],
        _ => &[0],
    };
    let row = |row: usize| {
        let mut bytes: Vec<u8> = (0..blocks * layout.bytes).map(|i| byte(row, i)).collect();
        for (b, block) in bytes.chunks_exact_mut(layout.bytes).enumerate() {
            for &at in scales {
                let scale = f16::from_f32((row as f32 - 7.3) / (b + at + 1) as f32);
                block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
        bytes
    };
    let rows: Vec<Vec<u8>> = (0..ROWS).map(row).collect();
    let mut tile = vec![Line::ZERO; blocks * layout.lines()];
    layout.interleave(std::array::from_fn(|i| &rows[i][..]), &mut tile);
    tile
}

/// The products of `tile` with `n` rows, the activations of which are `a(row, place)`, as the kernel makes them.
fn products(
    kernels: &Kernels,
    dtype: DType,
    tile: &[Line],
    blocks: usize,
    n: usize,
    a: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let cols = blocks * dtype.block_len();
    let x: Vec<f32> =
        (0..n).flat_map(|n| (0..cols).map(move |i| (n, i))).map(|(n, i)| a(n, i)).collect();
    let mut out = vec![[f32::NAN; ROWS]; n];
    match kernels.integer(dtype).unwrap() {
        IntegerKernel::Blocks(kernel) => {
            let mut rounded = vec![Q8::UNWRITTEN; x.len() / Q8::LEN];
            (kernels.quantize_q8_0)(&x, &mut rounded);
            multiply(kernel, tile, &rounded, &mut out);
        }
        IntegerKernel::Superblocks(kernel) => {
            let mut rounded = vec![Q8K::UNWRITTEN; x.len() / Q8K::LEN];
            (kernels.quantize_q8_k)(&x, &mut rounded);
            multiply(kernel, tile, &rounded, &mut out);
        }
    }
    out.into_flattened()
}

/// One row as it is, several packed, or as matrices where there are kernels for those.
fn multiply<A: Block8>(
    kernel: TileKernel<A>,
    tile: &[Line],
    rounded: &[A],
    out: &mut [[f32; ROWS]],
) {
    if let [out] = out {
        return (kernel.one)(tile, rounded, out);
    }
    let blocks = rounded.len() / out.len();
    match kernel.many {
        Some(many) => many(tile, &packed::<A, _>(rounded, blocks), out),
        None => (kernel.several)(tile, &packed::<A, _>(rounded, blocks), out),
    }
}

/// Rows of so many blocks.
fn packed<A, R: Rows<A>>(rounded: &[A], blocks: usize) -> Vec<R> {
    let rows = rounded.len() / blocks;
    let mut packed = vec![R::UNWRITTEN; rows.div_ceil(R::COUNT) * blocks];
    for (i, block) in rounded.iter().enumerate() {
        let (row, b) = (i / blocks, i % blocks);
        packed[row / R::COUNT * blocks + b].put(row % R::COUNT, block);
    }
    packed
}

fn tiled_types() -> impl Iterator<Item = DType> {
    DType::all().filter(|&dtype| Layout::of(dtype).is_some())
}

#[test]
fn tile_kernels_are_their_twins_for_every_number_of_rows() {
    /// Two matrices of activations, and some rows.
    const MOST: usize = 2 * MATRIX + 3;

    for dtype in tiled_types() {
        let few = &[1, 2, 3, 4, 5, 6, 7, 8, 9, MATRIX - 1, MATRIX, MATRIX + 1, MOST][..];
        // The last is more than what is unpacked together.
        for (blocks, numbers) in [(1, few), (3, few), (9, &[MOST])] {
            let tile = tile(dtype, blocks, |row, i| (i * 151 + row * 89 + i * i / 7) as u8);
            let values: Vec<Vec<f32>> =
                (0..MOST).map(|n| values(n as u32, blocks * dtype.block_len())).collect();
            let mut alone = Vec::new();
            for row in &values {
                alone.extend(products(&scalar::KERNELS, dtype, &tile, blocks, 1, |_, i| row[i]));
            }
            for &n in numbers {
                assert_twins(&format!("{dtype} against {n} rows"), |k| {
                    products(k, dtype, &tile, blocks, n, |n, i| values[n][i])
                });
                let found =
                    products(&scalar::KERNELS, dtype, &tile, blocks, n, |n, i| values[n][i]);
                assert_eq!(bits(&found), bits(&alone[..n * ROWS]), "{dtype}: {n} rows at once");
            }
        }
    }
}

#[test]
fn integer_products_are_exact_at_their_extremes() {
    // Every weight, scale and activation at its largest: the sums that are nearest to overflow.
    for dtype in tiled_types() {
        for (byte, a) in [(0xff, 1.0), (0xff, -1.0), (0x7f, -1.0), (0x80, 1.0), (0x00, -1.0)] {
            let tile = tile(dtype, 2, |_, _| byte);
            assert_twins(&format!("{dtype}: {byte:#x} times {a}"), |k| {
                products(k, dtype, &tile, 2, 9, |n, _| if n % 2 == 0 { a } else { -a })
            });
        }
    }
}

//! Each op on random data, against the f64 reference that emulates the declared rounding, with derived bounds.

use apr_cpu::{Activations, Cpu, CpuOptions, Isa, KvType};
use apr_model::{
    AttentionInner, Backend, HostTensor, Inner, KvShape, LayerKv, RopeFrequencies, Site, Stage,
    Values,
};
use apr_reference::{Arithmetic, Reference};
use apr_tensor::{DType, Shape, Stored};

const EPS: f64 = f32::EPSILON as f64;

/// Types of weights, with the offsets of the half-precision scales in a block.
const QUANTIZED: [(DType, &[usize]); 13] = [
    (DType::Q4_0, &[0]),
    (DType::Q4_1, &[0, 2]),
    (DType::Q5_0, &[0]),
    (DType::Q5_1, &[0, 2]),
    (DType::Q8_0, &[0]),
    (DType::IQ4_NL, &[0]),
    (DType::Q2_K, &[80, 82]),
    (DType::Q3_K, &[108]),
    (DType::Q4_K, &[0, 2]),
    (DType::Q5_K, &[0, 2]),
    (DType::Q6_K, &[208]),
    (DType::IQ4_XS, &[0]),
    (DType::AprQ4, &[0]),
];
const FLOAT: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A small generator of our own, so that a failure repeats (Marsaglia 2003).
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In -1..1, with one in 16 ten times as large, like the outliers of real activations.
    fn value(&mut self) -> f64 {
        let value = (self.bits() >> 40) as f64 / f64::from(1 << 23) - 1.0;
        if self.bits().is_multiple_of(16) { 10.0 * value } else { value }
    }

    fn tensor(&mut self, shape: &[usize]) -> HostTensor {
        let values = (0..shape.iter().product()).map(|_| f64::from(self.value() as f32)).collect();
        HostTensor { shape: shape.to_vec(), values }
    }

    fn weight(&mut self, dtype: DType, rows: usize, cols: usize) -> Stored {
        let shape = Shape::from([rows, cols]);
        let len = dtype.tensor_bytes(&shape).expect("whole blocks");
        let mut bytes: Vec<u8> = (0..len).map(|_| self.bits() as u8).collect();
        let scales = QUANTIZED.iter().find(|row| row.0 == dtype).map_or(&[0][..], |row| row.1);
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for &at in scales {
                let value = self.value() as f32;
                match dtype {
                    DType::F32 => block.copy_from_slice(&value.to_le_bytes()),
                    DType::BF16 => block.copy_from_slice(&value.to_le_bytes()[2..]),
                    _ => {
                        block[at..at + 2].copy_from_slice(&half::f16::from_f32(value).to_le_bytes())
                    }
                }
            }
        }
        Stored::new(dtype, shape, bytes.into()).unwrap()
    }
}

fn values<B: Backend>(backend: &B, x: &B::Tensor) -> Vec<f64> {
    let mut out = Vec::new();
    let mut sink = |_, view: apr_model::View<'_>| {
        out = (0..view.values.len()).map(|i| view.values.get(i)).collect();
        Ok(())
    };
    backend.show(Site::whole(Stage::Embedding), x, &mut sink).unwrap();
    out
}

fn bits(cpu: &Cpu, x: &apr_cpu::Tensor) -> Vec<u32> {
    values(cpu, x).iter().map(|&x| (x as f32).to_bits()).collect()
}

/// Every combination that must give the same bits as the first.
fn twins(options: CpuOptions) -> impl Iterator<Item = Cpu> {
    Isa::available().flat_map(move |isa| {
        [(1, false), (2, true), (4, false)].map(|(threads, no_repack)| {
            let (isa, threads) = (Some(isa), Some(threads));
            Cpu::new(CpuOptions { isa, threads, no_repack, ..options }).unwrap()
        })
    })
}

/// Fails unless `|found - exact| <= bound` for each element.
fn assert_near(found: &[f64], exact: &[f64], bound: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (i, (found, exact)) in found.iter().zip(exact).enumerate() {
        let bound = bound(i);
        assert!((found - exact).abs() <= bound, "{what} {i}: {found} for {exact}, bound {bound}");
    }
}

/// A bound on the rounding of a dot product, given the largest weight and the sum of the magnitudes of the activations.
///
/// The partial sums of `n` elements are at most `3 * max|w| * sum|x|` (quants times scale are at most `2 * max|w|`, since
/// the minimum is one of the weights or near it; the minima are another `max|w|`). Each of the at most `2 * n / 32`
/// additions over blocks, or `n / 16 + 4` over lanes, rounds by half an epsilon of that; so do the product of scales, the
/// integer's conversion and, in the float kernels, the product of two scales in a dequantised weight.
fn dot_bound(n: usize, max_weight: f64, sum_activations: f64) -> f64 {
    (n / 16 + 8) as f64 * EPS / 2.0 * 3.0 * max_weight * sum_activations
}

#[test]
fn linear_is_the_reference_within_its_rounding_and_the_same_by_bits_everywhere() {
    let types = QUANTIZED.iter().map(|row| row.0).chain(FLOAT);
    for (seed, dtype) in types.enumerate() {
        for activations in [Activations::Native, Activations::F32] {
            let mut random = Random(0x9e37_79b9 + seed as u64);
            let options = CpuOptions { activations, ..CpuOptions::default() };
            let arithmetic = match activations {
                Activations::Native => Arithmetic::CPU,
                Activations::F32 => Arithmetic::EXACT,
            };
            let reference = Reference::<f64>::new(arithmetic);
            let widths: &[usize] = match dtype.block_len() {
                1 => &[1, 15, 16, 17, 50, 256],
                32 => &[32, 64, 96, 288],
                _ => &[256, 512, 768],
            };
            for &cols in widths {
                for (n, rows) in [(1, 1), (1, 65), (2, 3), (5, 17), (67, 4)] {
                    let what = format!("{dtype} {activations:?} {n}x{cols} by {rows}:");
                    let (x, w) = (random.tensor(&[n, cols]), random.weight(dtype, rows, cols));
                    let exact = {
                        let w = reference.weight(std::slice::from_ref(&w)).unwrap();
                        let x = reference.upload(x.clone()).unwrap();
                        values(&reference, &reference.linear(&x, &w).unwrap())
                    };
                    let wide = w.to_f32().unwrap();
                    let bound = |i: usize| {
                        let w = &wide[i % rows * cols..][..cols];
                        let max = w.iter().fold(0.0, |max: f64, &w| max.max(f64::from(w.abs())));
                        let x = &x.values[i / rows * cols..][..cols];
                        dot_bound(cols, max, x.iter().map(|x| x.abs()).sum())
                    };
                    let mut first = None;
                    for cpu in twins(options) {
                        let w = cpu.weight(std::slice::from_ref(&w)).unwrap();
                        let x = cpu.upload(x.clone()).unwrap();
                        let y = cpu.linear(&x, &w).unwrap();
                        if first.is_none() {
                            assert_near(&values(&cpu, &y), &exact, bound, &what);
                        }
                        let all = bits(&cpu, &y);
                        assert_eq!(
                            first.get_or_insert(all.clone()),
                            &all,
                            "{what} {:?}",
                            cpu.info()
                        );
                        // Row by row, as in decode.
                        for row in 0..n {
                            let x = cpu.rows(&x, row..row + 1).unwrap();
                            let y = bits(&cpu, &cpu.linear(&x, &w).unwrap());
                            assert_eq!(y, all[row * rows..][..rows], "{what} row {row}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn parts_of_several_types_are_one_matrix() {
    let mut random = Random(7);
    let parts = [
        random.weight(DType::Q4_K, 5, 512),
        random.weight(DType::Q6_K, 3, 512),
        random.weight(DType::Q8_0, 2, 512),
        random.weight(DType::F16, 1, 512),
    ];
    let x = random.tensor(&[3, 512]);
    for cpu in twins(CpuOptions::default()) {
        let x = cpu.upload(x.clone()).unwrap();
        let whole = bits(&cpu, &cpu.linear(&x, &cpu.weight(&parts).unwrap()).unwrap());
        let mut start = 0;
        for part in &parts {
            let rows = part.shape().rows();
            let w = cpu.weight(std::slice::from_ref(part)).unwrap();
            let alone = bits(&cpu, &cpu.linear(&x, &w).unwrap());
            for n in 0..3 {
                assert_eq!(whole[n * 11 + start..][..rows], alone[n * rows..][..rows]);
            }
            start += rows;
        }
    }
}

#[test]
fn an_activation_that_is_no_number_shows_in_its_row_and_only_there() {
    let mut random = Random(11);
    for dtype in QUANTIZED.iter().map(|row| row.0).chain(FLOAT) {
        let w = random.weight(dtype, 4, 512);
        for bad in [f64::NAN, f64::INFINITY] {
            let mut x = random.tensor(&[3, 512]);
            x.values[512 + 300] = bad;
            for cpu in twins(CpuOptions::default()) {
                let w = cpu.weight(std::slice::from_ref(&w)).unwrap();
                let x = cpu.upload(x.clone()).unwrap();
                let y = values(&cpu, &cpu.linear(&x, &w).unwrap());
                let finite: Vec<bool> = y.iter().map(|y| y.is_finite()).collect();
                assert_eq!(finite, [[true; 4], [false; 4], [true; 4]].concat(), "{dtype} {bad}");
            }
        }
    }
}

#[test]
fn a_weight_that_is_no_number_shows_in_its_output() {
    let mut random = Random(13);
    for (dtype, scales) in QUANTIZED {
        for &at in scales {
            let good = random.weight(dtype, 3, 512);
            let mut bytes = good.bytes().to_vec();
            let row = dtype.row_bytes(512).unwrap();
            bytes[row + at..][..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
            let bad = Stored::new(dtype, good.shape().clone(), bytes.into()).unwrap();
            let x = random.tensor(&[1, 512]);
            for cpu in twins(CpuOptions::default()) {
                let w = cpu.weight(std::slice::from_ref(&bad)).unwrap();
                let y = cpu.linear(&cpu.upload(x.clone()).unwrap(), &w).unwrap();
                let nan: Vec<bool> = values(&cpu, &y).iter().map(|y| y.is_nan()).collect();
                assert_eq!(nan, [false, true, false], "{dtype}, scale at {at}");
            }
        }
    }
}

#[test]
fn embedding_is_the_definition_of_every_stored_type() {
    let mut random = Random(17);
    let apr_q8 = {
        let mut bytes = 0.25f32.to_le_bytes().to_vec();
        bytes.extend((0..3 * 64).map(|i| i as u8));
        Stored::new(DType::AprQ8, [3, 64].into(), bytes.into()).unwrap()
    };
    let apr_q4 = random.weight(DType::AprQ4, 3, 64);
    let f64 = {
        let bytes: Vec<u8> = (0..3 * 64).flat_map(|i| (f64::from(i) / 3.0).to_le_bytes()).collect();
        Stored::new(DType::F64, [3, 64].into(), bytes.into()).unwrap()
    };
    let types = QUANTIZED.iter().map(|row| row.0).chain(FLOAT);
    let mut tables: Vec<Stored> = types.map(|dtype| random.weight(dtype, 3, 256)).collect();
    tables.extend([apr_q8, apr_q4, f64]);
    for table in tables {
        let cols = table.shape().cols();
        for cpu in twins(CpuOptions::default()) {
            let w = cpu.weight(std::slice::from_ref(&table)).unwrap();
            let found = bits(&cpu, &cpu.embed(&w, &[2, 0, 2]).unwrap());
            for (found, row) in found.chunks(cols).zip([2, 0, 2]) {
                let mut exact = vec![0.0; cols];
                table.dequantize_row(row, &mut exact).unwrap();
                let exact: Vec<u32> = exact.iter().map(|x| x.to_bits()).collect();
                assert_eq!(found, exact, "{}", table.dtype());
            }
        }
    }
}

#[test]
fn a_type_that_cannot_be_read_is_refused_with_those_that_can() {
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let table = [Stored::new(DType::IQ1_S, [1, 256].into(), vec![0; 50].into()).unwrap()];
    for error in [cpu.weight(&table).unwrap_err(), cpu.vector(&table).unwrap_err()] {
        let message = error.to_string();
        assert!(message.contains("IQ1_S") && message.contains("Q4_K"), "{message}");
    }
}

#[test]
fn elementwise_ops_and_norms_are_the_reference_within_their_rounding() {
    let mut random = Random(19);
    let reference = Reference::<f64>::new(Arithmetic::EXACT);
    // The last is so much that threads share it.
    for (n, width) in [(1, 1), (2, 15), (3, 16), (1, 17), (5, 130), (160, 896)] {
        let (x, y) = (random.tensor(&[n, width]), random.tensor(&[n, width]));
        let w = random.weight(DType::F32, 1, width).with_shape([width]).unwrap();
        fn run<B: Backend>(b: &B, x: &HostTensor, y: &HostTensor, w: &Stored) -> [Vec<f64>; 5] {
            let [gate, x, sum, biased, y] = [x, x, x, x, y].map(|x| b.upload(x.clone()).unwrap());
            let w = b.vector(std::slice::from_ref(w)).unwrap();
            let silu = Inner { spill: true, replace: None };
            let gated = b.swiglu(gate, &y, silu).unwrap();
            [
                values(b, &b.rms_norm(&x, &w, 1e-6).unwrap()),
                values(b, &b.add(sum, &y).unwrap()),
                values(b, &b.add_bias(biased, &w).unwrap()),
                values(b, &gated.silu.expect("asked for")),
                values(b, &gated.out),
            ]
        }
        let exact = run(&reference, &x, &y, &w);
        let mut first = None;
        for cpu in twins(CpuOptions::default()) {
            let found = run(&cpu, &x, &y, &w);
            // In halves of an epsilon: one rounding; one; one; exp 2.1, sum 1, quotient 1; one more for the product.
            for ((found, exact), roundings) in
                found.iter().zip(&exact).zip([1.0, 1.0, 1.0, 4.1, 5.1])
            {
                let bound = |i: usize| roundings * EPS / 2.0 * exact[i].abs() * 1.001 + 1e-45;
                assert_near(found, exact, bound, &format!("{n}x{width}"));
            }
            let all = found.map(|op| op.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
            assert_eq!(first.get_or_insert(all.clone()), &all, "{:?}", cpu.info());
        }
    }
}

#[test]
fn rope_turns_the_rotated_channels_and_passes_the_others() {
    let mut random = Random(23);
    let reference = Reference::<f64>::new(Arithmetic::EXACT);
    for (n, heads, head_dim, rotary_dim) in [(1, 1, 2, 2), (3, 5, 64, 64), (2, 3, 20, 8)] {
        let table = RopeFrequencies::new(1e4, rotary_dim).table(100..100 + n);
        let x = random.tensor(&[n, heads, head_dim]);
        let exact = reference.rope(&reference.upload(x.clone()).unwrap(), &table).unwrap();
        let exact = values(&reference, &exact);
        for cpu in twins(CpuOptions::default()) {
            let found = cpu.rope(&cpu.upload(x.clone()).unwrap(), &table).unwrap();
            // Two products of rounded factors and a sum, all of at most |x| + |x'|; elements are at most 10.
            assert_near(&values(&cpu, &found), &exact, |_| 3.0 * EPS / 2.0 * 20.0, "rope");
        }
    }
}

#[test]
fn attention_is_the_reference_and_prefill_is_decode() {
    let mut random = Random(29);
    for kv in [KvType::F16, KvType::F32] {
        let reference = Reference::<f64>::new(Arithmetic::CPU.with_kv(kv.dtype()));
        for (n, heads, kv_heads, head_dim) in [
            (1, 1, 1, 1),
            (5, 4, 2, 20),
            (33, 6, 3, 64),
            (7, 2, 2, 130),
            (19, 14, 2, 16),
            (3, 22, 2, 8),
        ] {
            let q = random.tensor(&[n, heads, head_dim]);
            let (k, v) =
                (random.tensor(&[n, kv_heads, head_dim]), random.tensor(&[n, kv_heads, head_dim]));
            let shape = KvShape { heads: kv_heads, head_dim };
            let scale = 1.0 / (head_dim as f64).sqrt();

            /// Scores, softmax and result.
            fn run<B: Backend>(
                b: &B,
                x: [&HostTensor; 3],
                shape: KvShape,
                scale: f64,
            ) -> [Vec<f64>; 3] {
                let [q, k, v] = x.map(|x| b.upload(x.clone()).unwrap());
                let mut kv = b.kv(shape, 50).unwrap();
                b.kv_append(&mut kv, &k, &v).unwrap();
                let spill = || Inner { spill: true, replace: None };
                let inner = AttentionInner { scores: spill(), softmax: spill() };
                let attended = b.attention(&q, &kv, scale, inner).unwrap();
                let inner =
                    [attended.scores, attended.softmax].map(|x| values(b, &x.expect("asked for")));
                let [scores, softmax] = inner;
                [scores, softmax, values(b, &attended.out)]
            }
            let exact = run(&reference, [&q, &k, &v], shape, scale);
            let mut first = None;
            for cpu in twins(CpuOptions { kv, ..CpuOptions::default() }) {
                let found = run(&cpu, [&q, &k, &v], shape, scale);
                // Elements are at most 10, so a score is at most 100 * sqrt(head_dim), and its sum rounds head_dim times; so do
                // the scale and the product with it. The softmax turns an absolute error of a score into a relative one.
                let size = 100.0 * (head_dim as f64).sqrt();
                let score = (head_dim + 2) as f64 * EPS / 2.0 * size;
                let softmax = 2.0 * score + (8 + n / 16) as f64 * EPS;
                let bounds = [score, softmax, 10.0 * (softmax + n as f64 * EPS)];
                for ((found, exact), bound) in found.iter().zip(&exact).zip(bounds) {
                    assert_near(found, exact, |_| bound, &format!("{n} {heads} {head_dim}"));
                }
                let all = found[2].clone();
                assert_eq!(first.get_or_insert(all.clone()), &all, "{:?}", cpu.info());

                let [q, k, v] = [&q, &k, &v].map(|x| cpu.upload(x.clone()).unwrap());
                let mut cache = cpu.kv(shape, 64).unwrap();
                for row in 0..n {
                    let [q, k, v] = [&q, &k, &v].map(|x| cpu.rows(x, row..row + 1).unwrap());
                    cpu.kv_append(&mut cache, &k, &v).unwrap();
                    let out = cpu.attention(&q, &cache, scale, AttentionInner::default()).unwrap();
                    assert!(out.scores.is_none() && out.softmax.is_none(), "nobody asked");
                    let width = heads * head_dim;
                    assert_eq!(values(&cpu, &out.out), all[row * width..][..width], "row {row}");
                }
            }
        }
    }
}

#[test]
fn positions_that_a_query_does_not_see_change_none_of_its_bits() {
    const N: usize = 21;
    let mut random = Random(37);
    let (heads, shape) = (6, KvShape { heads: 3, head_dim: 20 });
    let [k, v] = [(); 2].map(|()| random.tensor(&[N, shape.heads, shape.head_dim]));
    let q = random.tensor(&[N, heads, shape.head_dim]);
    let nan = HostTensor { values: vec![f64::NAN; k.values.len()], ..k.clone() };
    for kv in [KvType::F16, KvType::F32] {
        for cpu in twins(CpuOptions { kv, ..CpuOptions::default() }) {
            let [q, k, v, nan] = [&q, &k, &v, &nan].map(|x| cpu.upload(x.clone()).unwrap());
            let attention = |cache: &_, rows: std::ops::Range<usize>| {
                let q = cpu.rows(&q, rows).unwrap();
                bits(&cpu, &cpu.attention(&q, cache, 0.2, AttentionInner::default()).unwrap().out)
            };
            let mut cache = cpu.kv(shape, 2 * N).unwrap();
            cpu.kv_append(&mut cache, &k, &v).unwrap();
            let expected = attention(&cache, 0..N);

            // What a cache has forgotten.
            let mut cache = cpu.kv(shape, 2 * N).unwrap();
            cpu.kv_append(&mut cache, &nan, &nan).unwrap();
            cpu.kv_append(&mut cache, &nan, &nan).unwrap();
            cache.truncate(0);
            cpu.kv_append(&mut cache, &k, &v).unwrap();
            assert!(attention(&cache, 0..N) == expected, "forgotten, {:?}", cpu.info());

            // What comes later.
            cache.truncate(N - 6);
            let [nan_k, nan_v] = [&nan, &nan].map(|x| cpu.rows(x, 0..6).unwrap());
            cpu.kv_append(&mut cache, &nan_k, &nan_v).unwrap();
            let row = heads * shape.head_dim;
            let (seen, blind) = (attention(&cache, 0..N), (N - 6) * row);
            assert!(seen[..blind] == expected[..blind], "later, {:?}", cpu.info());
            assert!(seen[blind..] != expected[blind..], "the NaN are seen by those that should");
        }
    }
}

/// Logits of a router, some of them equal.
fn logits(random: &mut Random, n: usize, experts: usize) -> HostTensor {
    let mut logits = random.tensor(&[n, experts]);
    logits.values[experts / 2] = logits.values[0];
    logits
}

#[test]
fn experts_are_products_with_the_matrices_that_the_ids_name() {
    const EXPERTS: usize = 5;
    let mut random = Random(41);
    let types = QUANTIZED.iter().map(|row| row.0).chain(FLOAT);
    for dtype in types {
        let (rows, cols) = (9, 2 * dtype.block_len().max(32));
        let one = |random: &mut Random| random.weight(dtype, rows, cols);
        let alone: [Stored; EXPERTS] = std::array::from_fn(|_| one(&mut random));
        let bytes: Vec<u8> = alone.iter().flat_map(|w| w.bytes().to_vec()).collect();
        let merged = Stored::new(dtype, [EXPERTS * rows, cols].into(), bytes.into()).unwrap();
        for (n, k) in [(1, 1), (1, 3), (7, 2), (70, 5)] {
            let ids = Reference::<f64>::new(Arithmetic::EXACT);
            let ids = ids.top_k(&logits(&mut random, n, EXPERTS).into(), k).unwrap();
            let ids = HostTensor { shape: ids.shape, values: ids.data };
            for shape in [vec![n, cols], vec![n, k, cols]] {
                let x = random.tensor(&shape);
                for cpu in twins(CpuOptions::default()) {
                    let upload = |x: &HostTensor| cpu.upload(x.clone()).unwrap();
                    let (x, ids) = (upload(&x), upload(&ids));
                    let run = |parts: &[Stored]| {
                        let w = cpu.weight(parts).unwrap();
                        cpu.expert_linear(&x, &w, EXPERTS, &ids).unwrap()
                    };
                    let y = run(std::slice::from_ref(&merged));
                    assert_eq!(y.shape(), [n, k, rows]);
                    let y = bits(&cpu, &y);
                    assert_eq!(y, bits(&cpu, &run(&alone)), "{dtype}: one tensor or many");
                    for (i, y) in y.chunks_exact(rows).enumerate() {
                        let row = if x.shape().len() == 3 { i } else { i / k };
                        let values = x.values()[row * cols..][..cols].iter().map(|&x| x.into());
                        let x = HostTensor { shape: vec![1, cols], values: values.collect() };
                        let expert = &alone[ids.values()[i] as usize];
                        let w = cpu.weight(std::slice::from_ref(expert)).unwrap();
                        let alone = bits(&cpu, &cpu.linear(&upload(&x), &w).unwrap());
                        assert_eq!(y, alone, "{dtype}: slot {} of row {}", i % k, i / k);
                    }
                }
            }
        }
    }
}

#[test]
fn routing_is_the_reference_and_the_same_by_bits_everywhere() {
    let mut random = Random(43);
    let reference = Reference::<f64>::new(Arithmetic::EXACT);
    for (n, experts, k) in [(1, 1, 1), (3, 8, 2), (20, 64, 8), (5, 128, 128)] {
        let x = logits(&mut random, n, experts);
        let y = random.tensor(&[n, k, 33]);
        for normalize in [false, true] {
            let (exact_ids, exact_weights, exact_sum) = {
                let x = reference.upload(x.clone()).unwrap();
                let ids = reference.top_k(&x, k).unwrap();
                let weights = reference.route_weights(&x, &ids, normalize).unwrap();
                let sum = reference.weighted_sum(&y.clone().into(), &weights).unwrap();
                (ids.data, weights.data, sum.data)
            };
            let mut first = None;
            for cpu in twins(CpuOptions::default()) {
                let x = cpu.upload(x.clone()).unwrap();
                let ids = cpu.top_k(&x, k).unwrap();
                assert_eq!(values(&cpu, &ids), exact_ids, "the logits are exact in both");
                let weights = cpu.route_weights(&x, &ids, normalize).unwrap();
                // The argument of the exponential is at most 20 and rounds once, the exponential and its sum over lanes as in
                // attention, and then the sum of the chosen ones.
                let weight = (20 + 8 + experts / 16 + k) as f64 * EPS;
                let bound = |i: usize| weight * exact_weights[i];
                assert_near(&values(&cpu, &weights), &exact_weights, bound, "weights");
                let sum = cpu.weighted_sum(&cpu.upload(y.clone()).unwrap(), &weights).unwrap();
                // Elements are at most 10, weights at most 1 together.
                let bound = 10.0 * (weight + (k + 1) as f64 * EPS);
                assert_near(&values(&cpu, &sum), &exact_sum, |_| bound, "sum");
                let all = (bits(&cpu, &weights), bits(&cpu, &sum));
                assert_eq!(first.get_or_insert(all.clone()), &all, "{:?}", cpu.info());
            }
        }
    }
}

#[test]
fn kernels_are_named_after_their_contract() {
    let mut random = Random(31);
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let parts = [
        random.weight(DType::Q4_K, 2, 256),
        random.weight(DType::Q4_K, 1, 256),
        random.weight(DType::F16, 1, 256),
    ];
    let w = cpu.weight(&parts).unwrap();
    let kernel = cpu.kernel(apr_model::Op::Linear(&w));
    assert_eq!(kernel.kernel, "dot_f16_f32+dot_q4_k_q8_k");
    assert_eq!(kernel.weights, ["Q4_K", "Q4_K", "F16"]);
    assert_eq!(kernel.activations, ["Q8_K", "Q8_K", "F32"]);
    assert_eq!(cpu.kernel(apr_model::Op::Attention).kernel, "attention_f16");
    let f32 =
        CpuOptions { activations: Activations::F32, kv: KvType::F32, ..CpuOptions::default() };
    let cpu = Cpu::new(f32).unwrap();
    let kernel = cpu.kernel(apr_model::Op::Linear(&cpu.weight(&parts[..1]).unwrap()));
    assert_eq!(
        (kernel.kernel.as_str(), &kernel.activations[..]),
        ("dot_q4_k_f32", &["F32".into()][..])
    );
    assert_eq!(cpu.kernel(apr_model::Op::KvAppend).output, "F32");
}

#[test]
fn shown_values_lie_where_they_were_computed() {
    let cpu = Cpu::new(CpuOptions::default()).unwrap();
    let x = cpu.upload(HostTensor { shape: vec![1, 2], values: vec![1.5, -0.5] }).unwrap();
    let mut sink = |_, view: apr_model::View<'_>| {
        assert_eq!(view.shape, [1, 2]);
        assert!(matches!(view.values, Values::F32(v) if std::ptr::eq(v, x.values())));
        Ok(())
    };
    cpu.show(Site::whole(Stage::Embedding), &x, &mut sink).unwrap();
}

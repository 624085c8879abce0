//! One pass over a tensor: everything that the checks of weights want to know.
//!
//! A tensor of more than two dimensions is made of parts along the first: the experts of a layer, merged. Each is looked at
//! like a tensor of its own. Only some rows are in memory as numbers at a time, on all cores.

use std::cmp::Ordering;

use apr_model::{Role, role_of};
use apr_tensor::{DType, Shape, Stored};
use rayon::prelude::*;

/// What a tensor holds, as far as the checks are concerned.
#[derive(Debug)]
pub(crate) struct TensorFacts {
    pub(crate) name: String,
    pub(crate) role: Option<Role>,
    pub(crate) is_matrix: bool,
    pub(crate) parts: Parts,
    /// Of the stored type, shape and bytes of each part.
    pub(crate) hashes: Vec<blake3::Hash>,
    /// Why there are no numbers, if there are none.
    pub(crate) numbers: Result<Numbers, String>,
}

/// How a tensor is cut along its first dimension.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// What one is called: `expert`.
    what: &'static str,
    pub(crate) count: usize,
    rows: usize,
    block_len: usize,
}

/// The numbers of a tensor.
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) elements: u64,
    pub(crate) columns: usize,
    /// NaN and infinities.
    pub(crate) not_finite: Count<f32>,
    /// Numbers beyond what F16 holds.
    pub(crate) huge: Count<f32>,
    /// The least and the greatest finite number; none if there is no finite number.
    pub(crate) range: Option<(f32, f32)>,
    /// The parts that are one number throughout, and which.
    pub(crate) constant_parts: Vec<(usize, f32)>,
    pub(crate) negative: u64,
    pub(crate) mean_abs: f64,
    /// Rows of zeros.
    pub(crate) zero_rows: Count<()>,
    /// Blocks of zeros in rows that have other numbers too.
    pub(crate) zero_blocks: Count<()>,
    /// Blocks that hold next to nothing in rows that do.
    pub(crate) faint_blocks: Count<f32>,
    /// The largest magnitude, and where.
    pub(crate) largest: Option<(usize, usize, f32)>,
    /// Rows whose norm is far from the others', the farthest first, and the median norm.
    pub(crate) odd_rows: Vec<OddRow>,
    pub(crate) median_norm: f64,
}

/// How many there are of something, and the first: its row, its column and what stands there.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count<T> {
    pub(crate) count: u64,
    pub(crate) first: Option<(usize, usize, T)>,
}

/// A row of another scale than its tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct OddRow {
    pub(crate) row: usize,
    pub(crate) norm: f64,
}

/// Elements of a block: no quantised type has smaller ones.
pub(crate) const BLOCK: usize = 32;

/// A block is faint if nothing in it reaches this share of what most blocks of its row reach.
const FAINT: f32 = 1.0 / 256.0;

/// The largest number that F16 holds.
pub(crate) const LARGEST_F16: f32 = 65504.0;

/// Rows that are in memory as numbers at a time.
const ROWS_AT_A_TIME: usize = 1024;

impl TensorFacts {
    /// Reads all of `stored`, on all cores.
    pub(crate) fn of(name: &str, stored: &Stored) -> Self {
        let parts = Parts::of(name, stored);
        let (hashes, numbers) = rayon::join(
            || parts.hashes(stored),
            || match stored.dtype().can_dequantize() {
                true => Numbers::of(stored, &parts).map_err(|error| error.to_string()),
                false => Err(format!("{} cannot be read as numbers here", stored.dtype())),
            },
        );
        let is_matrix = stored.shape().dims().len() > 1;
        Self { name: name.to_owned(), role: role_of(name), is_matrix, parts, hashes, numbers }
    }

    /// The numbers, if they are one number throughout: which.
    pub(crate) fn constant(&self) -> Option<f32> {
        let numbers = self.numbers.as_ref().ok()?;
        let (min, max) = numbers.range?;
        let all = numbers.elements > 1 && numbers.not_finite.count == 0;
        (all && min == max).then_some(min)
    }
}

impl Parts {
    fn of(name: &str, stored: &Stored) -> Self {
        let (shape, dtype) = (stored.shape(), stored.dtype());
        let count = match shape.dims() {
            // The scale of an `AprQ8` tensor is that of all its parts.
            &[count, _, _, ..] if count > 0 && dtype != DType::AprQ8 => count,
            _ => 1,
        };
        let is_expert = name.contains("exps") || name.contains("experts");
        let what = if is_expert { "expert" } else { "part" };
        Self { what, count, rows: (shape.rows() / count).max(1), block_len: dtype.block_len() }
    }

    fn hashes(&self, stored: &Stored) -> Vec<blake3::Hash> {
        let outer = usize::from(self.count > 1);
        let shape = Shape::new(&stored.shape().dims()[outer..]);
        let kind = format!("{} {shape}\n", stored.dtype());
        let bytes = &stored.bytes()[..];
        let of_part =
            |part: &[u8]| blake3::Hasher::new().update(kind.as_bytes()).update(part).finalize();
        bytes.chunks(bytes.len().div_ceil(self.count).max(1)).map(of_part).collect()
    }

    /// A part, in words; nothing if the tensor is whole.
    pub(crate) fn name(&self, part: usize) -> Option<String> {
        (self.count > 1).then(|| format!("{} {part}", self.what))
    }

    /// A row, in words.
    pub(crate) fn row(&self, row: usize) -> String {
        let row_of_part = format!("row {}", row % self.rows);
        match self.name(row / self.rows) {
            Some(part) => format!("{part}, {row_of_part}"),
            None => row_of_part,
        }
    }

    /// An element, in words, with the block that it was quantised in.
    pub(crate) fn element(&self, row: usize, column: usize) -> String {
        let block = match self.block_len {
            1 => String::new(),
            len => format!(" (block {} of the row)", column / len),
        };
        format!("{}, column {column}{block}", self.row(row))
    }
}

impl Numbers {
    fn of(stored: &Stored, parts: &Parts) -> apr_tensor::Result<Self> {
        let (rows, cols) = (stored.shape().rows(), stored.shape().cols());
        let mut all = Self {
            elements: stored.shape().elements() as u64,
            columns: cols,
            not_finite: Count::default(),
            huge: Count::default(),
            range: None,
            constant_parts: Vec::new(),
            negative: 0,
            mean_abs: 0.0,
            zero_rows: Count::default(),
            zero_blocks: Count::default(),
            faint_blocks: Count::default(),
            largest: None,
            odd_rows: Vec::new(),
            median_norm: 0.0,
        };
        let mut norms = Vec::new();
        let mut of_part: Option<(f32, f32)> = None;
        for start in (0..rows).step_by(ROWS_AT_A_TIME) {
            let some: Vec<OfRow> = (start..rows.min(start + ROWS_AT_A_TIME))
                .into_par_iter()
                .map_init(
                    || vec![0.0f32; cols],
                    |values, row| {
                        stored.dequantize_row(row, values)?;
                        Ok(OfRow::new(values))
                    },
                )
                .collect::<apr_tensor::Result<_>>()?;
            for (row, of_row) in (start..).zip(&some) {
                all.add(row, of_row);
                // A part with something that is no number is not one number throughout.
                let range = match of_row.not_finite.count {
                    0 => of_row.range,
                    _ => Some((f32::NEG_INFINITY, f32::INFINITY)),
                };
                of_part = joined(of_part, range);
                if (row + 1) % parts.rows == 0 {
                    let constant = of_part.take().filter(|(min, max)| min == max);
                    all.constant_parts.extend(constant.map(|(x, _)| (row / parts.rows, x)));
                }
            }
            norms.extend(some.iter().map(|of_row| of_row.squares.sqrt() as f32));
        }
        all.mean_abs /= (all.elements - all.not_finite.count).max(1) as f64;
        (all.odd_rows, all.median_norm) = odd_rows(&norms);
        Ok(all)
    }

    fn add(&mut self, row: usize, of_row: &OfRow) {
        self.not_finite.add(row, &of_row.not_finite);
        self.huge.add(row, &of_row.huge);
        self.range = joined(self.range, of_row.range);
        if let Some((column, x)) = of_row.largest
            && self.largest.is_none_or(|(_, _, largest)| largest.abs() < x.abs())
        {
            self.largest = Some((row, column, x));
        }
        self.negative += of_row.negative;
        self.mean_abs += of_row.sum_abs;
        let is_zero = of_row.range == Some((0.0, 0.0)) && of_row.not_finite.count == 0;
        match is_zero {
            true => self.zero_rows.add(row, &Count { count: 1, first: Some((row, 0, ())) }),
            false => {
                self.zero_blocks.add(row, &of_row.zero_blocks);
                self.faint_blocks.add(row, &of_row.faint_blocks);
            }
        }
    }
}

/// The range of the numbers of two ranges.
fn joined(a: Option<(f32, f32)>, b: Option<(f32, f32)>) -> Option<(f32, f32)> {
    match (a, b) {
        (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
        (range, other) => range.or(other),
    }
}

impl<T: Copy> Count<T> {
    /// Adds what was counted in `row`.
    fn add(&mut self, row: usize, of_row: &Self) {
        self.count += of_row.count;
        self.first = self.first.or(of_row.first.map(|(_, column, what)| (row, column, what)));
    }
}

/// The same of one row.
#[derive(Default)]
struct OfRow {
    not_finite: Count<f32>,
    huge: Count<f32>,
    range: Option<(f32, f32)>,
    negative: u64,
    sum_abs: f64,
    squares: f64,
    zero_blocks: Count<()>,
    faint_blocks: Count<f32>,
    /// The largest magnitude, and its column.
    largest: Option<(usize, f32)>,
}

impl OfRow {
    fn new(values: &[f32]) -> Self {
        let mut row = Self::default();
        let largest: Vec<f32> = (0..)
            .step_by(BLOCK)
            .zip(values.chunks(BLOCK))
            .map(|(column, block)| row.add(column, block))
            .collect();
        let whole = &largest[..values.len() / BLOCK];
        let usual = median_of(&mut whole.to_vec(), f32::total_cmp).unwrap_or_default();
        for (column, &largest) in (0..).step_by(BLOCK).zip(whole) {
            if largest == 0.0 {
                row.zero_blocks.add(0, &Count { count: 1, first: Some((0, column, ())) });
            } else if largest < FAINT * usual {
                row.faint_blocks.add(0, &Count { count: 1, first: Some((0, column, largest)) });
            }
        }
        row
    }

    /// Adds the block that begins at `column`, and returns its largest magnitude.
    fn add(&mut self, column: usize, block: &[f32]) -> f32 {
        let numbers = OfBlock::new(block);
        if numbers.largest > LARGEST_F16 || !numbers.largest.is_finite() {
            return self.add_each(column, block);
        }
        self.add_numbers(&numbers);
        if self.largest.is_none_or(|(_, largest)| largest.abs() < numbers.largest) {
            let at = block.iter().position(|x| x.abs() == numbers.largest);
            self.largest = at.map(|at| (column + at, block[at]));
        }
        numbers.largest
    }

    /// The same, number by number, of a block in which there is something to be told.
    fn add_each(&mut self, column: usize, block: &[f32]) -> f32 {
        for (column, &x) in (column..).zip(block) {
            let one = Count { count: 1, first: Some((0, column, x)) };
            if !x.is_finite() {
                self.not_finite.add(0, &one);
                continue;
            }
            if x.abs() > LARGEST_F16 {
                self.huge.add(0, &one);
            }
            self.add_numbers(&OfBlock::new(&[x]));
            if self.largest.is_none_or(|(_, largest)| largest.abs() < x.abs()) {
                self.largest = Some((column, x));
            }
        }
        f32::INFINITY
    }

    fn add_numbers(&mut self, numbers: &OfBlock) {
        self.range = joined(self.range, Some((numbers.min, numbers.max)));
        self.negative += u64::from(numbers.negative);
        self.sum_abs += numbers.sum_abs;
        self.squares += numbers.squares;
    }
}

/// The same of one block of numbers, at least one. Nothing but `largest` means anything if one of them is not finite.
struct OfBlock {
    /// The largest magnitude; if one is a NaN, a NaN.
    largest: f32,
    min: f32,
    max: f32,
    negative: u32,
    sum_abs: f64,
    squares: f64,
}

/// Sums that run side by side, for compilers to do at once.
const LANES: usize = 8;

impl OfBlock {
    fn new(block: &[f32]) -> Self {
        let (mut largest, mut negative) = ([0u32; LANES], [0u32; LANES]);
        let (mut sum_abs, mut squares) = ([0.0f64; LANES], [0.0f64; LANES]);
        let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let mut add = |lane: usize, x: f32| {
            let magnitude = f64::from(x.abs());
            // The bits of magnitudes are in the order of the magnitudes, and those of NaN after all of them.
            largest[lane] = largest[lane].max(x.abs().to_bits());
            negative[lane] += u32::from(x < 0.0);
            sum_abs[lane] += magnitude;
            squares[lane] += magnitude * magnitude;
            min[lane] = if x < min[lane] { x } else { min[lane] };
            max[lane] = if x > max[lane] { x } else { max[lane] };
        };
        let (whole, rest) = block.as_chunks::<LANES>();
        for eight in whole {
            for (lane, &x) in eight.iter().enumerate() {
                add(lane, x);
            }
        }
        for (lane, &x) in rest.iter().enumerate() {
            add(lane, x);
        }
        Self {
            largest: f32::from_bits(largest.into_iter().max().expect("there are lanes")),
            min: min.into_iter().fold(f32::INFINITY, f32::min),
            max: max.into_iter().fold(f32::NEG_INFINITY, f32::max),
            negative: negative.iter().sum(),
            sum_abs: sum_abs.iter().sum(),
            squares: squares.iter().sum(),
        }
    }
}

/// How much larger or smaller than the median a norm must be at least to be odd.
const ODD_FACTOR: f64 = 8.0;
/// How often rows whose norms are spread like a bell curve may have an odd one among them.
const FALSE_ALARMS: f64 = 1e-3;
/// Fewer rows have no scale of their own.
const FEW: usize = 8;

/// The norms that are far from the others on a logarithmic scale, the farthest first, and the median.
///
/// Far is what the largest of so many normal deviates exceeds with probability [`FALSE_ALARMS`], in units of the spread
/// (1.4826 times the median deviation is the standard deviation of a bell curve, and blind to outliers), but at least a
/// factor of [`ODD_FACTOR`]. Rows of zeros have no scale.
fn odd_rows(norms: &[f32]) -> (Vec<OddRow>, f64) {
    let log = |norm: f32| f64::from(norm).ln();
    let mut logs: Vec<f64> = norms.iter().filter(|&&n| n > 0.0).map(|&n| log(n)).collect();
    if logs.len() < FEW {
        return (Vec::new(), 0.0);
    }
    let Some(median) = median_of(&mut logs, f64::total_cmp) else { return (Vec::new(), 0.0) };
    let mut deviations: Vec<f64> = logs.iter().map(|log| (log - median).abs()).collect();
    let spread = 1.4826 * median_of(&mut deviations, f64::total_cmp).unwrap_or_default();
    let normal = (2.0 * (2.0 * logs.len() as f64 / FALSE_ALARMS).ln()).sqrt();
    let far = (normal * spread).max(ODD_FACTOR.ln());
    let deviation = |norm: f32| (log(norm) - median).abs();
    let mut odd: Vec<(usize, f32)> = norms
        .iter()
        .copied()
        .enumerate()
        .filter(|&(_, norm)| norm > 0.0 && deviation(norm) > far)
        .collect();
    odd.sort_by(|a, b| deviation(b.1).total_cmp(&deviation(a.1)));
    let odd = odd.into_iter().map(|(row, norm)| OddRow { row, norm: norm.into() });
    (odd.collect(), median.exp())
}

fn median_of<T: Copy>(values: &mut [T], order: impl FnMut(&T, &T) -> Ordering) -> Option<T> {
    let middle = values.len() / 2;
    (!values.is_empty()).then(|| *values.select_nth_unstable_by(middle, order).1)
}

#[cfg(test)]
mod tests {
    use apr_tensor::DType;

    use super::*;

    fn facts(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f32) -> TensorFacts {
        let values = (0..rows * cols).map(|i| value(i / cols, i % cols));
        let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let shape = [rows, cols].into();
        TensorFacts::of("x", &Stored::new(DType::F32, shape, bytes.into()).unwrap())
    }

    /// Something between 1 and 2 in size, of either sign.
    fn ordinary(row: usize, col: usize) -> f32 {
        let x = (row * 31 + col * 17) % 97;
        (1.0 + x as f32 / 97.0) * if x.is_multiple_of(2) { 1.0 } else { -1.0 }
    }

    #[test]
    fn what_is_wrong_is_counted_and_located_across_the_borders_of_a_pass() {
        let row = ROWS_AT_A_TIME + 5;
        let facts = facts(row + 3, 64, |r, c| match (r, c) {
            (r, 7) if r == row => f32::INFINITY,
            (r, 9) if r == row + 1 => f32::NAN,
            (3, _) => 0.0,
            (2, 32..) => 0.0,
            (r, c) => ordinary(r, c),
        });
        let numbers = facts.numbers.as_ref().unwrap();
        assert_eq!(numbers.not_finite.count, 2);
        assert_eq!(numbers.not_finite.first, Some((row, 7, f32::INFINITY)));
        assert_eq!((numbers.zero_rows.count, numbers.zero_rows.first), (1, Some((3, 0, ()))));
        assert_eq!((numbers.zero_blocks.count, numbers.zero_blocks.first), (1, Some((2, 32, ()))));
        assert!(numbers.odd_rows.is_empty() && facts.constant().is_none());
    }

    #[test]
    fn a_row_of_another_scale_is_odd_and_ordinary_spread_is_not() {
        let scaled = |factor: f32| {
            let facts = facts(40, 16, |r, c| ordinary(r, c) * if r == 11 { factor } else { 1.0 });
            facts.numbers.unwrap().odd_rows.iter().map(|odd| odd.row).collect::<Vec<_>>()
        };
        assert_eq!(scaled(100.0), [11]);
        assert_eq!(scaled(0.01), [11]);
        assert!(scaled(4.0).is_empty());
    }

    #[test]
    fn what_is_beyond_f16_or_next_to_nothing_or_largest_is_located() {
        let facts = facts(3, 100, |r, c| match (r, c) {
            (1, 70) => -70_000.0,
            (2, 32..64) => 1e-4 * ordinary(r, c),
            (2, 99) => 9.0,
            (r, c) => ordinary(r, c),
        });
        let numbers = facts.numbers.unwrap();
        assert_eq!((numbers.huge.count, numbers.huge.first), (1, Some((1, 70, -70_000.0))));
        assert_eq!(numbers.largest, Some((1, 70, -70_000.0)));
        let faint = numbers.faint_blocks;
        assert_eq!(faint.count, 1);
        let (row, column, largest) = faint.first.unwrap();
        assert!((row, column) == (2, 32) && largest < 2e-4, "{largest}");
    }

    #[test]
    fn sums_over_lanes_are_those_of_the_numbers_one_by_one() {
        let values: Vec<f32> = (0..75).map(|c| ordinary(5, c)).collect();
        let row = OfRow::new(&values);
        let sum = |f: fn(f64) -> f64| values.iter().map(|&x| f(x.into())).sum::<f64>();
        assert!((row.sum_abs - sum(f64::abs)).abs() < 1e-9);
        assert!((row.squares - sum(|x| x * x)).abs() < 1e-9);
        assert_eq!(row.negative, values.iter().filter(|&&x| x < 0.0).count() as u64);
        let least = values.iter().copied().fold(f32::INFINITY, f32::min);
        let greatest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(row.range, Some((least, greatest)));
    }

    #[test]
    fn a_part_that_is_one_number_is_told_and_its_rows_are_counted_from_its_beginning() {
        let value = |i: usize| if (32..48).contains(&i) { 0.5 } else { ordinary(0, i) };
        let bytes: Vec<u8> = (0..64).flat_map(|i| value(i).to_le_bytes()).collect();
        let stored = Stored::new(DType::F32, [4, 2, 8].into(), bytes.into()).unwrap();
        let facts = TensorFacts::of("blk.0.ffn_up_exps.weight", &stored);
        assert_eq!(facts.numbers.as_ref().unwrap().constant_parts, [(2, 0.5)]);
        assert_eq!(facts.parts.row(5), "expert 2, row 1");
        assert_eq!(facts.hashes.len(), 4);
    }

    #[test]
    fn a_tensor_of_one_number_is_constant() {
        assert_eq!(facts(4, 4, |_, _| 2.5).constant(), Some(2.5));
        assert_eq!(facts(4, 4, |r, _| r as f32).constant(), None);
        assert_eq!(facts(1, 1, |_, _| 2.5).constant(), None);
    }
}

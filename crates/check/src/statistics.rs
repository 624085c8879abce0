//! One pass over a tensor: everything that the checks of weights want to know.

use apr_model::{Role, role_of};
use apr_tensor::Stored;
use rayon::prelude::*;

/// What a tensor holds, as far as the checks are concerned.
#[derive(Debug)]
pub(crate) struct TensorFacts {
    pub(crate) name: String,
    pub(crate) role: Option<Role>,
    pub(crate) is_matrix: bool,
    /// Of stored type, shape and bytes.
    pub(crate) hash: blake3::Hash,
    /// Why there are no numbers, if there are none.
    pub(crate) numbers: Result<Numbers, String>,
}

/// The numbers of a tensor.
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) elements: u64,
    /// NaN and infinities.
    pub(crate) not_finite: Count<f32>,
    /// The least and the greatest finite number; none if there is no finite number.
    pub(crate) range: Option<(f32, f32)>,
    pub(crate) negative: u64,
    pub(crate) mean_abs: f64,
    /// Rows of zeros.
    pub(crate) zero_rows: Count<()>,
    /// Blocks of zeros in rows that have other numbers too.
    pub(crate) zero_blocks: Count<()>,
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

/// Elements of a block of zeros: no quantised type has smaller blocks.
pub(crate) const BLOCK: usize = 32;

/// Rows that are in memory as numbers at a time.
const ROWS_AT_A_TIME: usize = 1024;

impl TensorFacts {
    /// Reads all of `stored`, on all cores.
    pub(crate) fn of(name: &str, stored: &Stored) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{} {}\n", stored.dtype(), stored.shape()).as_bytes());
        hasher.update(&stored.bytes()[..]);
        Self {
            name: name.to_owned(),
            role: role_of(name),
            is_matrix: stored.shape().dims().len() > 1,
            hash: hasher.finalize(),
            numbers: match stored.dtype().can_dequantize() {
                true => Numbers::of(stored).map_err(|error| error.to_string()),
                false => Err(format!("{} cannot be read as numbers here", stored.dtype())),
            },
        }
    }

    /// The numbers, if they are one number throughout: which.
    pub(crate) fn constant(&self) -> Option<f32> {
        let numbers = self.numbers.as_ref().ok()?;
        let (min, max) = numbers.range?;
        let all = numbers.elements > 1 && numbers.not_finite.count == 0;
        (all && min == max).then_some(min)
    }
}

impl Numbers {
    fn of(stored: &Stored) -> apr_tensor::Result<Self> {
        let (rows, cols) = (stored.shape().rows(), stored.shape().cols());
        let mut all = Self {
            elements: stored.shape().elements() as u64,
            not_finite: Count::default(),
            range: None,
            negative: 0,
            mean_abs: 0.0,
            zero_rows: Count::default(),
            zero_blocks: Count::default(),
            odd_rows: Vec::new(),
            median_norm: 0.0,
        };
        let mut norms = Vec::new();
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
            }
            norms.extend(some.iter().map(|of_row| of_row.squares.sqrt() as f32));
        }
        all.mean_abs /= (all.elements - all.not_finite.count).max(1) as f64;
        (all.odd_rows, all.median_norm) = odd_rows(&norms);
        Ok(all)
    }

    fn add(&mut self, row: usize, of_row: &OfRow) {
        self.not_finite.add(row, &of_row.not_finite);
        self.range = match (self.range, of_row.range) {
            (Some((a, b)), Some((c, d))) => Some((a.min(c), b.max(d))),
            (range, other) => range.or(other),
        };
        self.negative += of_row.negative;
        self.mean_abs += of_row.sum_abs;
        let is_zero = of_row.range == Some((0.0, 0.0)) && of_row.not_finite.count == 0;
        match is_zero {
            true => self.zero_rows.add(row, &Count { count: 1, first: Some((row, 0, ())) }),
            false => self.zero_blocks.add(row, &of_row.zero_blocks),
        }
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
struct OfRow {
    not_finite: Count<f32>,
    range: Option<(f32, f32)>,
    negative: u64,
    sum_abs: f64,
    squares: f64,
    zero_blocks: Count<()>,
}

impl OfRow {
    fn new(values: &[f32]) -> Self {
        let mut not_finite = Count::default();
        let mut range: Option<(f32, f32)> = None;
        let (mut negative, mut sum_abs, mut squares) = (0, 0.0, 0.0);
        for (column, &x) in values.iter().enumerate() {
            if !x.is_finite() {
                not_finite.count += 1;
                not_finite.first = not_finite.first.or(Some((0, column, x)));
                continue;
            }
            range = Some(range.map_or((x, x), |(min, max)| (min.min(x), max.max(x))));
            negative += u64::from(x < 0.0);
            sum_abs += f64::from(x).abs();
            squares += f64::from(x) * f64::from(x);
        }
        let is_zero = |(_, block): &(usize, &[f32])| block.iter().all(|&x| x == 0.0);
        let blocks = values.chunks_exact(BLOCK).enumerate();
        let mut zero = blocks.filter(is_zero);
        let first = zero.next().map(|(block, _)| (0, block * BLOCK, ()));
        let count = first.map_or(0, |_| 1 + zero.count() as u64);
        let zero_blocks = Count { count, first };
        Self { not_finite, range, negative, sum_abs, squares, zero_blocks }
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
    let median = median_of(&mut logs);
    let mut deviations: Vec<f64> = logs.iter().map(|log| (log - median).abs()).collect();
    let spread = 1.4826 * median_of(&mut deviations);
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

fn median_of(values: &mut [f64]) -> f64 {
    let middle = values.len() / 2;
    *values.select_nth_unstable_by(middle, f64::total_cmp).1
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
    fn a_tensor_of_one_number_is_constant() {
        assert_eq!(facts(4, 4, |_, _| 2.5).constant(), Some(2.5));
        assert_eq!(facts(4, 4, |r, _| r as f32).constant(), None);
        assert_eq!(facts(1, 1, |_, _| 2.5).constant(), None);
    }
}

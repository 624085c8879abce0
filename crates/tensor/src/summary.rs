//! What a set of numbers looks like, in a dozen numbers.

/// Statistics of a sample, computed in f64.
///
/// NaN and infinities are counted and take no part in the other numbers, which are `None` if
/// nothing else is there: absence is not zero. The result depends on the order of the values only.
/// Parts summarised apart can be [merged](Self::merge); mean, deviation and RMS may then differ in
/// the last bits from those in one go.
///
/// ```
/// # use apr_tensor::Summary;
/// let summary = Summary::of(&[3.0f32, -4.0, f32::NAN]);
/// assert_eq!((summary.count(), summary.nan()), (3, 1));
/// assert_eq!((summary.min(), summary.abs_max()), (Some(-4.0), Some(4.0)));
/// assert_eq!((summary.mean(), summary.std()), (Some(-0.5), Some(3.5)));
/// assert_eq!(Summary::of::<f32>(&[]).mean(), None);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    finite: u64,
    nan: u64,
    inf: u64,
    zeros: u64,
    min: f64,
    max: f64,
    mean: f64,
    /// The sum of squared differences from the mean.
    squares: f64,
}

/// Values that are summed plainly before they are merged into the rest: few enough to be read twice from the nearest
/// cache.
const CHUNK: usize = 1024;

/// Sums that are kept apart until the end of a chunk, so that a compiler can have them in vectors.
const LANES: usize = 16;

/// An `f32` or an `f64`.
pub trait Value: Copy + Default + PartialOrd + Into<f64> {}

impl Value for f32 {}
impl Value for f64 {}

/// What one reading of a chunk gives: its numbers dealt out to lanes.
struct Lanes<T> {
    sum: [f64; LANES],
    /// Of the values as they are.
    squares: [f64; LANES],
    zeros: [u32; LANES],
    min: [T; LANES],
    max: [T; LANES],
}

impl<T: Value> Lanes<T> {
    #[inline(always)]
    fn add(&mut self, lane: usize, value: T) {
        let x: f64 = value.into();
        self.sum[lane] += x;
        self.squares[lane] += x * x;
        self.zeros[lane] += u32::from(value == T::default());
        self.min[lane] = if value < self.min[lane] { value } else { self.min[lane] };
        self.max[lane] = if value > self.max[lane] { value } else { self.max[lane] };
    }
}

impl Summary {
    /// The statistics of `values`.
    pub fn of<T: Value>(values: &[T]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            #[target_feature(enable = "avx2")]
            fn of_avx2<T: Value>(values: &[T]) -> Summary {
                Summary::of_chunks(values)
            }
            // SAFETY: the machine has it.
            return unsafe { of_avx2(values) };
        }
        Self::of_chunks(values)
    }

    #[inline(always)]
    fn of_chunks<T: Value>(values: &[T]) -> Self {
        let mut summary = Self::default();
        for chunk in values.chunks(CHUNK) {
            summary = summary.merge(Self::of_chunk(chunk));
        }
        summary
    }

    /// How many values there are, of whatever kind.
    pub fn count(&self) -> u64 {
        self.finite + self.nan + self.inf
    }

    /// How many values are NaN.
    pub fn nan(&self) -> u64 {
        self.nan
    }

    /// How many values are infinite.
    pub fn inf(&self) -> u64 {
        self.inf
    }

    /// How many values are zero, of either sign.
    pub fn zeros(&self) -> u64 {
        self.zeros
    }

    /// The least finite value.
    pub fn min(&self) -> Option<f64> {
        self.unless_empty(self.min)
    }

    /// The greatest finite value.
    pub fn max(&self) -> Option<f64> {
        self.unless_empty(self.max)
    }

    /// The greatest finite magnitude.
    pub fn abs_max(&self) -> Option<f64> {
        self.unless_empty(self.max.abs().max(self.min.abs()))
    }

    /// The mean of the finite values. As for all moments, values beyond 1e150 may overflow.
    pub fn mean(&self) -> Option<f64> {
        self.unless_empty(self.mean)
    }

    /// The standard deviation of the finite values taken as the whole population (divided by n, not
    /// n - 1).
    pub fn std(&self) -> Option<f64> {
        self.unless_empty(self.variance().sqrt())
    }

    /// The root of the mean square of the finite values.
    pub fn rms(&self) -> Option<f64> {
        self.unless_empty((self.mean * self.mean + self.variance()).sqrt())
    }

    /// The statistics of both samples together.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        let counts = Self {
            finite: self.finite + other.finite,
            nan: self.nan + other.nan,
            inf: self.inf + other.inf,
            zeros: self.zeros + other.zeros,
            ..self
        };
        if other.finite == 0 {
            return counts;
        }
        if self.finite == 0 {
            let Self { min, max, mean, squares, .. } = other;
            return Self { min, max, mean, squares, ..counts };
        }
        // Chan, Golub, LeVeque: no large squares are subtracted from each other.
        let share = other.finite as f64 / counts.finite as f64;
        let apart = other.mean - self.mean;
        Self {
            min: self.min.min(other.min),
            max: self.max.max(other.max),
            mean: self.mean + apart * share,
            squares: self.squares + other.squares + apart * apart * share * self.finite as f64,
            ..counts
        }
    }

    fn variance(&self) -> f64 {
        self.squares / self.finite as f64
    }

    fn unless_empty(&self, value: f64) -> Option<f64> {
        (self.finite > 0).then_some(value)
    }

    /// Statistics of at most [`CHUNK`] values.
    #[inline(always)]
    fn of_chunk<T: Value>(values: &[T]) -> Self {
        let Some(&first) = values.first() else { return Self::default() };
        let mut lanes = Lanes {
            sum: [0.0; LANES],
            squares: [0.0; LANES],
            zeros: [0; LANES],
            min: [first; LANES],
            max: [first; LANES],
        };
        let (whole, rest) = values.as_chunks::<LANES>();
        for values in whole {
            for (i, &x) in values.iter().enumerate() {
                lanes.add(i, x);
            }
        }
        for (i, &x) in rest.iter().enumerate() {
            lanes.add(i, x);
        }
        let (n, sum) = (values.len() as f64, lanes.sum.iter().sum::<f64>());
        let (mean, about_zero) = (sum / n, lanes.squares.iter().sum::<f64>());
        if !about_zero.is_finite() {
            return Self::of_chunk_not_finite(values);
        }
        // Where the mean is large, the difference has lost digits to it.
        let squares = match about_zero - sum * mean {
            squares if squares > 1e-3 * about_zero => squares,
            _ => values.iter().map(|&x| (x.into() - mean) * (x.into() - mean)).sum(),
        };
        Self {
            finite: values.len() as u64,
            zeros: lanes.zeros.iter().map(|&zeros| u64::from(zeros)).sum(),
            min: lanes.min.into_iter().fold(f64::INFINITY, |min, x| min.min(x.into())),
            max: lanes.max.into_iter().fold(f64::NEG_INFINITY, |max, x| max.max(x.into())),
            mean,
            squares,
            ..Self::default()
        }
    }

    /// Statistics of at most [`CHUNK`] values whose sum is not finite: some of them are not, or they are very large.
    #[cold]
    #[inline(never)]
    fn of_chunk_not_finite<T: Value>(values: &[T]) -> Self {
        let values = || values.iter().map(|&x| -> f64 { x.into() });
        let finite = || values().filter(|x| x.is_finite());
        let count = finite().count();
        let counts = Self {
            finite: count as u64,
            nan: values().filter(|x| x.is_nan()).count() as u64,
            inf: values().filter(|x| x.is_infinite()).count() as u64,
            zeros: values().filter(|&x| x == 0.0).count() as u64,
            ..Self::default()
        };
        if count == 0 {
            return counts;
        }
        let mean = finite().sum::<f64>() / count as f64;
        Self {
            min: finite().fold(f64::INFINITY, f64::min),
            max: finite().fold(f64::NEG_INFINITY, f64::max),
            mean,
            squares: finite().map(|x| (x - mean) * (x - mean)).sum(),
            ..counts
        }
    }
}

impl<T: Into<f64>> FromIterator<T> for Summary {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut summary = Self::default();
        let (mut chunk, mut len) = ([0.0; CHUNK], 0);
        for value in values {
            chunk[len] = value.into();
            len += 1;
            if len == CHUNK {
                summary = summary.merge(Self::of(&chunk));
                len = 0;
            }
        }
        summary.merge(Self::of(&chunk[..len]))
    }
}

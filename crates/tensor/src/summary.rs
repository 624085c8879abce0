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

/// Values that are summed plainly before they are merged into the rest.
const CHUNK: usize = 256;

impl Summary {
    /// The statistics of `values`.
    pub fn of<T: Copy + Into<f64>>(values: &[T]) -> Self {
        values.iter().copied().collect()
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

    /// Statistics of at most [`CHUNK`] finite values: few enough to sum plainly, twice.
    fn of_chunk(values: &[f64]) -> Self {
        let Some(&first) = values.first() else { return Self::default() };
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        Self {
            finite: values.len() as u64,
            zeros: values.iter().filter(|&&x| x == 0.0).count() as u64,
            min: values.iter().copied().fold(first, f64::min),
            max: values.iter().copied().fold(first, f64::max),
            mean,
            squares: values.iter().map(|x| (x - mean) * (x - mean)).sum(),
            ..Self::default()
        }
    }
}

impl<T: Into<f64>> FromIterator<T> for Summary {
    fn from_iter<I: IntoIterator<Item = T>>(values: I) -> Self {
        let mut summary = Self::default();
        let (mut chunk, mut len) = ([0.0; CHUNK], 0);
        for value in values {
            let value = value.into();
            if value.is_nan() {
                summary.nan += 1;
            } else if value.is_infinite() {
                summary.inf += 1;
            } else {
                chunk[len] = value;
                len += 1;
                if len == CHUNK {
                    summary = summary.merge(Self::of_chunk(&chunk));
                    len = 0;
                }
            }
        }
        summary.merge(Self::of_chunk(&chunk[..len]))
    }
}

//! Rows of numbers and of their steps: a tensor as stored, or what a hypothesis makes of one.

use apr_tensor::Stored;

/// A matrix that is read a row at a time.
pub(super) trait Rows: Sync {
    /// Rows and columns.
    fn dims(&self) -> [usize; 2];
    /// The numbers of row `row`.
    fn values(&self, row: usize, out: &mut [f32]);
    /// The step of each.
    fn steps(&self, row: usize, out: &mut [f32]);
}

/// A tensor of a type that [can be read as numbers](apr_tensor::DType::can_dequantize).
impl Rows for Stored {
    fn dims(&self) -> [usize; 2] {
        [self.shape().rows(), self.shape().cols()]
    }

    fn values(&self, row: usize, out: &mut [f32]) {
        self.dequantize_row(row, out).expect("the type has numbers and the row its length");
    }

    fn steps(&self, row: usize, out: &mut [f32]) {
        self.row_steps(row, out).expect("the type has numbers and the row its length");
    }
}

/// Some rows of another, in any order.
pub(super) struct Gather<'a> {
    pub(super) of: &'a dyn Rows,
    /// Which row of it each row is.
    pub(super) sources: Vec<usize>,
}

impl Rows for Gather<'_> {
    fn dims(&self) -> [usize; 2] {
        [self.sources.len(), self.of.dims()[1]]
    }

    fn values(&self, row: usize, out: &mut [f32]) {
        self.of.values(self.sources[row], out);
    }

    fn steps(&self, row: usize, out: &mut [f32]) {
        self.of.steps(self.sources[row], out);
    }
}

/// `scale * x + offset`, computed in the type of x, whose relative precision it keeps.
pub(super) struct Affine<'a> {
    pub(super) of: &'a dyn Rows,
    pub(super) scale: f64,
    pub(super) offset: f64,
}

impl Affine<'_> {
    fn value(&self, x: f32) -> f32 {
        (self.scale * f64::from(x) + self.offset) as f32
    }
}

impl Rows for Affine<'_> {
    fn dims(&self) -> [usize; 2] {
        self.of.dims()
    }

    fn values(&self, row: usize, out: &mut [f32]) {
        self.of.values(row, out);
        out.iter_mut().for_each(|x| *x = self.value(*x));
    }

    fn steps(&self, row: usize, out: &mut [f32]) {
        let mut values = vec![0.0; out.len()];
        self.of.values(row, &mut values);
        self.of.steps(row, out);
        for (step, &x) in out.iter_mut().zip(&values) {
            let moved = if x == 0.0 { 0.0 } else { (self.value(x) / x).abs() };
            *step *= moved.max(self.scale.abs() as f32);
        }
    }
}

/// Numbers in memory, in an order that no stored tensor has.
pub(super) struct Dense {
    dims: [usize; 2],
    values: Vec<f32>,
    steps: Vec<f32>,
}

impl Dense {
    /// The rows and columns of `of` exchanged, and the numbers read as rows of `cols`: as many as it has rows if the
    /// dimensions are exchanged as well. Only the rows `wanted`, in this order.
    pub(super) fn turned(of: &dyn Rows, cols: usize, wanted: &[usize]) -> Self {
        let [rows_of, cols_of] = of.dims();
        let mut place = vec![None; rows_of * cols_of / cols];
        wanted.iter().enumerate().for_each(|(i, &row)| place[row] = Some(i));
        let turn = |read: &dyn Fn(usize, &mut [f32])| {
            let (mut buffer, mut turned) = (vec![0.0; cols_of], vec![0.0; wanted.len() * cols]);
            for row in 0..rows_of {
                read(row, &mut buffer);
                for (col, &x) in buffer.iter().enumerate() {
                    let to = col * rows_of + row;
                    if let Some(i) = place[to / cols] {
                        turned[i * cols + to % cols] = x;
                    }
                }
            }
            turned
        };
        let values = turn(&|row, out| of.values(row, out));
        Self { dims: [wanted.len(), cols], values, steps: turn(&|row, out| of.steps(row, out)) }
    }

    /// The same numbers as a matrix of `dims`, which have as many elements.
    pub(super) fn reshaped(of: &dyn Rows, dims: [usize; 2]) -> Self {
        let [rows, cols] = of.dims();
        let (mut values, mut steps) = (vec![0.0; rows * cols], vec![0.0; rows * cols]);
        let both = values.chunks_exact_mut(cols).zip(steps.chunks_exact_mut(cols));
        for (row, (values, steps)) in both.enumerate() {
            of.values(row, values);
            of.steps(row, steps);
        }
        Self { dims, values, steps }
    }

    fn row(&self, row: usize) -> std::ops::Range<usize> {
        let [_, cols] = self.dims;
        row * cols..(row + 1) * cols
    }
}

impl Rows for Dense {
    fn dims(&self) -> [usize; 2] {
        self.dims
    }

    fn values(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.values[self.row(row)]);
    }

    fn steps(&self, row: usize, out: &mut [f32]) {
        out.copy_from_slice(&self.steps[self.row(row)]);
    }
}

/// Buffers for a row of each side.
pub(super) struct Reader {
    values: [Vec<f32>; 2],
    steps: [Vec<f32>; 2],
}

impl Reader {
    pub(super) fn new(cols: usize) -> Self {
        let pair = || [vec![0.0; cols], vec![0.0; cols]];
        Self { values: pair(), steps: pair() }
    }

    /// The numbers of one row of each side, and the steps of both added up.
    pub(super) fn row(&mut self, sides: [&dyn Rows; 2], rows: [usize; 2]) -> [&[f32]; 3] {
        for (i, (side, row)) in sides.into_iter().zip(rows).enumerate() {
            side.values(row, &mut self.values[i]);
            side.steps(row, &mut self.steps[i]);
        }
        let [steps, of_b] = &mut self.steps;
        steps.iter_mut().zip(of_b).for_each(|(step, b)| *step += *b);
        [&self.values[0], &self.values[1], &self.steps[0]]
    }
}

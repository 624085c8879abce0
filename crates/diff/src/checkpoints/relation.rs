//! What turns one tensor into the other: hypotheses, tried only where rounding does not explain the difference.
//!
//! A hypothesis has to explain the difference down to rounding, so that quantisation noise is never given a name, and a tensor
//! that is equal is equal, whatever else it may be (a symmetric one its own transpose, for example). The first that does is
//! stated; those that say most about how a fault came about are tried first.

use std::fmt;

use apr_model::{HeadRows, Role};
use apr_tensor::{DType, Shape, Stored};
use serde::Serialize;

use super::{
    matching::{self, Moved},
    pairing::{Side as Model, whole_heads},
    rows::{Affine, Dense, Gather, Rows},
    score::{Score, mean_difference, row_explained, score},
};
use crate::{Error, Result};

/// A fitted constant explains a difference if it leaves no more than this share of it.
const FITTED: f64 = 0.5;
/// Larger tensors are not turned: that takes one of them in memory as a whole.
const MAX_TURNED: usize = 1 << 28;
/// Rows that are tried before all are.
const SAMPLE: usize = 8;

/// What turns the tensor under test into the reference's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Relation {
    /// What it is.
    #[serde(flatten)]
    pub kind: RelationKind,
    /// The relative L2 that it leaves.
    #[serde(serialize_with = "crate::metrics::option_number")]
    pub relative_l2: Option<f64>,
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

/// A way in which tensors are wrongly stored.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum RelationKind {
    /// Rows and columns are exchanged.
    Transposed,
    /// The same numbers in the same order, under other dimensions.
    Reshaped,
    /// The rows of each head are in interleaved pairs where the reference has halves.
    RowsInterleaved,
    /// The rows of each head are in halves where the reference has interleaved pairs.
    RowsInHalves,
    /// Whole heads are other heads of the reference.
    HeadsMoved {
        /// Which head of the reference each one is.
        sources: Vec<usize>,
    },
    /// Each row is another row of the reference, all by the same distance.
    RowsShifted {
        /// Row `r` is row `r + by` of the reference; rows without such a one were not compared.
        by: isize,
    },
    /// Some rows are other rows of the reference.
    RowsMoved {
        /// How many.
        moved: usize,
        /// The first of them.
        row: usize,
        /// Which row of the reference it is.
        source: usize,
    },
    /// It is another tensor of the reference.
    OtherTensor {
        /// Which.
        name: String,
    },
    /// All zeros.
    Zero,
    /// All elements are one number, and those of the reference are not.
    Constant {
        /// The number.
        value: f64,
    },
    /// The reference with its sign changed.
    Negated,
    /// The reference times a constant.
    Scaled {
        /// The constant.
        by: f64,
    },
    /// The reference plus a constant.
    Offset {
        /// The constant.
        by: f64,
    },
    /// The bytes are right if they are read as another type.
    Mislabelled {
        /// That type.
        dtype: String,
    },
    /// The bytes of each number are in reverse order.
    ByteOrder,
    /// The lower and upper four bits of the codes are exchanged.
    NibblesExchanged,
}

impl fmt::Display for RelationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transposed => f.write_str("TRANSPOSED"),
            Self::Reshaped => f.write_str("the same numbers under OTHER DIMENSIONS"),
            Self::RowsInterleaved => f.write_str("rows of heads INTERLEAVED in A"),
            Self::RowsInHalves => f.write_str("rows of heads IN HALVES in A"),
            Self::HeadsMoved { sources } => {
                f.write_str("HEADS MOVED:")?;
                let mut moved = sources.iter().enumerate().filter(|(head, source)| head != *source);
                let mut separator = "";
                for (head, source) in moved.by_ref().take(4) {
                    write!(f, "{separator} head {head} is B's {source}")?;
                    separator = ",";
                }
                match moved.count() {
                    0 => Ok(()),
                    more => write!(f, " (and {more} more)"),
                }
            }
            Self::RowsShifted { by } => write!(f, "ROWS SHIFTED: row r is B's r {by:+}"),
            Self::RowsMoved { moved, row, source } => {
                write!(f, "{moved} ROWS MOVED: row {row} is B's {source}")
            }
            Self::OtherTensor { name } => write!(f, "ANOTHER TENSOR: B's {name}"),
            Self::Zero => f.write_str("ALL ZERO"),
            Self::Constant { value } => write!(f, "CONSTANT {value}"),
            Self::Negated => f.write_str("SIGN CHANGED"),
            Self::Scaled { by } => write!(f, "SCALED by {by}"),
            Self::Offset { by } => write!(f, "OFFSET by {by:+}"),
            Self::Mislabelled { dtype } => write!(f, "MISLABELLED: right if read as {dtype}"),
            Self::ByteOrder => f.write_str("BYTES REVERSED in each number"),
            Self::NibblesExchanged => f.write_str("NIBBLES EXCHANGED"),
        }
    }
}

/// A tensor that rounding does not explain.
pub(super) struct Case<'a> {
    pub(super) a: &'a Stored,
    pub(super) b: &'a Stored,
    pub(super) name: &'a str,
    pub(super) role: Option<Role>,
    pub(super) head_dim: Option<usize>,
    /// The file that `b` is of.
    pub(super) reference: &'a Model<'a>,
    /// The difference as it is, if the shapes allow to say.
    pub(super) before: Option<&'a Score>,
    /// The rows that differ by more than rounding.
    pub(super) strays: &'a [usize],
}

type Found = Option<(RelationKind, Score)>;

/// The relation that explains the difference, with the numbers under it.
pub(super) fn find(case: &Case<'_>) -> Result<Option<(Relation, Score)>> {
    if case.a.shape().elements() == 0 || case.b.shape().elements() == 0 {
        return Ok(None);
    }
    let hypotheses: [fn(&Case<'_>) -> Result<Found>; 9] = [
        constant,
        order_of_pairs,
        other_bytes,
        fitted,
        transposed,
        reshaped,
        other_tensor,
        heads_moved,
        rows_moved,
    ];
    for hypothesis in hypotheses {
        if let Some((kind, score)) = hypothesis(case)? {
            let relative_l2 = score.metrics.relative_l2;
            return Ok(Some((Relation { kind, relative_l2 }, score)));
        }
    }
    Ok(None)
}

/// What is left of the difference, if it is no more than rounding. A few rows are tried first.
fn explains(a: &dyn Rows, b: &dyn Rows) -> Option<Score> {
    let [rows, _] = a.dims();
    if a.dims() != b.dims() {
        return None;
    }
    let mut sample = matching::spread(rows, SAMPLE);
    let promising = sample.all(|row| row_explained(a, b, [row; 2]));
    promising.then(|| score(a, b)).filter(Score::explained)
}

/// No number of `a` differs from the others, while those of `b` do.
fn constant(case: &Case<'_>) -> Result<Found> {
    let Some(before) = case.before else { return Ok(None) };
    let [rows, cols] = case.a.dims();
    let mut row_of = vec![0.0; cols];
    case.a.values(0, &mut row_of);
    let value = row_of[0];
    for row in 0..rows {
        case.a.values(row, &mut row_of);
        if !row_of.iter().all(|&x| x == value) {
            return Ok(None);
        }
    }
    let kind = match value {
        0.0 => RelationKind::Zero,
        _ => RelationKind::Constant { value: value.into() },
    };
    Ok(Some((kind, before.clone())))
}

/// The rows of heads in the order of the other kind of rotation.
fn order_of_pairs(case: &Case<'_>) -> Result<Found> {
    let (Some(role), Some(head_dim)) = (case.role, case.head_dim) else { return Ok(None) };
    if case.a.shape() != case.b.shape() || !whole_heads(case.a, role, head_dim) {
        return Ok(None);
    }
    let in_halves = |stored: &Stored| {
        let halves = HeadRows::Interleaved.to_halves(role, stored, head_dim);
        halves.map_err(|error| Error::model(case.reference.path(), error))
    };
    if let Some(score) = explains(&in_halves(case.a)?, case.b) {
        return Ok(Some((RelationKind::RowsInterleaved, score)));
    }
    let score = explains(case.a, &in_halves(case.b)?);
    Ok(score.map(|score| (RelationKind::RowsInHalves, score)))
}

/// The bytes of `a` mean something else than its type says.
fn other_bytes(case: &Case<'_>) -> Result<Found> {
    let a = case.a;
    let (dtype, shape, bytes) = (a.dtype(), a.shape(), a.bytes());
    let read = |dtype: DType, bytes: Vec<u8>| {
        let read = Stored::new(dtype, shape.clone(), bytes.into()).ok()?;
        explains(&read, case.b)
    };
    for other in DType::all() {
        let a_float = matches!(other, DType::F64 | DType::F32 | DType::F16 | DType::BF16);
        let fits = other.tensor_bytes(shape) == Some(bytes.len());
        if other == dtype || !fits || !other.can_dequantize() || !(a_float || other.is_quantized())
        {
            continue;
        }
        let read = Stored::new(other, shape.clone(), bytes.clone()).ok();
        if let Some(score) = read.and_then(|read| explains(&read, case.b)) {
            return Ok(Some((RelationKind::Mislabelled { dtype: other.name().to_owned() }, score)));
        }
    }
    if dtype.block_len() == 1 && dtype.block_bytes() > 1 {
        let reversed = bytes.chunks(dtype.block_bytes()).flat_map(|number| number.iter().rev());
        let score = read(dtype, reversed.copied().collect());
        return Ok(score.map(|score| (RelationKind::ByteOrder, score)));
    }
    let Some(codes) = nibbles(dtype) else { return Ok(None) };
    let mut exchanged = bytes.to_vec();
    for block in exchanged.chunks_mut(dtype.block_bytes()) {
        block[codes..].iter_mut().for_each(|byte| *byte = byte.rotate_left(4));
    }
    let score = read(dtype, exchanged);
    Ok(score.map(|score| (RelationKind::NibblesExchanged, score)))
}

/// Where in a block its codes begin, if they are nibbles to its end.
fn nibbles(dtype: DType) -> Option<usize> {
    let codes = match dtype {
        DType::Q4_0 | DType::Q4_1 | DType::IQ4_NL | DType::MXFP4 | DType::AprQ4 => 16,
        DType::Q4_K | DType::IQ4_XS => 128,
        _ => return None,
    };
    Some(dtype.block_bytes() - codes)
}

/// A constant factor, or a constant added.
fn fitted(case: &Case<'_>) -> Result<Found> {
    let Some(before) = case.before else { return Ok(None) };
    let (Some(cosine), Some(ratio)) = (before.metrics.cosine, before.metrics.norm_ratio) else {
        return Ok(None);
    };
    let fit = |scale: f64, offset: f64| {
        let score = explains(case.a, &Affine { of: case.b, scale, offset })?;
        let before = before.metrics.relative_l2?;
        score.metrics.relative_l2.is_some_and(|left| left <= FITTED * before).then_some(score)
    };
    if let Some(score) = fit(-1.0, 0.0) {
        return Ok(Some((RelationKind::Negated, score)));
    }
    for by in plausible(cosine * ratio) {
        if let Some(score) = fit(by, 0.0) {
            return Ok(Some((RelationKind::Scaled { by }, score)));
        }
    }
    for by in plausible(mean_difference(case.a, case.b)) {
        if let Some(score) = fit(1.0, by) {
            return Ok(Some((RelationKind::Offset { by }, score)));
        }
    }
    Ok(None)
}

/// The constant that was probably meant, then the fit itself.
fn plausible(fit: f64) -> impl Iterator<Item = f64> {
    let near = move |guess: f64| (guess - fit).abs() <= 0.02 * fit.abs();
    let whole = fit.round();
    let of_one = 1.0 / (1.0 / fit).round();
    let guesses =
        [whole, of_one].into_iter().filter(move |&guess| guess.is_finite() && near(guess));
    guesses.chain([fit]).filter(|by| by.is_finite() && *by != 0.0)
}

/// The numbers in the order of the reference's transpose, whether or not the dimensions say so.
fn transposed(case: &Case<'_>) -> Result<Found> {
    let (&[rows, cols], &[b_rows, b_cols]) = (case.a.shape().dims(), case.b.shape().dims()) else {
        return Ok(None);
    };
    let same = [[b_cols, b_rows], [b_rows, b_cols]].contains(&[rows, cols]);
    if !same || rows.min(cols) < 2 || rows * cols > MAX_TURNED {
        return Ok(None);
    }
    let turned = |wanted: Vec<usize>| {
        let of_b = Dense::turned(case.b, cols, &wanted);
        explains(&Gather { of: case.a, sources: wanted }, &of_b)
    };
    let score =
        turned(matching::spread(rows, SAMPLE).collect()).and_then(|_| turned((0..rows).collect()));
    Ok(score.map(|score| (RelationKind::Transposed, score)))
}

/// The numbers in the order of the reference, under other dimensions.
fn reshaped(case: &Case<'_>) -> Result<Found> {
    let elements = case.a.shape().elements();
    if case.a.shape() == case.b.shape()
        || elements != case.b.shape().elements()
        || elements > MAX_TURNED
    {
        return Ok(None);
    }
    let score = explains(case.a, &Dense::reshaped(case.b, case.a.dims()));
    Ok(score.map(|score| (RelationKind::Reshaped, score)))
}

/// Another tensor of the reference.
fn other_tensor(case: &Case<'_>) -> Result<Found> {
    for (name, role, tensor) in case.reference.readable() {
        if name == case.name || tensor.stored.shape() != case.a.shape() {
            continue;
        }
        let other = case.reference.in_halves(role, &tensor)?;
        if let Some(score) = explains(case.a, &other) {
            return Ok(Some((RelationKind::OtherTensor { name }, score)));
        }
    }
    Ok(None)
}

/// Heads that are other heads: as rows of a matrix, or as parts of a bias.
fn heads_moved(case: &Case<'_>) -> Result<Found> {
    let (Some(role), Some(head_dim)) = (case.role, case.head_dim) else { return Ok(None) };
    let of_heads = |stored: &Stored| {
        let heads = stored.shape().elements() / head_dim;
        stored.with_shape(Shape::from([heads, head_dim])).ok()
    };
    if !matching::is_bias_of_heads(role, case.a, head_dim) || case.a.shape() != case.b.shape() {
        return Ok(None);
    }
    let (Some(a), Some(b)) = (of_heads(case.a), of_heads(case.b)) else { return Ok(None) };
    Ok(match matching::moved(&a, &b, &matching::strays(&a, &b)) {
        Some(Moved::Rows(sources)) => {
            let score = explains(&a, &Gather { of: &b, sources: sources.clone() });
            score.map(|score| (RelationKind::HeadsMoved { sources }, score))
        }
        _ => None,
    })
}

/// Rows that are other rows: of whole heads, all by one distance, or some.
fn rows_moved(case: &Case<'_>) -> Result<Found> {
    let (a, b) = (case.a, case.b);
    if a.shape() != b.shape() || a.shape().dims().len() < 2 {
        return Ok(None);
    }
    Ok(match matching::moved(a, b, case.strays) {
        None => None,
        Some(Moved::Shifted(by)) => {
            let rows = 0..a.dims()[0];
            let (kept, sources): (Vec<_>, Vec<_>) = rows
                .clone()
                .filter_map(|row| Some((row, row.checked_add_signed(by)?)))
                .filter(|(_, source)| rows.contains(source))
                .unzip();
            let score = explains(&Gather { of: a, sources: kept }, &Gather { of: b, sources });
            score.map(|score| (RelationKind::RowsShifted { by }, score))
        }
        Some(Moved::Rows(sources)) => {
            let heads = case
                .role
                .zip(case.head_dim)
                .and_then(|(role, head_dim)| matching::whole_heads_moved(role, head_dim, &sources));
            let moved = || sources.iter().enumerate().filter(|(row, source)| row != *source);
            let Some((row, &source)) = moved().next() else { return Ok(None) };
            let kind = match heads {
                Some(sources) => RelationKind::HeadsMoved { sources },
                None => RelationKind::RowsMoved { moved: moved().count(), row, source },
            };
            explains(a, &Gather { of: b, sources }).map(|score| (kind, score))
        }
    })
}

//! Comparing two captures, one stage in memory at a time.

use apr_capture::{Capture, CaptureTensor, RowRef};
use apr_model::{Axes, Site, Stage, TapSet};

use crate::{
    Alignment, Comparison, Location, NotCompared, Origin, Outcome, Reason, Result, RowScore, Side,
    StageComparison, TokenDifference,
    align::{Ambiguous, align, token_differences},
    experts::{Chosen, Routing},
    logits::LogitRows,
    metrics::{Accumulator, ZeroNorm},
};

/// What to compare, and what counts as equal.
#[derive(Clone, Debug)]
pub struct Options {
    /// The stages to compare; `None` means all that either side holds.
    pub sites: Option<TapSet>,
    /// Compare what both sides hold and do not miss the rest, which is only listed.
    pub common: bool,
    /// The largest relative L2 that counts as equal, of a stage and of each of its rows.
    pub tolerance: f64,
    /// How many of the best tokens to compare.
    pub top_k: usize,
}

impl Options {
    /// The tolerance for two F32 computations of the same weights: an order of magnitude above what different orders of
    /// summation do to a deep model, and orders below what any other type does.
    pub const TOLERANCE: f64 = 1e-5;
}

impl Default for Options {
    fn default() -> Self {
        Self { sites: None, common: false, tolerance: Self::TOLERANCE, top_k: 10 }
    }
}

/// Compares `a`, which is under test, with `b`, the reference.
pub fn compare(a: &Capture, b: &Capture, options: &Options) -> Result<Comparison> {
    let alignment = Alignment::of(a, b);
    let token_differences = match alignment {
        Alignment::Positions => token_differences(a, b),
        Alignment::LastRow => Vec::new(),
    };
    let mut comparison = Comparison {
        schema: "apr-diff/1",
        a: Origin::of(a),
        b: Origin::of(b),
        tolerance: options.tolerance,
        alignment,
        token_differences,
        stages: Vec::new(),
        not_compared: Vec::new(),
        left_out: Vec::new(),
        outcome: Outcome::Unmeasured { because: String::new() },
    };
    for site in asked_for(a, b, options) {
        let mut pair = StagePair {
            site,
            a: Reader::new(a, site),
            b: Reader::new(b, site),
            routing: Routing::of(a, b, site),
            alignment,
            differences: &comparison.token_differences,
        };
        match pair.compare(options)? {
            Ok(stage) => comparison.stages.push(stage),
            Err(reason) => {
                let list = match reason {
                    Reason::Missing { .. } if options.common => &mut comparison.left_out,
                    _ => &mut comparison.not_compared,
                };
                list.push(NotCompared { name: site.to_string(), reason });
            }
        }
    }
    if options.sites.is_none() {
        let list = match options.common {
            true => &mut comparison.left_out,
            false => &mut comparison.not_compared,
        };
        for (side, capture) in [(Side::A, a), (Side::B, b)] {
            list.extend(
                capture.unknown().iter().map(|name| NotCompared {
                    name: name.clone(),
                    reason: Reason::Unknown { side },
                }),
            );
        }
    }
    comparison.outcome = outcome(&comparison);
    Ok(comparison)
}

fn asked_for(a: &Capture, b: &Capture, options: &Options) -> Vec<Site> {
    match &options.sites {
        Some(sites) => sites.iter().collect(),
        None => {
            let mut sites = a.sites();
            sites.extend(b.sites());
            sites.sort();
            sites.dedup();
            sites
        }
    }
}

fn outcome(comparison: &Comparison) -> Outcome {
    let Comparison { stages, not_compared, token_differences, .. } = comparison;
    if let Some(stage) = stages.iter().find(|stage| !stage.within) {
        return Outcome::Differs { first: stage.site.to_string() };
    }
    let because = if let Some(difference) = token_differences.first() {
        let TokenDifference { position, a, b, .. } = difference;
        format!("the tokens differ from position {position} on ({a} in A, {b} in B)")
    } else if let Some(first) = not_compared.first() {
        let more = match not_compared.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        format!("{}: {}{more}", first.name, first.reason)
    } else if stages.is_empty() {
        "nothing was compared".to_owned()
    } else {
        return Outcome::Match { bitwise: stages.iter().all(|stage| stage.bitwise) };
    };
    Outcome::Unmeasured { because }
}

/// One stage of both captures.
struct StagePair<'a> {
    site: Site,
    a: Reader<'a>,
    b: Reader<'a>,
    /// Where rows have slots.
    routing: Option<Routing<'a>>,
    alignment: Alignment,
    differences: &'a [TokenDifference],
}

/// Where an element stands: pair of rows, piece of the row (a head, or an expert), element of the piece.
type Place = (usize, usize, usize);

impl StagePair<'_> {
    /// The comparison, or why there is none.
    fn compare(&mut self, options: &Options) -> Result<Result<StageComparison, Reason>> {
        let (rows_a, rows_b) = (self.a.rows(), self.b.rows());
        match (rows_a.is_empty(), rows_b.is_empty()) {
            (true, true) => return Ok(Err(Reason::MissingOnBoth)),
            (true, false) => return Ok(Err(Reason::Missing { side: Side::A })),
            (false, true) => return Ok(Err(Reason::Missing { side: Side::B })),
            (false, false) => {}
        }
        let rows = match align(self.alignment, &rows_a, &rows_b, self.differences) {
            Ok(rows) => rows,
            Err(Ambiguous { side, position }) => {
                return Ok(Err(Reason::Ambiguous { side, position }));
            }
        };
        if rows.pairs.is_empty() {
            return Ok(Err(match rows.other_tokens {
                0 => Reason::NoCommonRows,
                _ => Reason::OtherTokens,
            }));
        }

        let mut sum = Accumulator::default();
        let mut sums = Vec::with_capacity(rows.pairs.len());
        let mut logits = (self.site.stage == Stage::LmHead).then(|| LogitRows::new(options.top_k));
        let mut bitwise = true;
        let (mut flips, mut slots_left_out, mut by_expert) =
            (Vec::new(), 0, self.routing.is_some());
        for (index, &(row_a, row_b)) in rows.pairs.iter().enumerate() {
            let chosen = match &mut self.routing {
                Some(routing) => routing.chosen([row_a, row_b])?,
                None => None,
            };
            by_expert &= chosen.is_some();
            let (a, b) = (self.a.load(row_a.step)?, self.b.load(row_b.step)?);
            let Some(len) = comparable(a, row_a, b, row_b) else {
                let (a, b) = (a.shape().to_vec(), b.shape().to_vec());
                return Ok(Err(Reason::Shape { a, b }));
            };
            let row = match &chosen {
                Some(chosen) => {
                    compare_slots(index, (a, row_a), (b, row_b), chosen, self.site.stage)
                }
                None => compare_row(index, (a, row_a), (b, row_b), len, logits.as_mut()),
            };
            if let (Some(routing), Some(chosen)) = (&mut self.routing, &chosen) {
                match self.site.stage.holds_ids() {
                    true => flips.extend(routing.flip([row_a, row_b], chosen)?),
                    false => slots_left_out += chosen.slots_left_out(),
                }
            }
            bitwise &= row.bitwise;
            sum.merge(&row.sum);
            sums.push(row.sum);
        }
        let usual_norm = sum.reference_norm() / (rows.pairs.len() as f64).sqrt();
        let scores: Vec<RowScore> = rows
            .pairs
            .iter()
            .zip(&sums)
            .map(|(&(row, _), sum)| row_score(row, sum, usual_norm))
            .collect();
        let metrics = sum.metrics();
        if metrics.finite == 0 && metrics.categories.mismatched == 0 {
            return Ok(Err(match slots_left_out {
                0 => Reason::NothingFinite,
                _ => Reason::OtherExperts,
            }));
        }
        let head_dim = self.a.head_dim().or(self.b.head_dim());
        let metrics =
            metrics.locate(|place| locate(place, self.site, by_expert, &rows.pairs, head_dim));
        Ok(Ok(StageComparison {
            site: self.site,
            within: metrics.within(options.tolerance)
                && scores.iter().all(|row| row.within(options.tolerance)),
            bitwise,
            metrics,
            rows: scores,
            rows_only_a: rows.only_a,
            rows_only_b: rows.only_b,
            rows_other_tokens: rows.other_tokens,
            slots_left_out,
            flips,
            logits: logits.map(LogitRows::finish),
        }))
    }
}

struct Row {
    sum: Accumulator<Place>,
    bitwise: bool,
}

/// Compares the first `len` elements of each piece of a row.
fn compare_row(
    index: usize,
    (a, row_a): (&CaptureTensor, RowRef),
    (b, row_b): (&CaptureTensor, RowRef),
    len: usize,
    logits: Option<&mut LogitRows>,
) -> Row {
    let mut row = Row { sum: Accumulator::default(), bitwise: a.dtype() == b.dtype() };
    let (mut values_a, mut values_b) = (Vec::new(), Vec::new());
    for piece in 0..a.pieces() {
        values_a.clear();
        values_b.clear();
        a.read_piece(piece, row_a.row, &mut values_a);
        b.read_piece(piece, row_b.row, &mut values_b);
        row.sum.add(&values_a[..len], &values_b[..len], |i| (index, piece, i));
        let bytes = len * a.dtype().block_bytes();
        row.bitwise = row.bitwise
            && a.piece_bytes(piece, row_a.row)[..bytes] == b.piece_bytes(piece, row_b.row)[..bytes];
    }
    if let Some(logits) = logits {
        logits.add(row_a.position, &values_a, &values_b);
    }
    row
}

/// Compares the slots of a row expert by expert, or the experts themselves.
fn compare_slots(
    index: usize,
    (a, row_a): (&CaptureTensor, RowRef),
    (b, row_b): (&CaptureTensor, RowRef),
    chosen: &Chosen,
    stage: Stage,
) -> Row {
    let mut row = Row {
        sum: Accumulator::default(),
        bitwise: chosen.in_one_order()
            && a.dtype() == b.dtype()
            && a.piece_bytes(0, row_a.row) == b.piece_bytes(0, row_b.row),
    };
    let (mut values_a, mut values_b) = (Vec::new(), Vec::new());
    a.read_piece(0, row_a.row, &mut values_a);
    b.read_piece(0, row_b.row, &mut values_b);
    let (experts, [values_a, values_b]) = match stage.holds_ids() {
        true => chosen.membership(),
        false => chosen.common(&values_a, &values_b),
    };
    let width = values_a.len() / experts.len().max(1);
    row.sum.add(&values_a, &values_b, |i| (index, experts[i / width], i % width));
    row
}

/// The score of one row of a stage, whose rows have the norm `usual_norm` in the root mean square.
fn row_score(row: RowRef, sum: &Accumulator<Place>, usual_norm: f64) -> RowScore {
    let metrics = sum.clone().metrics();
    let relative_l2 = match sum.reference_norm() < RowScore::TINY * usual_norm {
        true => metrics.relative_l2.map(|_| sum.distance() / usual_norm),
        false => metrics.relative_l2,
    };
    RowScore {
        slot: row.slot,
        position: row.position,
        relative_l2,
        max_abs: metrics.max_abs.map(|pair| pair.abs_diff()),
        mismatched: metrics.categories.mismatched,
        dead: match metrics.zero_norm {
            Some(ZeroNorm::OnlyA) => Some(Side::A),
            Some(ZeroNorm::OnlyB) => Some(Side::B),
            Some(ZeroNorm::Both) | None => None,
        },
    }
}

/// How many elements of each piece of the two rows mean the same; `None` if the shapes do not fit.
///
/// Of scores, these are the keys that the row can see: what stands behind them is masked, or padding.
fn comparable(a: &CaptureTensor, row_a: RowRef, b: &CaptureTensor, row_b: RowRef) -> Option<usize> {
    if a.pieces() != b.pieces() {
        return None;
    }
    if a.axes() != Axes::HeadRowKey {
        return (a.piece_len() == b.piece_len()).then_some(a.piece_len());
    }
    let visible = |tensor: &CaptureTensor, row: RowRef| {
        // Without positions, the last row is taken to see all keys.
        let keys = match row.position {
            Some(position) => position.checked_add(1)?,
            None => (tensor.piece_len() + row.row + 1).checked_sub(tensor.rows())?,
        };
        (keys <= tensor.piece_len()).then_some(keys)
    };
    let keys = visible(a, row_a)?;
    (visible(b, row_b)? == keys).then_some(keys)
}

fn locate(
    (index, piece, element): Place,
    site: Site,
    by_expert: bool,
    pairs: &[(RowRef, RowRef)],
    head_dim: Option<usize>,
) -> Location {
    let RowRef { slot, position, .. } = pairs[index].0;
    let none = None;
    let at =
        Location { slot, position, row: index, head: none, expert: none, channel: none, key: none };
    match (site.stage.axes(), head_dim) {
        (Axes::RowSlot, _) if by_expert => Location { expert: Some(piece), ..at },
        (Axes::RowSlotChannel, _) if by_expert => {
            Location { expert: Some(piece), channel: Some(element), ..at }
        }
        (Axes::HeadRowKey, _) => Location { head: Some(piece), key: Some(element), ..at },
        (Axes::RowHeadChannel, Some(dim)) => {
            Location { head: Some(element / dim), channel: Some(element % dim), ..at }
        }
        _ => Location { channel: Some(element), ..at },
    }
}

/// Loads the tensors of one site, a step at a time.
pub(crate) struct Reader<'a> {
    capture: &'a Capture,
    site: Site,
    loaded: Option<(usize, CaptureTensor)>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(capture: &'a Capture, site: Site) -> Self {
        Self { capture, site, loaded: None }
    }

    pub(crate) fn rows(&self) -> Vec<RowRef> {
        self.capture.rows(self.site)
    }

    pub(crate) fn load(&mut self, step: usize) -> Result<&CaptureTensor> {
        if self.loaded.as_ref().is_none_or(|(loaded, _)| *loaded != step) {
            self.loaded = Some((step, self.capture.tensor(step, self.site)?));
        }
        Ok(self.loaded.as_ref().map(|(_, tensor)| tensor).expect("it was loaded a line above"))
    }

    /// Channels per head, where the stage has heads and this side stores them apart.
    fn head_dim(&self) -> Option<usize> {
        let (_, tensor) = self.loaded.as_ref()?;
        match (tensor.axes(), tensor.shape()) {
            (Axes::RowHeadChannel, &[_, _, head_dim]) if head_dim > 0 => Some(head_dim),
            _ => None,
        }
    }
}

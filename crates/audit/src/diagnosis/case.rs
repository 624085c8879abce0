//! One faulty stage, with everything that is known of it.
//!
//! The steps of a capture follow each other without a gap, so a case takes them for one sequence: its values have one row
//! for each position, whichever step computed it. What nobody captured is computed from what somebody did, by the ops of
//! the [twin](crate::twin). An alternative value is held against the captured one by the tests that the audit judges by.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use apr_capture::{Capture, Dims};
use apr_model::{
    AttentionInner, Axes, Backend, Config, Inner, KvShape, Model, MoeConfig, Site, Stage, Stage::*,
};
use apr_reference::Tensor as Plain;

use crate::{
    Error, Result, StageAudit,
    audit::Replayed,
    inputs,
    judge::{Compared, Place, Record, Sums},
    replay::{has_slots, head_width},
    routing::{Exchange, is_id},
    twin::{
        Triple, Twin, Weight,
        slack::{Choice, UNKNOWN},
    },
};

/// A capture as one sequence, and the model to compute its stages with.
pub(crate) struct Evidence<'a> {
    pub(crate) capture: &'a Capture,
    pub(crate) model: Model<Twin>,
    pub(crate) replayed: &'a Replayed,
    /// The first position of each step, and the end of the last.
    starts: Vec<usize>,
    tokens: Vec<u32>,
}

impl<'a> Evidence<'a> {
    pub(crate) fn new(capture: &'a Capture, model: Model<Twin>, replayed: &'a Replayed) -> Self {
        let mut starts = vec![0];
        for step in &replayed.steps {
            starts.push(starts[starts.len() - 1] + step.len());
        }
        Self { capture, model, replayed, starts, tokens: replayed.steps.concat() }
    }

    pub(crate) fn config(&self) -> &Config {
        self.model.config()
    }

    /// The token at `position`.
    pub(crate) fn token(&self, position: usize) -> u32 {
        self.tokens[position]
    }

    /// Positions in the sequence.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// The positions of each step.
    pub(crate) fn steps(&self) -> impl Iterator<Item = Range<usize>> {
        self.starts.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// The step that computed `position`.
    pub(crate) fn step_of(&self, position: usize) -> usize {
        self.starts.partition_point(|&start| start <= position) - 1
    }

    fn dims_of(&self, stage: Stage, rows: usize) -> Vec<usize> {
        Dims::from(self.config()).shape(stage, rows, self.len())
    }

    /// The positions of the rows of `site` that step `step` holds, if it holds it in the model's shape.
    fn positions(&self, step: usize, site: Site) -> Option<Vec<usize>> {
        let info = self.capture.info(step, site)?;
        let of_step = self.starts[step]..self.starts[step + 1];
        let rows = match info.positions() {
            Some(positions) => positions.to_vec(),
            None => (of_step.end.checked_sub(info.rows())?..of_step.end).collect(),
        };
        let shape = Dims::from(self.config()).shape(site.stage, rows.len(), of_step.end);
        (info.shape() == shape && rows.iter().all(|row| of_step.contains(row))).then_some(rows)
    }

    /// The positions of which the capture holds `site`.
    pub(crate) fn captured_rows(&self, site: Site) -> BTreeSet<usize> {
        (0..self.replayed.steps.len())
            .filter_map(|step| self.positions(step, site))
            .flatten()
            .collect()
    }

    /// The captured `columns` of `site` in the rows at `positions`; rows that were not captured are zeros.
    pub(crate) fn captured(
        &self,
        site: Site,
        positions: &[usize],
        columns: Option<&Range<usize>>,
    ) -> Result<Plain<f64>> {
        let mut shape = self.dims_of(site.stage, positions.len());
        let axis = site.stage.axes().row_axis();
        if let Some(columns) = columns {
            shape[axis + 1] = columns.len();
        }
        let mut value = Plain::zeros(shape);
        let pieces: usize = value.shape[..axis].iter().product();
        let width = value.data.len() / (pieces * positions.len()).max(1);
        let mut piece_of_row = Vec::new();
        for step in 0..self.replayed.steps.len() {
            let Some(rows) = self.positions(step, site) else { continue };
            let wanted: Vec<(usize, usize)> = positions
                .iter()
                .enumerate()
                .filter_map(|(to, p)| Some((to, rows.iter().position(|row| row == p)?)))
                .collect();
            if wanted.is_empty() {
                continue;
            }
            let tensor = self.capture.tensor(step, site)?;
            for (to, from) in wanted {
                for piece in 0..pieces {
                    piece_of_row.clear();
                    tensor.read_piece(piece, from, &mut piece_of_row);
                    let read = match columns {
                        Some(columns) => &piece_of_row[columns.clone()],
                        None => &piece_of_row[..],
                    };
                    // A step's scores reach to its own end.
                    let to = (piece * positions.len() + to) * width;
                    value.data[to..to + read.len()].copy_from_slice(read);
                }
            }
        }
        Ok(value)
    }
}

/// A faulty stage, and what it is computed from.
pub(crate) struct Case<'a> {
    pub(crate) evidence: &'a Evidence<'a>,
    pub(crate) site: Site,
    /// The positions of the rows of all values.
    pub(crate) rows: Vec<usize>,
    /// Which of the rows are judged.
    judged: Vec<bool>,
    is_all: bool,
    /// The first position whose row is wrong, whether or not it is among the rows of this case.
    pub(crate) first_wrong: Option<usize>,
    /// The columns of the stage that are looked at; `None` for all.
    pub(crate) columns: Option<Range<usize>>,
    /// What was captured.
    pub(crate) captured: Plain<f64>,
    /// What the declared arithmetic gives.
    pub(crate) expected: Triple,
    /// The experts of each row and slot, where rows have slots.
    chosen: Option<Triple>,
    /// What is chosen by, where the stage is a choice of experts.
    logits: Option<Triple>,
    /// How far the two are apart.
    pub(crate) record: Record,
    values: RefCell<BTreeMap<Site, Triple>>,
}

/// Why there is no case.
#[derive(Debug)]
pub(crate) enum NoCase {
    /// What the stage is computed from was not captured, nor anything near.
    Missing(Vec<Site>),
    Failed(Error),
}

impl From<Error> for NoCase {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<apr_model::Error> for NoCase {
    fn from(error: apr_model::Error) -> Self {
        Self::Failed(error.into())
    }
}

/// Which part of a stage a case looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All that can be afforded.
    All,
    /// The worst rows and some others, and of a very large product some columns around the worst.
    Sample,
}

impl<'a> Case<'a> {
    /// How many rows a sample has.
    const SAMPLE: usize = 12;
    /// Columns of a sample of a very large product.
    const SAMPLE_COLUMNS: usize = 1024;
    /// Multiplications that a whole case may take for one product.
    const AFFORDABLE: usize = 1 << 30;
    /// Multiplications for one row from which on a product is very large.
    const LARGE: usize = 1 << 24;
    /// How many stages may be computed because nobody captured them.
    const CHAIN: usize = 12;

    pub(crate) fn new(
        evidence: &'a Evidence<'a>,
        stage: &StageAudit,
        extent: Extent,
    ) -> Result<Self, NoCase> {
        let site = stage.site;
        let mut positions = evidence.known_rows(site).map_err(NoCase::Missing)?;
        if stage.span.len() > Self::CHAIN || positions.is_empty() {
            return Err(NoCase::Missing(stage.span.clone()));
        }
        let work = evidence.work(site);
        let whole = evidence.is_of_attention(site);
        let most = match extent {
            Extent::Sample => Self::SAMPLE,
            Extent::All => (Self::AFFORDABLE / work).max(Self::SAMPLE / 2),
        };
        let is_all_rows = positions.len() <= most;
        thin_out(&mut positions, stage, most);
        let columns = (extent == Extent::Sample && work > Self::LARGE && site.stage == LmHead)
            .then(|| around_worst(stage, Self::SAMPLE_COLUMNS));
        let rows: Vec<usize> = match whole {
            true => (0..evidence.len()).collect(),
            false => positions.iter().copied().collect(),
        };
        let judged = rows.iter().map(|row| positions.contains(row)).collect();
        let captured = evidence.captured(site, &rows, columns.as_ref())?;
        let nothing = Triple::known(Plain::zeros([0]));
        let mut case = Self {
            evidence,
            site,
            rows,
            judged,
            is_all: is_all_rows && columns.is_none(),
            first_wrong: stage.rows.iter().find(|row| row.beyond).map(|row| row.position),
            columns,
            captured,
            expected: nothing,
            chosen: None,
            logits: None,
            record: Record::default(),
            values: RefCell::default(),
        };
        if has_slots(site) {
            case.chosen = Some(case.value(Site { stage: MoeRouterIndices, ..site })?);
        }
        if site.stage.holds_ids() {
            case.logits = Some(case.value(Site { stage: MoeRouter, ..site })?);
        }
        case.expected = case.op(site, &|input| case.value(input))?;
        case.record = case.judge(&case.expected);
        Ok(case)
    }

    pub(crate) fn twin(&self) -> &Twin {
        self.evidence.model.backend()
    }

    pub(crate) fn config(&self) -> &'a Config {
        self.evidence.config()
    }

    /// How many times what it may be the test of `record` is that is furthest beyond.
    pub(crate) fn excess(&self, record: &Record) -> f64 {
        record.worst(self.evidence.replayed.bound).excess
    }

    /// Whether this is all there is of the stage, sample or not.
    pub(crate) fn is_all(&self) -> bool {
        self.is_all
    }

    /// Indices of the rows that are judged.
    pub(crate) fn judged(&self) -> impl Iterator<Item = usize> {
        self.judged.iter().enumerate().filter_map(|(row, &judged)| judged.then_some(row))
    }

    /// Whether the columns are keys.
    pub(crate) fn by_key(&self) -> bool {
        self.site.stage.axes() == Axes::HeadRowKey
    }

    /// What is looked at of row `row`: in one piece, or in one for each head of scores or for each expert. The columns of
    /// scores end with the step that computed them.
    pub(crate) fn pieces(&self, row: usize) -> impl Iterator<Item = Piece> {
        let axis = self.site.stage.axes().row_axis();
        let heads: usize = self.captured.shape[..axis].iter().product();
        let slots = self.slots();
        let width = self.captured.data.len() / (heads * slots * self.rows.len()).max(1);
        let by_key = self.by_key();
        let end = self.evidence.starts[self.evidence.step_of(self.rows[row]) + 1];
        let len = if by_key { end } else { width };
        let rows = self.rows.len();
        (0..heads * slots).map(move |piece| {
            // There are heads or slots, never both.
            let start = (piece / slots * rows + row) * slots * width + piece % slots * width;
            Piece {
                head: by_key.then_some(piece),
                expert: self.expert_of(row * slots + piece % slots),
                range: start..start + len,
            }
        })
    }

    /// How many experts a row has results of; 1 where the stage is not computed by experts.
    pub(crate) fn slots(&self) -> usize {
        self.chosen.as_ref().map_or(1, |ids| ids.emulated.cols())
    }

    /// The expert of slot `slot`, counted over all rows, if the stage is computed by experts.
    pub(crate) fn expert_of(&self, slot: usize) -> Option<usize> {
        self.chosen.as_ref().map(|ids| ids.emulated.data[slot] as usize)
    }

    /// Holds `alternative` against what was captured.
    pub(crate) fn judge(&self, alternative: &Triple) -> Record {
        let mut record = Record::default();
        let head_width = head_width(self.site, self.config());
        for row in self.judged() {
            let (position, mut sums) = (self.rows[row], Sums::default());
            let step = self.evidence.step_of(position);
            if let Some(logits) = &self.logits {
                let place = Place { step, position, ..Place::default() };
                let exchange = self.exchange(row, logits, alternative);
                sums = record.add(place, exchange.compared());
                record.rows.push((step, position, sums));
                continue;
            }
            for Piece { head, expert, range } in self.pieces(row) {
                let compared = Compared {
                    captured: &self.captured.data[range.clone()],
                    exact: &alternative.exact.data[range.clone()],
                    emulated: &alternative.emulated.data[range.clone()],
                    slack: alternative.slack.as_ref().map(|slack| &slack[range]),
                };
                let place = Place { step, position, head, head_width, expert };
                sums.merge(&record.add(place, compared));
            }
            record.rows.push((step, position, sums));
        }
        record
    }

    /// The captured ids of row `row` against those of `ids`.
    fn exchange(&self, row: usize, logits: &Triple, ids: &Triple) -> Exchange {
        let (k, experts) = (ids.emulated.cols(), logits.emulated.cols());
        let (slots, part) = (row * k..(row + 1) * k, row * experts..(row + 1) * experts);
        let before = logits.slack.as_ref().map(|slack| &slack[part.clone()]);
        let choice = Choice::new(&logits.emulated.data[part.clone()], before);
        let expected = &ids.emulated.data[slots.clone()];
        Exchange::of(&choice, &logits.exact.data[part], expected, &self.captured.data[slots])
    }

    /// The captured ids of `site`; in rows where one is of no expert, ours, about which nothing is certain.
    fn captured_ids(&self, site: Site) -> Result<Triple> {
        let captured = self.evidence.captured(site, &self.rows, None)?;
        let ours = self.op(site, &|input| self.value(input))?;
        let experts = self.experts(site).map_or(0, |moe| moe.num_experts);
        let (mut ids, k) = (captured, ours.emulated.cols());
        let mut slack = vec![0.0; ids.data.len()];
        let rows = ids.data.chunks_exact_mut(k).zip(slack.chunks_exact_mut(k));
        for ((ids, slack), ours) in rows.zip(ours.emulated.rows()) {
            if !ids.iter().all(|&id| is_id(id, experts)) {
                ids.copy_from_slice(ours);
                slack.fill(UNKNOWN);
            }
        }
        Ok(Triple::alternative(ids, slack))
    }

    /// The value of `site`: captured, or computed from what was.
    pub(crate) fn value(&self, site: Site) -> Result<Triple> {
        if let Some(value) = self.values.borrow().get(&site) {
            return Ok(value.clone());
        }
        let value = match self.evidence.holds(site) {
            true if site.stage.holds_ids() => self.captured_ids(site)?,
            true => Triple::known(self.evidence.captured(site, &self.rows, None)?),
            false => self.op(site, &|input| self.value(input))?,
        };
        self.values.borrow_mut().insert(site, value.clone());
        Ok(value)
    }

    /// The value of the case's stage if that of `target`, which it is computed from, were `alternative`.
    pub(crate) fn through(&self, target: Site, alternative: &Triple) -> Result<Triple> {
        fn of(case: &Case<'_>, site: Site, target: Site, put: &Triple) -> Result<Triple> {
            match site {
                site if site == target => Ok(put.clone()),
                site if site != case.site && case.evidence.holds(site) => case.value(site),
                site => case.op(site, &|input| of(case, input, target, put)),
            }
        }
        of(self, self.site, target, alternative)
    }

    /// The op of `site` on its inputs, in the rows of the case.
    pub(crate) fn op(&self, site: Site, input: &dyn Fn(Site) -> Result<Triple>) -> Result<Triple> {
        let (config, twin, model) = (self.config(), self.twin(), &self.evidence.model);
        let from = inputs(site, config);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let vector = || model.vector(site).expect("norms and biases have a vector");
        Ok(match site.stage {
            Embedding => {
                let tokens: Vec<u32> = self.rows.iter().map(|&p| self.evidence.tokens[p]).collect();
                twin.embed(model.weight(site).expect("models have a table"), &tokens)?
            }
            FfnOut if self.experts(site).is_some() => {
                twin.weighted_sum(&input(from[0])?, &input(from[1])?)?
            }
            QkvMatmul | AttnOut | FfnGate | FfnUp | FfnOut | MoeRouter | LmHead => {
                twin.linear(&input(from[0])?, &self.weight(site)?)?
            }
            MoeRouterIndices => {
                let k = self.experts(site).map_or(0, |moe| moe.num_experts_per_tok);
                twin.top_k(&input(from[0])?, k)?
            }
            MoeRouterWeights => {
                let normalize = self.experts(site).is_some_and(|moe| moe.norm_topk_prob);
                twin.route_weights(&input(from[0])?, &input(from[1])?, normalize)?
            }
            MoeExpertGate | MoeExpertUp | MoeExpertOut => {
                let experts = self.experts(site).map_or(0, |moe| moe.num_experts);
                let (x, ids) = (input(from[0])?, input(from[1])?);
                twin.expert_linear(&x, &self.weight(site)?, experts, &ids)?
            }
            QkvBias => {
                let x = input(from[0])?;
                // Leaves the slack of the product with the twin, in case that the engine fuses the two.
                self.op(from[0], input)?;
                twin.add_bias(x, vector())?
            }
            AttnNorm | FfnNorm | FinalNorm => {
                twin.rms_norm(&input(from[0])?, vector(), config.rms_norm_eps)?
            }
            QNorm | KNorm => {
                let x = self.heads_of(site.stage, &input(from[0])?)?;
                twin.rms_norm(&x, vector(), config.rms_norm_eps)?
            }
            QPostRope | KPostRope => {
                let x = self.heads_of(site.stage, &input(from[0])?)?;
                twin.rope(&x, &config.rope_frequencies().table(self.rows.iter().copied()))?
            }
            AttnScores => {
                let (q, k) = (input(from[0])?, input(from[1])?);
                let nothing = AttentionInner::default();
                let attended = self.attention(&q, &k, &k, self.scale(), nothing)?;
                attended.scores.expect("the twin spills")
            }
            AttnSoftmax => {
                let q = self.no_heads(heads);
                let kv = self.no_heads(kv_heads);
                let mut inner = AttentionInner::default();
                inner.scores.replace = Some(input(from[0])?);
                let attended = self.attention(&q, &kv, &kv, self.scale(), inner)?;
                attended.softmax.expect("the twin spills")
            }
            Attention => {
                let (q, k) = (self.no_heads(heads), self.no_heads(kv_heads));
                let v = self.values_of(&input(from[1])?)?;
                let mut inner = AttentionInner::default();
                inner.softmax.replace = Some(input(from[0])?);
                self.attention(&q, &k, &v, self.scale(), inner)?.out
            }
            PostAttnResidual | PostFfnResidual => twin.add(input(from[0])?, &input(from[1])?)?,
            FfnSilu | MoeExpertSilu => {
                let gate = input(from[0])?;
                let gated = twin.swiglu(gate.clone(), &gate, Inner::default())?;
                gated.silu.expect("the twin spills")
            }
            FfnSwigl | MoeExpertSwigl => {
                let (silu, up) = (input(from[0])?, input(from[1])?);
                // What the gate is does not matter once its SiLU is given.
                let inner = Inner { spill: false, replace: Some(silu.clone()) };
                twin.swiglu(silu, &up, inner)?.out
            }
        })
    }

    /// The experts of the layer of `site`.
    pub(crate) fn experts(&self, site: Site) -> Option<&'a MoeConfig> {
        self.config().experts_of(site.layer? as usize)
    }

    /// `1 / sqrt(head_dim)`.
    pub(crate) fn scale(&self) -> f64 {
        1.0 / (self.config().head_dim as f64).sqrt()
    }

    /// Attention of all rows over all rows.
    pub(crate) fn attention(
        &self,
        q: &Triple,
        k: &Triple,
        v: &Triple,
        scale: f64,
        inner: AttentionInner<Triple>,
    ) -> Result<apr_model::Attended<Triple>> {
        let [cached, heads, head_dim] = k.exact.shape[..] else { panic!("keys have heads") };
        let twin = self.twin();
        let mut kv = twin.kv(KvShape { heads, head_dim }, cached)?;
        twin.kv_append(&mut kv, k, v)?;
        Ok(twin.attention(q, &kv, scale, inner)?)
    }

    fn no_heads(&self, heads: usize) -> Triple {
        Triple::known(Plain::zeros([self.rows.len(), heads, self.config().head_dim]))
    }

    /// The part of `qkv` that a stage of queries or keys reads, or `qkv` where it already is that.
    pub(crate) fn heads_of(&self, stage: Stage, qkv: &Triple) -> Result<Triple> {
        let config = self.config();
        if qkv.exact.shape.len() == 3 {
            return Ok(qkv.clone());
        }
        let (start, heads) = match stage {
            QNorm | QPostRope => (0, config.num_attention_heads),
            _ => (config.q_dim(), config.num_key_value_heads),
        };
        Ok(self.twin().heads(qkv, start, heads, config.head_dim)?)
    }

    /// The values of `qkv`.
    pub(crate) fn values_of(&self, qkv: &Triple) -> Result<Triple> {
        let config = self.config();
        let (start, heads) = (config.q_dim() + config.kv_dim(), config.num_key_value_heads);
        Ok(self.twin().heads(qkv, start, heads, config.head_dim)?)
    }

    /// The matrix of `site`; of the case's own only the rows that it looks at.
    pub(crate) fn weight(&self, site: Site) -> Result<Weight> {
        let weight = self.evidence.model.weight(site).expect("products have a matrix");
        let mut parts = weight.parts.clone();
        if let Some(columns) = &self.columns
            && site == self.site
        {
            parts = vec![parts[0].slice_rows(columns.clone())];
        }
        Ok(self.twin().weight(&parts)?)
    }
}

/// A part of a row that is compared by itself.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    /// The head of scores.
    pub(crate) head: Option<usize>,
    /// The expert that computed it.
    pub(crate) expert: Option<usize>,
    /// The elements.
    pub(crate) range: Range<usize>,
}

impl Evidence<'_> {
    /// Multiplications for one row of `site`.
    fn work(&self, site: Site) -> usize {
        let elements = self.model.weight(site).map_or(1, Weight::elements);
        let experts = site.layer.and_then(|layer| self.config().experts_of(layer as usize));
        match experts {
            Some(moe) if has_slots(site) => {
                (elements / moe.num_experts * moe.num_experts_per_tok).max(1)
            }
            _ => elements,
        }
    }

    /// Whether any row of `site` was captured.
    pub(crate) fn holds(&self, site: Site) -> bool {
        (0..self.replayed.steps.len()).any(|step| self.positions(step, site).is_some())
    }

    /// Whether rows of `site` depend on other rows of what was captured before it.
    fn is_of_attention(&self, site: Site) -> bool {
        let attends = |site: Site| matches!(site.stage, AttnScores | AttnSoftmax | Attention);
        attends(site)
            || inputs(site, self.config())
                .into_iter()
                .any(|input| !self.holds(input) && self.is_of_attention(input))
    }

    /// The captured rows of `site` for which all that they are computed from is known; else the stages that are not.
    fn known_rows(&self, site: Site) -> Result<BTreeSet<usize>, Vec<Site>> {
        let mut rows = self.captured_rows(site);
        let mut open: Vec<(Site, bool)> = self.reads(site, false);
        let mut seen = BTreeSet::new();
        while let Some((input, all_rows)) = open.pop() {
            if !seen.insert((input, all_rows)) {
                continue;
            }
            if !self.holds(input) {
                open.extend(self.reads(input, all_rows));
                continue;
            }
            let captured = self.captured_rows(input);
            match all_rows {
                true if captured.len() < self.len() => return Err(vec![input]),
                true => {}
                false => rows = rows.intersection(&captured).copied().collect(),
            }
        }
        Ok(rows)
    }

    /// What `site` reads, and whether it reads all rows of it.
    fn reads(&self, site: Site, all_rows: bool) -> Vec<(Site, bool)> {
        let cached = |input: Site| match site.stage {
            AttnScores => input.stage == KPostRope,
            Attention => input.stage != AttnSoftmax,
            _ => false,
        };
        let from = inputs(site, self.config());
        from.into_iter().map(|input| (input, all_rows || cached(input))).collect()
    }
}

/// Leaves at most `most` rows: the worst ones, and others spread over the rest.
fn thin_out(positions: &mut BTreeSet<usize>, stage: &StageAudit, most: usize) {
    if positions.len() <= most {
        return;
    }
    let mut rows: Vec<_> =
        stage.rows.iter().filter(|row| positions.contains(&row.position)).collect();
    let badness = |errors: &crate::Errors| match errors.unexplained {
        // Rows of numbers that are none.
        e if e.is_finite() => e / errors.bound.max(f64::MIN_POSITIVE),
        _ => f64::INFINITY,
    };
    rows.sort_by(|a, b| badness(&b.errors).total_cmp(&badness(&a.errors)));
    let mut kept: BTreeSet<usize> = rows.iter().take(most / 2).map(|row| row.position).collect();
    let rest: Vec<usize> = positions.difference(&kept).copied().collect();
    let spread = most - kept.len();
    kept.extend((0..spread).map(|i| rest[i * (rest.len() - 1) / (spread - 1).max(1)]));
    *positions = kept;
}

/// Some columns around the worst.
fn around_worst(stage: &StageAudit, count: usize) -> Range<usize> {
    let worst = match stage.worst.group {
        crate::Group::Channel { channel } => channel,
        crate::Group::Element { column, .. } => column,
        _ => stage.channels.first().map_or(0, |channel| channel.channel),
    };
    let total = stage.channels_total;
    let start = worst.saturating_sub(count / 2).min(total.saturating_sub(count));
    start..(start + count).min(total)
}

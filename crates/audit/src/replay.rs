//! The forward pass again, stage by stage from what the engine itself had.
//!
//! The observer compares each captured value with what the [twin](crate::twin) makes of the same inputs and then puts the
//! captured one in its place, so that the next stage starts from what the engine's next stage started from. A
//! difference therefore belongs to the stage that shows it. One layer's values are in memory at a time; the logits, which
//! may be more than all of them, are judged some rows at a time when the pass has ended.

use std::{
    collections::{BTreeMap, BTreeSet},
    rc::Rc,
};

use apr_capture::{Capture, CaptureTensor};
use apr_model::{
    Axes, Backend, Config, HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site,
    Stage, Step, StepInput, TapSet, View,
};
use apr_reference::Tensor as Plain;

use crate::{
    Error, NotMeasured, Result,
    arithmetic::Declared,
    judge::{Compared, Place, Record, Sums},
    routing::{self, Exchange, Flip, Routing, is_id},
    twin::{
        Mailbox, Triple, Twin, Units,
        slack::{Choice, UNKNOWN},
    },
};

/// How a replay is going.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Values judged so far.
    pub done: usize,
    /// Values there are.
    pub total: usize,
}

/// A replay of a capture with a model's weights under an arithmetic.
pub(crate) struct Replay<'c> {
    capture: &'c Capture,
    config: Config,
    units: Units,
    mailbox: Rc<Mailbox>,
    step: usize,
    /// Rows of the step.
    rows: usize,
    taps: TapSet,
    /// Of these, the ones of which there is a captured value to judge.
    fitting: TapSet,
    /// The captured value of the site that is being looked at.
    loaded: Option<(Site, CaptureTensor)>,
    /// Layers from this one on are not replayed.
    layers: Option<usize>,
    /// What the head reads in this step, if its logits were captured.
    head: Option<Triple>,
    /// The experts of each row and slot, as the engine chose them in this layer.
    chosen: Option<Triple>,
    pub(crate) records: BTreeMap<Site, Record>,
    /// What is known of choices of experts beside their records.
    pub(crate) routing: BTreeMap<Site, Routing>,
    pub(crate) not_measured: BTreeMap<Site, String>,
    /// Stages of which the capture has some rows only.
    pub(crate) partial: BTreeSet<Site>,
    /// The stages whose emulated values are kept, and those values.
    keep: BTreeSet<Site>,
    pub(crate) kept: BTreeMap<(usize, Site), HostTensor>,
    progress: &'c mut dyn FnMut(Progress),
    done: usize,
    total: usize,
}

/// Ends a replay that was to look at some layers only.
#[derive(Debug, thiserror::Error)]
#[error("the layers asked for have been replayed")]
struct Enough;

impl<'c> Replay<'c> {
    /// Prepares to replay the steps of `capture` whose tokens are `steps`.
    pub(crate) fn new(
        capture: &'c Capture,
        model: &Model<Twin>,
        mailbox: Rc<Mailbox>,
        steps: &[Vec<u32>],
        progress: &'c mut dyn FnMut(Progress),
    ) -> Self {
        Self {
            capture,
            config: model.config().clone(),
            units: model.backend().units,
            mailbox,
            step: 0,
            rows: 0,
            taps: TapSet::none(),
            fitting: TapSet::none(),
            loaded: None,
            layers: None,
            head: None,
            chosen: None,
            records: BTreeMap::new(),
            routing: BTreeMap::new(),
            not_measured: BTreeMap::new(),
            partial: BTreeSet::new(),
            keep: BTreeSet::new(),
            kept: BTreeMap::new(),
            progress,
            done: 0,
            total: capture.sites().len() * steps.len(),
        }
    }

    /// Replays the first `layers` layers only.
    pub(crate) fn of_layers(self, layers: usize) -> Self {
        Self { layers: Some(layers), ..self }
    }

    /// Keeps the emulated values of these sites.
    pub(crate) fn keeping(self, keep: BTreeSet<Site>) -> Self {
        Self { keep, ..self }
    }

    /// What the capture holds, whether the model has it or not.
    pub(crate) fn captured_sites(&self) -> Vec<Site> {
        self.capture.sites()
    }

    /// Runs.
    pub(crate) fn run(self, model: &Model<Twin>, steps: &[Vec<u32>]) -> Result<Self> {
        let mut replay = self;
        let positions = steps.iter().map(Vec::len).sum();
        let mut cache = model.cache(positions)?;
        for (index, tokens) in steps.iter().enumerate() {
            (replay.step, replay.rows) = (index, tokens.len());
            let first = cache.len();
            let logits = replay.choose_taps(model, first, tokens.len());
            let phase = match tokens.len() {
                1 if index > 0 => Phase::Decode,
                _ => Phase::Prefill,
            };
            let input = StepInput { tokens, phase, chunk: 0, logits: LogitRows::None };
            match model.step(input, &mut cache, &mut replay) {
                Err(apr_model::Error::Observer { source, .. }) if source.is::<Enough>() => break,
                other => other?,
            };
            if logits {
                replay.logits(model, first)?;
            }
        }
        Ok(replay)
    }

    /// Judges the logits of a step whose first position is `first`.
    fn logits(&mut self, model: &Model<Twin>, first: usize) -> Result<()> {
        const ROWS: usize = 32;
        let site = Site::whole(Stage::LmHead);
        let (head, weight) = (self.head.take(), model.weight(site));
        let (head, weight) = head.zip(weight).expect("a model has a head, and its norm was tapped");
        let (captured, rows) = self.load(site, &(first..first + head.exact.shape[0]))?;
        for rows in rows.chunk_by(|a, b| b.1 == a.1 + 1).flat_map(|run| run.chunks(ROWS)) {
            let (start, end) = (rows[0].1, rows[rows.len() - 1].1 + 1);
            let x = model.backend().rows(&head, start..end)?;
            let logits = model.backend().linear(&x, weight)?;
            let rows: Vec<_> = rows.iter().map(|&(from, row)| (from, row - start)).collect();
            self.judge(site, first + start, &logits, &captured, &rows);
        }
        self.advance();
        Ok(())
    }

    /// Judges rows of `captured` by those of `shown`, the first of which is at position `first`.
    fn judge(
        &mut self,
        site: Site,
        first: usize,
        shown: &Triple,
        captured: &CaptureTensor,
        rows: &[(usize, usize)],
    ) {
        self.keep(site, shown);
        let record = self.records.entry(site).or_default();
        let parts = Parts {
            head_width: head_width(site, &self.config),
            experts: self.chosen.as_ref().filter(|_| has_slots(site)).map(|ids| &*ids.emulated),
        };
        compare(record, self.step, first, shown, captured, rows, parts);
    }

    /// Keeps the emulated value of `site`, if it is one of those to be kept.
    fn keep(&mut self, site: Site, shown: &Triple) {
        if !self.keep.contains(&site) {
            return;
        }
        let Plain { shape, data } = Plain::clone(&shown.emulated);
        let kept = self.kept.entry((self.step, site)).or_insert_with(|| {
            let shape = [&[0], &shape[1..]].concat();
            HostTensor { shape, values: Vec::new() }
        });
        kept.shape[0] += shape[0];
        kept.values.extend(data);
    }

    /// Judges the captured choice of experts, the first row being at position `first`, and goes on with it: with ours
    /// where an id is of no expert, which nothing can be computed with.
    fn judge_choice(
        &mut self,
        site: Site,
        first: usize,
        shown: &Triple,
        captured: &CaptureTensor,
        rows: &[(usize, usize)],
    ) -> Triple {
        self.keep(site, shown);
        let logits = self.mailbox.logits.take().expect("the twin posts what it chooses by");
        let (k, experts) = (shown.emulated.cols(), logits.emulated.cols());
        let record = self.records.entry(site).or_default();
        let routing = self.routing.entry(site).or_default();
        (routing.experts, routing.per_row) = (experts, k);
        let mut ids = Plain::clone(&shown.emulated);
        let mut slack = shown.slack.as_ref().map_or(vec![0.0; ids.data.len()], |s| s.to_vec());
        let mut found = Vec::with_capacity(k);
        for &(from, row) in rows {
            found.clear();
            captured.read_piece(0, from, &mut found);
            let part = row * experts..(row + 1) * experts;
            let before = logits.slack.as_ref().map(|slack| &slack[part.clone()]);
            let choice = Choice::new(&logits.emulated.data[part.clone()], before);
            let slots = row * k..(row + 1) * k;
            let expected = &shown.emulated.data[slots.clone()];
            let exchange = Exchange::of(&choice, &logits.exact.data[part], expected, &found);
            let position = first + row;
            let place = Place { step: self.step, position, ..Place::default() };
            let sums = record.add(place, exchange.compared());
            record.rows.push((self.step, position, sums));
            let flip = exchange.flip.map(|(margin, slack)| Flip {
                step: self.step,
                position,
                expected: expected.iter().map(|&id| id as usize).collect(),
                captured: found.clone(),
                margin,
                slack,
                explained: false,
            });
            routing.add(flip, routing::near_tie(&choice, k, self.step, position));
            match found.iter().all(|&id| is_id(id, experts)) {
                true => {
                    ids.data[slots.clone()].copy_from_slice(&found);
                    slack[slots].fill(0.0);
                }
                false => slack[slots].fill(UNKNOWN),
            }
        }
        Triple::alternative(ids, slack)
    }

    fn advance(&mut self) {
        self.done += 1;
        (self.progress)(Progress { done: self.done, total: self.total });
    }

    /// Chooses the sites to look at in the coming step, and says whether there are logits to be judged after it.
    fn choose_taps(&mut self, model: &Model<Twin>, first: usize, n: usize) -> bool {
        let mut logits = false;
        self.fitting = TapSet::none();
        self.taps = TapSet::none();
        for site in model.plan().sites().iter().copied() {
            if let (Some(limit), Some(layer)) = (self.layers, site.layer)
                && layer as usize >= limit
            {
                self.taps.insert(site);
                break;
            }
            let Some(info) = self.capture.info(self.step, site) else { continue };
            let rows = match info.positions() {
                Some(positions) => positions.to_vec(),
                None => (first + n - info.rows().min(n)..first + n).collect(),
            };
            let dims = apr_capture::Dims::from(&self.config);
            let expected = dims.shape(site.stage, rows.len(), first + n);
            let within = rows.iter().all(|position| (first..first + n).contains(position));
            let in_order = rows.is_sorted_by(|a, b| a < b);
            if info.shape() != expected || !within || !in_order || rows.is_empty() {
                let (found, step) = (info.shape(), self.step);
                let why = match (within, in_order) {
                    (false, _) => format!("its rows in step {step} are not of that step's tokens"),
                    (_, false) => format!("its rows in step {step} are not in order"),
                    _ => format!("its shape in step {step} is {found:?}, the model's {expected:?}"),
                };
                self.not_measured.insert(site, why);
                continue;
            }
            if site.stage == Stage::LmHead {
                logits = true;
                self.taps.insert(Site::whole(Stage::FinalNorm));
                continue;
            }
            if rows.len() < n {
                self.partial.insert(site);
            }
            self.fitting.insert(site);
            self.taps.insert(site);
        }
        // Whose results the experts' are is to be known, whether that was captured or not.
        for &site in model.plan().sites().iter().filter(|site| site.stage.holds_ids()) {
            if self.layers.is_none_or(|limit| site.layer < Some(limit as u32)) {
                self.taps.insert(site);
            }
        }
        logits
    }

    /// The captured value of `site`, and of each of its rows the index there and in the step.
    fn load(&mut self, site: Site, step: &Range) -> Result<(CaptureTensor, Vec<(usize, usize)>)> {
        let tensor = match self.loaded.take() {
            Some((loaded, tensor)) if loaded == site => tensor,
            _ => self.capture.tensor(self.step, site)?,
        };
        let row = |from: usize| match tensor.positions() {
            Some(positions) => positions[from] - step.start,
            None => step.len() - tensor.rows() + from,
        };
        let rows = (0..tensor.rows()).map(|from| (from, row(from))).collect();
        Ok((tensor, rows))
    }
}

type Range = std::ops::Range<usize>;

impl Observer for Replay<'_> {
    fn wanted(&self) -> TapSet {
        self.taps.clone()
    }

    fn value(&mut self, step: &Step<'_>, site: Site, _: View<'_>) -> Result<(), ObserverError> {
        if let (Some(limit), Some(layer)) = (self.layers, site.layer)
            && layer as usize >= limit
        {
            return Err(Enough.into());
        }
        let shown = self.mailbox.shown.borrow_mut().take();
        let shown = shown.expect("the twin posts what it shows");
        if !self.fitting.contains(site) {
            let kept = if site.stage.holds_ids() { &mut self.chosen } else { &mut self.head };
            *kept = Some(shown);
            return Ok(());
        }
        let positions = step.positions(site);
        let (captured, rows) = self.load(site, &positions)?;
        if site.stage.holds_ids() {
            let chosen = self.judge_choice(site, positions.start, &shown, &captured, &rows);
            *self.mailbox.incoming.borrow_mut() = Some(chosen.clone());
            self.chosen = Some(chosen);
            self.advance();
            return Ok(());
        }
        self.judge(site, positions.start, &shown, &captured, &rows);
        if !is_inner(site) {
            let merged = merged(&shown, &captured, &rows, &self.units);
            if site.stage == Stage::FinalNorm {
                let known = || Triple::captured(Plain::from(host(&captured)), &self.units);
                self.head = Some(merged.clone().unwrap_or_else(known));
            }
            *self.mailbox.incoming.borrow_mut() = merged;
            self.loaded = Some((site, captured));
        }
        self.advance();
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        if !self.fitting.contains(site) {
            return Ok(None);
        }
        if let Some(Triple { emulated, .. }) = &*self.mailbox.incoming.borrow() {
            // What is uploaded is the value in the mailbox.
            let Plain { shape, data } = Plain::clone(emulated);
            return Ok(Some(HostTensor { shape, values: data }));
        }
        let tensor = match self.loaded.take() {
            Some((loaded, tensor)) if loaded == site => tensor,
            _ => self.capture.tensor(self.step, site)?,
        };
        if tensor.rows() < self.rows {
            // Inside of a fused op: there is nothing yet that the captured rows could be merged with.
            return Ok(None);
        }
        let value = host(&tensor);
        if is_inner(site) {
            // It is shown after the op has run.
            self.loaded = Some((site, tensor));
        }
        Ok(Some(value))
    }
}

fn host(tensor: &CaptureTensor) -> HostTensor {
    HostTensor { shape: tensor.shape().to_vec(), values: tensor.to_f64() }
}

/// Whether a fused op computes `site` on the way, so that its replacement is asked for before it is shown.
pub(crate) fn is_inner(site: Site) -> bool {
    use Stage::*;
    matches!(site.stage, AttnScores | AttnSoftmax | FfnSilu | MoeExpertSilu)
}

/// `shown` with the captured rows in their place, where not all are captured.
fn merged(
    shown: &Triple,
    captured: &CaptureTensor,
    rows: &[(usize, usize)],
    units: &Units,
) -> Option<Triple> {
    let all = shown.emulated.shape[0];
    if rows.len() == all {
        return None;
    }
    let (mut exact, mut emulated) = (Plain::clone(&shown.exact), Plain::clone(&shown.emulated));
    let mut slack = shown.slack.as_ref().map_or(vec![0.0; exact.data.len()], |s| s.to_vec());
    let width = exact.data.len() / all;
    let values = Plain { shape: captured.shape().to_vec(), data: captured.to_f64() };
    let known = units.known(&values).unwrap_or_else(|| vec![0.0; values.data.len()]);
    for &(from, row) in rows {
        let values = &values.data[from * width..][..width];
        exact.data[row * width..][..width].copy_from_slice(values);
        emulated.data[row * width..][..width].copy_from_slice(values);
        slack[row * width..][..width].copy_from_slice(&known[from * width..][..width]);
    }
    Some(Triple::new(exact, emulated, slack))
}

/// The channels of a head, in stages whose channels are those of heads.
pub(crate) fn head_width(site: Site, config: &Config) -> Option<usize> {
    match site.stage {
        Stage::QkvMatmul | Stage::QkvBias | Stage::Attention => Some(config.head_dim),
        stage if stage.axes() == Axes::RowHeadChannel => Some(config.head_dim),
        _ => None,
    }
}

/// Whether rows of `site` have a part for each of their experts.
pub(crate) fn has_slots(site: Site) -> bool {
    site.stage.axes() == Axes::RowSlotChannel
}

/// What the channels of a row belong to.
#[derive(Clone, Copy, Debug)]
struct Parts<'a> {
    head_width: Option<usize>,
    /// The expert of each row and slot, where rows have slots.
    experts: Option<&'a Plain<f64>>,
}

/// Compares the captured rows of a step, the first position of which is `first`.
fn compare(
    record: &mut Record,
    step: usize,
    first: usize,
    shown: &Triple,
    captured: &CaptureTensor,
    rows: &[(usize, usize)],
    Parts { head_width, experts }: Parts<'_>,
) {
    let slots = experts.map_or(1, Plain::cols);
    let pieces = captured.pieces();
    let len = captured.piece_len();
    let all_rows = shown.emulated.data.len() / (pieces * len);
    let by_key = captured.axes() == Axes::HeadRowKey;
    let mut values = Vec::with_capacity(len);
    for &(from, row) in rows {
        let mut sums = Sums::default();
        for piece in 0..pieces {
            values.clear();
            captured.read_piece(piece, from, &mut values);
            let start = (piece * all_rows + row) * len;
            for (slot, values) in values.chunks_exact(len / slots).enumerate() {
                let part = start + slot * values.len()..start + (slot + 1) * values.len();
                let compared = Compared {
                    captured: values,
                    exact: &shown.exact.data[part.clone()],
                    emulated: &shown.emulated.data[part.clone()],
                    slack: shown.slack.as_ref().map(|slack| &slack[part]),
                };
                let expert = experts.map(|ids| ids.data[row * slots + slot] as usize);
                let head = by_key.then_some(piece);
                let place = Place { step, position: first + row, head, head_width, expert };
                sums.merge(&record.add(place, compared));
            }
        }
        record.rows.push((step, first + row, sums));
    }
}

/// The tokens of each step of `capture`, or why it cannot be replayed.
pub(crate) fn steps(capture: &Capture) -> std::result::Result<Vec<Vec<u32>>, NotMeasured> {
    let mut next = 0;
    let mut steps = Vec::new();
    for (index, step) in capture.steps().iter().enumerate() {
        let Some(tokens) = &step.token_ids else {
            return Err(NotMeasured::all(format!(
                "step {index} does not say its tokens, so it cannot be replayed; give them with --tokens or --prompt"
            )));
        };
        if step.slot != 0 {
            return Err(NotMeasured::all(format!(
                "step {index} is of sequence {} of a batch; capture one sequence at a time",
                step.slot
            )));
        }
        let positions = step.positions.clone().unwrap_or((next..next + tokens.len()).collect());
        if !positions.iter().copied().eq(next..next + tokens.len()) {
            return Err(NotMeasured::all(format!(
                "the tokens of step {index} do not follow those before: its positions begin at {:?} where {next} \
                 is next; capture the sequence from its first token on",
                positions.first()
            )));
        }
        next += tokens.len();
        steps.push(tokens.clone());
    }
    if next == 0 {
        return Err(NotMeasured::all("it holds no steps".to_owned()));
    }
    Ok(steps)
}

/// A model of these weights for replays under `declared`.
pub(crate) fn load(
    checkpoint: &apr_format::Checkpoint,
    declared: &Declared,
) -> Result<(Model<Twin>, Rc<Mailbox>)> {
    let mailbox = Rc::new(Mailbox::default());
    let twin = Twin::new(declared.arithmetic.clone(), declared.units, mailbox.clone());
    Ok((Model::load(twin, checkpoint).map_err(Error::Model)?, mailbox))
}

//! What the value of any stage may look like, whatever made it so.

use std::collections::BTreeSet;

use apr_model::{Config, Site, Stage, Stage::*};
use apr_reference::Tensor as Plain;
use half::f16;

use super::{Hypothesis, general};
use crate::{
    diagnosis::{
        case::Piece,
        geometry,
        suspect::{Answer, Guess, Suspect, slack_of},
    },
    twin::Triple,
};

const ANY: &[Stage] = &[
    Embedding,
    AttnNorm,
    QkvMatmul,
    QkvBias,
    QNorm,
    KNorm,
    QPostRope,
    KPostRope,
    AttnScores,
    AttnSoftmax,
    Attention,
    AttnOut,
    PostAttnResidual,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnSilu,
    FfnSwigl,
    MoeRouter,
    MoeRouterWeights,
    MoeExpertGate,
    MoeExpertUp,
    MoeExpertSilu,
    MoeExpertSwigl,
    MoeExpertOut,
    FfnOut,
    PostFfnResidual,
    FinalNorm,
    LmHead,
];

pub(super) const TABLE: &[Hypothesis] = &[
    general("f16-overflow", ANY, overflow),
    general("nan-origin", ANY, not_finite),
    general("all-zeros", ANY, zeros),
    general("last-row-only-repeated", ANY, last_row),
    general("rows-of-another-token", ANY, other_rows),
    general("stale-accumulator", ANY, stale_accumulator),
    general("equals-another-stage", ANY, same_as),
    general("value-of-other-layer", ANY, of_other_layer),
    general("clipped", ANY, clipped),
    general("channels-exchanged", ANY, exchanged),
    general("constant-factor", ANY, constant_factor),
    general("constant-offset", ANY, constant_offset),
];

/// The elements of the rows that are judged.
pub(super) fn judged_elements(suspect: &Suspect<'_>) -> impl Iterator<Item = usize> {
    let rows: BTreeSet<usize> = suspect.case.judged().collect();
    (0..suspect.expected.emulated.data.len()).filter(move |&i| rows.contains(&suspect.row_of(i)))
}

/// The factor from what is expected to what was captured, over the elements `at`, each as certain as its slack.
pub(super) fn factor(
    suspect: &Suspect<'_>,
    captured: &Plain<f64>,
    at: impl IntoIterator<Item = usize>,
) -> f64 {
    let (expected, slack) = (&suspect.expected.emulated.data, slack_of(&suspect.expected));
    let (mut product, mut square) = (0.0, 0.0);
    for i in at {
        let (e, c) = (expected[i], captured.data[i]);
        if e.is_finite() && c.is_finite() && slack[i] > 0.0 {
            let weight = f64::from(slack[i]).powi(-2);
            product += weight * e * c;
            square += weight * e * e;
        }
    }
    if square > 0.0 { product / square } else { 1.0 }
}

/// A factor in words: which constant of the model it is, if it is one.
pub(super) fn constant(factor: f64, config: &Config) -> String {
    match known(factor, config) {
        Some((x, form)) => format!("{x:.6} = {form}"),
        None => format!("{:.6}", super::rounded(factor, 1e-6)),
    }
}

/// The constant of the model that is nearly `factor`, and what it is.
pub(super) fn known(factor: f64, config: &Config) -> Option<(f64, String)> {
    let known: [(&str, f64); 12] = [
        ("2", 2.0),
        ("1/2", 0.5),
        ("head_dim", config.head_dim as f64),
        ("hidden_size", config.hidden_size as f64),
        ("the number of heads", config.num_attention_heads as f64),
        (
            "heads per key head",
            config.num_attention_heads as f64 / config.num_key_value_heads as f64,
        ),
        ("intermediate_size", config.intermediate_size as f64),
        ("ln 2", std::f64::consts::LN_2),
        ("log2 e", std::f64::consts::LOG2_E),
        ("the number of layers", config.num_hidden_layers as f64),
        ("twice the number of layers", 2.0 * config.num_hidden_layers as f64),
        ("1", 1.0),
    ];
    let is = |x: f64| (factor - x).abs() <= 1e-5 * x.abs();
    let forms = known.into_iter().flat_map(|(name, x)| {
        [
            (x, name.to_owned()),
            (1.0 / x, format!("1/{name}")),
            (x.sqrt(), format!("sqrt({name})")),
            (1.0 / x.sqrt(), format!("1/sqrt({name})")),
        ]
    });
    forms.into_iter().find(|(x, _)| is(*x))
}

fn own<'c>(suspect: &Suspect<'c>) -> Option<&'c Plain<f64>> {
    suspect.captured()
}

/// What does not fit into half precision is infinite, or the largest number there is.
fn overflow(suspect: &Suspect<'_>) -> Answer {
    let largest = f16::MAX.to_f64();
    let Some(captured) = own(suspect) else { return Ok(None) };
    let expected = &suspect.expected.emulated.data;
    let beyond = |x: &f64| x.abs() > largest;
    let before_scaling = suspect.case.scale();
    let scores = suspect.site.stage == AttnScores;
    let is_there = expected.iter().any(|x| beyond(x) || (scores && beyond(&(x / before_scaling))));
    if !is_there
        || captured.data.iter().all(|x| x.is_finite() && x.abs() < largest * before_scaling)
    {
        return Ok(None);
    }
    let limits = [largest, largest * before_scaling];
    let mut guesses = Vec::new();
    for limit in limits.into_iter().take(if scores { 2 } else { 1 }) {
        for (to, words) in [(f64::INFINITY, "becomes infinite"), (limit, "becomes that")] {
            let value = suspect.elementwise(|_, x| match x.abs() > limit {
                true => (to.copysign(x), 0.0),
                false => (x, 1.0),
            });
            let sentence =
                format!("what is beyond {limit}, the largest half-precision number, {words}");
            guesses.push(Ok(Guess::new(value, sentence)));
        }
    }
    suspect.best(guesses)
}

/// Elements that are not finite, though what they are computed from is.
fn not_finite(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let expected = &suspect.expected.emulated.data;
    let is_new = |i: &usize| !captured.data[*i].is_finite() && expected[*i].is_finite();
    let new: Vec<usize> = judged_elements(suspect).filter(is_new).collect();
    let Some(&first) = new.first() else { return Ok(None) };
    let value = suspect.elementwise(|i, x| match captured.data[i].is_finite() {
        true => (x, 1.0),
        false => (captured.data[i], 0.0),
    });
    let (row, column) = (suspect.row_of(first), first % suspect.row_width());
    let what = if captured.data[first].is_nan() { "NaN" } else { "infinite" };
    let position = suspect.case.rows[row];
    let others = match new.len() - 1 {
        0 => String::new(),
        n => format!(", and {n} more"),
    };
    let sentence = format!(
        "channel {column} of position {position} is {what}{others}, though everything it is computed from is finite"
    );
    Ok(Some(Guess::new(value, sentence).with("elements", new.len() as f64)))
}

/// Zeros: everywhere, or in some rows, heads or channels.
fn zeros(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let value = suspect.elementwise(|i, x| match captured.data[i] {
        0.0 => (0.0, 0.0),
        _ => (x, 1.0),
    });
    let geometry = geometry::Geometry::of(suspect.case);
    let sentence = match captured.data.iter().all(|&x| x == 0.0) {
        true => "all values are zeros".to_owned(),
        false => format!("some values are zeros: {geometry}"),
    };
    Ok(Some(Guess::new(value, sentence)))
}

/// The last row in the place of all, or the last of each step in the place of all of the step's.
fn last_row(suspect: &Suspect<'_>) -> Answer {
    let Some(last) = suspect.case.judged().last().filter(|_| suspect.case.record.rows.len() > 1)
    else {
        return Ok(None);
    };
    let rows = &suspect.case.rows;
    let step_of = |row: usize| suspect.case.evidence.step_of(rows[row]);
    let last_of_step = |row: usize| {
        (row..rows.len()).take_while(|&later| step_of(later) == step_of(row)).last().unwrap_or(row)
    };
    suspect.best([
        Ok(Guess::new(suspect.rows_from(|_| last), "every row is the last row")),
        Ok(Guess::new(suspect.rows_from(last_of_step), "every row is the last row of its step")),
    ])
}

/// Each row is the one that it is nearest to.
fn other_rows(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let expected = &suspect.expected.emulated.data;
    let judged: Vec<usize> = suspect.case.judged().collect();
    let rows = suspect.case.rows.len();
    let distance = |row: usize, from: usize| -> f64 {
        let pieces = suspect.case.pieces(row).zip(suspect.case.pieces(from));
        let one = |(to, from): (Piece, Piece)| -> f64 {
            let pair = captured.data[to.range].iter().zip(&expected[from.range.start..]);
            pair.map(|(c, e)| (c - e).powi(2)).sum()
        };
        pieces.map(one).sum()
    };
    let mut source: Vec<usize> = (0..rows).collect();
    for &row in &judged {
        let own = distance(row, row);
        let nearest = judged
            .iter()
            .map(|&from| (distance(row, from), from))
            .min_by(|a, b| a.0.total_cmp(&b.0));
        if let Some((_, from)) = nearest.filter(|(found, _)| *found < own) {
            source[row] = from;
        }
    }
    let moved: Vec<usize> = judged.iter().copied().filter(|&row| source[row] != row).collect();
    let Some(&first) = moved.first() else { return Ok(None) };
    let positions = &suspect.case.rows;
    let by = |row: usize| positions[source[row]] as i64 - positions[row] as i64;
    let sentence = match moved.iter().all(|&row| by(row) == by(first)) {
        true if moved.len() > 1 => {
            format!("{} rows are those {:+} from them", moved.len(), by(first))
        }
        _ => {
            let some = moved
                .iter()
                .take(4)
                .map(|&row| format!("{} is that of {}", positions[row], positions[source[row]]));
            format!("the row of position {}", some.collect::<Vec<_>>().join(", "))
        }
    };
    let value = suspect.rows_from(|row| source[row]);
    Ok(Some(Guess::new(value, sentence).with("rows", moved.len() as f64)))
}

/// Each row is added to the one before it, as it is or as it was captured.
fn stale_accumulator(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let width = suspect.row_width();
    let evidence = suspect.case.evidence;
    let rows = &suspect.case.rows;
    if suspect.case.by_key() || rows.len() < 2 {
        return Ok(None);
    }
    let expected = &suspect.expected.emulated.data;
    let with = |before: &[f64], words: &str| {
        let value = suspect.elementwise(|i, x| {
            let row = suspect.row_of(i);
            let follows = row > 0
                && rows[row] == rows[row - 1] + 1
                && evidence.step_of(rows[row]) == evidence.step_of(rows[row - 1]);
            if follows { (x + before[i - width], 2.0) } else { (x, 1.0) }
        });
        let (value, parts) = suspect.in_parts(&value)?;
        let sentence = super::of_part(&parts, &format!("each row is added to {words} before it"));
        Ok(Guess::new(value, sentence))
    };
    suspect.best([with(expected, "the row"), with(&captured.data, "the sum of the rows")])
}

/// The captured value of this stage in another layer; or what it computes there, if what it computes here was captured
/// there: from what was captured of that layer, or, if all of the two is exchanged, from what was captured of this one.
fn of_other_layer(suspect: &Suspect<'_>) -> Answer {
    let (Some(own), Some(captured)) = (suspect.site.layer, own(suspect)) else { return Ok(None) };
    let (case, evidence) = (suspect.case, suspect.case.evidence);
    let slack = slack_of(&suspect.expected);
    let mut guesses = Vec::new();
    for other in (0..suspect.config().num_hidden_layers as u32).filter(|&other| other != own) {
        let site = Site { layer: Some(other), ..suspect.site };
        if !evidence.holds(site) {
            continue;
        }
        let there = evidence.captured(site, &case.rows, case.columns.as_ref())?;
        let guess = |value: Triple, sentence: String| {
            Guess::new(value, sentence).with("layer", f64::from(other))
        };
        let sentence = format!("the value is that of {site}");
        if resembles(&there.data, &captured.data) {
            let copy = Plain { shape: captured.shape.clone(), data: there.data };
            guesses.push(Ok(guess(Triple::alternative(copy, slack.to_vec()), sentence)));
            continue;
        }
        if !resembles(&there.data, &suspect.expected.emulated.data) {
            continue;
        }
        let renamed = |site: Site| match site.layer {
            Some(layer) if layer == own => Site { layer: Some(other), ..site },
            Some(layer) if layer == other => Site { layer: Some(own), ..site },
            _ => site,
        };
        let inputs = crate::inputs(site, suspect.config());
        if inputs.iter().all(|&input| evidence.holds(input)) {
            let value = case.op(site, &|input| case.value(input))?;
            guesses.push(Ok(guess(value, sentence)));
        }
        if inputs.iter().all(|&input| evidence.holds(renamed(input))) {
            let value = case.op(site, &|input| case.value(renamed(input)))?;
            let sentence = format!("layers {own} and {other} are captured under each other's name");
            guesses.push(Ok(guess(value, sentence)));
        }
    }
    suspect.best(guesses)
}

/// Whether `copy` may be `x`, rounded to 8 bits at worst: most of other values are further off, however small they are.
fn resembles(copy: &[f64], x: &[f64]) -> bool {
    let unlike = |(a, b): &(&f64, &f64)| (*a - *b).abs() > b.abs() / 64.0;
    copy.len() == x.len() && copy.iter().zip(x).filter(unlike).count() <= x.len() / 2
}

/// The captured value of another stage.
fn same_as(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let evidence = suspect.case.evidence;
    let plan = evidence.model.plan();
    let candidates: Vec<Site> = plan
        .sites()
        .iter()
        .copied()
        .filter(|&site| {
            let dims = apr_capture::Dims::from(suspect.config());
            let elements = |site: Site| dims.shape(site.stage, 1, 1).iter().product::<usize>();
            site.stage != suspect.site.stage
                && site.layer.is_none_or(|layer| Some(layer) == suspect.site.layer)
                && site.stage.axes().row_axis() == suspect.site.stage.axes().row_axis()
                && elements(site) == elements(suspect.site)
                && evidence.holds(site)
        })
        .collect();
    let slack = slack_of(&suspect.expected);
    let mut guesses = Vec::new();
    for site in candidates {
        let other = evidence.captured(site, &suspect.case.rows, suspect.case.columns.as_ref())?;
        if !resembles(&other.data, &captured.data) {
            continue;
        }
        let value = Plain { shape: captured.shape.clone(), data: other.data };
        let value = Triple::alternative(value, slack.to_vec());
        guesses.push(Ok(Guess::new(value, format!("the value is that of {site}"))));
    }
    suspect.best(guesses)
}

/// Nothing is beyond a limit, which some values are at; or not beyond one of each step.
fn clipped(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let most = captured.data.iter().fold(f64::NEG_INFINITY, |most, &x| most.max(x));
    let least = captured.data.iter().fold(f64::INFINITY, |least, &x| least.min(x));
    let limit = most.max(-least);
    if !limit.is_finite() || limit <= 0.0 {
        return Ok(None);
    }
    // What cannot be told from nothing is not clipped.
    if suspect.excess(&suspect.elementwise(|_, _| (0.0, 1.0)))? <= 1.0 {
        return Ok(None);
    }
    let within = |low: f64, high: f64, words: String| {
        let value = suspect.elementwise(|_, x| (x.clamp(low, high), 1.0));
        Ok(Guess::new(value, words).with("limit", limit))
    };
    let mut guesses = vec![within(-limit, limit, format!("values are clipped at {limit}"))];
    guesses.push(within(
        f64::NEG_INFINITY,
        most,
        format!("values are clipped at {most} from above"),
    ));
    guesses.push(within(least, f64::INFINITY, format!("values are clipped at {least} from below")));
    let evidence = suspect.case.evidence;
    let step_of = |i: usize| evidence.step_of(suspect.case.rows[suspect.row_of(i)]);
    let mut limits = vec![0.0f64; evidence.steps().count()];
    for i in judged_elements(suspect) {
        let limit = &mut limits[step_of(i)];
        *limit = limit.max(captured.data[i].abs());
    }
    let value = suspect.elementwise(|i, x| {
        let limit = limits[step_of(i)];
        (x.clamp(-limit, limit), 1.0)
    });
    let shown: Vec<String> = limits.iter().take(4).map(|limit| format!("{limit}")).collect();
    let sentence = format!("values are clipped at a limit of each step: {}", shown.join(", "));
    guesses.push(Ok(Guess::new(value, sentence)));
    suspect.best(guesses)
}

/// Wrong channels hold what others should.
fn exchanged(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    /// Channels that are looked for elsewhere.
    const MOST: usize = 4096;
    let wrong = geometry::wrong_channels(suspect.case);
    if suspect.case.by_key() || suspect.case.slots() > 1 || wrong.is_empty() || wrong.len() > MOST {
        return Ok(None);
    }
    let width = suspect.row_width();
    let rows: Vec<usize> = suspect.case.judged().collect();
    let (expected, slack) = (&suspect.expected.emulated.data, slack_of(&suspect.expected));
    // Near is decided by the first rows; the tests see all of them.
    let apart = |channel: usize, from: usize| -> f64 {
        let one = |&row: &usize| {
            let to = row * width + channel;
            let apart = captured.data[to] - expected[row * width + from];
            (apart / f64::from(slack[to])).powi(2)
        };
        rows.iter().take(4).map(one).sum()
    };
    let mut source = vec![None; width];
    for &channel in &wrong {
        let near = channel.saturating_sub(64)..(channel + 65).min(width);
        let candidates = near.chain(wrong.iter().copied().take(256));
        let nearest =
            candidates.map(|from| (apart(channel, from), from)).min_by(|a, b| a.0.total_cmp(&b.0));
        source[channel] = nearest.map(|(_, from)| from);
    }
    let value = suspect.columns_from(|channel| source[channel]);
    let some = wrong
        .iter()
        .take(4)
        .filter_map(|&channel| Some(format!("{channel} is that of {}", source[channel]?)));
    let some = some.collect::<Vec<_>>().join(", ");
    let more =
        if wrong.len() > 4 { format!(" and {} more", wrong.len() - 4) } else { String::new() };
    Ok(Some(Guess::new(value, format!("channel {some}{more}"))))
}

/// All values, or those of the wrong rows or channels, are off by one factor.
fn constant_factor(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let guesses = regions(suspect).into_iter().map(|(words, inside)| {
        let by = factor(suspect, captured, judged_elements(suspect).filter(|&i| inside[i]));
        let value = suspect.elementwise(|i, x| if inside[i] { (by * x, by) } else { (x, 1.0) });
        let constant = constant(by, suspect.config());
        Ok(Guess::new(value, format!("{words} multiplied by {constant}")).with("factor", by))
    });
    suspect.best(guesses)
}

fn constant_offset(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = own(suspect) else { return Ok(None) };
    let (expected, slack) = (&suspect.expected.emulated.data, slack_of(&suspect.expected));
    let guesses = regions(suspect).into_iter().map(|(words, inside)| {
        let (mut sum, mut weights) = (0.0, 0.0);
        let usable = |&i: &usize| inside[i] && slack[i] > 0.0 && captured.data[i].is_finite();
        for i in judged_elements(suspect).filter(usable) {
            let weight = f64::from(slack[i]).powi(-2);
            sum += weight * (captured.data[i] - expected[i]);
            weights += weight;
        }
        let by = if weights > 0.0 { super::rounded(sum / weights, 1e-5) } else { 0.0 };
        let value = suspect.elementwise(|i, x| if inside[i] { (x + by, 1.0) } else { (x, 1.0) });
        Ok(Guess::new(value, format!("{words} off by {by:+}")).with("offset", by))
    });
    suspect.best(guesses)
}

/// Where a wrong value may be wrong throughout: everywhere, in its wrong rows, in its wrong channels, where both meet.
fn regions(suspect: &Suspect<'_>) -> Vec<(String, Vec<bool>)> {
    let total = suspect.expected.emulated.data.len();
    let mut regions = vec![("all values are".to_owned(), vec![true; total])];
    let rows: BTreeSet<usize> = geometry::wrong_rows(suspect.case).into_iter().collect();
    let width = suspect.row_width();
    if rows.len() < suspect.case.record.rows.len() {
        let of_row = (0..total).map(|i| rows.contains(&suspect.case.rows[suspect.row_of(i)]));
        let words = format!("the values of {} are", geometry::positions(&rows));
        regions.push((words, of_row.collect()));
    }
    let channels: BTreeSet<usize> = geometry::wrong_channels(suspect.case).into_iter().collect();
    if !suspect.case.by_key() && channels.len() < width / suspect.case.slots() {
        let here = |i: usize| channels.contains(&suspect.channel_of(i));
        let of_channel: Vec<bool> = (0..total).map(here).collect();
        let words = format!("the values of {}", geometry::channels(&channels));
        if rows.len() < suspect.case.record.rows.len() {
            let both = of_channel.iter().zip(&regions[1].1).map(|(&a, &b)| a && b).collect();
            regions.push((format!("{words} of {} are", geometry::positions(&rows)), both));
        }
        regions.push((format!("{words} are"), of_channel));
    }
    let experts = geometry::wrong_experts(suspect.case);
    if experts.len() < suspect.case.record.experts.len() {
        let width = width / suspect.case.slots();
        let wrong = |i| suspect.case.expert_of(i / width).is_some_and(|e| experts.contains(&e));
        let words = format!("the values of {} are", geometry::experts(&experts));
        regions.push((words, (0..total).map(wrong).collect()));
    }
    regions
}

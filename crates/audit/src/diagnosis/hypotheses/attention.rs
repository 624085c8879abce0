//! Attention: scale, mask, softmax, which head and which row of the cache.

use apr_model::{AttentionInner, Inner, Stage, Stage::*};
use apr_reference::Tensor as Plain;

use super::{Hypothesis, any, fitted, least, named, rounded};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect, slack_of},
    twin::Triple,
};

const SCORES: &[Stage] = &[AttnScores];
const SOFTMAX: &[Stage] = &[AttnSoftmax];
const ALL: &[Stage] = &[AttnScores, AttnSoftmax, Attention];
const CACHE: &[Stage] = &[AttnScores, Attention];

pub(super) const TABLE: &[Hypothesis] = &[
    named("scores-unscaled", SCORES, |s| {
        let by = 1.0 / s.case.scale();
        scaled(s, by, "the scores are not scaled")
    }),
    named("scores-scaled-twice", SCORES, |s| {
        scaled(s, s.case.scale(), "the scores are scaled twice")
    }),
    named("mask-missing", ALL, |s| {
        masked(s, "each row sees all positions of its step, later ones too", |s, row| {
            (0..s.end_of_step(row)).collect()
        })
    }),
    named("mask-off-by-one", ALL, mask_off_by_one),
    named("cache-ignored", ALL, |s| {
        masked(s, "each row sees the positions of its own step only", |s, row| {
            (s.start_of_step(row)..=row).collect()
        })
    }),
    named("mask-without-offset", ALL, |s| {
        let sentence = "the mask counts rows from the beginning of their step, not of the sequence";
        masked(s, sentence, |s, row| (0..=row - s.start_of_step(row)).collect())
    }),
    named("first-key-missing", ALL, |s| {
        masked(s, "the first position is not seen", |_, row| (row.min(1)..=row).collect())
    }),
    named("head-map", &[AttnScores, Attention], |s| {
        if s.site.stage == Attention && s.case.evidence.holds(s.of_layer(AttnSoftmax)) {
            return Ok(None);
        }
        head_map(s, "query head h reads key head h modulo the key heads")
    }),
    named("value-head-map", &[Attention], |s| {
        if !s.case.evidence.holds(s.of_layer(AttnSoftmax)) {
            return Ok(None);
        }
        head_map(s, "query head h reads value head h modulo the value heads")
    }),
    named("kv-in-other-head", CACHE, other_head),
    named("kv-rows-shifted", CACHE, shifted_rows),
    named("stale-kv-row", CACHE, stale_row),
    named("heads-not-transposed", &[Attention], not_transposed),
    named("softmax-not-normalised", SOFTMAX, |s| {
        softmax(s, "the softmax is not divided by its sum", |_, scores, max| {
            scores.iter().map(|s| (s - max).exp()).collect()
        })
    }),
    named("softmax-over-padding", SOFTMAX, over_padding),
    named("softmax-off-by-one", SOFTMAX, |s| {
        softmax(s, "one is added to the sum that the softmax is divided by", |_, scores, max| {
            let sum = (-max).exp() + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            scores.iter().map(|s| (s - max).exp() / sum).collect()
        })
    }),
    named("softmax-no-max", SOFTMAX, |s| {
        let sentence = "the largest score is not subtracted before exponentials are taken";
        softmax(s, sentence, |_, scores, _| {
            let exp = |s: &f64| f64::from(s.exp() as f32);
            let sum = f64::from(scores.iter().map(exp).sum::<f64>() as f32);
            scores.iter().map(|s| exp(s) / sum).collect()
        })
    }),
    fitted("mask-window", ALL, window),
    fitted("scores-scale", SCORES, scale),
    fitted("softmax-temperature", SOFTMAX, temperature),
];

/// What attention is computed from, as far as it was captured: what is given is not computed.
struct Given {
    q: Triple,
    k: Triple,
    v: Triple,
    scores: Option<Triple>,
    softmax: Option<Triple>,
}

impl Given {
    fn of(suspect: &Suspect<'_>) -> Result<Self> {
        let held = |stage| suspect.case.evidence.holds(suspect.of_layer(stage));
        let value = |stage| suspect.case.value(suspect.of_layer(stage));
        let config = suspect.config();
        let stage = suspect.site.stage;
        let softmax = (stage == Attention && held(AttnSoftmax)).then(|| value(AttnSoftmax));
        let scores = (softmax.is_none() && stage != AttnScores && held(AttnScores))
            .then(|| value(AttnScores));
        let zeros =
            |heads| Triple::known(Plain::zeros([suspect.case.rows.len(), heads, config.head_dim]));
        let (q, k) = match softmax.is_some() || scores.is_some() {
            true => (zeros(config.num_attention_heads), zeros(config.num_key_value_heads)),
            false => (value(QPostRope)?, value(KPostRope)?),
        };
        let v = match stage {
            Attention => {
                let qkv = if config.attention_bias { QkvBias } else { QkvMatmul };
                suspect.case.values_of(&value(qkv)?)?
            }
            _ => k.clone(),
        };
        Ok(Self { q, k, v, scores: scores.transpose()?, softmax: softmax.transpose()? })
    }

    /// The stage's value.
    fn run(&self, suspect: &Suspect<'_>) -> Result<Triple> {
        let inner = |given: &Option<Triple>| Inner { spill: true, replace: given.clone() };
        let inner = AttentionInner { scores: inner(&self.scores), softmax: inner(&self.softmax) };
        let scale = suspect.case.scale();
        let attended = suspect.case.attention(&self.q, &self.k, &self.v, scale, inner)?;
        Ok(match suspect.site.stage {
            AttnScores => attended.scores.expect("the twin spills"),
            AttnSoftmax => attended.softmax.expect("the twin spills"),
            _ => attended.out,
        })
    }

    /// What row `row` computes if it sees `keys`, and finds the rows `cached` in their places.
    fn of_row(&self, row: usize, keys: &[usize], cached: &[usize]) -> Self {
        let columns = |given: &Triple| {
            picked(given, |shape| {
                let (heads, n, width) = (shape[0], shape[1], shape[2]);
                let indices = (0..heads)
                    .flat_map(|head| keys.iter().map(move |key| (head * n + row) * width + key));
                (vec![heads, 1, keys.len()], indices.collect())
            })
        };
        let rows = |given: &Triple, rows: &[usize]| {
            picked(given, |shape| {
                let width = shape[1] * shape[2];
                let indices = rows.iter().flat_map(|row| row * width..(row + 1) * width);
                (vec![rows.len(), shape[1], shape[2]], indices.collect())
            })
        };
        Self {
            q: rows(&self.q, &[row]),
            k: rows(&self.k, cached),
            v: rows(&self.v, cached),
            scores: self.scores.as_ref().map(columns),
            softmax: self.softmax.as_ref().map(columns),
        }
    }
}

/// Some elements of `value`: the shape they are in, and their indices.
fn picked(value: &Triple, which: impl Fn(&[usize]) -> (Vec<usize>, Vec<usize>)) -> Triple {
    let (shape, indices) = which(&value.emulated.shape);
    let data = indices.iter().map(|&i| value.emulated.data[i]).collect();
    match &value.slack {
        None => Triple::known(Plain { shape, data }),
        Some(slack) => {
            Triple::alternative(Plain { shape, data }, indices.iter().map(|&i| slack[i]).collect())
        }
    }
}

impl Suspect<'_> {
    /// The first position of the step that computed `row`.
    fn start_of_step(&self, row: usize) -> usize {
        let step = self.case.evidence.step_of(row);
        self.case.evidence.steps().nth(step).map_or(0, |step| step.start)
    }

    /// The end of the step that computed `row`.
    fn end_of_step(&self, row: usize) -> usize {
        let step = self.case.evidence.step_of(row);
        self.case.evidence.steps().nth(step).map_or(0, |step| step.end)
    }

    /// Whether this is the stage that was captured: of the inner values of a fused kernel only what goes through them
    /// one by one is tried.
    fn is_own(&self) -> bool {
        self.site == self.case.site
    }
}

/// Each row sees the positions that `sees` gives for it, of which there must be one.
fn masked(
    suspect: &Suspect<'_>,
    sentence: &str,
    sees: impl Fn(&Suspect<'_>, usize) -> Vec<usize>,
) -> Answer {
    seeing(suspect, sentence, |suspect, row| {
        let keys = sees(suspect, row);
        (keys.clone(), keys)
    })
}

/// Each row sees the positions that `sees` gives for it, of which there must be one, and finds the second list of
/// positions cached in their places.
fn seeing(
    suspect: &Suspect<'_>,
    sentence: &str,
    sees: impl Fn(&Suspect<'_>, usize) -> (Vec<usize>, Vec<usize>),
) -> Answer {
    if !suspect.is_own() {
        return Ok(None);
    }
    let given = Given::of(suspect)?;
    let mut value = Plain::clone(&suspect.expected.emulated);
    let mut slack = slack_of(&suspect.expected).to_vec();
    let (n, keys) = (suspect.case.rows.len(), suspect.case.rows.len());
    let by_key = suspect.site.stage != Attention;
    for row in suspect.case.judged() {
        let (seen, cached) = sees(suspect, row);
        if seen == cached && seen.iter().copied().eq(0..=row) {
            continue;
        }
        let one = given.of_row(row, &seen, &cached).run(suspect)?;
        let from = slack_of(&one);
        if !by_key {
            let width = one.emulated.data.len();
            value.data[row * width..][..width].copy_from_slice(&one.emulated.data);
            slack[row * width..][..width].copy_from_slice(from);
            continue;
        }
        for head in 0..one.emulated.shape[0] {
            let to = (head * n + row) * keys;
            value.data[to..to + keys].fill(0.0);
            slack[to..to + keys].fill(0.0);
            for (i, &key) in seen.iter().enumerate() {
                value.data[to + key] = one.emulated.data[head * seen.len() + i];
                slack[to + key] = from[head * seen.len() + i];
            }
        }
    }
    Ok(Some(Guess::new(Triple::alternative(value, slack), sentence)))
}

fn mask_off_by_one(suspect: &Suspect<'_>) -> Answer {
    let few = masked(suspect, "each row sees one position too few, its own", |_, row| {
        (0..row.max(1)).collect()
    })?;
    let many = masked(suspect, "each row sees one position too many, the next", |s, row| {
        (0..(row + 2).min(s.end_of_step(row))).collect()
    })?;
    suspect.best(few.into_iter().chain(many).map(Ok))
}

fn window(suspect: &Suspect<'_>) -> Answer {
    if !suspect.is_own() {
        return Ok(None);
    }
    let Some(first) = suspect.case.first_wrong else { return Ok(None) };
    // The first row that is wrong is the first that is longer than the window.
    if first == 0 {
        return Ok(None);
    }
    let guess =
        masked(suspect, &format!("each row sees the last {first} positions only"), |_, row| {
            ((row + 1).saturating_sub(first)..=row).collect()
        })?;
    Ok(guess.map(|guess| guess.with("window", first as f64)))
}

fn scaled(suspect: &Suspect<'_>, by: f64, sentence: &str) -> Answer {
    let value = suspect.elementwise(|_, score| (score * by, by));
    Ok(Some(Guess::new(value, sentence)))
}

fn scale(suspect: &Suspect<'_>) -> Answer {
    let with = |by: f64| suspect.elementwise(|_, score| (score * by, by));
    let by = match suspect.captured() {
        Some(captured) => any::factor(suspect, captured, any::judged_elements(suspect)),
        None => {
            least((1e-3f64).ln(), 1e3f64.ln(), 60, |log| suspect.misfit(&with(log.exp())))?.exp()
        }
    };
    let scale = by * suspect.case.scale();
    let constant = any::constant(scale, suspect.config());
    let sentence = format!("the scores are scaled by {constant} instead of 1/sqrt(head_dim)");
    Ok(Some(Guess::new(with(by), sentence).with("scale", scale)))
}

/// Keys and values with a head for each query head: that of its number modulo theirs.
fn head_map(suspect: &Suspect<'_>, sentence: &str) -> Answer {
    let config = suspect.config();
    if !suspect.is_own() || config.num_key_value_heads == config.num_attention_heads {
        return Ok(None);
    }
    let mut given = Given::of(suspect)?;
    let kv_heads = config.num_key_value_heads;
    let spread = |x: &Triple| heads_from(x, config.num_attention_heads, |head| head % kv_heads);
    (given.k, given.v) = (spread(&given.k), spread(&given.v));
    Ok(Some(Guess::new(given.run(suspect)?, sentence)))
}

/// `x` with `heads` heads, each from where `source` says.
fn heads_from(x: &Triple, heads: usize, source: impl Fn(usize) -> usize) -> Triple {
    picked(x, |shape| {
        let (n, from_heads, head_dim) = (shape[0], shape[1], shape[2]);
        let indices = (0..n).flat_map(|row| {
            let source = &source;
            (0..heads).flat_map(move |head| {
                let start = (row * from_heads + source(head)) * head_dim;
                start..start + head_dim
            })
        });
        (vec![n, heads, head_dim], indices.collect())
    })
}

/// `x` with its rows from where `source` says; `None` is a row of zeros.
fn rows_from(x: &Triple, source: impl Fn(usize) -> Option<usize>) -> Triple {
    let shape = x.emulated.shape.clone();
    let width: usize = shape[1..].iter().product();
    let mut moved = Plain::zeros(shape);
    let mut slack = vec![0.0; moved.data.len()];
    for row in 0..moved.shape[0] {
        let Some(from) = source(row) else { continue };
        let (to, from) = (row * width..(row + 1) * width, from * width..(from + 1) * width);
        moved.data[to.clone()].copy_from_slice(&x.emulated.data[from.clone()]);
        if let Some(of) = &x.slack {
            slack[to].copy_from_slice(&of[from]);
        }
    }
    match &x.slack {
        None => Triple::known(moved),
        Some(_) => Triple::alternative(moved, slack),
    }
}

/// What the cache holds of a case's stage, in words.
fn of_cache(suspect: &Suspect<'_>) -> &'static str {
    let held = |stage| suspect.case.evidence.holds(suspect.of_layer(stage));
    let fused = !held(AttnSoftmax) && !held(AttnScores);
    match suspect.site.stage {
        AttnScores => "key",
        _ if fused => "key and value",
        _ => "value",
    }
}

fn other_head(suspect: &Suspect<'_>) -> Answer {
    let heads = suspect.config().num_key_value_heads;
    if !suspect.is_own() || heads == 1 {
        return Ok(None);
    }
    let given = Given::of(suspect)?;
    let what = of_cache(suspect);
    let only = suspect.case.first_wrong;
    let guesses = (1..heads).flat_map(|by| [(by, None), (by, only)]).map(|(by, only)| {
        let moved = |x: &Triple| {
            let all = heads_from(x, heads, |head| (head + by) % heads);
            match only {
                None => all,
                Some(row) => blend_row(x, &all, row),
            }
        };
        let given = Given {
            q: given.q.clone(),
            k: moved(&given.k),
            v: moved(&given.v),
            scores: given.scores.clone(),
            softmax: given.softmax.clone(),
        };
        let place = only.map_or(String::new(), |row| format!(" of position {row}"));
        let sentence = format!("the {what}{place} of head h is that of head h + {by}");
        Ok(Guess::new(given.run(suspect)?, sentence).with("heads", by as f64))
    });
    suspect.best(guesses.collect::<Vec<_>>())
}

/// `x` with row `row` from `other`.
fn blend_row(x: &Triple, other: &Triple, row: usize) -> Triple {
    let width: usize = x.emulated.shape[1..].iter().product();
    let mut value = Plain::clone(&x.emulated);
    let range = row * width..(row + 1) * width;
    value.data[range.clone()].copy_from_slice(&other.emulated.data[range]);
    match &x.slack {
        None => Triple::known(value),
        Some(slack) => Triple::alternative(value, slack.to_vec()),
    }
}

/// Runs attention with other rows in the cache.
fn with_rows(
    suspect: &Suspect<'_>,
    given: &Given,
    source: impl Fn(usize) -> Option<usize>,
) -> Result<Triple> {
    let given = Given {
        q: given.q.clone(),
        k: rows_from(&given.k, &source),
        v: rows_from(&given.v, &source),
        scores: given.scores.clone(),
        softmax: given.softmax.clone(),
    };
    given.run(suspect)
}

/// Each row of the cache is its neighbour: throughout, where what falls off one end is lost or comes back at the other, or
/// from the first row on that is wrong.
fn shifted_rows(suspect: &Suspect<'_>) -> Answer {
    if !suspect.is_own() {
        return Ok(None);
    }
    let (given, what) = (Given::of(suspect)?, of_cache(suspect));
    let n = suspect.case.rows.len();
    let first = suspect.case.first_wrong.unwrap_or(0);
    let mut guesses = Vec::new();
    for by in [-1isize, 1] {
        let sentence =
            format!("the {what} of each position is that of the position {by:+} from it");
        let rolled = seeing(suspect, &sentence, |s, row| {
            let end = s.end_of_step(row) as isize;
            let cached = (0..=row as isize).map(|row| (row + by).rem_euclid(end) as usize);
            ((0..=row).collect(), cached.collect())
        })?;
        guesses.extend(rolled.map(Ok));
        for first in if first > 0 { vec![0, first] } else { vec![0] } {
            let value = with_rows(suspect, &given, |row| match row.checked_add_signed(by) {
                _ if row < first => Some(row),
                from => from.filter(|&from| from < n),
            })?;
            let from = if first > 0 { format!(", from {first} on") } else { String::new() };
            guesses.push(Ok(Guess::new(value, sentence.clone() + &from)));
        }
    }
    suspect.best(guesses)
}

/// One row of the cache is another's, or was never written.
fn stale_row(suspect: &Suspect<'_>) -> Answer {
    if !suspect.is_own() {
        return Ok(None);
    }
    let Some(first) = suspect.case.first_wrong else { return Ok(None) };
    let (given, what) = (Given::of(suspect)?, of_cache(suspect));
    let n = suspect.case.rows.len();
    // Each try is a whole attention.
    let reach = if n <= 128 { n } else { 8 };
    let near = first.saturating_sub(reach)..(first + reach).min(n);
    let sources = near.filter(|&row| row != first).map(Some).chain([None]);
    let mut rows = vec![first];
    rows.extend(worst_key(suspect).filter(|&key| key != first));
    let tries: Vec<_> =
        rows.into_iter().flat_map(|row| sources.clone().map(move |from| (row, from))).collect();
    suspect.best(tries.into_iter().map(|(stale, from)| {
        let value = with_rows(suspect, &given, |row| if row == stale { from } else { Some(row) })?;
        let sentence = match from {
            Some(from) => {
                format!("the cached {what} of position {stale} is that of position {from}")
            }
            None => format!("the cached {what} of position {stale} was never written"),
        };
        Ok(Guess::new(value, sentence).with("position", stale as f64))
    }))
}

/// The key of the score that is furthest off.
fn worst_key(suspect: &Suspect<'_>) -> Option<usize> {
    match suspect.case.record.element {
        Some((_, crate::Group::Element { column, head: Some(_), .. })) => Some(column),
        _ => None,
    }
}

/// The heads' results one after the other, as they were computed, taken for rows; or the channels of a row one after the
/// other, each of all heads.
fn not_transposed(suspect: &Suspect<'_>) -> Answer {
    let config = suspect.config();
    let (heads, head_dim) = (config.num_attention_heads, config.head_dim);
    let width = heads * head_dim;
    let by_channel =
        suspect.columns_from(|column| Some(column % heads * head_dim + column / heads));
    let from = |i: usize| {
        let (row, column) = (i / width, i % width);
        let start = suspect.start_of_step(row);
        let n = suspect.end_of_step(row) - start;
        let flat = (row - start) * width + column;
        let (head, rest) = (flat / (n * head_dim), flat % (n * head_dim));
        (start + rest / head_dim) * width + head * head_dim + rest % head_dim
    };
    let value = picked(&suspect.expected, |shape| {
        (shape.to_vec(), (0..suspect.expected.emulated.data.len()).map(from).collect())
    });
    let sentence = "the heads' results are not transposed before they are joined";
    let by_channel_sentence = "the heads' results are joined channel by channel, not head by head";
    suspect.best([Ok(Guess::new(value, sentence)), Ok(Guess::new(by_channel, by_channel_sentence))])
}

/// Another function of the visible scores of each row and head, of which the largest is given too.
fn softmax(
    suspect: &Suspect<'_>,
    sentence: &str,
    f: impl Fn(usize, &[f64], f64) -> Vec<f64>,
) -> Answer {
    let scores = suspect.input(0)?;
    let n = suspect.case.rows.len();
    let mut value = Plain::clone(&suspect.expected.emulated);
    let mut slack = slack_of(&suspect.expected).to_vec();
    for (index, (value, slack)) in
        value.data.chunks_exact_mut(n).zip(slack.chunks_exact_mut(n)).enumerate()
    {
        let row = index % n;
        let scores = &scores.emulated.data[index * n..][..=row];
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        for (j, y) in f(row, scores, max).into_iter().enumerate() {
            // The same roundings, of another result.
            let grows = if value[j] > 0.0 { (y / value[j]).abs() } else { 0.0 };
            let least = 16.0 * f64::from(f32::EPSILON) * y.abs();
            // Below the normal numbers a relative error says nothing, and some engines have only zero there.
            let least = least.max(f64::from(f32::MIN_POSITIVE));
            slack[j] = (f64::from(slack[j]) * grows).max(least) as f32;
            value[j] = y;
        }
    }
    Ok(Some(Guess::new(Triple::alternative(value, slack), sentence)))
}

/// Masked positions, whose scores are zeros, counted in; their own weights are shown, or zeros. Engines round the length
/// of the cache up.
fn over_padding(suspect: &Suspect<'_>) -> Answer {
    let of = |shown: bool, multiple: usize| {
        let sentence = match multiple {
            1 => "masked positions are counted in the softmax with a score of zero".to_owned(),
            n => format!(
                "positions up to a multiple of {n} are counted in the softmax with a score of zero"
            ),
        };
        softmax(suspect, &sentence, move |row, scores, max| {
            let end = suspect.end_of_step(row);
            let masked = end.next_multiple_of(multiple) - scores.len();
            let max = if masked > 0 { max.max(0.0) } else { max };
            let padding = (-max).exp();
            let sum = masked as f64 * padding + scores.iter().map(|s| (s - max).exp()).sum::<f64>();
            let weights = scores.iter().map(|s| (s - max).exp() / sum);
            let of_masked = if shown { end - scores.len() } else { 0 };
            weights.chain(std::iter::repeat_n(padding / sum, of_masked)).collect()
        })
    };
    let mut guesses = Vec::new();
    for multiple in [1, 8, 16, 32, 64, 128, 256] {
        for shown in [false, true] {
            guesses.extend(of(shown, multiple)?.map(Ok));
        }
    }
    suspect.best(guesses)
}

fn temperature(suspect: &Suspect<'_>) -> Answer {
    let with = |by: f64| {
        let answer = softmax(suspect, "", move |_, scores, max| {
            let sum = scores.iter().map(|s| (by * (s - max)).exp()).sum::<f64>();
            scores.iter().map(|s| (by * (s - max)).exp() / sum).collect()
        })?;
        Ok::<_, crate::Error>(answer.expect("a softmax has a value").value)
    };
    let by = least(0.02f64.ln(), 50f64.ln(), 60, |log| suspect.misfit(&with(log.exp())?))?.exp();
    // Weights that are next to nothing say the number to more digits than the sum that was fitted.
    let known = any::known(by, suspect.config()).map(|(known, _)| known);
    let candidates = known.into_iter().chain([rounded(by, 1e-4), by]);
    suspect.best(candidates.map(|by| {
        let constant = any::constant(by, suspect.config());
        let sentence = format!("the scores are multiplied by {constant} before the softmax");
        Ok(Guess::new(with(by)?, sentence).with("factor", by))
    }))
}

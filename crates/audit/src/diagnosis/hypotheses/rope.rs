//! Rotations: by which angles, of which pairs.

use apr_model::{Backend, RopeFrequencies, RopeScaling, Stage, Stage::*};
use apr_reference::Tensor as Plain;

use super::{Hypothesis, fitted, least, named, rounded};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect},
    twin::Triple,
};

const ROPE: &[Stage] = &[QPostRope, KPostRope];

pub(super) const TABLE: &[Hypothesis] = &[
    named("rope-missing", ROPE, |s| {
        let value = rotated(s, &s.config().rope_frequencies(), s.case.rows.iter().map(|_| 0))?;
        Ok(Some(Guess::new(value, "the heads are not rotated")))
    }),
    named("rope-inverse", ROPE, inverse),
    named("rope-style", ROPE, neighbouring_pairs),
    named("rope-scaling-missing", ROPE, |s| {
        if s.config().rope_scaling == RopeScaling::None {
            return Ok(None);
        }
        let plain = RopeFrequencies::new(s.config().rope_theta, s.config().rotary_dim);
        let value = rotated(s, &plain, s.case.rows.iter().copied())?;
        Ok(Some(Guess::new(value, "the frequencies are not scaled as the model's config says")))
    }),
    named("partial-rotary", ROPE, partial),
    fitted("rope-position-offset", ROPE, positions),
    fitted("rope-theta", ROPE, theta),
    fitted("rope-frequencies-scaled", ROPE, scaled),
];

/// What is rotated.
fn input(suspect: &Suspect<'_>) -> Result<Triple> {
    suspect.case.heads_of(suspect.site.stage, &suspect.input(0)?)
}

fn rotated(
    suspect: &Suspect<'_>,
    frequencies: &RopeFrequencies,
    positions: impl IntoIterator<Item = usize>,
) -> Result<Triple> {
    Ok(suspect.twin().rope(&input(suspect)?, &frequencies.table(positions))?)
}

/// Its input and the result with the channels of each head in the order that `source` says, undone afterwards.
fn reordered(suspect: &Suspect<'_>, x: &Triple, source: impl Fn(usize) -> usize) -> Result<Triple> {
    let head_dim = suspect.config().head_dim;
    let order: Vec<usize> = (0..head_dim).map(source).collect();
    let mut back = vec![0; head_dim];
    order.iter().enumerate().for_each(|(to, &from)| back[from] = to);
    let moved = |x: &Triple, order: &[usize]| {
        let from = |i: usize| i - i % head_dim + order[i % head_dim];
        let data = &x.emulated.data;
        let values = Plain {
            shape: x.emulated.shape.clone(),
            data: (0..data.len()).map(|i| data[from(i)]).collect(),
        };
        match &x.slack {
            None => Triple::known(values),
            Some(slack) => {
                let slack = (0..slack.len()).map(|i| slack[from(i)]).collect();
                Triple::alternative(values, slack)
            }
        }
    };
    let table = suspect.config().rope_frequencies().table(suspect.case.rows.iter().copied());
    Ok(moved(&suspect.twin().rope(&moved(x, &order), &table)?, &back))
}

/// Rotation by the negative angle is rotation of the other half's channel first.
fn inverse(suspect: &Suspect<'_>) -> Answer {
    let half = suspect.config().rotary_dim / 2;
    let source = |channel: usize| match channel {
        channel if channel < half => channel + half,
        channel if channel < 2 * half => channel - half,
        channel => channel,
    };
    let value = reordered(suspect, &input(suspect)?, source)?;
    Ok(Some(Guess::new(value, "the heads are rotated the other way round")))
}

fn neighbouring_pairs(suspect: &Suspect<'_>) -> Answer {
    let half = suspect.config().rotary_dim / 2;
    let source = |channel: usize| match channel {
        channel if channel < half => 2 * channel,
        channel if channel < 2 * half => 2 * (channel - half) + 1,
        channel => channel,
    };
    let value = reordered(suspect, &input(suspect)?, source)?;
    Ok(Some(Guess::new(
        value,
        "neighbouring channels are rotated as pairs, not those of the two halves",
    )))
}

/// The position of each row, as its angles tell.
fn positions(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let evidence = suspect.case.evidence;
    let frequencies = suspect.config().rope_frequencies();
    let rows = &suspect.case.rows;
    let x = input(suspect)?;
    let width = suspect.row_width();
    // Beyond the sequence too: the row may have been counted from some other start.
    let reach = evidence.len() + 64;
    let table = frequencies.table(0..reach);
    let head_dim = suspect.config().head_dim;
    let pairs = table.pairs();
    let misfit = |row: usize, position: usize| {
        let (cos, sin) = table.row(position);
        let (x, y) =
            (&x.emulated.data[row * width..][..width], &captured.data[row * width..][..width]);
        let mut sum = 0.0;
        for (x, y) in x.chunks_exact(head_dim).zip(y.chunks_exact(head_dim)) {
            for i in 0..pairs {
                let (a, b) = (x[i], x[i + pairs]);
                sum += (a * cos[i] - b * sin[i] - y[i]).powi(2);
                sum += (b * cos[i] + a * sin[i] - y[i + pairs]).powi(2);
            }
        }
        sum
    };
    let nearest = |row: usize| {
        let mut best = (rows[row], misfit(row, rows[row]));
        for position in 0..reach {
            let found = misfit(row, position);
            if found < 0.25 * best.1 {
                best = (position, found);
            }
        }
        best.0
    };
    let judged: Vec<usize> = suspect.case.judged().collect();
    let mut found = rows.clone();
    judged.iter().for_each(|&row| found[row] = nearest(row));
    let off = |row: usize| found[row] as i64 - rows[row] as i64;
    let Some(&first) = judged.iter().find(|&&row| off(row) != 0) else { return Ok(None) };
    let value = rotated(suspect, &frequencies, found.iter().copied())?;
    let same = judged.iter().all(|&row| row < first || off(row) == off(first));
    let start_of = |row: usize| {
        let step = evidence.step_of(rows[row]);
        evidence.steps().nth(step).map_or(0, |step| step.start)
    };
    let restarts = judged.iter().all(|&row| off(row) == -(start_of(row) as i64));
    let sentence = match () {
        () if same && first == judged[0] => format!("positions are off by {:+}", off(first)),
        () if restarts => "each step counts its positions from 0".to_owned(),
        () if same => format!("positions are off by {:+} from {} on", off(first), rows[first]),
        () => {
            let some: Vec<String> = judged
                .iter()
                .filter(|&&row| off(row) != 0)
                .take(4)
                .map(|&row| format!("{} as {}", rows[row], found[row]))
                .collect();
            format!("rows are rotated as if at other positions: {}", some.join(", "))
        }
    };
    Ok(Some(Guess::new(value, sentence).with("offset", off(first) as f64)))
}

/// Only some channels rotated, the angles being those of a head of that many; or only the fastest of the model's pairs.
fn partial(suspect: &Suspect<'_>) -> Answer {
    let config = suspect.config();
    let (own, head_dim, x) = (config.rotary_dim, config.head_dim, input(suspect)?);
    let dims = [own / 2, own / 4, 3 * own / 4, head_dim];
    let rows = || suspect.case.rows.iter().copied();
    let mut guesses = Vec::new();
    for dim in dims.into_iter().filter(|&dim| dim != own && dim >= 2 && dim % 2 == 0) {
        let sentence = format!("{dim} channels of each head are rotated instead of {own}");
        let frequencies = RopeFrequencies::new(config.rope_theta, dim);
        let value = suspect.twin().rope(&x, &frequencies.table(rows()))?;
        guesses.push(Ok(Guess::new(value, sentence).with("rotary_dim", dim as f64)));
    }
    let pairs = own / 2;
    for turning in [pairs / 2, pairs / 4, 3 * pairs / 4] {
        // A pair that is infinitely slow does not turn.
        let slower: Vec<f32> =
            (0..pairs).map(|pair| if pair < turning { 1.0 } else { f32::INFINITY }).collect();
        let frequencies = config.rope_frequencies().divided_by(&slower);
        let value = suspect.twin().rope(&x, &frequencies.table(rows()))?;
        let sentence = format!("only the {turning} fastest of {pairs} pairs are rotated");
        guesses.push(Ok(Guess::new(value, sentence).with("pairs", turning as f64)));
    }
    suspect.best(guesses)
}

fn scaled_as_configured(suspect: &Suspect<'_>, theta: f64) -> RopeFrequencies {
    let config = suspect.config();
    apr_model::Config { rope_theta: theta, ..config.clone() }.rope_frequencies()
}

/// How many values of a parameter are tried to begin with: fewer where each takes a whole attention.
fn grid(suspect: &Suspect<'_>) -> usize {
    if suspect.captured().is_some() { 400 } else { 80 }
}

fn theta(suspect: &Suspect<'_>) -> Answer {
    let (x, own) = (input(suspect)?, suspect.config().rope_theta);
    let rows = || suspect.case.rows.iter().copied();
    let with = |theta: f64| {
        Ok::<_, crate::Error>(
            suspect.twin().rope(&x, &scaled_as_configured(suspect, theta).table(rows()))?,
        )
    };
    let found =
        least(10f64.ln(), 1e8f64.ln(), grid(suspect), |log| suspect.misfit(&with(log.exp())?))?
            .exp();
    let candidates = [rounded(found, 1e-2), rounded(found, 1e-4), found];
    suspect.best(candidates.into_iter().map(|theta| {
        let sentence = format!("rope theta is {theta} instead of {own}");
        Ok(Guess::new(with(theta)?, sentence).with("theta", theta))
    }))
}

fn scaled(suspect: &Suspect<'_>) -> Answer {
    let (x, config) = (input(suspect)?, suspect.config());
    let rows = || suspect.case.rows.iter().copied();
    let with = |factor: f64| {
        let frequencies = config.rope_frequencies().linear(factor);
        Ok::<_, crate::Error>(suspect.twin().rope(&x, &frequencies.table(rows()))?)
    };
    let log =
        least(0.01f64.ln(), 100f64.ln(), grid(suspect), |log| suspect.misfit(&with(log.exp())?))?;
    let candidates = [rounded(log.exp(), 1e-2), rounded(log.exp(), 1e-4), log.exp()];
    suspect.best(candidates.into_iter().map(|factor| {
        let sentence = format!("the frequencies are divided by {factor}");
        Ok(Guess::new(with(factor)?, sentence).with("factor", factor))
    }))
}

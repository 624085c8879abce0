//! Norms: weights, epsilons, what is averaged over.

use apr_model::{Backend, Stage, Stage::*};
use apr_reference::Tensor as Plain;

use super::{Hypothesis, fitted, named, rounded};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect},
    inputs,
    twin::{Triple, slack},
};

const NORMS: &[Stage] = &[AttnNorm, QNorm, KNorm, FfnNorm, FinalNorm];

pub(super) const TABLE: &[Hypothesis] = &[
    named("norm-weight-missing", NORMS, |s| {
        weighted(s, |_| 1.0, "the norm's weight is taken for ones")
    }),
    named("norm-weight-plus-one", NORMS, |s| {
        weighted(s, |w| w + 1.0, "one is added to the norm's weight")
    }),
    named("norm-weight-minus-one", NORMS, |s| {
        weighted(s, |w| w - 1.0, "one is subtracted from the norm's weight")
    }),
    named("norm-weight-of-another", NORMS, of_another),
    named("norm-not-normalised", NORMS, |s| {
        let sentence = "the values are scaled by the norm's weight and not normalised";
        normalised(s, |_| 1.0, sentence)
    }),
    named("norm-mean-subtracted", NORMS, mean_subtracted),
    named("norm-sum-for-mean", NORMS, |s| {
        let eps = s.config().rms_norm_eps;
        let sentence = "the sum of squares is not divided by the width";
        normalised(s, |x| (mean_square(x) * x.len() as f64 + eps).sqrt(), sentence)
    }),
    named("norm-over-wrong-axis", &[QNorm, KNorm], over_whole_row),
    named("norm-over-half", NORMS, |s| {
        let eps = s.config().rms_norm_eps;
        let sentence = "the mean is taken over the first half of the channels";
        normalised(s, |x| (mean_square(&x[..x.len() / 2]) + eps).sqrt(), sentence)
    }),
    named("norm-of-first-row", NORMS, of_first_row),
    // Of a norm that is hardly small enough for an epsilon to matter, this and another epsilon look the same.
    fitted("norm-eps-outside-root", NORMS, |s| {
        let eps = s.config().rms_norm_eps;
        let sentence = "epsilon is added to the root of the mean square, not under it";
        normalised(s, |x| mean_square(x).sqrt() + eps, sentence)
    }),
    fitted("norm-eps", NORMS, eps),
];

/// What is normalised.
fn input(suspect: &Suspect<'_>) -> Result<Triple> {
    let x = suspect.input(0)?;
    match suspect.site.stage {
        QNorm | KNorm => suspect.case.heads_of(suspect.site.stage, &x),
        _ => Ok(x),
    }
}

fn weighted(suspect: &Suspect<'_>, f: impl Fn(f64) -> f64, sentence: &str) -> Answer {
    let w = suspect.vector().iter().map(|&w| f(w)).collect();
    with_weight(suspect, &w, sentence.to_owned()).map(Some)
}

fn with_weight(suspect: &Suspect<'_>, w: &Vec<f64>, sentence: String) -> Result<Guess> {
    let value = suspect.twin().rms_norm(&input(suspect)?, w, suspect.config().rms_norm_eps)?;
    Ok(Guess::new(value, sentence))
}

/// The weights of all other norms of this width.
fn of_another(suspect: &Suspect<'_>) -> Answer {
    let model = &suspect.case.evidence.model;
    let others = model.plan().sites().iter().copied().filter(|&site| {
        let same = |w: &Vec<f64>| w.len() == suspect.vector().len();
        site != suspect.site && NORMS.contains(&site.stage) && model.vector(site).is_some_and(same)
    });
    suspect.best(others.map(|site| {
        let w = model.vector(site).expect("filtered");
        with_weight(suspect, w, format!("the norm's weight is that of {site}"))
    }))
}

fn mean_square(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64
}

/// Each group of values divided by what `rms` makes of it.
fn normalised(suspect: &Suspect<'_>, rms: impl Fn(&[f64]) -> f64, sentence: &str) -> Answer {
    let (x, w) = (input(suspect)?, suspect.vector());
    Ok(Some(Guess::new(divided(suspect, &x, w.len(), |x, _| rms(x)), sentence)))
}

/// Groups of `width` values divided by what `rms` makes of them and of their index, and weighted.
fn divided(
    suspect: &Suspect<'_>,
    x: &Triple,
    width: usize,
    rms: impl Fn(&[f64], usize) -> f64,
) -> Triple {
    let w = suspect.vector();
    let mut y = Plain::clone(&x.emulated);
    for (group, y) in y.data.chunks_exact_mut(width).enumerate() {
        let rms = rms(y, group);
        y.iter_mut().enumerate().for_each(|(i, y)| *y = *y / rms * w[i % w.len()]);
    }
    let units = &suspect.twin().units;
    let eps = suspect.config().rms_norm_eps;
    let slack = slack::rms_norm(units, &x.emulated, x.slack.as_deref(), w, eps, &y);
    Triple::alternative(y, slack)
}

fn mean_subtracted(suspect: &Suspect<'_>) -> Answer {
    let (x, w) = (input(suspect)?, suspect.vector());
    let means: Vec<f64> = x
        .emulated
        .data
        .chunks_exact(w.len())
        .map(|x| x.iter().sum::<f64>() / x.len() as f64)
        .collect();
    let mut centred = x.clone();
    let data = x.emulated.data.iter().enumerate().map(|(i, x)| x - means[i / w.len()]);
    let centred_value = Plain { shape: x.emulated.shape.clone(), data: data.collect() };
    // The mean is a sum of `width` terms that may cancel.
    let walk = f64::from(f32::EPSILON) * (w.len() as f64).sqrt();
    let own = |i: usize| (walk * means[i / w.len()]) as f32;
    let slack = (0..x.emulated.data.len())
        .map(|i| own(i).hypot(x.slack.as_ref().map_or(0.0, |slack| slack[i])))
        .collect();
    centred.clone_from(&Triple::alternative(centred_value, slack));
    let value = suspect.twin().rms_norm(&centred, w, suspect.config().rms_norm_eps)?;
    Ok(Some(Guess::new(value, "the mean is subtracted first, as in LayerNorm")))
}

fn over_whole_row(suspect: &Suspect<'_>) -> Answer {
    let (x, eps) = (input(suspect)?, suspect.config().rms_norm_eps);
    let width = suspect.row_width();
    let value = divided(suspect, &x, width, |x, _| (mean_square(x) + eps).sqrt());
    Ok(Some(Guess::new(value, "the mean square is taken over all heads of a row, not over each")))
}

/// The first row of each step in the place of all of the step's: of each head its own, or all of them.
fn of_first_row(suspect: &Suspect<'_>) -> Answer {
    let (case, w, eps) = (suspect.case, suspect.vector(), suspect.config().rms_norm_eps);
    let source = inputs(suspect.site, suspect.config())[0];
    let starts: Vec<usize> = case.evidence.steps().map(|step| step.start).collect();
    if !case.evidence.holds(source) {
        return Ok(None);
    }
    let first = Triple::known(case.evidence.captured(source, &starts, None)?);
    let first = match suspect.site.stage {
        QNorm | KNorm => case.heads_of(suspect.site.stage, &first)?,
        _ => first,
    };
    let (x, width) = (input(suspect)?, suspect.row_width());
    let groups = width / w.len();
    let of = |group: usize| {
        let step = case.evidence.step_of(case.rows[group / groups]);
        &first.emulated.data[step * width..][..width]
    };
    let by = |rms: &dyn Fn(usize) -> f64| divided(suspect, &x, w.len(), |_, group| rms(group));
    let of_head = |group: usize| mean_square(&of(group)[group % groups * w.len()..][..w.len()]);
    let sentence = "every row is divided by the root mean square of the first of its step";
    suspect.best([
        Ok(Guess::new(by(&|group| (of_head(group) + eps).sqrt()), sentence)),
        Ok(Guess::new(by(&|group| (mean_square(of(group)) + eps).sqrt()), sentence)),
    ])
}

/// Each group of values says by itself what epsilon must have been; those that it matters most for are asked.
fn eps(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let (x, w, own) = (input(suspect)?, suspect.vector(), suspect.config().rms_norm_eps);
    let width = w.len();
    let judged: Vec<bool> = {
        let mut judged = vec![false; suspect.case.rows.len()];
        suspect.case.judged().for_each(|row| judged[row] = true);
        judged
    };
    let mut smallest: Option<(f64, f64)> = None;
    for (group, (x, y)) in
        x.emulated.data.chunks_exact(width).zip(captured.data.chunks_exact(width)).enumerate()
    {
        let square = mean_square(x);
        if !judged[suspect.row_of(group * width)] || square == 0.0 {
            continue;
        }
        let xw = || x.iter().zip(w).map(|(x, w)| x * w);
        let scale =
            xw().zip(y).map(|(xw, y)| xw * y).sum::<f64>() / xw().map(|x| x * x).sum::<f64>();
        if smallest.is_none_or(|(least, _)| square < least) {
            smallest = Some((square, 1.0 / (scale * scale) - square));
        }
    }
    let Some((square, found)) = smallest.filter(|(_, eps)| eps.is_finite()) else {
        return Ok(None);
    };
    // Rounding in f32 moves the mean square by this much.
    let blur = square * f64::from(f32::EPSILON) * (width as f64).sqrt();
    let found = if found.abs() <= blur { 0.0 } else { found };
    let candidates = [rounded(found, 0.3), rounded(found, 0.03), rounded(found, 1e-3), found];
    suspect.best(candidates.into_iter().filter(|&eps| eps >= 0.0).map(|eps| {
        let value = suspect.twin().rms_norm(&x, w, eps)?;
        let sentence = format!("epsilon is {eps:e} instead of {own:e}");
        Ok(Guess::new(value, sentence).with("eps", eps))
    }))
}

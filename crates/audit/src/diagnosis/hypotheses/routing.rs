//! The choice of experts, their weights, and the sum by these.

use apr_model::{Backend, Stage, Stage::*};
use apr_reference::Tensor as Plain;

use super::{Hypothesis, fitted, general, named};
use crate::{
    Result,
    diagnosis::suspect::{Answer, Guess, Suspect, elementwise, slack_of},
    twin::Triple,
};

const IDS: &[Stage] = &[MoeRouterIndices];
const WEIGHTS: &[Stage] = &[MoeRouterWeights];
const SUM: &[Stage] = &[FfnOut];

pub(super) const TABLE: &[Hypothesis] = &[
    named("top-k-off-by-one", IDS, off_by_one),
    named("top-k-smallest", IDS, |s| {
        by(s, |logit, _| -logit, "the experts with the smallest logits are chosen")
    }),
    named("top-k-of-magnitudes", IDS, |s| {
        by(s, |logit, _| logit.abs(), "experts are chosen by the magnitude of their logits")
    }),
    named("top-k-of-part", IDS, of_part),
    named("top-k-repeated", IDS, repeated),
    named("top-k-shifted", IDS, shifted),
    general("rows-of-another-token", IDS, of_row_beside),
    named("router-not-renormalised", WEIGHTS, |s| {
        normalised(s, false, "the weights are not divided by their sum")
    }),
    named("router-renormalised", WEIGHTS, |s| {
        normalised(
            s,
            true,
            "the weights are divided by their sum, which the model does not ask for",
        )
    }),
    named("router-sigmoid", WEIGHTS, sigmoid),
    named("router-slots-exchanged", WEIGHTS, slots_exchanged),
    named("router-weights-equal", WEIGHTS, |s| {
        let value = weights_from(s, |row, _| 1.0 / row.len() as f64);
        Ok(Some(Guess::new(value, "all experts of a row have the same weight")))
    }),
    named("router-last-expert-unused", WEIGHTS, last_unused),
    fitted("router-temperature", WEIGHTS, temperature),
    named("experts-slot-missing", SUM, |s| {
        of_slots(s, |slot| format!("the sum leaves out {slot}"), 0.0)
    }),
    named("experts-slot-twice", SUM, |s| {
        of_slots(s, |slot| format!("the sum has {slot} twice"), 2.0)
    }),
    named("expert-missing", SUM, of_expert_missing),
    named("experts-unweighted", SUM, |s| {
        weighted(s, |_, _| 1.0, "the experts' results are added up without weights")
    }),
    named("experts-weighted-twice", SUM, |s| {
        weighted(s, |row, slot| row[slot] * row[slot], "the experts' results are weighted twice")
    }),
    named("experts-weights-exchanged", SUM, |s| {
        permuted(s, |source| sum(s, |_, row, slot| row[source[slot]]))
    }),
    fitted("expert-scaled", SUM, of_expert_scaled),
];

/// Ids of each row, made of its logits.
fn chosen(suspect: &Suspect<'_>, ids: impl Fn(&[f64], usize) -> Vec<f64>) -> Result<Triple> {
    let logits = suspect.input(0)?;
    let k = suspect.expected.emulated.cols();
    let data: Vec<f64> = logits.emulated.rows().flat_map(|row| ids(row, k)).collect();
    let slack = vec![0.0; data.len()];
    let shape = suspect.expected.emulated.shape.clone();
    Ok(Triple::alternative(Plain { shape, data }, slack))
}

/// All ids of a row, by what `f` makes of logit and id, the largest first.
fn ordered(logits: &[f64], f: impl Fn(f64, usize) -> f64) -> Vec<f64> {
    let keys: Vec<f64> = logits.iter().enumerate().map(|(id, &logit)| f(logit, id)).collect();
    let mut ids: Vec<usize> = (0..keys.len()).collect();
    ids.sort_by(|&a, &b| keys[b].total_cmp(&keys[a]));
    ids.into_iter().map(|id| id as f64).collect()
}

fn by(suspect: &Suspect<'_>, f: impl Fn(f64, usize) -> f64, sentence: &str) -> Answer {
    let value = chosen(suspect, |logits, k| ordered(logits, &f)[..k].to_vec())?;
    Ok(Some(Guess::new(value, sentence)))
}

fn off_by_one(suspect: &Suspect<'_>) -> Answer {
    let k = suspect.expected.emulated.cols();
    if k >= suspect.input(0)?.emulated.cols() {
        return Ok(None);
    }
    suspect.best((0..k).rev().map(|passed_over| {
        let value = chosen(suspect, |logits, k| {
            let mut ids = ordered(logits, |logit, _| logit);
            ids.remove(passed_over);
            ids.truncate(k);
            ids
        })?;
        let sentence = format!(
            "number {} of the {k} largest logits is passed over for the next",
            passed_over + 1
        );
        Ok(Guess::new(value, sentence).with("passed_over", passed_over as f64))
    }))
}

/// A choice among some of the experts only.
fn of_part(suspect: &Suspect<'_>) -> Answer {
    let experts = suspect.input(0)?.emulated.cols();
    let k = suspect.expected.emulated.cols();
    let halves = [0..experts / 2, experts / 2..experts, 0..experts / 4, 0..experts - 1, 0..k];
    suspect.best(halves.into_iter().filter(|part| part.len() >= k).map(|part| {
        let inside =
            |logit: f64, id: usize| if part.contains(&id) { logit } else { f64::NEG_INFINITY };
        let value = chosen(suspect, |logits, k| ordered(logits, inside)[..k].to_vec())?;
        let sentence =
            format!("only the experts {}..{} of {experts} are chosen from", part.start, part.end);
        Ok(Guess::new(value, sentence))
    }))
}

fn repeated(suspect: &Suspect<'_>) -> Answer {
    let k = suspect.expected.emulated.cols();
    suspect.best((1..k).rev().flat_map(|from| [0, from - 1].map(|of| (from, of))).map(
        |(from, of)| {
            let value = chosen(suspect, |logits, k| {
                let mut ids = ordered(logits, |logit, _| logit);
                let again = ids[of];
                ids[from..].fill(again);
                ids.truncate(k);
                ids
            })?;
            let sentence = format!("from slot {from} on, the expert of slot {of} is chosen again");
            Ok(Guess::new(value, sentence))
        },
    ))
}

/// Each id is that of a neighbour: counted from one, or from one too few.
fn shifted(suspect: &Suspect<'_>) -> Answer {
    let experts = suspect.input(0)?.emulated.cols();
    suspect.best([(1, "+1"), (experts - 1, "-1")].map(|(by, words)| {
        let value = chosen(suspect, |logits, k| {
            let ids = ordered(logits, |logit, _| logit);
            ids[..k].iter().map(|&id| ((id as usize + by) % experts) as f64).collect()
        })?;
        Ok(Guess::new(value, format!("each id is {words} of that of the largest logit")))
    }))
}

fn of_row_beside(suspect: &Suspect<'_>) -> Answer {
    let (rows, evidence) = (&suspect.case.rows, suspect.case.evidence);
    let beside = |row: usize, by: isize| {
        let from = row.checked_add_signed(by).filter(|&from| from < rows.len())?;
        let same = evidence.step_of(rows[from]) == evidence.step_of(rows[row]);
        (same && rows[from].abs_diff(rows[row]) == by.unsigned_abs()).then_some(from)
    };
    suspect.best([-1, 1].map(|by| {
        let value = suspect.rows_from(|row| beside(row, by).unwrap_or(row));
        Ok(Guess::new(
            value,
            format!("the experts of each row are those of the row {by:+} from it"),
        ))
    }))
}

fn normalised(suspect: &Suspect<'_>, normalize: bool, sentence: &str) -> Answer {
    let asked = suspect.case.experts(suspect.site).is_some_and(|moe| moe.norm_topk_prob);
    if asked == normalize {
        return Ok(None);
    }
    let (logits, ids) = (suspect.input(0)?, suspect.input(1)?);
    let value = suspect.twin().route_weights(&logits, &ids, normalize)?;
    Ok(Some(Guess::new(value, sentence)))
}

/// Weights made of the expected ones of a row, slot by slot, and about as certain.
fn weights_from(suspect: &Suspect<'_>, f: impl Fn(&[f64], usize) -> f64) -> Triple {
    reweighted(&suspect.expected, |_, row, slot| f(row, slot))
}

/// `weights` put through `f`, which is given the row, its weights and the slot; relative to their size they stay as certain.
fn reweighted(weights: &Triple, f: impl Fn(usize, &[f64], usize) -> f64) -> Triple {
    let k = weights.emulated.cols();
    let old = &weights.emulated.data;
    let new = |i: usize| f(i / k, &old[i / k * k..][..k], i % k);
    let data: Vec<f64> = (0..old.len()).map(new).collect();
    let slack = (0..old.len()).map(|i| {
        let relative = weights.slack.as_ref().map_or(0.0, |slack| {
            let of_row = (i / k * k..(i / k + 1) * k).filter(|&j| old[j] > 0.0);
            of_row.map(|j| f64::from(slack[j]) / old[j]).fold(0.0, f64::max)
        });
        (data[i].abs() * (relative + 4.0 * f64::from(f32::EPSILON))) as f32
    });
    let slack = slack.collect();
    Triple::alternative(Plain { shape: weights.emulated.shape.clone(), data }, slack)
}

fn sigmoid(suspect: &Suspect<'_>) -> Answer {
    let (logits, ids) = (suspect.input(0)?, suspect.input(1)?);
    let (experts, k) = (logits.emulated.cols(), ids.emulated.cols());
    let of = |row: usize, slot: usize| {
        let id = ids.emulated.data[row * k + slot] as usize;
        1.0 / (1.0 + (-logits.emulated.data[row * experts + id]).exp())
    };
    let plain = reweighted(&suspect.expected, |row, _, slot| of(row, slot));
    let divided = reweighted(&suspect.expected, |row, _, slot| {
        of(row, slot) / (0..k).map(|slot| of(row, slot)).sum::<f64>()
    });
    let sentence = "weights are sigmoids of the logits, not their softmax";
    suspect.best([
        Ok(Guess::new(plain, sentence)),
        Ok(Guess::new(divided, format!("{sentence}, divided by their sum"))),
    ])
}

/// The value with slots taken from others: `value` is given the source of each.
fn permuted(suspect: &Suspect<'_>, value: impl Fn(&[usize]) -> Result<Triple>) -> Answer {
    let k = match suspect.site.stage {
        FfnOut => suspect.input(1)?.emulated.cols(),
        _ => suspect.expected.emulated.cols(),
    };
    suspect.best(orders(k).into_iter().map(|(source, words)| {
        Ok(Guess::new(value(&source)?, format!("the weight of each slot is that of {words}")))
    }))
}

fn slots_exchanged(suspect: &Suspect<'_>) -> Answer {
    let sorted = weights_from(suspect, |row, slot| {
        let mut row = row.to_vec();
        row.sort_by(|a, b| b.total_cmp(a));
        row[slot]
    });
    let ids = suspect.input(1)?;
    let k = ids.emulated.cols();
    let by_id = reweighted(&suspect.expected, |row, weights, slot| {
        let ids = &ids.emulated.data[row * k..][..k];
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by(|&a, &b| ids[a].total_cmp(&ids[b]));
        weights[order[slot]]
    });
    let guesses = [
        Ok(Guess::new(sorted, "the largest weight comes first, whatever the order of the ids")),
        Ok(Guess::new(
            by_id,
            "the weights are in the ascending order of ids, which the ids are not",
        )),
    ];
    let rest =
        permuted(suspect, |source| Ok(weights_from(suspect, |row, slot| row[source[slot]])))?;
    suspect.best(guesses.into_iter().chain(rest.map(Ok)))
}

/// Wrong orders of slots: the source of each, and what they are called.
pub(super) fn orders(k: usize) -> Vec<(Vec<usize>, String)> {
    let all = 0..k;
    let mut orders = vec![
        (all.clone().map(|slot| (slot + k - 1) % k).collect(), "the slot before".to_owned()),
        (all.clone().map(|slot| (slot + 1) % k).collect(), "the slot after".to_owned()),
        (all.clone().rev().collect(), "the slot as far from the other end".to_owned()),
        (vec![0; k], "the first slot".to_owned()),
    ];
    let identity: Vec<usize> = all.collect();
    orders.retain(|(order, _)| *order != identity);
    orders
}

fn last_unused(suspect: &Suspect<'_>) -> Answer {
    let normalize = suspect.case.experts(suspect.site).is_some_and(|moe| moe.norm_topk_prob);
    let value = weights_from(suspect, |row, slot| {
        let used = &row[..row.len() - 1];
        let by = if normalize { used.iter().sum() } else { 1.0 };
        used.get(slot).map_or(0.0, |weight| weight / by)
    });
    Ok(Some(Guess::new(value, "the last expert of each row is not used")))
}

fn temperature(suspect: &Suspect<'_>) -> Answer {
    let (logits, ids) = (suspect.input(0)?, suspect.input(1)?);
    let normalize = suspect.case.experts(suspect.site).is_some_and(|moe| moe.norm_topk_prob);
    let certain = Triple { slack: Some(vec![0.0; logits.emulated.data.len()].into()), ..logits };
    let of = |factor: f64| -> Result<Triple> {
        let scaled = elementwise(&certain, |_, logit| (factor * logit, 0.0));
        Ok(suspect.twin().route_weights(&scaled, &ids, normalize)?)
    };
    let factor = super::least(-3.0, 3.0, 48, |power| suspect.misfit(&of(power.exp())?))?.exp();
    let constant = super::any::constant(factor, suspect.config());
    let sentence = format!("logits are multiplied by {constant} before the softmax");
    Ok(Some(Guess::new(of(factor)?, sentence).with("factor", factor)))
}

/// The sum over the slots with other weights: `f` is given the row, its weights and the slot.
fn sum(suspect: &Suspect<'_>, f: impl Fn(usize, &[f64], usize) -> f64) -> Result<Triple> {
    let weights = reweighted(&suspect.input(1)?, f);
    Ok(suspect.twin().weighted_sum(&suspect.input(0)?, &weights)?)
}

fn weighted(suspect: &Suspect<'_>, f: impl Fn(&[f64], usize) -> f64, sentence: &str) -> Answer {
    Ok(Some(Guess::new(sum(suspect, |_, row, slot| f(row, slot))?, sentence)))
}

/// One slot weighs `times` as much as it should.
fn of_slots(suspect: &Suspect<'_>, sentence: impl Fn(&str) -> String, times: f64) -> Answer {
    let k = suspect.input(1)?.emulated.cols();
    suspect.best((0..k).map(|wrong| {
        let value =
            sum(suspect, |_, row, slot| if slot == wrong { times * row[slot] } else { row[slot] })?;
        Ok(Guess::new(value, sentence(&format!("slot {wrong} of {k}"))).with("slot", wrong as f64))
    }))
}

/// The experts of each row and slot that a sum is over.
fn ids(suspect: &Suspect<'_>) -> Result<Triple> {
    suspect.case.value(suspect.of_layer(MoeRouterIndices))
}

fn of_expert_missing(suspect: &Suspect<'_>) -> Answer {
    let ids = ids(suspect)?;
    let k = ids.emulated.cols();
    let is =
        |row: usize, slot: usize, expert: usize| ids.emulated.data[row * k + slot] == expert as f64;
    suspect.best(candidates(suspect, &ids).into_iter().map(|expert| {
        let value = sum(suspect, |row, weights, slot| match is(row, slot, expert) {
            true => 0.0,
            false => weights[slot],
        })?;
        let sentence = format!("the sum leaves out expert {expert}");
        Ok(Guess::new(value, sentence).with("expert", expert as f64))
    }))
}

/// The experts that all wrong rows went to.
fn candidates(suspect: &Suspect<'_>, ids: &Triple) -> Vec<usize> {
    let bound = suspect.case.evidence.replayed.bound.of(1);
    let mut common: Option<Vec<usize>> = None;
    for (row, (_, _, sums)) in suspect.case.judged().zip(&suspect.case.record.rows) {
        if sums.ratio() <= bound {
            continue;
        }
        let k = ids.emulated.cols();
        let of_row: Vec<usize> =
            ids.emulated.data[row * k..][..k].iter().map(|&id| id as usize).collect();
        match &mut common {
            Some(common) => common.retain(|expert| of_row.contains(expert)),
            None => common = Some(of_row),
        }
    }
    common.unwrap_or_default()
}

fn of_expert_scaled(suspect: &Suspect<'_>) -> Answer {
    let Some(captured) = suspect.captured() else { return Ok(None) };
    let ids = ids(suspect)?;
    let k = ids.emulated.cols();
    let is =
        |row: usize, slot: usize, expert: usize| ids.emulated.data[row * k + slot] == expert as f64;
    let (expected, slack) = (&suspect.expected.emulated.data, slack_of(&suspect.expected));
    suspect.best(candidates(suspect, &ids).into_iter().map(|expert| {
        let part = sum(suspect, |row, weights, slot| match is(row, slot, expert) {
            true => weights[slot],
            false => 0.0,
        })?;
        let (mut product, mut square) = (0.0, 0.0);
        for i in super::any::judged_elements(suspect) {
            let (x, y) = (part.emulated.data[i], captured.data[i] - expected[i]);
            let weight = f64::from(slack[i]).powi(-2);
            if x != 0.0 && y.is_finite() && weight.is_finite() {
                product += weight * x * y;
                square += weight * x * x;
            }
        }
        let factor = 1.0 + if square > 0.0 { product / square } else { 0.0 };
        let value = sum(suspect, |row, weights, slot| match is(row, slot, expert) {
            true => factor * weights[slot],
            false => weights[slot],
        })?;
        let constant = super::any::constant(factor, suspect.config());
        let sentence = format!("the results of expert {expert} are multiplied by {constant}");
        Ok(Guess::new(value, sentence).with("expert", expert as f64).with("factor", factor))
    }))
}

//! Where an error lies: which rows, heads, channels and keys, and what they have in common.

use std::{collections::BTreeSet, fmt};

use serde::Serialize;

use super::case::{Case, Piece};

/// Where the error of a stage lies, among the rows that were looked at.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Geometry {
    /// Positions of wrong rows.
    pub rows: Vec<usize>,
    /// Rows looked at.
    pub rows_total: usize,
    /// Wrong heads, where the stage has heads.
    pub heads: Vec<usize>,
    /// Heads of the stage.
    pub heads_total: usize,
    /// Wrong experts, where the stage is computed by experts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<usize>,
    /// Experts that any of these rows went to.
    #[serde(skip_serializing_if = "is_none")]
    pub experts_total: usize,
    /// Wrong channels, counted over all heads; none for scores.
    pub channels: Vec<usize>,
    /// Channels of the stage.
    pub channels_total: usize,
    /// Wrong keys, for scores.
    pub keys: Vec<usize>,
    /// Keys that there are.
    pub keys_total: usize,
    /// Elements that are wrong by themselves.
    pub elements: usize,
    /// The same in sentences, most telling first.
    pub sentences: Vec<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's convention")]
fn is_none(count: &usize) -> bool {
    *count == 0
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentences.join("; "))
    }
}

impl Geometry {
    pub(crate) fn of(case: &Case<'_>) -> Self {
        let rows: BTreeSet<usize> = wrong_rows(case).into_iter().collect();
        let channels: BTreeSet<usize> = wrong_channels(case).into_iter().collect();
        let heads = wrong_heads(case);
        let (elements, keys) = wrong_elements(case);
        let mut geometry = Self {
            rows_total: case.record.rows.len(),
            heads_total: case.record.heads.len(),
            experts: wrong_experts(case).into_iter().collect(),
            experts_total: case.record.experts.len(),
            channels_total: case.record.channels.len(),
            keys_total: if case.by_key() { case.evidence.len() } else { 0 },
            elements,
            sentences: Vec::new(),
            rows: rows.iter().copied().collect(),
            heads,
            channels: channels.iter().copied().collect(),
            keys: keys.iter().copied().collect(),
        };
        geometry.sentences = geometry.describe(case, &rows, &channels, &keys);
        geometry
    }

    fn describe(
        &self,
        case: &Case<'_>,
        rows: &BTreeSet<usize>,
        wrong: &BTreeSet<usize>,
        keys: &BTreeSet<usize>,
    ) -> Vec<String> {
        let mut said = Vec::new();
        if self.elements == 1 {
            said.push("a single element".to_owned());
        }
        if !self.heads.is_empty() && self.heads.len() < self.heads_total {
            let many = if self.heads.len() == 1 { "head" } else { "heads" };
            said.push(format!(
                "{many} {} of {}",
                ranges(self.heads.iter().copied()),
                self.heads_total
            ));
        }
        if !self.experts.is_empty() && self.experts.len() < self.experts_total {
            let chosen = if self.experts.len() == 1 { "is" } else { "are" };
            let which = experts(&self.experts.iter().copied().collect());
            said.push(format!("only where {which} {chosen} chosen"));
        }
        if !wrong.is_empty() && wrong.len() < self.channels_total {
            said.push(self.of_channels(case, wrong));
        }
        if !keys.is_empty() && keys.len() < self.keys_total {
            said.push(format!("keys {}", ranges(keys.iter().copied())));
        }
        if !rows.is_empty() {
            said.push(self.of_rows(case, rows));
        }
        if said.is_empty() {
            said.push("spread over everything, beyond what may be in no single place".to_owned());
        }
        said
    }

    fn of_channels(&self, case: &Case<'_>, wrong: &BTreeSet<usize>) -> String {
        let (first, last) =
            (wrong.first().copied().unwrap_or(0), wrong.last().copied().unwrap_or(0));
        let span = last + 1 - first;
        let total = self.channels_total;
        // Of a run of wrong channels some may be right by chance.
        let dense = 4 * wrong.len() >= 3 * span;
        let part = super::suspect::joined(case.site.stage, case.config())
            .into_iter()
            .find(|(_, part)| part.contains(&first) && part.contains(&last));
        match () {
            () if wrong.len() == 1 => format!("one channel ({first}) of {total}"),
            () if dense && last + 1 == total => format!("only the last {span} of {total} channels"),
            () if dense && first == 0 => format!("only the first {span} of {total} channels"),
            () if dense => {
                let block =
                    [256, 32, 16].into_iter().find(|size| first % size == 0 && span == *size);
                let of_block = block.map_or(String::new(), |size| format!(", a block of {size}"));
                let name = part
                    .filter(|(_, part)| span == part.len())
                    .map_or(String::new(), |(name, _)| format!(", all of {name}"));
                format!("only channels {first}..{} of {total}{of_block}{name}", last + 1)
            }
            () => {
                let strided = (2..=64).rev().find(|stride| {
                    let same = wrong.iter().all(|channel| channel % stride == first % stride);
                    same && 2 * wrong.len() * stride >= total
                });
                match strided {
                    Some(stride) => format!("one channel in {stride}, from {first} on"),
                    None => {
                        let name =
                            part.map_or(String::new(), |(name, _)| format!(", all in {name}"));
                        format!("{} of {total} channels ({}){name}", wrong.len(), some(wrong))
                    }
                }
            }
        }
    }

    fn of_rows(&self, case: &Case<'_>, rows: &BTreeSet<usize>) -> String {
        let looked: Vec<usize> = case.judged().map(|row| case.rows[row]).collect();
        let (first, last) = (rows.first().copied().unwrap_or(0), rows.last().copied().unwrap_or(0));
        let after: Vec<&usize> = looked.iter().filter(|&&row| row >= first).collect();
        let starts = case.evidence.steps().map(|step| step.start);
        let at_start =
            if starts.skip(1).any(|start| start == first) { ", where a step begins" } else { "" };
        match () {
            () if rows.len() == looked.len() => format!("all {} rows", looked.len()),
            () if rows.len() == 1 && looked.last() == Some(&first) => {
                format!("only the last row (position {first})")
            }
            () if rows.len() == 1 => format!("a single row (position {first})"),
            () if after.len() == rows.len() => format!("rows from position {first} on{at_start}"),
            () if looked.iter().filter(|&&row| row <= last).count() == rows.len() => {
                format!("rows up to position {last}")
            }
            () => format!("{} of {} rows (positions {})", rows.len(), looked.len(), some(rows)),
        }
    }
}

/// The first few, as ranges.
fn some(all: &BTreeSet<usize>) -> String {
    const SHOWN: usize = 12;
    let text = ranges(all.iter().copied().take(SHOWN));
    if all.len() > SHOWN { format!("{text}, ...") } else { text }
}

/// `1, 4..8`: ascending numbers with runs taken together; the end of a run does not belong to it.
pub(crate) fn ranges(numbers: impl Iterator<Item = usize>) -> String {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some(run) if run.end == number => run.end += 1,
            _ => runs.push(number..number + 1),
        }
    }
    let text = runs.into_iter().map(|run| match run.len() {
        1 => run.start.to_string(),
        _ => format!("{}..{}", run.start, run.end),
    });
    text.collect::<Vec<_>>().join(", ")
}

pub(crate) fn positions(rows: &BTreeSet<usize>) -> String {
    let many = if rows.len() == 1 { "position" } else { "positions" };
    format!("{many} {}", some(rows))
}

pub(crate) fn channels(wrong: &BTreeSet<usize>) -> String {
    let many = if wrong.len() == 1 { "channel" } else { "channels" };
    format!("{many} {}", some(wrong))
}

pub(crate) fn experts(wrong: &BTreeSet<usize>) -> String {
    let many = if wrong.len() == 1 { "expert" } else { "experts" };
    format!("{many} {}", some(wrong))
}

/// The positions of rows that are wrong, or that have a wrong element.
pub(crate) fn wrong_rows(case: &Case<'_>) -> Vec<usize> {
    let bound = case.evidence.replayed.bound.of(1);
    let sums = case.record.rows.iter();
    let by_sums =
        sums.filter(|(_, _, sums)| sums.ratio() > bound).map(|&(_, position, _)| position);
    let mut rows: BTreeSet<usize> = by_sums.collect();
    rows.extend(
        case.judged().filter(|&row| wrong_in(case, row).next().is_some()).map(|row| case.rows[row]),
    );
    rows.into_iter().collect()
}

/// The channels that are wrong, or that have a wrong element.
pub(crate) fn wrong_channels(case: &Case<'_>) -> Vec<usize> {
    let bound = case.evidence.replayed.bound.of(case.record.rows.len());
    let sums = case.record.channels.iter().enumerate();
    let mut channels: BTreeSet<usize> =
        sums.filter(|(_, sums)| sums.ratio() > bound).map(|(channel, _)| channel).collect();
    if !case.by_key() {
        channels
            .extend(case.judged().flat_map(|row| wrong_in(case, row).map(|wrong| wrong.column)));
    }
    channels.into_iter().collect()
}

/// The experts that are wrong, or that have a wrong element.
pub(crate) fn wrong_experts(case: &Case<'_>) -> BTreeSet<usize> {
    let bound = case.evidence.replayed.bound;
    let sums = case.record.experts.iter();
    let by_sums = sums.filter(|(_, (rows, sums))| sums.ratio() > bound.of(*rows));
    let mut experts: BTreeSet<usize> = by_sums.map(|(&expert, _)| expert).collect();
    experts.extend(case.judged().flat_map(|row| wrong_in(case, row).filter_map(|it| it.expert)));
    experts
}

fn wrong_heads(case: &Case<'_>) -> Vec<usize> {
    let bound = case.evidence.replayed.bound.of(case.record.rows.len());
    let head_dim = case.config().head_dim;
    let sums = case.record.heads.iter().enumerate();
    let mut heads: BTreeSet<usize> =
        sums.filter(|(_, sums)| sums.ratio() > bound).map(|(head, _)| head).collect();
    if case.record.heads.is_empty() {
        return Vec::new();
    }
    for row in case.judged() {
        heads.extend(wrong_in(case, row).map(|it| it.head.unwrap_or(it.column / head_dim)));
    }
    heads.into_iter().collect()
}

/// How many elements are wrong by themselves, and in the columns of which keys.
fn wrong_elements(case: &Case<'_>) -> (usize, BTreeSet<usize>) {
    let mut count = 0;
    let mut keys = BTreeSet::new();
    for row in case.judged() {
        for wrong in wrong_in(case, row) {
            count += 1;
            if wrong.head.is_some() {
                keys.insert(wrong.column);
            }
        }
    }
    (count, keys)
}

/// An element that is wrong by itself.
#[derive(Clone, Copy, Debug)]
struct Wrong {
    head: Option<usize>,
    expert: Option<usize>,
    column: usize,
}

/// The elements of a row that are wrong by themselves; of ids none is, they are right or wrong as a set.
fn wrong_in(case: &Case<'_>, row: usize) -> impl Iterator<Item = Wrong> {
    let bound = case.evidence.replayed.bound.of(1);
    let slack = super::suspect::slack_of(&case.expected);
    let pieces = case.pieces(row).filter(|_| !case.site.stage.holds_ids());
    pieces.flat_map(move |Piece { head, expert, range }| {
        let start = range.start;
        range.filter_map(move |i| {
            let (c, e) = (case.captured.data[i], case.expected.emulated.data[i]);
            let wrong = match c.is_finite() && e.is_finite() {
                true => (c - e).abs() > bound * f64::from(slack[i]),
                false => c != e && !(c.is_nan() && e.is_nan()),
            };
            wrong.then_some(Wrong { head, expert, column: i - start })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_numbers_are_taken_together() {
        assert_eq!(ranges([1, 4, 5, 6, 9].into_iter()), "1, 4..7, 9");
        assert_eq!(ranges([].into_iter()), "");
    }
}

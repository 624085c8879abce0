//! When is a difference more than rounding?
//!
//! A stage is compared whole, row by row, head by head, channel by channel and element by element: a damaged block of one
//! output row drowns in the norm of a whole tensor, and a small error of everything in the norm of one row. Each group of
//! elements gives one number, the sum of squared differences over the sum of squared [slacks](crate::twin::slack),
//! which is about 1 where nothing is wrong. How far above 1 it may be is decided by how many such numbers an audit
//! looks at: with `t = ln(comparisons / ALPHA)` the bound of Laurent and Massart (2000) for a sum of `n` squares,
//!
//! ```text
//! 1 + 2 sqrt(t / n) + 2 t / n
//! ```
//!
//! is exceeded by none of them with probability `1 - ALPHA`. `n` counts what is independent: errors within a row share
//! its scale, so rows count and elements do not.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::{Group, Test, twin::slack::is_unknown};

/// The chance that an audit of a faultless engine finds a fault by accident.
pub(crate) const ALPHA: f64 = 1e-6;

/// How many groups of elements an audit compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bound {
    t: f64,
}

impl Bound {
    pub(crate) fn for_comparisons(comparisons: f64) -> Self {
        Self { t: (comparisons.max(1.0) / ALPHA).ln() }
    }

    /// The largest ratio of norms (not of their squares) for `n` independent errors.
    pub(crate) fn of(self, n: usize) -> f64 {
        let n = n.max(1) as f64;
        (1.0 + 2.0 * (self.t / n).sqrt() + 2.0 * self.t / n).sqrt()
    }
}

/// Sums of squares over a group of elements.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sums {
    pub(crate) exact: f64,
    pub(crate) emulated: f64,
    pub(crate) captured: f64,
    /// Captured times exact.
    pub(crate) dot: f64,
    /// Captured less exact.
    pub(crate) local: f64,
    /// Emulated less exact.
    pub(crate) floor: f64,
    /// Captured less emulated.
    pub(crate) unexplained: f64,
    pub(crate) slack: f64,
    /// Elements that are not finite on one side only, or not in the same way; they are in none of the sums.
    pub(crate) not_finite: u64,
}

impl Sums {
    pub(crate) fn add(&mut self, captured: f64, exact: f64, emulated: f64, slack: f64) {
        self.exact += exact * exact;
        self.emulated += emulated * emulated;
        self.captured += captured * captured;
        self.dot += captured * exact;
        self.local += (captured - exact).powi(2);
        self.floor += (emulated - exact).powi(2);
        self.unexplained += (captured - emulated).powi(2);
        self.slack += slack * slack;
    }

    pub(crate) fn merge(&mut self, other: &Self) {
        self.exact += other.exact;
        self.emulated += other.emulated;
        self.captured += other.captured;
        self.dot += other.dot;
        self.local += other.local;
        self.floor += other.floor;
        self.unexplained += other.unexplained;
        self.slack += other.slack;
        self.not_finite += other.not_finite;
    }

    /// What is unexplained, in units of the slack; nothing makes a NaN of a number.
    pub(crate) fn ratio(&self) -> f64 {
        match self.not_finite {
            0 => quotient(self.unexplained, self.slack),
            _ => f64::INFINITY,
        }
    }

    /// The local error in units of the floor: for an arithmetic that is only roughly the declared one.
    pub(crate) fn rough_ratio(&self) -> f64 {
        quotient(self.local, self.floor + self.slack)
    }

    pub(crate) fn errors(&self) -> Errors {
        let relative = |error: f64, norm: f64| quotient(error, norm);
        Errors {
            local: relative(self.local, self.exact),
            floor: relative(self.floor, self.exact),
            unexplained: relative(self.unexplained, self.emulated),
            bound: relative(self.slack, self.emulated),
        }
    }
}

/// What was summed up of one stage.
#[derive(Clone, Debug, Default)]
pub(crate) struct Record {
    pub(crate) whole: Sums,
    pub(crate) rows: Vec<(usize, usize, Sums)>,
    pub(crate) heads: Vec<Sums>,
    pub(crate) channels: Vec<Sums>,
    /// Of each expert, how many rows went to it and their sums.
    pub(crate) experts: BTreeMap<usize, (usize, Sums)>,
    pub(crate) elements: u64,
    /// Elements of which nobody can say what they should be; they are in none of the sums.
    pub(crate) unknown: u64,
    /// Elements that are not finite in the same way on both sides.
    pub(crate) both_not_finite: u64,
    /// Elements that are not finite on one side only.
    pub(crate) not_finite: u64,
    /// The element furthest from its bound, by unexplained error over slack.
    pub(crate) element: Option<(f64, Group)>,
}

/// Where the elements of a comparison stand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Place {
    pub(crate) step: usize,
    pub(crate) position: usize,
    /// The head of scores, whose columns are keys and not channels.
    pub(crate) head: Option<usize>,
    /// The channels of a head, where channels are those of heads.
    pub(crate) head_width: Option<usize>,
    /// The expert that computed them.
    pub(crate) expert: Option<usize>,
}

/// Some neighbouring elements of a row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared<'a> {
    pub(crate) captured: &'a [f64],
    pub(crate) exact: &'a [f64],
    pub(crate) emulated: &'a [f64],
    pub(crate) slack: Option<&'a [f32]>,
}

impl Record {
    /// Adds a row, one head's part of a row of scores or one expert's of a row of experts, and returns its sums: a row's go
    /// to [`Record::rows`].
    pub(crate) fn add(&mut self, place: Place, compared: Compared<'_>) -> Sums {
        let Compared { captured, exact, emulated, slack } = compared;
        let len = captured.len();
        let heads = match place.head {
            Some(head) => self.heads.len().max(head + 1),
            None => place.head_width.map_or(0, |width| len / width),
        };
        self.heads.resize(heads, Sums::default());
        if place.head.is_none() {
            self.channels.resize(len, Sums::default());
        }
        let mut sums = Sums::default();
        for i in 0..len {
            let (c, e, m) = (captured[i], exact[i], emulated[i]);
            if !(c.is_finite() && m.is_finite()) {
                let same = c == m || (c.is_nan() && m.is_nan());
                self.both_not_finite += u64::from(same);
                self.not_finite += u64::from(!same);
                sums.not_finite += u64::from(!same);
                if place.head.is_none() {
                    self.channels[i].not_finite += u64::from(!same);
                    if let Some(width) = place.head_width {
                        self.heads[i / width].not_finite += u64::from(!same);
                    }
                }
                if !same && self.element.is_none_or(|(z, _)| z.is_finite()) {
                    self.element = Some((f64::INFINITY, place.element(i, c, m)));
                }
                continue;
            }
            if slack.is_some_and(|slack| is_unknown(slack[i])) {
                self.unknown += 1;
                continue;
            }
            self.elements += 1;
            let slack = slack.map_or(0.0, |slack| f64::from(slack[i]));
            sums.add(c, e, m, slack);
            if place.head.is_none() {
                self.channels[i].add(c, e, m, slack);
                if let Some(width) = place.head_width {
                    self.heads[i / width].add(c, e, m, slack);
                }
            }
            let apart = (c - m).abs();
            let z = if apart == 0.0 { 0.0 } else { apart / slack };
            if self.element.is_none_or(|(worst, _)| z > worst) {
                self.element = Some((z, place.element(i, c, m)));
            }
        }
        if let Some(head) = place.head {
            self.heads[head].merge(&sums);
        }
        if let Some(expert) = place.expert {
            let (rows, of_expert) = self.experts.entry(expert).or_default();
            *rows += 1;
            of_expert.merge(&sums);
        }
        self.whole.merge(&sums);
        sums
    }

    /// Whether anything of the size of the value would pass for what accumulation may add.
    pub(crate) fn is_drowned(&self, bound: Bound) -> bool {
        let limit = bound.of(self.rows.len()).powi(2);
        self.whole.emulated > 0.0 && self.whole.slack * limit >= self.whole.emulated
    }

    /// The test that is furthest beyond its bound.
    pub(crate) fn worst(&self, bound: Bound) -> Test {
        let n = self.rows.len();
        let mut worst = Test { group: Group::Whole, excess: self.whole.ratio() / bound.of(n) };
        let mut consider = |excess: f64, group: Group| {
            // Of parts that are wrong beyond measure, the smallest says most.
            if excess > worst.excess || (excess.is_infinite() && worst.excess.is_infinite()) {
                worst = Test { group, excess };
            }
        };
        for &(step, position, sums) in &self.rows {
            consider(sums.ratio() / bound.of(1), Group::Row { step, position });
        }
        for (head, sums) in self.heads.iter().enumerate() {
            consider(sums.ratio() / bound.of(n), Group::Head { head });
        }
        for (&expert, (rows, sums)) in &self.experts {
            consider(sums.ratio() / bound.of(*rows), Group::Expert { expert });
        }
        for (channel, sums) in self.channels.iter().enumerate() {
            consider(sums.ratio() / bound.of(n), Group::Channel { channel });
        }
        if let Some((z, element)) = self.element {
            consider(z / bound.of(1), element);
        }
        worst
    }
}

impl Place {
    fn element(self, column: usize, captured: f64, expected: f64) -> Group {
        let Self { step, position, head, expert, .. } = self;
        Group::Element { step, position, head, expert, column, captured, expected }
    }
}

/// The root of a quotient of squares; nothing over nothing is nothing.
fn quotient(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { (a / b).sqrt() }
}

/// The numbers of a stage or of a part of it; all are relative L2.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Errors {
    /// Captured against exact: all that the stage itself does to its value.
    #[serde(serialize_with = "crate::number")]
    pub local: f64,
    /// Emulated against exact: what the declared arithmetic must do to it.
    #[serde(serialize_with = "crate::number")]
    pub floor: f64,
    /// Captured against emulated: what the declared arithmetic does not explain.
    #[serde(serialize_with = "crate::number")]
    pub unexplained: f64,
    /// The standard deviation that accumulation in the declared type may add to it.
    #[serde(serialize_with = "crate::number")]
    pub bound: f64,
}

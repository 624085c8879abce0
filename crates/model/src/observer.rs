//! Who looks at a step, and what they see.
//!
//! An [`Observer`] names the sites it wants before the step; during the step it is handed each of those values
//! as the engine computed it, and may put another value in its place, which the rest of the step then uses.
//! Recording, statistics, audits, grafts and fault injection are observers of the one forward pass; none of
//! them has a forward pass of its own.

use std::error::Error as StdError;

use crate::{Site, TapSet};

/// What an observer may fail with; it ends the step.
pub type ObserverError = Box<dyn StdError + Send + Sync>;

/// Whether a step reads the prompt or continues it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// The step's tokens are part of the prompt.
    Prefill,
    /// The step's token was generated.
    Decode,
}

impl Phase {
    /// The name in captures and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// What a step is about to compute.
#[derive(Clone, Debug)]
pub struct Step<'a> {
    /// The number of this step in its sequence, from 0.
    pub index: usize,
    /// Prompt or continuation.
    pub phase: Phase,
    /// The number of this prefill chunk, from 0; 0 in decode steps.
    pub chunk: usize,
    /// The input tokens.
    pub tokens: &'a [u32],
    /// The position of the first of them; the others follow without a gap.
    pub first_position: usize,
    /// Which of the step's rows get logits, as indices into `tokens`.
    pub logit_rows: std::ops::Range<usize>,
}

impl Step<'_> {
    /// The position in the sequence of each row of `site`'s value.
    pub fn positions(&self, site: Site) -> std::ops::Range<usize> {
        let rows = match site.stage {
            crate::Stage::LmHead => self.logit_rows.clone(),
            _ => 0..self.tokens.len(),
        };
        self.first_position + rows.start..self.first_position + rows.end
    }
}

/// The elements of a value, in the type the backend computes in.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the types name themselves")]
pub enum Values<'a> {
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl Values<'_> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `i`, widened.
    pub fn get(&self, i: usize) -> f64 {
        match self {
            Self::F32(v) => f64::from(v[i]),
            Self::F64(v) => v[i],
        }
    }
}

/// A value of the step, where it lies: nothing is copied for the observer.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Row-major dimensions; [`crate::Stage::axes`] says what they mean.
    pub shape: &'a [usize],
    /// The elements.
    pub values: Values<'a>,
}

/// A value given to the step from outside.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Row-major dimensions, the same as those of the value it replaces.
    pub shape: Vec<usize>,
    /// The elements; a backend that computes in f32 rounds them.
    pub values: Vec<f64>,
}

/// Somebody who sees, and may replace, values of a step.
pub trait Observer {
    /// The sites that this observer wants in the coming step: the same until that step has ended. A site outside
    /// the set is neither shown nor replaceable.
    fn wanted(&self) -> TapSet;

    /// A step begins. An error ends it before anything is computed.
    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        let _ = step;
        Ok(())
    }

    /// A wanted value, as the engine computed it.
    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError>;

    /// A value to use in place of the computed one at `site`, for the rest of the step.
    ///
    /// A fused kernel asks for the replacements of its inner values before it runs, so the answer may depend on
    /// the site and on earlier values, but not on the value it replaces.
    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        let _ = site;
        Ok(None)
    }

    /// The step has ended and all its values have been shown.
    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        let _ = step;
        Ok(())
    }
}

/// Nobody looks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn wanted(&self) -> TapSet {
        TapSet::none()
    }

    fn value(&mut self, _: &Step<'_>, _: Site, _: View<'_>) -> Result<(), ObserverError> {
        Ok(())
    }
}

/// Two observers of the same step, each shown what it wants. Where both replace a value, the second has the last word.
#[allow(missing_debug_implementations, reason = "observers need not be printable")]
pub struct Both<'a> {
    first: (&'a mut dyn Observer, TapSet),
    second: (&'a mut dyn Observer, TapSet),
}

impl<'a> Both<'a> {
    /// `first`, then `second`.
    pub fn new(first: &'a mut dyn Observer, second: &'a mut dyn Observer) -> Self {
        Self { first: (first, TapSet::none()), second: (second, TapSet::none()) }
    }

    fn each(&mut self) -> [&mut (&'a mut dyn Observer, TapSet); 2] {
        [&mut self.first, &mut self.second]
    }
}

impl Observer for Both<'_> {
    fn wanted(&self) -> TapSet {
        self.first.0.wanted().union(&self.second.0.wanted())
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        for (observer, taps) in self.each() {
            *taps = observer.wanted();
            observer.begin(step)?;
        }
        Ok(())
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        for (observer, taps) in self.each() {
            if taps.contains(site) {
                observer.value(step, site, view)?;
            }
        }
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        let mut replacement = None;
        for (observer, taps) in self.each() {
            if taps.contains(site) {
                replacement = observer.replace(site)?.or(replacement);
            }
        }
        Ok(replacement)
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        self.each().into_iter().try_for_each(|(observer, _)| observer.end(step))
    }
}

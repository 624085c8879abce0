//! The table of inputs against the forward pass.

use std::collections::BTreeSet;

use apr_audit::inputs;
use apr_model::{
    HostTensor, LogitRows, Model, Observer, ObserverError, Phase, Site, Stage, Step, StepInput,
    TapSet, Values, View,
};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::{Collect, TINY, invariants::tokens};

use crate::engine::open;

/// Gives every site its recorded value, but for one that is moved, and notes which are computed differently then.
struct Moved<'a> {
    recorded: &'a Collect,
    moved: Site,
    changed: BTreeSet<Site>,
}

impl Observer for Moved<'_> {
    fn wanted(&self) -> TapSet {
        self.recorded.wanted()
    }

    fn value(&mut self, _: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        let Values::F64(values) = view.values else { panic!("the reference computes in f64") };
        if values != self.recorded.get(0, site).tensor.values {
            self.changed.insert(site);
        }
        Ok(())
    }

    fn replace(&mut self, site: Site) -> Result<Option<HostTensor>, ObserverError> {
        let mut value = self.recorded.get(0, site).tensor.clone();
        if site == self.moved {
            // Softmax weights stay positive, and no two rows move alike.
            // Ids become others of the 8 that there are, and logits choose others.
            let moved = |(i, x): (usize, &mut f64)| match site.stage {
                Stage::MoeRouterIndices => *x = 7.0 - *x,
                Stage::MoeRouter => *x = -*x,
                _ => *x = *x * 1.25 + 0.01 * (i % 7) as f64,
            };
            value.values.iter_mut().enumerate().for_each(moved);
        }
        Ok(Some(value))
    }
}

#[test]
fn a_stage_changes_with_its_listed_inputs_and_with_no_other_stage() {
    for name in TINY {
        let checkpoint = open(&format!("tiny/{name}"));
        let model = Model::load(Reference::<f64>::new(Arithmetic::EXACT), &checkpoint).unwrap();
        let tokens = tokens(5);
        let step = |observer: &mut dyn Observer| {
            let (phase, chunk, logits) = (Phase::Prefill, 0, LogitRows::All);
            let input = StepInput { tokens: &tokens, phase, chunk, logits };
            model.step(input, &mut model.cache(5).unwrap(), observer).unwrap();
        };
        let mut recorded = Collect::new(model.all_taps());
        step(&mut recorded);
        let sites = model.plan().sites();
        for &site in sites {
            let mut observer = Moved { recorded: &recorded, moved: site, changed: BTreeSet::new() };
            step(&mut observer);
            let listed: BTreeSet<Site> = sites
                .iter()
                .copied()
                .filter(|&reader| inputs(reader, model.config()).contains(&site))
                .collect();
            assert_eq!(observer.changed, listed, "{name}: what is computed from {site}");
            assert!(!listed.is_empty() || site.stage == Stage::LmHead, "{name}: {site} is read");
        }
    }
}

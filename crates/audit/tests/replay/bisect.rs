//! Bisections of mixtures of experts, whose tensors one file has merged and another one by one.

use apr_audit::{
    Against, BisectOptions, BisectVerdict, Culprit, Engine, Loaded, Result, Run, Script, bisect,
};
use apr_format::Checkpoint;
use apr_reference::{Arithmetic, Reference};

use crate::engine::{native, open};

const ONE_BY_ONE: &str = "tiny/qwen3-moe";
const MERGED: &str = "tiny/qwen3-moe/qwen3-moe-F16.gguf";

/// Our cpu backend, or the reference in f64.
enum Ours {
    Cpu,
    Exact,
}

impl Engine for Ours {
    fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".to_owned(),
            Self::Exact => "reference".to_owned(),
        }
    }

    fn load(&self, checkpoint: &Checkpoint) -> Result<Box<dyn Run>> {
        Ok(match self {
            Self::Cpu => Box::new(Loaded::new(native(), checkpoint, None)?),
            Self::Exact => {
                let backend = Reference::<f64>::new(Arithmetic::EXACT);
                Box::new(Loaded::new(backend, checkpoint, None)?)
            }
        })
    }
}

fn verdict(a: &Checkpoint, ours: &Ours, b: &Checkpoint, theirs: &Ours) -> BisectVerdict {
    let place = tempfile::tempdir().unwrap();
    let script = Script::Greedy { prompt: vec![5, 6, 7, 30, 2, 19], decode: 2 };
    let against = Against::Model { checkpoint: b, engine: theirs };
    let options = BisectOptions::default();
    bisect(a, ours, &against, &script, place.path(), &options, &mut |_| {}).unwrap().verdict
}

#[test]
fn one_model_in_two_containers_and_on_two_engines_drifts_at_most() {
    let (one_by_one, merged) = (open(ONE_BY_ONE), open(MERGED));
    for (a, ours, b, theirs) in [
        (&one_by_one, Ours::Cpu, &merged, Ours::Cpu),
        (&merged, Ours::Cpu, &one_by_one, Ours::Cpu),
        (&merged, Ours::Cpu, &merged, Ours::Exact),
        (&one_by_one, Ours::Cpu, &merged, Ours::Exact),
    ] {
        let found = verdict(a, &ours, b, &theirs);
        let agree = matches!(found, BisectVerdict::Match | BisectVerdict::Drift { .. });
        assert!(agree, "{}: {found:?}", a.path().display());
    }
}

#[test]
fn a_damaged_expert_is_the_files_fault_at_its_stage() {
    let mut draft = apr_testkit::Draft::of(&open(MERGED));
    let stored = draft.tensor("blk.1.ffn_up_exps.weight");
    let mut bytes = stored.bytes().to_vec();
    let of_expert = bytes.len() / 8;
    bytes.copy_within(5 * of_expert..6 * of_expert, 3 * of_expert);
    *stored =
        apr_tensor::Stored::new(stored.dtype(), stored.shape().clone(), bytes.into()).unwrap();
    for reference in [MERGED, ONE_BY_ONE] {
        let found = verdict(&draft.gguf(), &Ours::Cpu, &open(reference), &Ours::Cpu);
        let BisectVerdict::Diverges { blames } = found else { panic!("{reference}: {found:?}") };
        let blame = blames.iter().find(|blame| blame.culprit == Culprit::File);
        let blame = blame.unwrap_or_else(|| panic!("{reference}: {blames:?}"));
        assert!(blame.what.contains("up"), "{reference}: {}", blame.what);
        assert!(!blames.iter().any(|blame| blame.culprit == Culprit::Engine), "{blames:?}");
    }
}

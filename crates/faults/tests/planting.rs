//! Faults change what they say, and nothing before it.

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use apr_capture::Capture;
use apr_cpu::{Cpu, CpuOptions};
use apr_faults::{
    Engine, Expectation, Fault, Faulty, Format, ModelSpec, Planting, Rig, Severity, catalogue,
};
use apr_model::{Architecture, Backend, LogitRows, Model, Phase, Site, StepInput};
use apr_reference::{Arithmetic, Reference};
use apr_testkit::Collect;
use common::trained;

/// All values of a capture, by step and site, as bytes.
type Values = BTreeMap<(usize, Site), Vec<u8>>;

/// What the capture in `directory` holds.
fn values(directory: &Path) -> Values {
    let capture = Capture::open(directory).unwrap();
    let mut values = Values::new();
    for step in 0..capture.steps().len() {
        for site in capture.sites() {
            if capture.info(step, site).is_some() {
                let tensor = capture.tensor(step, site).unwrap();
                values.insert((step, site), tensor.bytes().to_vec());
            }
        }
    }
    values
}

/// A model and an engine for each architecture and format, and the trained model.
fn rigs(directory: &Path) -> Vec<Rig> {
    let random = |architecture, format| ModelSpec::Random { architecture, format };
    let rigs = [
        (random(Architecture::Qwen2, Format::F32), Engine::Cpu),
        (random(Architecture::Qwen2, Format::Q4_K_M), Engine::LlamaCpp),
        (random(Architecture::Qwen3, Format::Q8_0), Engine::Cpu),
        (random(Architecture::Qwen3, Format::Q4_K_M), Engine::Cpu),
        (random(Architecture::Llama, Format::Q8_0), Engine::CpuF32),
        (random(Architecture::Llama, Format::F32), Engine::Exact),
        (ModelSpec::Trained { format: Format::Q8_0 }, Engine::Cpu),
        (random(Architecture::Qwen3Moe, Format::Q4_K_M), Engine::Cpu),
        (random(Architecture::Qwen3Moe, Format::Q8_0), Engine::LlamaCpp),
        (random(Architecture::Qwen3Moe, Format::F32), Engine::CpuF32),
    ];
    let trained = trained();
    let rig = |(model, engine): (ModelSpec, Engine)| {
        let subject = model.build(Some(&trained), 5).unwrap();
        Rig::new(model, engine, subject, directory).unwrap()
    };
    rigs.map(rig).into()
}

/// A place for `fault`, in a layer that is not the first where there is a choice.
fn place(rig: &Rig, fault: &Fault) -> Option<Site> {
    let layers = [Some(2), Some(1), Some(3), Some(0), None];
    let mut sites = layers.into_iter().flat_map(|layer| {
        let stages = fault.stages.iter().filter(move |s| s.is_whole_model() == layer.is_none());
        stages.map(move |&stage| Site { layer, stage })
    });
    sites.find(|&site| fault.applies(&rig.target(site)))
}

#[test]
fn every_fault_changes_its_first_site_and_nothing_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let (clean, wrong) = (dir.path().join("clean"), dir.path().join("wrong"));
    let mut planted_kinds = BTreeSet::new();
    for (index, rig) in rigs(&clean).iter().enumerate() {
        rig.run(&clean).unwrap();
        let right = values(&clean);
        // Each kind in the first model that it fits, and some in others.
        let due = |(number, fault): (usize, &'static Fault)| {
            let is_due = !planted_kinds.contains(fault.name) || (number + index) % 8 == 0;
            is_due.then_some(fault)
        };
        let faults: Vec<&Fault> = catalogue::all().enumerate().filter_map(due).collect();
        for fault in faults {
            let Some(site) = place(rig, fault) else { continue };
            planted_kinds.insert(fault.name);
            let planting = Planting { fault, site, severity: Severity::Gross };
            let planted = rig.plant(planting, 3, &wrong).unwrap();
            let Expectation::Sites(sites) = planted.expectation else { continue };
            assert_eq!(sites.first(), Some(&site), "{}", fault.name);
            let found = values(&wrong);
            assert_nothing_before(&found, &right, site, fault.name);
            if !matches!(fault.name, "captured-other-prompt" | "declared-unrounded") {
                assert!(differs(&found, &right, site), "{} at {site} changes nothing", fault.name);
                assert!(
                    planted.effect.is_visible(),
                    "{} at {site}: {:?}",
                    fault.name,
                    planted.effect
                );
            }
        }
    }
    let all: BTreeSet<&str> = catalogue::all().map(|fault| fault.name).collect();
    assert_eq!(planted_kinds, all, "every kind fits one of the models");
}

fn assert_nothing_before(found: &Values, right: &Values, site: Site, name: &str) {
    for (key, value) in right.iter().filter(|((_, at), _)| *at < site) {
        assert!(
            found.get(key) == Some(value),
            "{name} at {site} changes {} of step {}",
            key.1,
            key.0
        );
    }
}

fn differs(found: &Values, right: &Values, site: Site) -> bool {
    right.iter().any(|(key, value)| key.1 == site && found.get(key) != Some(value))
}

#[test]
fn sites_that_are_wrong_by_themselves_are_named_beside_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let architecture = Architecture::Qwen3;
    let model = ModelSpec::Random { architecture, format: Format::F32 };
    let rig = Rig::new(model, Engine::Cpu, model.build(None, 1).unwrap(), dir.path()).unwrap();
    let expected = |name: &str, site: &str| {
        let fault = catalogue::find(name).unwrap();
        let Expectation::Sites(sites) = fault.expectation(site.parse().unwrap(), rig.config())
        else {
            panic!("{name} names sites")
        };
        sites.iter().map(Site::to_string).collect::<Vec<_>>()
    };
    assert_eq!(
        expected("gate-up-swapped", "layers.2.ffn_gate"),
        ["layers.2.ffn_gate", "layers.2.ffn_up"]
    );
    // Qwen3's head is tied to the embedding, and it has no biases.
    assert_eq!(expected("embedding-row-shifted", "embedding"), ["embedding", "lm_head"]);
    let eps = expected("file-eps", "layers.0.attn_norm");
    assert_eq!(eps.len(), 4 * 4 + 1);
    assert_eq!((&*eps[1], &*eps[16]), ("layers.0.q_norm", "final_norm"));
    let swapped = expected("layers-swapped", "layers.1.attn_norm");
    assert!(swapped.contains(&"layers.2.ffn_out".to_owned()) && swapped.len() == 18);
}

#[test]
fn a_case_is_the_same_whenever_it_is_run() {
    let dir = tempfile::tempdir().unwrap();
    let model = ModelSpec::Random { architecture: Architecture::Llama, format: Format::Q4_K_M };
    let rig = Rig::new(model, Engine::Cpu, model.build(None, 9).unwrap(), dir.path()).unwrap();
    let fault = catalogue::find("block-zeroed").unwrap();
    let site = "layers.1.ffn_out".parse().unwrap();
    let run = |seed, severity| {
        rig.plant(Planting { fault, site, severity }, seed, dir.path()).unwrap();
        values(dir.path())
    };
    let once = run(4, Severity::Subtle);
    assert!(run(4, Severity::Subtle) == once);
    assert!(run(5, Severity::Subtle) != once, "the seed chooses the block");
    assert!(run(4, Severity::Gross) != once);
}

#[test]
fn an_engine_without_a_fault_has_the_bits_of_the_one_it_wraps() {
    let cpu = || Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let exact = || Reference::<f64>::new(Arithmetic::EXACT);
    for architecture in Architecture::ALL {
        let spec = ModelSpec::Random { architecture, format: Format::Q4_K_M };
        let subject = spec.build(None, 2).unwrap();
        let load = |file: &_| (Model::load(cpu(), file), Model::load(Faulty::new(cpu()), file));
        let (plain, wrapped) = load(&subject.model);
        assert!(
            all_values(plain.unwrap(), &subject.prompt)
                == all_values(wrapped.unwrap(), &subject.prompt)
        );
        let plain = Model::load(exact(), &subject.model).unwrap();
        let wrapped = Model::load(Faulty::new(exact()), &subject.model).unwrap();
        assert_eq!(plain.plan().fingerprint(), wrapped.plan().fingerprint());
        assert!(all_values(plain, &subject.prompt) == all_values(wrapped, &subject.prompt));
    }
}

fn all_values<B: Backend>(model: Model<B>, tokens: &[u32]) -> Vec<(Site, Vec<u64>)> {
    let mut seen = Collect::new(model.all_taps());
    let input = StepInput { tokens, phase: Phase::Prefill, chunk: 0, logits: LogitRows::All };
    model.step(input, &mut model.cache(tokens.len()).unwrap(), &mut seen).unwrap();
    let bits = |x: &f64| x.to_bits();
    seen.shown
        .into_iter()
        .map(|((_, site), shown)| (site, shown.tensor.values.iter().map(bits).collect()))
        .collect()
}

#[test]
fn a_fault_is_refused_where_it_does_not_fit() {
    let dir = tempfile::tempdir().unwrap();
    let model = ModelSpec::Random { architecture: Architecture::Llama, format: Format::F32 };
    let rig = Rig::new(model, Engine::Cpu, model.build(None, 1).unwrap(), dir.path()).unwrap();
    for (name, site) in [
        ("bias-lost", "layers.1.qkv_bias"),
        ("weight-transposed", "layers.1.attn_norm"),
        ("weight-transposed", "layers.4.attn_out"),
        ("nibbles-exchanged", "layers.1.attn_out"),
        ("file-eps", "layers.1.attn_norm"),
    ] {
        let fault = catalogue::find(name).unwrap();
        let site = site.parse().unwrap();
        let planting = Planting { fault, site, severity: Severity::Gross };
        let error = rig.plant(planting, 1, dir.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(&site.to_string()), "{error}");
    }
}

//! Faults change what they say, and nothing before it.

use apr_faults::{Engine, ModelSpec, Planting, Rig, Severity, Trained, catalogue};
use apr_format::Checkpoint;
use apr_model::Site;
use apr_testkit::{fixture, golden};

fn trained() -> Trained {
    let model = Checkpoint::open(fixture("pycoder-3m/pycoder-3m-Q4_K_M.gguf")).unwrap();
    Trained { model, prompt: { let g = golden("pycoder-3m-Q4_K_M"); let mut p = g.prompt_ids; p.extend(g.greedy_ids); p.truncate(26); p } }
}

#[test]
fn smoke() {
    let trained = trained();
    println!("prompt {}", trained.prompt.len());
    let dir = tempfile::tempdir().unwrap();
    for model in ModelSpec::all() {
        for engine in Engine::ALL {
            let t = std::time::Instant::now();
            let subject = model.build(Some(&trained), 1).unwrap();
            let rig = Rig::new(model, engine, subject, &dir.path().join("clean")).unwrap();
            println!("{model} {engine} {:?}", t.elapsed());
            if engine != Engine::Cpu {
                continue;
            }
            for fault in catalogue::all() {
                for &stage in fault.stages {
                    for layer in [0, 1, 3] {
                    let site = Site { layer: (!stage.is_whole_model()).then_some(layer), stage };
                    if (stage.is_whole_model() && layer > 0) || !fault.applies(&rig.target(site)) { continue }
                    for &severity in fault.severities() {
                        let t = std::time::Instant::now();
                        let planted = rig.plant(Planting { fault, site, severity }, 1, &dir.path().join("x")).unwrap();
                        let e = planted.effect.unwrap();
                        println!("  {:26} {severity} {site} l2 {:.1e} row {:.1e} el {:.1e} kl {:.1e} flips {} {} {:?}", fault.name, e.relative_l2, e.worst_row, e.worst_element, e.logits_kl, e.argmax_flips, if e.is_visible() {""} else {"INVISIBLE"}, t.elapsed());
                    }
                    }
                }
            }
        }
    }
}

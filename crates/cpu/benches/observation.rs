//! What it costs to be looked at: nobody, one site, every site, every site copied.
//!
//! Each arm decodes the same 32 tokens with the same model. `off` is what users run; the difference between
//! two runs of it is the noise that the other arms are to be read against.

use apr_cpu::{Cpu, CpuOptions};
use apr_model::{
    LogitRows, Model, Observer, ObserverError, Phase, Site, Stage, Step, StepInput, TapSet,
    Unobserved, View,
};
use apr_testkit::{Collect, invariants};

const TOKENS: usize = 32;

fn main() {
    divan::main();
}

fn model() -> Model<Cpu> {
    let options = CpuOptions { threads: Some(1), ..CpuOptions::default() };
    invariants::load(Cpu::new(options).unwrap(), "pycoder-3m/pycoder-3m-Q4_K_M.gguf")
}

fn decode(model: &Model<Cpu>, observer: &mut dyn Observer) {
    let mut cache = model.cache(TOKENS).unwrap();
    for token in invariants::tokens(TOKENS) {
        let input =
            StepInput { tokens: &[token], phase: Phase::Decode, chunk: 0, logits: LogitRows::Last };
        divan::black_box(model.step(input, &mut cache, observer).unwrap());
    }
}

/// Sees values where they lie, and does nothing.
struct Glance(TapSet);

impl Observer for Glance {
    fn wanted(&self) -> TapSet {
        self.0.clone()
    }

    fn value(&mut self, _: &Step<'_>, _: Site, view: View<'_>) -> Result<(), ObserverError> {
        divan::black_box(view);
        Ok(())
    }
}

#[divan::bench]
fn off(bencher: divan::Bencher) {
    let model = model();
    bencher.bench_local(|| decode(&model, &mut Unobserved));
}

#[divan::bench]
fn off_again(bencher: divan::Bencher) {
    off(bencher);
}

#[divan::bench]
fn one(bencher: divan::Bencher) {
    let model = model();
    let site = Site::layer(1, Stage::FfnNorm);
    bencher.bench_local(|| decode(&model, &mut Glance([site].into_iter().collect())));
}

#[divan::bench]
fn all(bencher: divan::Bencher) {
    let model = model();
    bencher.bench_local(|| decode(&model, &mut Glance(model.all_taps())));
}

#[divan::bench]
fn all_copied(bencher: divan::Bencher) {
    let model = model();
    bencher.bench_local(|| decode(&model, &mut Collect::new(model.all_taps())));
}

//! An engine that computes nothing: it shows an observer made-up values of the right shapes.

#![allow(dead_code, reason = "each test uses its own part")]

use apr_capture::{
    Dims, Provenance, Recorder, RecorderOptions, Result,
    manifest::{Model, Tool},
};
use apr_model::{Observer, ObserverError, Phase, Site, Stage, Step, TapSet, Values, View};
use std::path::{Path, PathBuf};

pub(crate) fn dims() -> Dims {
    Dims {
        num_hidden_layers: 2,
        hidden_size: 8,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 2,
        intermediate_size: 12,
        vocab_size: 16,
        attention_bias: true,
        qk_norm: false,
        moe: None,
    }
}

pub(crate) fn provenance() -> Provenance {
    Provenance {
        tool: Tool { name: "test".into(), version: "0".into() },
        model: Model {
            path: "m.gguf".into(),
            format: "gguf".into(),
            architecture: Some("qwen2".into()),
            index_sha256: None,
            file_sha256: None,
            config: None,
        },
        prompt: None,
        backend: None,
        plan: None,
        kv: None,
    }
}

/// Everything that the model can show.
pub(crate) fn all_sites(dims: &Dims) -> TapSet {
    let mut sites = TapSet::none();
    for stage in dims.stages() {
        match stage.is_whole_model() {
            true => sites.insert(Site::whole(stage)),
            false => (0..dims.num_hidden_layers).for_each(|i| sites.insert(Site::layer(i, stage))),
        }
    }
    sites
}

pub(crate) fn prefill(tokens: &[u32]) -> Step<'_> {
    let last = tokens.len() - 1;
    Step {
        index: 0,
        phase: Phase::Prefill,
        chunk: 0,
        tokens,
        first_position: 0,
        logit_rows: last..last + 1,
    }
}

pub(crate) fn decode(index: usize, token: &[u32], position: usize) -> Step<'_> {
    Step {
        index,
        phase: Phase::Decode,
        chunk: 0,
        tokens: token,
        first_position: position,
        logit_rows: 0..1,
    }
}

/// The value of channel `channel` of `site` at token position `position`, the same whatever the step.
pub(crate) fn value(site: Site, position: usize, channel: usize) -> f32 {
    let (place, stage) = site.order();
    let seed = (place as f32).sin() + (stage as u8 as f32) * 0.1;
    (seed + position as f32 * 0.37 + channel as f32 * 0.11).sin()
}

/// All values of `site` in `step`, and their shape.
pub(crate) fn values(dims: &Dims, step: &Step<'_>, site: Site) -> (Vec<usize>, Vec<f32>) {
    let positions = step.positions(site);
    let keys = step.first_position + step.tokens.len();
    let shape = dims.shape(site.stage, positions.len(), keys);
    let mut values = Vec::new();
    if matches!(site.stage, Stage::AttnScores | Stage::AttnSoftmax) {
        for head in 0..shape[0] {
            for position in positions.clone() {
                values.extend((0..keys).map(|key| match key <= position {
                    true => value(site, position, head * 1000 + key),
                    false => 0.0,
                }));
            }
        }
    } else {
        let width: usize = shape[1..].iter().product();
        for position in positions {
            values.extend((0..width).map(|channel| value(site, position, channel)));
        }
    }
    (shape, values)
}

/// Runs one step under `observer`.
pub(crate) fn run(
    observer: &mut dyn Observer,
    dims: &Dims,
    step: &Step<'_>,
) -> Result<(), ObserverError> {
    observer.begin(step)?;
    for site in observer.wanted().iter() {
        let (shape, values) = values(dims, step, site);
        observer.value(step, site, View { shape: &shape, values: Values::F32(&values) })?;
    }
    observer.end(step)
}

/// A capture of the prompt 5, 6, 7 and one decoded token.
pub(crate) fn record(out: &Path, change: impl FnOnce(&mut RecorderOptions)) -> Result<PathBuf> {
    let dims = dims();
    let mut options = RecorderOptions::new(all_sites(&dims));
    change(&mut options);
    let mut recorder = Recorder::create(out, provenance(), dims.clone(), options)?;
    run(&mut recorder, &dims, &prefill(&[5, 6, 7])).unwrap();
    run(&mut recorder, &dims, &decode(1, &[8], 3)).unwrap();
    recorder.finish()
}

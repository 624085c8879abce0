//! What every backend must promise, as checks that its tests call.
//!
//! Each check loads the tiny models onto the backend and compares bits: of all stages, for whoever
//! looks and however the tokens are cut into steps.

use apr_format::Checkpoint;
use apr_model::{
    Backend, Cache, Error, HostTensor, LogitRows, Model, Observer, Phase, Site, Stage, StepInput,
    TapSet, Unobserved,
};

use crate::{Collect, TINY, fixture};

/// Models of every architecture, as they lie on disk: bf16 safetensors and f16 GGUF.
pub fn tiny_files() -> Vec<String> {
    TINY.iter().flat_map(|t| [format!("tiny/{t}"), format!("tiny/{t}/{t}-F16.gguf")]).collect()
}

/// The same, and a model whose weights are quantised.
fn files() -> Vec<String> {
    let mut files = tiny_files();
    files.push("pycoder-3m/pycoder-3m-Q4_K_M.gguf".to_owned());
    files
}

/// Loads the fixture `file`.
///
/// # Panics
/// If it cannot be loaded.
pub fn load<B: Backend>(backend: B, file: &str) -> Model<B> {
    let checkpoint = Checkpoint::open(fixture(file)).unwrap_or_else(|e| panic!("{e}"));
    Model::load(backend, &checkpoint).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// Runs `tokens` in steps of the given lengths and returns the logits of every row, as bits.
///
/// # Panics
/// If a step fails.
pub fn logits<B: Backend>(
    model: &Model<B>,
    tokens: &[u32],
    lengths: &[usize],
    observer: &mut dyn Observer,
) -> Vec<u32> {
    assert_eq!(lengths.iter().sum::<usize>(), tokens.len(), "the steps cover the tokens");
    let mut cache = model.cache(tokens.len()).unwrap();
    let mut bits = Vec::new();
    let mut rest = tokens;
    for (chunk, &length) in lengths.iter().enumerate() {
        let (tokens, after) = rest.split_at(length);
        rest = after;
        bits.extend(step(model, &mut cache, tokens, chunk, observer).unwrap());
    }
    bits
}

fn step<B: Backend>(
    model: &Model<B>,
    cache: &mut Cache<B>,
    tokens: &[u32],
    chunk: usize,
    observer: &mut dyn Observer,
) -> Result<Vec<u32>, Error> {
    let input = StepInput { tokens, phase: Phase::Prefill, chunk, logits: LogitRows::All };
    let logits = model.step(input, cache, observer)?;
    Ok(logits.as_slice().iter().map(|x| x.to_bits()).collect())
}

/// Tokens that every tiny vocabulary has, none like its neighbours.
pub fn tokens(n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * 37 + 11) % 251).collect()
}

/// Looking changes nothing: no taps, one tap and all taps give the same bits.
///
/// # Panics
/// If they do not.
pub fn observed_equals_unobserved<B: Backend>(backend: impl Fn() -> B) {
    for file in files() {
        let model = load(backend(), &file);
        let tokens = tokens(9);
        let off = logits(&model, &tokens, &[9], &mut Unobserved);
        let one: TapSet = [Site::layer(1, Stage::AttnSoftmax)].into_iter().collect();
        for taps in [one, model.all_taps()] {
            let mut seen = Collect::new(taps.clone());
            assert!(
                logits(&model, &tokens, &[9], &mut seen) == off,
                "{file}: looking changed bits"
            );
            assert_eq!(seen.order.len(), taps.iter().count(), "{file}");
        }
        let again = load(backend(), &file);
        assert_eq!(model.plan().fingerprint(), again.plan().fingerprint(), "{file}");
    }
}

/// Every stage has the same bits however the tokens are cut into steps: at once, in chunks of 7, one by one.
///
/// # Panics
/// If it does not.
pub fn bits_do_not_depend_on_chunking<B: Backend>(backend: impl Fn() -> B) {
    const N: usize = 64;
    for file in files() {
        let model = load(backend(), &file);
        let tokens = tokens(N);
        let mut whole = Collect::new(model.all_taps());
        let expected = logits(&model, &tokens, &[N], &mut whole);
        let mut sevens = vec![7; N / 7];
        sevens.push(N % 7);
        for lengths in [sevens, vec![1; N]] {
            let mut parts = Collect::new(model.all_taps());
            let bits = logits(&model, &tokens, &lengths, &mut parts);
            assert!(bits == expected, "{file}: other logits in steps of {}", lengths[0]);
            for (&(index, site), part) in &parts.shown {
                let axis = site.stage.axes().row_axis();
                let positions: Vec<usize> = part.positions.clone().collect();
                let mut same = whole.get(0, site).at(axis, &positions);
                if axis == 1 {
                    same = first_keys(&same, part.tensor.shape[2]);
                }
                assert!(
                    same_bits(&same, &part.tensor),
                    "{file}: {site} of step {index} differs in steps of {}",
                    lengths[0]
                );
            }
        }
    }
}

/// The first `keys` columns: a chunk cannot see keys that come after it.
fn first_keys(tensor: &HostTensor, keys: usize) -> HostTensor {
    let width = tensor.shape[2];
    let values = tensor.values.chunks(width).flat_map(|row| row[..keys].to_vec()).collect();
    HostTensor { shape: vec![tensor.shape[0], tensor.shape[1], keys], values }
}

fn same_bits(a: &HostTensor, b: &HostTensor) -> bool {
    a.shape == b.shape && a.values.iter().zip(&b.values).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// A row's logits do not depend on which other rows get theirs; asking for none gives none.
///
/// # Panics
/// If that is not so.
pub fn logits_do_not_depend_on_the_rows_asked_for<B: Backend>(backend: impl Fn() -> B) {
    let model = load(backend(), "tiny/qwen3");
    let tokens = tokens(7);
    let of = |logits| {
        let input = StepInput { tokens: &tokens, phase: Phase::Prefill, chunk: 0, logits };
        let mut seen = Collect::new(model.all_taps());
        model.step(input, &mut model.cache(7).unwrap(), &mut seen).unwrap().clone()
    };
    let (none, last, all) = (of(LogitRows::None), of(LogitRows::Last), of(LogitRows::All));
    assert!(none.last().is_none() && all.rows().count() == 7, "rows as asked for");
    assert!(last.last().is_some() && last.last() == all.last(), "the last row's logits");
}

/// A model shows every stage of its architecture, each once, in the order of computation.
///
/// # Panics
/// If it does not.
pub fn every_stage_is_shown_in_order<B: Backend>(backend: impl Fn() -> B) {
    for file in tiny_files() {
        let model = load(backend(), &file);
        let config = model.config();
        let mut expected = Vec::new();
        for stage in Stage::all() {
            let there = match stage {
                Stage::QkvBias => config.attention_bias,
                Stage::QNorm | Stage::KNorm => config.qk_norm,
                _ => true,
            };
            match stage.is_whole_model() {
                true => expected.push(Site::whole(stage)),
                false if there => {
                    let has = |&i: &usize| {
                        let experts = config.experts_of(i).is_some();
                        stage.of_experts().is_none_or(|of_experts| of_experts == experts)
                    };
                    let layers = (0..config.num_hidden_layers).filter(has);
                    expected.extend(layers.map(|i| Site::layer(i, stage)));
                }
                false => {}
            }
        }
        expected.sort();
        let mut seen = Collect::new(model.all_taps());
        logits(&model, &tokens(5), &[5], &mut seen);
        assert_eq!(seen.order, expected, "{file}");
        assert_eq!(model.plan().sites(), expected, "{file}");
    }
}

/// A value put in at any site is what the rest of the step uses; a wrong shape is refused, and so are steps after it.
///
/// Each site is replaced by its own value first, which must change nothing, and then by that value with one element
/// moved, which must change something downstream and nothing upstream.
///
/// # Panics
/// If that is not so.
pub fn replaced_values_are_used<B: Backend>(backend: impl Fn() -> B) {
    for name in TINY {
        let model = load(backend(), &format!("tiny/{name}"));
        let tokens = tokens(4);
        let mut seen = Collect::new(model.all_taps());
        let expected = logits(&model, &tokens, &[4], &mut seen);
        for &site in model.plan().sites() {
            let own = seen.get(0, site).tensor.clone();
            let mut same = Collect::new(model.all_taps()).replacing(site, own.clone());
            let unchanged = logits(&model, &tokens, &[4], &mut same) == expected;
            assert!(unchanged, "{name}: {site} replaced by itself changed the logits");

            let mut moved = own.clone();
            // The last row of the first head: never masked, and, unlike the first row, with a choice of keys.
            let axis = site.stage.axes().row_axis();
            let row_len = own.shape[axis + 1..].iter().product::<usize>();
            let element = &mut moved.values[(own.shape[axis] - 1) * row_len];
            *element = match (site.stage.holds_ids(), &model.config().moe) {
                (true, Some(moe)) => (*element + 1.0) % moe.num_experts as f64,
                // The logit of an expert that is not chosen has no effect.
                _ if site.stage == Stage::MoeRouter => 100.0,
                _ => *element * 1.5 + 0.25,
            };
            let mut graft = Collect::new(model.all_taps()).replacing(site, moved);
            let changed = logits(&model, &tokens, &[4], &mut graft);
            assert!(changed != expected, "{name}: the value put in at {site} was not used");
            for &earlier in model.plan().sites().iter().take_while(|&&earlier| earlier <= site) {
                let (a, b) = (graft.get(0, earlier), seen.get(0, earlier));
                assert!(same_bits(&a.tensor, &b.tensor), "{name}: {site} changed {earlier}");
            }

            let wrong = HostTensor { shape: vec![1, 1], values: vec![0.0] };
            let mut wrong = Collect::new(model.all_taps()).replacing(site, wrong);
            let mut cache = model.cache(4).unwrap();
            let error = step(&model, &mut cache, &tokens, 0, &mut wrong).unwrap_err();
            assert!(
                matches!(error, Error::ReplacementShape { site: s, .. } if s == site),
                "{error}"
            );
            let again = step(&model, &mut cache, &tokens, 0, &mut Unobserved);
            assert!(matches!(again, Err(Error::BrokenCache)), "{name}: goes on after {site}");
        }
    }
}

/// Nonsense input is an error, not a panic.
///
/// # Panics
/// If it is not.
pub fn bad_input_is_refused<B: Backend>(backend: impl Fn() -> B) {
    let model = load(backend(), "tiny/qwen2");
    let mut cache = model.cache(4).unwrap();
    let vocab_size = model.config().vocab_size;
    let mut attempt = |tokens: &[u32]| step(&model, &mut cache, tokens, 0, &mut Unobserved);
    assert!(matches!(attempt(&[]), Err(Error::NoTokens)));
    let outside = attempt(&[vocab_size as u32]);
    assert!(matches!(outside, Err(Error::TokenOutOfRange { .. })));
    let long = attempt(&[1; 5]);
    assert!(matches!(long, Err(Error::ContextFull { needed: 5, capacity: 4 })));
    let beyond = model.cache(usize::MAX);
    assert!(matches!(beyond, Err(Error::ContextFull { .. })));
}

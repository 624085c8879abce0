//! A bound model, its cache, and the step.

use std::{
    iter,
    ops::{ControlFlow, Range},
};

use apr_format::Checkpoint;

use crate::{
    Backend, Config, Cx, Error, KvShape, LayerKv, Observer, Phase, Plan, Result, RopeTable, Site,
    Stage, Step, TapSet, Values,
    bind::{LoadWatch, Loader, bind},
    decoder::{Decoder, Ffn, forward},
};

/// A model on a backend, ready to run.
#[allow(missing_debug_implementations, reason = "a backend's weights need not be printable")]
pub struct Model<B: Backend> {
    backend: B,
    decoder: Decoder<B::Weight, B::Vector>,
    plan: Plan,
}

impl<B: Backend> Model<B> {
    /// Takes the weights of `checkpoint` to `backend`.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_watched(backend, checkpoint, &mut |_| ControlFlow::Continue(()))
    }

    /// The same in front of `watch`, which hears of each tensor that was taken and may stop the loading.
    pub fn load_watched(
        backend: B,
        checkpoint: &Checkpoint,
        watch: &mut LoadWatch<'_>,
    ) -> Result<Self> {
        let decoder = bind(&Loader::new(&backend, checkpoint, watch), checkpoint)?;
        let plan = Plan::of(&backend, &decoder)?;
        // What was copied is not read again, and what was not comes back when it is read first.
        checkpoint.files().iter().for_each(|file| file.bytes().release());
        Ok(Self { backend, decoder, plan })
    }

    /// The model's dimensions and constants.
    pub fn config(&self) -> &Config {
        &self.decoder.config
    }

    /// Where it runs.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// What each step executes.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// An empty cache for sequences of up to `capacity` positions.
    pub fn cache(&self, capacity: usize) -> Result<Cache<B>> {
        let config = self.config();
        if capacity > config.max_position_embeddings {
            return Err(Error::ContextFull {
                needed: capacity,
                capacity: config.max_position_embeddings,
            });
        }
        let shape = KvShape { heads: config.num_key_value_heads, head_dim: config.head_dim };
        let layers = (0..config.num_hidden_layers)
            .map(|_| self.backend.kv(shape, capacity))
            .collect::<Result<_>>()?;
        let (rotation, logits) = (RopeTable::default(), Logits::none(config.vocab_size));
        Ok(Cache { layers, rotation, logits, len: 0, capacity, steps: 0, broken: false })
    }

    /// Runs `input` through the model, after what `cache` has seen, in front of `observer`. The logits are
    /// [the cache's](Cache::logits), until the next step.
    ///
    /// Input that is refused leaves `cache` as it was. After any other error no further step can use it.
    pub fn step<'c>(
        &self,
        input: StepInput<'_>,
        cache: &'c mut Cache<B>,
        observer: &mut dyn Observer,
    ) -> Result<&'c Logits> {
        let StepInput { tokens, phase, chunk, logits } = input;
        let vocab_size = self.config().vocab_size;
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::TokenOutOfRange { id, vocab_size });
        }
        if cache.broken {
            return Err(Error::BrokenCache);
        }
        let needed = cache.len + tokens.len();
        if needed > cache.capacity {
            return Err(Error::ContextFull { needed, capacity: cache.capacity });
        }
        let step = Step {
            index: cache.steps,
            phase,
            chunk,
            tokens,
            first_position: cache.len,
            logit_rows: logits.of(tokens.len()),
        };

        let taps = observer.wanted();
        let at_edge = |source| Error::Observer { site: None, source };
        if !taps.is_empty() {
            observer.begin(&step).map_err(at_edge)?;
        }
        cache.broken = true;
        let mut cx = Cx::new(&self.backend, &step, &taps, observer);
        let logits = forward(&mut cx, &self.decoder, &mut cache.layers, &mut cache.rotation)?;
        cx.finish()?;
        if !taps.is_empty() {
            observer.end(&step).map_err(at_edge)?;
        }

        cache.broken = false;
        cache.len = needed;
        cache.steps += 1;
        self.download(&logits, &mut cache.logits)?;
        Ok(&cache.logits)
    }

    fn download(&self, logits: &B::Tensor, Logits { values, .. }: &mut Logits) -> Result<()> {
        values.clear();
        let mut sink = |_: Site, view: crate::View<'_>| {
            // Those of a whole prompt may be large; they are not kept for the single row that comes next.
            values.shrink_to(view.values.len());
            match view.values {
                Values::F32(v) => values.extend_from_slice(v),
                Values::F64(v) => values.extend(v.iter().map(|&x| x as f32)),
            }
            Ok(())
        };
        self.backend.show(Site::whole(Stage::LmHead), logits, &mut sink)?;
        self.backend.drain(&mut sink)
    }

    /// The matrix that `site`'s op reads, if it reads one and the model has the site. Those of experts lie one below the
    /// other.
    pub fn weight(&self, site: Site) -> Option<&B::Weight> {
        let Decoder { embed_tokens, layers, lm_head, .. } = &self.decoder;
        let layer = site.layer.map(|layer| layers.get(layer as usize));
        match (site.stage, layer) {
            (Stage::Embedding, None) => Some(embed_tokens),
            (Stage::LmHead, None) => Some(lm_head.as_ref().unwrap_or(embed_tokens)),
            (Stage::QkvMatmul, Some(layer)) => Some(&layer?.qkv),
            (Stage::AttnOut, Some(layer)) => Some(&layer?.attn_output),
            (stage, Some(layer)) => match (stage, &layer?.ffn) {
                (Stage::FfnGate, Ffn::Dense { gate, .. })
                | (Stage::MoeExpertGate, Ffn::Moe { gate, .. }) => Some(gate),
                (Stage::FfnUp, Ffn::Dense { up, .. })
                | (Stage::MoeExpertUp, Ffn::Moe { up, .. }) => Some(up),
                (Stage::FfnOut, Ffn::Dense { down, .. })
                | (Stage::MoeExpertOut, Ffn::Moe { down, .. }) => Some(down),
                (Stage::MoeRouter, Ffn::Moe { router, .. }) => Some(router),
                _ => None,
            },
            _ => None,
        }
    }

    /// All matrices, one that is used twice once.
    pub fn weights(&self) -> impl Iterator<Item = &B::Weight> {
        let Decoder { embed_tokens, layers, lm_head, .. } = &self.decoder;
        let of_layers = layers.iter().flat_map(|layer| {
            let ffn = match &layer.ffn {
                Ffn::Dense { gate, up, down } => [None, Some(gate), Some(up), Some(down)],
                Ffn::Moe { router, gate, up, down, .. } => [router, gate, up, down].map(Some),
            };
            [&layer.qkv, &layer.attn_output].into_iter().chain(ffn.into_iter().flatten())
        });
        iter::once(embed_tokens).chain(of_layers).chain(lm_head)
    }

    /// The norm weight or bias that `site`'s op reads, if it reads one and the model has the site.
    pub fn vector(&self, site: Site) -> Option<&B::Vector> {
        let layer = site.layer.map(|layer| self.decoder.layers.get(layer as usize));
        match (site.stage, layer) {
            (Stage::FinalNorm, None) => Some(&self.decoder.norm),
            (Stage::AttnNorm, Some(layer)) => Some(&layer?.attn_norm),
            (Stage::QkvBias, Some(layer)) => layer?.qkv_bias.as_ref(),
            (Stage::QNorm, Some(layer)) => layer?.q_norm.as_ref(),
            (Stage::KNorm, Some(layer)) => layer?.k_norm.as_ref(),
            (Stage::FfnNorm, Some(layer)) => Some(&layer?.ffn_norm),
            _ => None,
        }
    }

    /// Every site that this model can show.
    pub fn all_taps(&self) -> TapSet {
        self.plan.sites().iter().copied().collect()
    }
}

/// What a step is to compute.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// The tokens, which follow those that the cache has seen.
    pub tokens: &'a [u32],
    /// Prompt or continuation.
    pub phase: Phase,
    /// The number of this prefill chunk.
    pub chunk: usize,
    /// Which rows get logits.
    pub logits: LogitRows,
}

/// Which rows of a step get logits. A row's logits do not depend on the choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum LogitRows {
    None,
    Last,
    All,
}

impl LogitRows {
    fn of(self, rows: usize) -> Range<usize> {
        match self {
            Self::None => rows..rows,
            Self::Last => rows - 1..rows,
            Self::All => 0..rows,
        }
    }
}

/// The keys and values of a sequence.
#[allow(missing_debug_implementations, reason = "a backend's cache need not be printable")]
pub struct Cache<B: Backend> {
    layers: Vec<B::Kv>,
    /// The angles and the logits of the last step: kept here so that a step finds their memory.
    rotation: RopeTable,
    logits: Logits,
    len: usize,
    capacity: usize,
    steps: usize,
    /// Whether a step began that did not come to its end.
    broken: bool,
}

impl<B: Backend> Cache<B> {
    /// Positions seen so far.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been seen.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The memory set aside for keys and values, in bytes. Of a backend that grows its cache: so far.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(B::Kv::bytes).sum()
    }

    /// The logits of the last step, of the rows it was asked for.
    pub fn logits(&self) -> &Logits {
        &self.logits
    }

    /// Goes back to the first `len` positions, if there are more. Steps are counted on.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.layers.iter_mut().for_each(|layer| layer.truncate(len));
            self.len = len;
        }
    }
}

/// A copy is a snapshot: both sequences go on from here, and neither sees the other.
impl<B: Backend> Clone for Cache<B> {
    fn clone(&self) -> Self {
        let (layers, logits) = (self.layers.clone(), self.logits.clone());
        Self { layers, rotation: RopeTable::default(), logits, ..*self }
    }
}

/// The logits of a step, `[rows asked for, vocab]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Logits {
    values: Vec<f32>,
    vocab_size: usize,
}

impl Logits {
    fn none(vocab_size: usize) -> Self {
        Self { values: Vec::new(), vocab_size }
    }

    /// All values, row after row.
    pub fn as_slice(&self) -> &[f32] {
        &self.values
    }

    /// One row after the other.
    pub fn rows(&self) -> impl DoubleEndedIterator<Item = &[f32]> {
        self.values.chunks_exact(self.vocab_size)
    }

    /// The last row, if any was asked for.
    pub fn last(&self) -> Option<&[f32]> {
        self.rows().next_back()
    }
}

//! What a checkpoint says about itself, in another container's words.
//!
//! Facts are read once, from whichever container: the config by `apr_model`, the tokenizer as `apr_tokenizer::Parts`.
//! [`gguf`], [`apr`] and [`hugging_face`] write them, and what they write is read back and compared before anything else is
//! done. An `.apr` file takes the other container's own words along ([`carried`]), so that the way back loses
//! nothing. What else the source says, the target cannot: [`known`] tells what runs without it.

mod apr;
mod carried;
mod check;
mod gguf;
mod hugging_face;
mod json;
mod known;

use apr_format::{Checkpoint, Container, Map};
use apr_model::Config;
use apr_tokenizer::{Parts, Tokenizer};

use crate::{Layout, Loss, Result, Target};
use carried::Original;

/// Metadata in the target's words.
#[derive(Clone, Debug, Default)]
pub struct Translated {
    /// The container's own keys.
    pub map: Map,
    /// Names and contents of the files beside the tensors of a Hugging Face directory: `config.json`, `tokenizer.json`, ...
    pub files: Vec<(String, Vec<u8>)>,
    /// What the target cannot say.
    pub losses: Vec<Loss>,
    /// What the target cannot say and no one who runs the model needs.
    pub notes: Vec<Loss>,
}

/// What `source`, which runs with `config`, says about itself, for tensors stored as `layout` says.
pub fn translate(
    source: &Checkpoint,
    config: &Config,
    target: Target,
    layout: &Layout,
) -> Result<Translated> {
    let facts = Facts::of(source, config, layout)?;
    let mut translated = Translated::default();
    match (target, Original::of(source, target)?) {
        (Target::Gguf, Some(original)) => {
            translated.map = gguf::updated(original.gguf(&facts)?, &facts);
        }
        (Target::Safetensors, Some(original)) => {
            translated.files = hugging_face::updated(original.files(&facts)?, &facts).texts();
        }
        (Target::Apr, Some(original)) => {
            translated.map = apr::updated(original.apr(), &facts);
        }
        (Target::Gguf, None) => translated.map = gguf::write(&facts)?,
        (Target::Safetensors, None) => {
            let (files, loss) = hugging_face::write(&facts)?;
            translated.files = files.texts();
            translated.losses.extend(loss);
        }
        (Target::Apr, None) => {
            translated.map = apr::write(&facts)?;
            carried::carry(&facts, &mut translated.map)?;
        }
    }
    known::judge(&facts, target, &mut translated)?;
    if target == Target::Safetensors {
        // Without it, some readers take the file for TensorFlow's.
        translated.map.insert("format", "pt");
    }
    check::reads_as(&facts, target, &translated)?;
    Ok(translated)
}

/// What a checkpoint says, in no container's words.
struct Facts<'a> {
    source: &'a Checkpoint,
    config: &'a Config,
    layout: &'a Layout,
    name: String,
    tokenizer: Option<Parts>,
    /// All tokens that end a generation.
    ends: Vec<u32>,
    /// What only a `tokenizer.json` can say.
    omissions: Vec<Loss>,
}

impl<'a> Facts<'a> {
    fn of(source: &'a Checkpoint, config: &'a Config, layout: &'a Layout) -> Result<Self> {
        let (tokenizer, omissions) = match Parts::of(source)? {
            Some((parts, omissions)) => (Some(parts), omissions),
            None => (None, Vec::new()),
        };
        let ends = match &tokenizer {
            Some(_) => Tokenizer::from_checkpoint(source)?.eos_ids().to_vec(),
            None => Vec::new(),
        };
        let omissions =
            omissions.into_iter().map(|omission| Loss { what: omission.key, why: omission.why });
        let omissions = omissions.collect();
        Ok(Self { source, config, layout, name: name_of(source)?, tokenizer, ends, omissions })
    }

    /// The text of one of the special tokens.
    fn token(&self, id: impl FnOnce(&Parts) -> Option<u32>) -> Option<&str> {
        let parts = self.tokenizer.as_ref()?;
        parts.text(id(parts)?)
    }
}

/// The model's name: its own, or that of the directory.
fn name_of(source: &Checkpoint) -> Result<String> {
    let own = match source.container() {
        Container::Gguf { .. } => source.metadata().str("general.name")?,
        Container::Apr => source.metadata().str("name")?,
        Container::Safetensors => None,
    };
    let path = source.path().canonicalize().unwrap_or_else(|_| source.path().to_owned());
    let path = if path.is_dir() { path.file_name() } else { path.file_stem() };
    let path = path.map(|name| name.to_string_lossy().into_owned());
    Ok(own.map(str::to_owned).or(path).unwrap_or_else(|| "model".to_owned()))
}

/// A number that was stored as f32 in the decimals that its author wrote: `1e-6`, not `9.999999974752427e-7`.
fn decimal(x: f64) -> f64 {
    let single = x as f32;
    match f64::from(single) == x {
        true => single.to_string().parse().unwrap_or(x),
        false => x,
    }
}

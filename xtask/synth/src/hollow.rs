//! A model with a config, a tokenizer and tensors, whose weights are a hole in a file: they take no room, and nobody
//! reads them.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use apr_convert::{Options, Output, Plan, Recipe, Target};
use apr_format::{Array, Checkpoint, Value, safetensors::Safetensors, write::Writer};
use apr_model::{Config, read_config};
use apr_tensor::DType;

use crate::{shape::Shape, tensors::tensors, vocabulary};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The type of the weights that are not there: any that is not quantised will do.
const DTYPE: DType = DType::BF16;

/// A Hugging Face directory of a model without weights.
#[derive(Debug)]
pub(crate) struct Hollow {
    directory: PathBuf,
    config: Config,
}

impl Hollow {
    /// The model of `shape`, with the tokenizer at this path or one that is made up, in a new directory in `parent`.
    pub(crate) fn new(parent: &Path, shape: &Shape, tokenizer: Option<&Path>) -> Result<Self> {
        let config = config_of(shape)?;
        // A converted model is called after its directory.
        let directory = parent.join(format!("random {}", shape.name));
        let hollow = Self { directory, config };
        hollow.write(shape, tokenizer).with_context(|| hollow.directory.display().to_string())?;
        Ok(hollow)
    }

    fn write(&self, shape: &Shape, tokenizer: Option<&Path>) -> Result<()> {
        fs::create_dir(&self.directory)?;
        fs::write(self.directory.join(CONFIG), &shape.config)?;
        self.weights()?;
        let Some(path) = tokenizer else {
            let Some(files) = vocabulary::files(self.config.vocab_size) else {
                bail!(
                    "vocab_size {}: no room for all bytes; give a --tokenizer",
                    self.config.vocab_size
                );
            };
            for (name, content) in files {
                fs::write(self.directory.join(name), content.to_string())?;
            }
            return Ok(());
        };
        fs::copy(path, self.directory.join(TOKENIZER))
            .with_context(|| path.display().to_string())?;
        let beside = path.with_file_name(TOKENIZER_CONFIG);
        if beside.exists() {
            fs::copy(&beside, self.directory.join(TOKENIZER_CONFIG))
                .with_context(|| beside.display().to_string())?;
        }
        Ok(())
    }

    /// Writes the header of the weights, and leaves out what it announces.
    fn weights(&self) -> Result<()> {
        let mut writer = Writer::<Safetensors>::new();
        let mut bytes = 0;
        for (role, shape) in tensors(&self.config) {
            let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
            let elements = elements.with_context(|| format!("{role}: too large"))?;
            bytes += (elements * DTYPE.block_bytes()) as u64;
            writer.tensor(&role.hf_name(), DTYPE, apr_tensor::Shape::new(shape))?;
        }
        let file = File::create_new(self.directory.join(WEIGHTS))?;
        drop(writer.begin(&file)?);
        file.set_len(file.metadata()?.len() + bytes)?;
        Ok(())
    }

    /// What a conversion by `recipe` would write to `path`.
    pub(crate) fn plan(&self, recipe: Recipe, path: &Path, force: bool) -> Result<(Plan, Output)> {
        let source = Checkpoint::open(&self.directory)?;
        let output = Output::new(path, Target::Gguf, &source, force)?;
        let options = Options { recipe: Some(recipe), ..Options::default() };
        let plan = Plan::new(&source, Target::Gguf, options)?;
        let tokens = plan.metadata.map.get("tokenizer.ggml.tokens").and_then(Value::as_array);
        let (tokens, vocab) = (tokens.map_or(0, Array::len), self.config.vocab_size);
        if tokens > vocab {
            bail!(
                "the tokenizer has {tokens} tokens, the shape has {vocab}; give the tokenizer of this very model"
            );
        }
        Ok((plan, output))
    }
}

/// The config that `shape` says.
pub(crate) fn config_of(shape: &Shape) -> Result<Config> {
    let nothing = Writer::<Safetensors>::new().begin(Vec::new())?.finish()?;
    let config = shape.config.clone().into_bytes();
    let files = [(CONFIG.to_owned(), config.into()), (WEIGHTS.to_owned(), nothing.into())];
    Ok(read_config(&Checkpoint::from_files(&shape.name, &files)?)?)
}

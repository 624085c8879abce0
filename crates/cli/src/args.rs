//! Options that several commands share, under the same names everywhere.

use apr_cpu::{Activations, Isa, KvType};
use clap::ValueEnum;

/// Where the model runs, and in what arithmetic.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Backend")]
pub(crate) struct BackendArgs {
    /// What runs the ops.
    #[arg(long, value_enum, value_name = "NAME", default_value_t)]
    pub(crate) backend: BackendName,
    /// Threads of the cpu backend [default: all cores]. Results do not depend on it.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) threads: Option<usize>,
    /// Instruction set of the cpu backend: scalar, avx2, avxvnni, avx512, amx, neon or neondot [default: the best that the machine has].
    /// Results do not depend on it.
    #[arg(long, value_name = "NAME")]
    pub(crate) isa: Option<Isa>,
    /// Leave quantised weights as the file has them instead of reordering them on load: the least memory and the
    /// quickest start, but slower tokens. Results do not depend on it.
    #[arg(long)]
    pub(crate) no_repack: bool,
    /// What activations are rounded to before they meet quantised weights.
    #[arg(long, value_enum, value_name = "TYPE", default_value_t)]
    pub(crate) activations: ActivationsArg,
    /// What keys and values are kept as [default: f16; f64 on the reference backend].
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) kv: Option<KvArg>,
    /// Number type of the reference backend [default: f64].
    #[arg(long, value_enum, value_name = "TYPE")]
    pub(crate) precision: Option<Precision>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum BackendName {
    /// Fast: SIMD and threads, quantised weights as stored.
    #[default]
    Cpu,
    /// Exact: plain loops in f64.
    Reference,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum ActivationsArg {
    /// 8 bits where the weight is quantised (Q8_K, Q8_0), as llama.cpp does; exact on the reference backend.
    #[default]
    Native,
    /// Not rounded.
    F32,
    /// What the cpu backend rounds to, on any backend.
    Cpu,
    /// What llama.cpp rounds to, F16 and BF16 weights included (reference backend only).
    LlamaCpp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the types name themselves")]
pub(crate) enum KvArg {
    F16,
    Bf16,
    F32,
    F64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the types name themselves")]
pub(crate) enum Precision {
    #[default]
    F64,
    F32,
}

impl BackendArgs {
    /// A backend as it is without further options.
    pub(crate) fn plain(backend: BackendName) -> Self {
        let (activations, threads, isa, kv, precision) = Default::default();
        Self { backend, threads, isa, no_repack: false, activations, kv, precision }
    }

    /// The backend and what is said of its arithmetic.
    pub(crate) fn describe(&self) -> String {
        fn name(value: &impl ValueEnum) -> String {
            value.to_possible_value().map_or(String::new(), |value| value.get_name().to_owned())
        }
        let mut text = name(&self.backend);
        if self.activations != ActivationsArg::default() {
            text += &format!(", activations {}", name(&self.activations));
        }
        if let Some(kv) = &self.kv {
            text += &format!(", cache {}", name(kv));
        }
        if let Some(precision) = &self.precision {
            text += &format!(", {}", name(precision));
        }
        text
    }

    /// The cpu backend's options, or why they make no sense.
    pub(crate) fn cpu(&self) -> anyhow::Result<apr_cpu::CpuOptions> {
        if self.precision.is_some() {
            anyhow::bail!(
                "--precision is an option of --backend reference; the cpu backend computes in f32"
            );
        }
        let activations = match self.activations {
            ActivationsArg::Native | ActivationsArg::Cpu => Activations::Native,
            ActivationsArg::F32 => Activations::F32,
            ActivationsArg::LlamaCpp => {
                anyhow::bail!("--activations llama-cpp is emulated by --backend reference only")
            }
        };
        let kv = match self.kv {
            None | Some(KvArg::F16) => KvType::F16,
            Some(KvArg::F32) => KvType::F32,
            Some(KvArg::Bf16 | KvArg::F64) => {
                anyhow::bail!(
                    "the cpu backend keeps keys and values as f16 or f32: give --kv f16 or f32, or --backend reference"
                )
            }
        };
        let (threads, isa, no_repack) = (self.threads, self.isa, self.no_repack);
        Ok(apr_cpu::CpuOptions { threads, isa, activations, kv, no_repack })
    }

    /// The reference backend's arithmetic, or why the options make no sense.
    pub(crate) fn arithmetic(&self) -> anyhow::Result<apr_reference::Arithmetic> {
        use apr_reference::Arithmetic;
        if self.threads.is_some() || self.isa.is_some() || self.no_repack {
            anyhow::bail!(
                "--threads, --isa and --no-repack are options of --backend cpu; leave them out"
            );
        }
        let arithmetic = match self.activations {
            ActivationsArg::Native | ActivationsArg::F32 => Arithmetic::EXACT,
            ActivationsArg::Cpu => Arithmetic::CPU,
            ActivationsArg::LlamaCpp => Arithmetic::LLAMA_CPP,
        };
        Ok(match self.kv {
            None => arithmetic,
            Some(kv) => arithmetic.with_kv(match kv {
                KvArg::F16 => apr_tensor::DType::F16,
                KvArg::Bf16 => apr_tensor::DType::BF16,
                KvArg::F32 => apr_tensor::DType::F32,
                KvArg::F64 => apr_tensor::DType::F64,
            }),
        })
    }
}

/// The prompt: exactly one of text, text under the chat template, and token ids.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Prompt")]
#[command(group(clap::ArgGroup::new("input").args(["prompt", "tokens"]).required(true)))]
pub(crate) struct PromptArgs {
    /// The prompt, as it is; `-` reads it from stdin. A text that begins with a dash: --prompt=-TEXT.
    #[arg(short, long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Token ids as they are: no tokenizer, no template.
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', value_parser = token_id)]
    #[arg(allow_negative_numbers = true)]
    pub(crate) tokens: Option<Vec<u32>>,
    /// Apply the model's chat template to the prompt. Without this no template is ever applied.
    #[arg(long, conflicts_with = "tokens")]
    pub(crate) chat: bool,
    /// A system message, with --chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,
}

/// The same, where a command can do without.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Prompt")]
pub(crate) struct OptionalPromptArgs {
    /// The prompt, as it is; `-` reads it from stdin. A text that begins with a dash: --prompt=-TEXT.
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Token ids as they are: no tokenizer, no template.
    #[arg(long, value_name = "ID,ID,...", value_delimiter = ',', value_parser = token_id)]
    #[arg(allow_negative_numbers = true, conflicts_with = "prompt")]
    tokens: Option<Vec<u32>>,
    /// Apply the model's chat template to the prompt. Without this no template is ever applied.
    #[arg(long, conflicts_with = "tokens", requires = "prompt")]
    chat: bool,
    /// A system message, with --chat.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
}

impl OptionalPromptArgs {
    /// The prompt, if one was given.
    pub(crate) fn given(&self) -> Option<PromptArgs> {
        let Self { prompt, tokens, chat, system } = self.clone();
        let given = prompt.is_some() || tokens.is_some();
        given.then_some(PromptArgs { prompt, tokens, chat, system })
    }
}

pub(crate) fn token_id(text: &str) -> Result<u32, String> {
    let id = text.trim().parse();
    id.map_err(|_| format!("`{text}` is no token id; expected numbers such as 3838,374,220"))
}

/// Parses a number of things of which there has to be one.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n) if n > 0 => Ok(n),
        _ => Err("expected a whole number, 1 or more".to_owned()),
    }
}

/// Parses a number that is finite and not negative.
pub(crate) fn at_least_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x >= 0.0 => Ok(x),
        _ => Err("expected a number, 0 or more".to_owned()),
    }
}

/// Parses a share of the whole.
pub(crate) fn probability(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(p) if p > 0.0 && p <= 1.0 => Ok(p),
        _ => Err("expected a probability, above 0 and up to 1".to_owned()),
    }
}

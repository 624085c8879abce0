//! Keys that a translation does not look for: which of them nobody needs who runs the model, and which are a loss.
//!
//! What is in no table here is a loss: it may matter, and who knows that it does not can say `--lossy`.

use apr_format::{Container, Map, Value};

use super::{
    Facts, Translated,
    carried::{FILES, GGUF},
    hugging_face::{Content, files_of},
    json,
};
use crate::{Loss, Result, Target};

/// What becomes of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The target says it, or another key of the source does.
    Said,
    /// Nobody needs it who runs the model.
    Noted,
    /// It may matter.
    Lost,
}

/// Keys of `config.json` that are read.
const CONFIG_SAID: &[&str] = &[
    "architectures",
    "attention_bias",
    "bos_token_id",
    "decoder_sparse_step",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "is_causal",
    "layer_types",
    "max_position_embeddings",
    "mlp_bias",
    "mlp_only_layers",
    "model_type",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "pad_token_id",
    "partial_rotary_factor",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
    // Read with `use_sliding_window` and `layer_types`, which are refused where they switch it on.
    "max_window_layers",
    "sliding_window",
];

/// Keys of `config.json` that say how the model was trained, or how a program of its own should run it.
const CONFIG_NOTED: &[&str] = &[
    "_attn_implementation",
    "_name_or_path",
    "attention_dropout",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "router_aux_loss_coef",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "use_cache",
    "__metadata__",
];

/// Keys of `tokenizer_config.json` and `special_tokens_map.json` that are read, or that repeat `tokenizer.json`.
const TOKENIZER_SAID: &[&str] = &[
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "bos_token",
    "chat_template",
    "eos_token",
    "pad_token",
    "unk_token",
];

/// Keys of both that steer transformers, and no token.
const TOKENIZER_NOTED: &[&str] = &[
    "additional_special_tokens",
    "backend",
    "clean_up_tokenization_spaces",
    "cls_token",
    "errors",
    "extra_special_tokens",
    "is_local",
    "legacy",
    "mask_token",
    "model_input_names",
    "model_max_length",
    "model_specific_special_tokens",
    "padding_side",
    "processor_class",
    "sep_token",
    "sp_model_kwargs",
    "spaces_between_special_tokens",
    "split_special_tokens",
    "tokenizer_class",
    "truncation_side",
    "use_default_system_prompt",
    "use_fast",
];

/// What GGUF's keys say after the architecture, and is read.
const GGUF_SAID: &[&str] = &[
    "attention.causal",
    "attention.clamp_kqv",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.max_alibi_bias",
    "attention.scale",
    "attention.sliding_window",
    "attention.value_length",
    "attn_logit_softcapping",
    "block_count",
    "context_length",
    "embedding_length",
    "embedding_scale",
    "expert_count",
    "expert_feed_forward_length",
    "expert_gating_func",
    "expert_group_count",
    "expert_shared_count",
    "expert_shared_feed_forward_length",
    "expert_used_count",
    "expert_weights_norm",
    "expert_weights_scale",
    "feed_forward_length",
    "final_logit_softcapping",
    "leading_dense_block_count",
    "logit_scale",
    "moe_every_n_layers",
    "residual_scale",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.type",
    "vocab_size",
];

/// What they say of the training or of other models.
const GGUF_NOTED: &[&str] = &[
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
    "use_parallel_residual",
];

/// GGUF's keys of the tokenizer that are read.
const GGUF_TOKENIZER_SAID: &[&str] = &[
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "bos_token_id",
    "eom_token_id",
    "eos_token_id",
    "eot_token_id",
    "merges",
    "model",
    "padding_token_id",
    "pre",
    "scores",
    "token_type",
    "tokens",
    "unknown_token_id",
];

/// GGUF's keys of the tokenizer that name tokens for uses beside running text through the model.
const GGUF_TOKENIZER_NOTED: &[&str] = &[
    "add_sep_token",
    "cls_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_pre_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "fim_suf_token_id",
    "mask_token_id",
    "middle_token_id",
    "prefix_token_id",
    "seperator_token_id",
    "suffix_token_id",
    "token_type_count",
];

/// Keys of `.apr` beside those of `config.json`.
const APR_SAID: &[&str] = &[
    "architecture",
    "chat_template",
    "hf_architecture",
    "name",
    "num_heads",
    "num_kv_heads",
    "num_layers",
    "rope_type",
];

/// What aprender notes about a file.
const APR_NOTED: &[&str] = &[
    "author",
    "chat_format",
    "created_at",
    "data_license",
    "data_source",
    "description",
    "hf_model_type",
    "license",
    "original_format",
    "param_count",
    "quantization",
    "sharding",
    "source",
    "source_metadata",
    "special_tokens",
    "tensor_shapes",
    "tied_embeddings",
    "total_size",
    "version",
];

/// Judges what the source says and `target` does not.
pub(super) fn judge(facts: &Facts<'_>, target: Target, translated: &mut Translated) -> Result<()> {
    let source = facts.source;
    let metadata = source.metadata();
    let architecture = facts.config.architecture.gguf_name();
    translated.losses.extend(unread(facts));
    let mut judge = Judge { target, architecture, translated };
    match (source.container(), target) {
        (Container::Gguf { .. }, Target::Gguf)
        | (Container::Safetensors, Target::Safetensors)
        | (Container::Apr, Target::Apr) => return Ok(()),
        // It takes all of it along.
        (_, Target::Apr) => {}
        (Container::Gguf { .. }, _) => {
            metadata.iter().for_each(|(key, value)| judge.gguf(key, value));
        }
        (Container::Safetensors, _) => {
            files_of(source)?.0.iter().for_each(|(name, content)| judge.file(name, content));
        }
        (Container::Apr, _) => {
            metadata.iter().for_each(|(key, value)| judge.apr(key, value));
            let copy = |of: Target, key: &str| {
                let copy = metadata.get(key).and_then(Value::as_object).filter(|_| of != target);
                copy.into_iter().flat_map(Map::iter)
            };
            copy(Target::Gguf, GGUF).for_each(|(key, entry)| judge.gguf(key, entry));
            for (name, content) in copy(Target::Safetensors, FILES) {
                if let Value::Object(_) = content {
                    judge.file(name, &Content::Json(content.into()));
                }
            }
        }
    }
    // An `.apr` file has them in its copy, but whoever runs it does not.
    translated.losses.extend(facts.omissions.iter().cloned());
    if target == Target::Gguf && facts.config.moe.as_ref().is_some_and(|moe| !moe.norm_topk_prob) {
        let why = "the file says so, but llama.cpp always divides the weights of the experts by their sum";
        let what = "norm_topk_prob = false".to_owned();
        translated.losses.push(Loss { what, why: why.to_owned() });
    }
    Ok(())
}

/// Files of a Hugging Face directory that are not read, but by others.
const UNREAD: &[(&str, &str)] = &[
    ("adapter_config.json", "an adapter would change the weights; merge it first"),
    ("additional_chat_templates", "templates by name are read from tokenizer_config.json"),
    ("chat_template.json", "templates are read from chat_template.jinja and tokenizer_config.json"),
];

/// The same, where they are all that there is of a tokenizer.
const TOKENIZERS: &[(&str, &str)] = &[
    ("tokenizer.model", "tokenizers are read from tokenizer.json, which is missing"),
    ("vocab.json", "tokenizers are read from tokenizer.json, which is missing"),
];

/// What is beside the source, says something of the model, and is not read.
fn unread(facts: &Facts<'_>) -> impl Iterator<Item = Loss> {
    let path = facts.source.path();
    let directory = if path.is_dir() { Some(path) } else { path.parent() };
    let directory = directory
        .filter(|_| facts.source.container() == Container::Safetensors)
        .map(std::path::Path::to_owned);
    let tokenizers = if facts.tokenizer.is_none() { TOKENIZERS } else { &[] };
    UNREAD.iter().chain(tokenizers).filter_map(move |&(name, why)| {
        let is_there = directory.as_ref()?.join(name).exists();
        is_there.then(|| Loss { what: name.to_owned(), why: why.to_owned() })
    })
}

struct Judge<'t> {
    target: Target,
    architecture: &'static str,
    translated: &'t mut Translated,
}

impl Judge<'_> {
    fn put(&mut self, fate: Fate, what: String) {
        let target = self.target;
        match fate {
            Fate::Said => {}
            Fate::Noted => {
                let why = format!("{target} has no place for it, and running the model needs none");
                self.translated.notes.push(Loss { what, why });
            }
            Fate::Lost => {
                let why = format!("{target} has no place for it that is known here");
                self.translated.losses.push(Loss { what, why });
            }
        }
    }

    fn gguf(&mut self, key: &str, value: &Value) {
        if *value != Value::Null {
            self.put(gguf_fate(key, self.architecture), format!("key `{key}`"));
        }
    }

    fn apr(&mut self, key: &str, value: &Value) {
        let fate = match key {
            GGUF | FILES => Fate::Said,
            _ if *value == Value::Null || APR_SAID.contains(&key) => Fate::Said,
            _ if APR_NOTED.contains(&key) => Fate::Noted,
            _ => match key.strip_prefix("tokenizer.") {
                Some("vocabulary" | "model_type" | "pre_type") => Fate::Said,
                // Copies of other keys.
                Some("architecture" | "model_name" | "vocab_size") => Fate::Noted,
                Some(tokenizer) => fate_of(tokenizer, GGUF_TOKENIZER_SAID, GGUF_TOKENIZER_NOTED),
                None if key.starts_with("chat_template") => Fate::Said,
                None => fate_of(key, CONFIG_SAID, CONFIG_NOTED),
            },
        };
        self.put(fate, format!("key `{key}`"));
    }

    fn file(&mut self, name: &str, content: &Content) {
        let (said, noted) = match name {
            "config.json" => (CONFIG_SAID, CONFIG_NOTED),
            "tokenizer_config.json" | "special_tokens_map.json" => {
                (TOKENIZER_SAID, TOKENIZER_NOTED)
            }
            // What else is in it is advice on sampling.
            "generation_config.json" => {
                (&["bos_token_id", "eos_token_id", "pad_token_id"][..], &[][..])
            }
            _ => return,
        };
        let Content::Json(serde_json::Value::Object(keys)) = content else { return };
        for (key, value) in keys.iter().filter(|(_, value)| !value.is_null()) {
            let fate = match (name, fate_of(key, said, noted)) {
                ("generation_config.json", Fate::Lost) => Fate::Noted,
                // Neither true nor set to anything: as if it were not there.
                (_, Fate::Lost) if json::is_neutral(value) => Fate::Noted,
                (_, fate) => fate,
            };
            self.put(fate, format!("`{key}` of {name}"));
        }
    }
}

fn fate_of(key: &str, said: &[&str], noted: &[&str]) -> Fate {
    match () {
        () if said.contains(&key) => Fate::Said,
        () if noted.contains(&key) => Fate::Noted,
        () => Fate::Lost,
    }
}

fn gguf_fate(key: &str, architecture: &str) -> Fate {
    let (family, rest) = key.split_once('.').unwrap_or((key, ""));
    match family {
        "general" => match rest {
            "alignment"
            | "architecture"
            | "file_type"
            | "name"
            | "quantization_version"
            | "type" => Fate::Said,
            // Authors, licences, where it comes from, advice on sampling.
            _ => Fate::Noted,
        },
        "tokenizer" => match rest.strip_prefix("ggml.") {
            Some(rest) => fate_of(rest, GGUF_TOKENIZER_SAID, GGUF_TOKENIZER_NOTED),
            None if rest.starts_with("chat_template") => Fate::Said,
            // A copy of tokenizer.json that some converters put in.
            None if rest == "huggingface.json" => Fate::Noted,
            None => Fate::Lost,
        },
        // How the file was made and cut.
        "quantize" | "split" => Fate::Noted,
        family if family == architecture => fate_of(rest, GGUF_SAID, GGUF_NOTED),
        _ => Fate::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gguf_keys_are_said_noted_or_lost() {
        for (key, fate) in [
            ("general.architecture", Fate::Said),
            ("general.url", Fate::Noted),
            ("quantize.imatrix.file", Fate::Noted),
            ("qwen2.context_length", Fate::Said),
            ("qwen2.made_up", Fate::Lost),
            ("llama.context_length", Fate::Lost),
            ("tokenizer.ggml.tokens", Fate::Said),
            ("tokenizer.ggml.precompiled_charsmap", Fate::Lost),
            ("tokenizer.chat_template.tool_use", Fate::Said),
            ("nonsense", Fate::Lost),
        ] {
            assert_eq!(gguf_fate(key, "qwen2"), fate, "{key}");
        }
    }

    #[test]
    fn no_key_is_in_two_tables() {
        for (said, noted) in [
            (CONFIG_SAID, CONFIG_NOTED),
            (TOKENIZER_SAID, TOKENIZER_NOTED),
            (GGUF_SAID, GGUF_NOTED),
            (GGUF_TOKENIZER_SAID, GGUF_TOKENIZER_NOTED),
            (APR_SAID, APR_NOTED),
        ] {
            assert_eq!(said.iter().find(|key| noted.contains(key)), None);
        }
    }
}

//! One tensor, three names: what a checkpoint's tensors are for.

use std::fmt;

use crate::{Site, Stage};

/// What a tensor is for, whatever its container calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// The token embedding table, `[vocab, hidden]`.
    TokenEmbd,
    /// A tensor of decoder layer `.0`.
    Layer(usize, LayerRole),
    /// The part of expert `.2` in a tensor that holds those of all experts, where it is stored by itself.
    Expert(usize, LayerRole, usize),
    /// The norm after the last layer.
    OutputNorm,
    /// The head, `[vocab, hidden]`, where it is not tied to the embedding.
    Output,
    /// Divisors of the rotary frequencies (GGUF only).
    RopeFreqs,
}

/// What a tensor of a layer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the variants are the rows of the table below")]
pub enum LayerRole {
    AttnNorm,
    AttnQ,
    AttnK,
    AttnV,
    AttnQBias,
    AttnKBias,
    AttnVBias,
    AttnQNorm,
    AttnKNorm,
    AttnOutput,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnDown,
    FfnGateInp,
    FfnGateExps,
    FfnUpExps,
    FfnDownExps,
}

/// Role, GGUF's name after `blk.N.`, Hugging Face's name after `model.layers.N.`; `*` is the number of an expert, of which
/// Hugging Face stores each by itself.
const LAYER: [(LayerRole, &str, &str); 18] = [
    (LayerRole::AttnNorm, "attn_norm.weight", "input_layernorm.weight"),
    (LayerRole::AttnQ, "attn_q.weight", "self_attn.q_proj.weight"),
    (LayerRole::AttnK, "attn_k.weight", "self_attn.k_proj.weight"),
    (LayerRole::AttnV, "attn_v.weight", "self_attn.v_proj.weight"),
    (LayerRole::AttnQBias, "attn_q.bias", "self_attn.q_proj.bias"),
    (LayerRole::AttnKBias, "attn_k.bias", "self_attn.k_proj.bias"),
    (LayerRole::AttnVBias, "attn_v.bias", "self_attn.v_proj.bias"),
    (LayerRole::AttnQNorm, "attn_q_norm.weight", "self_attn.q_norm.weight"),
    (LayerRole::AttnKNorm, "attn_k_norm.weight", "self_attn.k_norm.weight"),
    (LayerRole::AttnOutput, "attn_output.weight", "self_attn.o_proj.weight"),
    (LayerRole::FfnNorm, "ffn_norm.weight", "post_attention_layernorm.weight"),
    (LayerRole::FfnGate, "ffn_gate.weight", "mlp.gate_proj.weight"),
    (LayerRole::FfnUp, "ffn_up.weight", "mlp.up_proj.weight"),
    (LayerRole::FfnDown, "ffn_down.weight", "mlp.down_proj.weight"),
    (LayerRole::FfnGateInp, "ffn_gate_inp.weight", "mlp.gate.weight"),
    (LayerRole::FfnGateExps, "ffn_gate_exps.weight", "mlp.experts.*.gate_proj.weight"),
    (LayerRole::FfnUpExps, "ffn_up_exps.weight", "mlp.experts.*.up_proj.weight"),
    (LayerRole::FfnDownExps, "ffn_down_exps.weight", "mlp.experts.*.down_proj.weight"),
];

/// Role, GGUF's name, Hugging Face's name.
const WHOLE: [(Role, &str, Option<&str>); 4] = [
    (Role::TokenEmbd, "token_embd.weight", Some("model.embed_tokens.weight")),
    (Role::OutputNorm, "output_norm.weight", Some("model.norm.weight")),
    (Role::Output, "output.weight", Some("lm_head.weight")),
    (Role::RopeFreqs, "rope_freqs.weight", None),
];

/// What the tensor called `name`, in GGUF's or Hugging Face's spelling, is for.
pub fn role_of(name: &str) -> Option<Role> {
    if let Some(row) = WHOLE.iter().find(|(_, gguf, hf)| *gguf == name || *hf == Some(name)) {
        return Some(row.0);
    }
    let in_layer = |prefix: &str| {
        let (layer, rest) = name.strip_prefix(prefix)?.split_once('.')?;
        Some((layer.parse().ok()?, rest))
    };
    if let Some((layer, rest)) = in_layer("blk.") {
        return LAYER.iter().find(|row| row.1 == rest).map(|row| Role::Layer(layer, row.0));
    }
    let (layer, rest) = in_layer("model.layers.")?;
    LAYER.iter().find_map(|&(role, _, hf)| match hf.split_once('*') {
        None => (hf == rest).then_some(Role::Layer(layer, role)),
        Some((before, after)) => {
            let expert = rest.strip_prefix(before)?.strip_suffix(after)?.parse().ok()?;
            Some(Role::Expert(layer, role, expert))
        }
    })
}

impl Role {
    /// The name in a GGUF file of the tensor, or of the one that it is a part of.
    pub fn gguf_name(self) -> String {
        match self {
            Self::Layer(layer, role) | Self::Expert(layer, role, _) => {
                format!("blk.{layer}.{}", role.row().1)
            }
            whole => whole.row().1.to_owned(),
        }
    }

    /// The tensor's name in a Hugging Face checkpoint; GGUF's where Hugging Face has no such tensor. That of a tensor of all
    /// experts has `*` for their number.
    pub fn hf_name(self) -> String {
        match self {
            Self::Layer(layer, role) => format!("model.layers.{layer}.{}", role.row().2),
            Self::Expert(layer, role, expert) => {
                let name = role.row().2.replacen('*', &expert.to_string(), 1);
                format!("model.layers.{layer}.{name}")
            }
            whole => whole.row().2.unwrap_or(whole.row().1).to_owned(),
        }
    }

    /// The stage whose op reads the tensor; a tied embedding is the head's too.
    pub fn site(self) -> Option<Site> {
        Some(match self {
            Self::TokenEmbd => Site::whole(Stage::Embedding),
            Self::Output => Site::whole(Stage::LmHead),
            Self::OutputNorm => Site::whole(Stage::FinalNorm),
            Self::RopeFreqs => return None,
            Self::Layer(layer, role) | Self::Expert(layer, role, _) => {
                Site::layer(layer, role.stage())
            }
        })
    }

    fn row(self) -> &'static (Role, &'static str, Option<&'static str>) {
        WHOLE.iter().find(|row| row.0 == self).expect("the table has every whole-model role")
    }
}

impl LayerRole {
    /// The tensor's name in a GGUF file, after that of its layer.
    pub fn gguf_name(self) -> &'static str {
        self.row().1
    }

    /// The stage whose op reads the tensor.
    pub fn stage(self) -> Stage {
        match self {
            Self::AttnNorm => Stage::AttnNorm,
            Self::AttnQ | Self::AttnK | Self::AttnV => Stage::QkvMatmul,
            Self::AttnQBias | Self::AttnKBias | Self::AttnVBias => Stage::QkvBias,
            Self::AttnQNorm => Stage::QNorm,
            Self::AttnKNorm => Stage::KNorm,
            Self::AttnOutput => Stage::AttnOut,
            Self::FfnNorm => Stage::FfnNorm,
            Self::FfnGate => Stage::FfnGate,
            Self::FfnUp => Stage::FfnUp,
            Self::FfnDown => Stage::FfnOut,
            Self::FfnGateInp => Stage::MoeRouter,
            Self::FfnGateExps => Stage::MoeExpertGate,
            Self::FfnUpExps => Stage::MoeExpertUp,
            Self::FfnDownExps => Stage::MoeExpertOut,
        }
    }

    /// Whether the tensor holds a matrix of each expert, `[experts, out, in]`.
    pub fn is_of_experts(self) -> bool {
        self.row().2.contains('*')
    }

    fn row(self) -> &'static (LayerRole, &'static str, &'static str) {
        &LAYER[self as usize]
    }
}

/// GGUF's name; that of an expert's part is followed by its number: `blk.0.ffn_up_exps.weight[3]`.
impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.gguf_name())?;
        match self {
            Self::Expert(_, _, expert) => write!(f, "[{expert}]"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_of_every_name_find_their_role() {
        let layers = LAYER.iter().map(|row| Role::Layer(21, row.0));
        for role in WHOLE.iter().map(|row| row.0).chain(layers) {
            assert_eq!(role_of(&role.gguf_name()), Some(role));
            match role {
                Role::Layer(layer, all) if all.is_of_experts() => {
                    let one = Role::Expert(layer, all, 17);
                    assert_eq!(role_of(&one.hf_name()), Some(one));
                    assert_eq!(one.gguf_name(), role.gguf_name());
                }
                _ => assert_eq!(role_of(&role.hf_name()), Some(role)),
            }
        }
    }

    #[test]
    fn the_layer_table_is_in_the_order_of_the_enum() {
        for (i, row) in LAYER.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "{}", row.1);
        }
    }

    #[test]
    fn foreign_names_have_no_role() {
        for name in [
            "blk.x.attn_q.weight",
            "blk.0.ffn_gate_shexp.weight",
            "model.layers.1",
            "model.layers.1.mlp.experts.*.up_proj.weight",
            "model.layers.1.mlp.experts.up_proj.weight",
            "",
        ] {
            assert_eq!(role_of(name), None, "{name}");
        }
    }
}

//! What other programs call the stages: one table, and maps that users write.
//!
//! A name is resolved in this order: our own (`layers.3.ffn_gate`), the user's map, then Hugging Face's module names and
//! llama.cpp's node names. What nobody knows is reported, never guessed.

use std::{fs, path::Path};

use apr_model::{Site, Stage};

use crate::{Dims, Error, Result};

/// What other programs call one stage. `{i}` is the layer.
#[derive(Clone, Copy, Debug)]
pub struct ForeignNames {
    /// The stage.
    pub stage: Stage,
    /// Node names of llama.cpp's graphs.
    pub llama_cpp: &'static [&'static str],
    /// Modules of `transformers`, whose output it is; with `.input`, whose input.
    pub hugging_face: &'static [&'static str],
}

const fn row(
    stage: Stage,
    llama_cpp: &'static [&'static str],
    hugging_face: &'static [&'static str],
) -> ForeignNames {
    ForeignNames { stage, llama_cpp, hugging_face }
}

/// The table. Several modules may show the same value; `q_proj`, `k_proj` and `v_proj` are the columns of one
/// stage: [`Stage::QkvBias`] where the model has a bias, for it is inside the module, [`Stage::QkvMatmul`] where not.
///
/// llama.cpp uses some names twice; of `Qcur` and `Kcur` the last value is the rotated one. Its `kq` is not scaled and
/// so is none of our stages.
pub const FOREIGN_NAMES: &[ForeignNames] = &[
    row(Stage::Embedding, &["inp_embd"], &["model.embed_tokens"]),
    row(
        Stage::AttnNorm,
        &["attn_norm-{i}"],
        &["model.layers.{i}.input_layernorm", "model.layers.{i}.self_attn.q_proj.input"],
    ),
    row(
        Stage::QkvBias,
        &[],
        &[
            "model.layers.{i}.self_attn.q_proj",
            "model.layers.{i}.self_attn.k_proj",
            "model.layers.{i}.self_attn.v_proj",
        ],
    ),
    row(Stage::QNorm, &["Qcur_normed-{i}"], &["model.layers.{i}.self_attn.q_norm"]),
    row(Stage::KNorm, &["Kcur_normed-{i}"], &["model.layers.{i}.self_attn.k_norm"]),
    row(Stage::QPostRope, &["Qcur-{i}"], &[]),
    row(Stage::KPostRope, &["Kcur-{i}"], &[]),
    row(Stage::AttnSoftmax, &["kq_soft_max-{i}", "kq_soft_max_ext-{i}"], &[]),
    row(Stage::Attention, &["kqv_out-{i}"], &["model.layers.{i}.self_attn.o_proj.input"]),
    row(Stage::AttnOut, &["attn_out-{i}"], &["model.layers.{i}.self_attn.o_proj"]),
    row(
        Stage::PostAttnResidual,
        &["ffn_inp-{i}"],
        &["model.layers.{i}.post_attention_layernorm.input"],
    ),
    row(
        Stage::FfnNorm,
        &["ffn_norm-{i}"],
        &["model.layers.{i}.post_attention_layernorm", "model.layers.{i}.mlp.gate_proj.input"],
    ),
    row(Stage::FfnGate, &["ffn_gate-{i}"], &["model.layers.{i}.mlp.gate_proj"]),
    row(Stage::FfnUp, &["ffn_up-{i}"], &["model.layers.{i}.mlp.up_proj"]),
    row(Stage::FfnSilu, &["ffn_silu-{i}"], &["model.layers.{i}.mlp.act_fn"]),
    row(
        Stage::FfnSwigl,
        &["ffn_gate_par-{i}", "ffn_swiglu-{i}"],
        &["model.layers.{i}.mlp.down_proj.input"],
    ),
    row(Stage::MoeRouter, &["ffn_moe_logits-{i}"], &["model.layers.{i}.mlp.gate"]),
    row(Stage::MoeRouterIndices, &["ffn_moe_topk-{i}"], &[]),
    row(Stage::MoeRouterWeights, &["ffn_moe_weights_norm-{i}"], &[]),
    row(Stage::MoeExpertGate, &["ffn_moe_gate-{i}"], &[]),
    row(Stage::MoeExpertUp, &["ffn_moe_up-{i}"], &[]),
    row(Stage::MoeExpertSilu, &["ffn_moe_silu-{i}"], &[]),
    row(Stage::MoeExpertSwigl, &["ffn_moe_swiglu-{i}", "ffn_moe_gate_par-{i}"], &[]),
    row(Stage::MoeExpertOut, &["ffn_moe_down-{i}"], &[]),
    row(
        Stage::FfnOut,
        &["ffn_out-{i}", "ffn_moe_out-{i}"],
        &["model.layers.{i}.mlp.down_proj", "model.layers.{i}.mlp"],
    ),
    row(Stage::PostFfnResidual, &["l_out-{i}"], &["model.layers.{i}"]),
    row(Stage::FinalNorm, &["result_norm"], &["model.norm"]),
    row(Stage::LmHead, &["result_output"], &["lm_head"]),
];

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A site's value.
    Whole(Site),
    /// The query (0), key (1) or value (2) columns of a site's value.
    Part(Site, usize),
    /// Something that depends on whether the model has attention biases, which is not known.
    NeedsDims,
}

/// Names of the user's own: patterns with `{i}` for the layer, and the stages they stand for.
///
/// ```toml
/// "blocks.{i}.mlp.fc_gate" = "ffn_gate"
/// "blocks.{i}.attn.wq" = "qkv_bias.q"   # columns of a stage: .q, .k, .v
/// "head" = "lm_head"
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameMap {
    patterns: Vec<(String, Stage, Option<usize>)>,
}

impl NameMap {
    /// Reads a TOML file of patterns and stages.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::read(path))?;
        Self::parse(&text).map_err(|problem| Error::NameMap { path: path.to_owned(), problem })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let table: toml::Table =
            text.parse().map_err(|error: toml::de::Error| error.to_string())?;
        let patterns = table
            .into_iter()
            .map(|(pattern, value)| {
                let value = value.as_str().ok_or(format!("`{pattern}` must name a stage"))?;
                let (stage, part) = match value.rsplit_once('.') {
                    Some((stage, "q")) => (stage, Some(0)),
                    Some((stage, "k")) => (stage, Some(1)),
                    Some((stage, "v")) => (stage, Some(2)),
                    _ => (value, None),
                };
                let stage: Stage =
                    stage.parse().map_err(|error| format!("`{pattern}`: {error}"))?;
                if part.is_some() && !matches!(stage, Stage::QkvMatmul | Stage::QkvBias) {
                    return Err(format!("`{pattern}`: {stage} has no .q, .k and .v columns"));
                }
                match (pattern.matches("{i}").count(), stage.is_whole_model()) {
                    (0, true) | (1, false) => Ok((pattern, stage, part)),
                    (_, true) => Err(format!("`{pattern}`: {stage} has no layers, so no {{i}}")),
                    (_, false) => Err(format!("`{pattern}`: {stage} needs one {{i}}, the layer")),
                }
            })
            .collect::<Result<_, String>>()?;
        Ok(Self { patterns })
    }

    /// What `name` stands for; `None` if nobody knows.
    pub(crate) fn resolve(&self, name: &str, dims: Option<&Dims>) -> Option<Meaning> {
        if let Ok(site) = name.parse() {
            return Some(Meaning::Whole(site));
        }
        for (pattern, stage, part) in &self.patterns {
            if let Some(layer) = match_layer(pattern, name) {
                let site = Site { layer, stage: *stage };
                return Some(part.map_or(Meaning::Whole(site), |part| Meaning::Part(site, part)));
            }
        }
        built_in(name, dims)
    }
}

fn built_in(name: &str, dims: Option<&Dims>) -> Option<Meaning> {
    let name = name.strip_suffix(".output").unwrap_or(name);
    let bare = name.strip_prefix("model.").unwrap_or(name);
    for ForeignNames { stage, llama_cpp, hugging_face } in FOREIGN_NAMES {
        let site = |layer| Site { layer, stage: *stage };
        let whole = |layer| Some(Meaning::Whole(site(layer)));
        if let Some(layer) = llama_cpp.iter().find_map(|pattern| match_layer(pattern, name)) {
            return whole(layer);
        }
        for (part, pattern) in hugging_face.iter().enumerate() {
            let pattern = pattern.strip_prefix("model.").unwrap_or(pattern);
            match (match_layer(pattern, bare), stage) {
                (None, _) => {}
                (Some(layer), Stage::QkvBias) => {
                    let Some(dims) = dims else { return Some(Meaning::NeedsDims) };
                    let stage = if dims.attention_bias { Stage::QkvBias } else { Stage::QkvMatmul };
                    return Some(Meaning::Part(Site { layer, stage }, part));
                }
                (Some(layer), _) => return whole(layer),
            }
        }
    }
    None
}

/// `Some(layer)` if `name` is `pattern` with a number for `{i}`, `Some(None)` if they are equal.
fn match_layer(pattern: &str, name: &str) -> Option<Option<u32>> {
    match pattern.split_once("{i}") {
        None => (pattern == name).then_some(None),
        Some((before, after)) => {
            let digits = name.strip_prefix(before)?.strip_suffix(after)?;
            let plain = digits.bytes().all(|b| b.is_ascii_digit());
            plain.then(|| digits.parse().ok()).flatten().map(Some)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(layer: usize, stage: Stage) -> Option<Meaning> {
        Some(Meaning::Whole(Site::layer(layer, stage)))
    }

    #[test]
    fn every_name_of_the_table_finds_its_stage_and_no_other() {
        let dims = crate::dims::tests::tiny();
        for row in FOREIGN_NAMES {
            for pattern in row.llama_cpp.iter().chain(row.hugging_face) {
                let name = pattern.replace("{i}", "17");
                assert_eq!(name != *pattern, !row.stage.is_whole_model(), "{pattern}");
                let found = NameMap::default().resolve(&name, Some(&dims)).unwrap();
                let (Meaning::Whole(site) | Meaning::Part(site, _)) = found else {
                    panic!("{pattern} needs no more than dimensions")
                };
                assert_eq!(site.stage, row.stage, "{pattern}");
                assert_eq!(site.layer, (!row.stage.is_whole_model()).then_some(17), "{pattern}");
            }
        }
    }

    #[test]
    fn our_own_names_aliases_and_bare_module_names_are_known() {
        let resolve = |name| NameMap::default().resolve(name, None);
        assert_eq!(resolve("layers.3.ffn_swiglu"), at(3, Stage::FfnSwigl));
        assert_eq!(resolve("layers.3.mlp.up_proj.output"), at(3, Stage::FfnUp));
        assert_eq!(resolve("logits"), Some(Meaning::Whole(Site::whole(Stage::LmHead))));
        assert_eq!(resolve("layers.3.self_attn.q_proj"), Some(Meaning::NeedsDims));
        for unknown in
            ["ffn_gate", "ffn_gate-", "ffn_gate-x", "ffn_gate-+1", "kq-3", "model.layers."]
        {
            assert_eq!(resolve(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn projections_are_the_biased_stage_only_in_models_with_a_bias() {
        let mut dims = crate::dims::tests::tiny();
        let name = "model.layers.1.self_attn.v_proj";
        let resolve = |dims: &Dims| NameMap::default().resolve(name, Some(dims));
        assert_eq!(resolve(&dims), Some(Meaning::Part(Site::layer(1, Stage::QkvBias), 2)));
        dims.attention_bias = false;
        assert_eq!(resolve(&dims), Some(Meaning::Part(Site::layer(1, Stage::QkvMatmul), 2)));
    }

    #[test]
    fn a_users_map_goes_before_the_table_and_its_mistakes_are_named() {
        let map = NameMap::parse(
            "'blocks.{i}.gate' = 'ffn_gate'\n'ffn_up-{i}' = 'ffn_gate'\nhead = 'logits'\n'q{i}' = 'qkv_bias.q'",
        )
        .unwrap();
        let resolve = |name| map.resolve(name, None);
        assert_eq!(resolve("blocks.4.gate"), at(4, Stage::FfnGate));
        assert_eq!(resolve("ffn_up-2"), at(2, Stage::FfnGate));
        assert_eq!(resolve("head"), Some(Meaning::Whole(Site::whole(Stage::LmHead))));
        assert_eq!(resolve("q5"), Some(Meaning::Part(Site::layer(5, Stage::QkvBias), 0)));

        for (text, problem) in [
            ("'a.{i}' = 'ffn_gat'", "unknown stage `ffn_gat`"),
            ("'a' = 'ffn_gate'", "needs one {i}"),
            ("'a.{i}' = 'lm_head'", "has no layers"),
            ("'a.{i}' = 'ffn_gate.q'", "has no .q"),
            ("'a.{i}' = 3", "must name a stage"),
            ("= 3", "TOML"),
        ] {
            let error = NameMap::parse(text).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}

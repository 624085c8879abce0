//! Names for every value of the forward pass.
//!
//! A decoder computes the same sequence of values for each layer: a norm, projections, rotated queries and
//! keys, scores, and so on. A [`Stage`] names one of them, and a [`Site`] says of which layer. Every op output
//! has exactly one site; that is what makes "the first wrong stage" a well-defined question. The names are
//! the vocabulary of the command line, of captures and of reports alike.
//!
//! A [`TapSet`] says which sites somebody wants to see. It is resolved before a step, so that the step itself
//! only tests a bit.

use std::{fmt, str::FromStr};

/// One kind of value of the forward pass, in the order of computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// Token embedding rows, `[n, hidden]`.
    Embedding,
    /// RMSNorm before attention, `[n, hidden]`.
    AttnNorm,
    /// Query, key and value projections side by side, before the bias, `[n, q_dim + 2 * kv_dim]`.
    QkvMatmul,
    /// The same after the bias; only where the model has one.
    QkvBias,
    /// Queries after the per-head RMSNorm, `[n, heads, head_dim]`; only where the model has one (Qwen3).
    QNorm,
    /// Keys after the per-head RMSNorm, `[n, kv_heads, head_dim]`.
    KNorm,
    /// Queries after rotary embedding, `[n, heads, head_dim]`.
    QPostRope,
    /// Keys after rotary embedding, `[n, kv_heads, head_dim]`.
    KPostRope,
    /// Scaled dot products of queries and keys, `[heads, n, kv]`; masked entries are 0.
    AttnScores,
    /// Their softmax, `[heads, n, kv]`; masked entries are 0.
    AttnSoftmax,
    /// The softmax-weighted sum of values, `[n, heads * head_dim]`.
    Attention,
    /// After the output projection, `[n, hidden]`.
    AttnOut,
    /// The residual stream after attention, `[n, hidden]`.
    PostAttnResidual,
    /// RMSNorm before the feed-forward network, `[n, hidden]`.
    FfnNorm,
    /// Gate projection, `[n, ffn]`.
    FfnGate,
    /// Up projection, `[n, ffn]`.
    FfnUp,
    /// SiLU of the gate, `[n, ffn]`.
    FfnSilu,
    /// SiLU of the gate times up, `[n, ffn]`. The odd spelling `ffn_swigl` is the established name on disk.
    FfnSwigl,
    /// The router's logits, `[n, experts]`. The stages of a mixture of experts stand in place of the four before.
    MoeRouter,
    /// The ids of the chosen experts, `[n, k]`, largest probability first.
    MoeRouterIndices,
    /// Their weights in the sum, `[n, k]`: probabilities, divided by their sum where the config says so.
    MoeRouterWeights,
    /// Gate projections by the chosen experts, `[n, k, moe_ffn]`, in the order of the indices, as all that follow.
    MoeExpertGate,
    /// Up projections, `[n, k, moe_ffn]`.
    MoeExpertUp,
    /// SiLU of the gates, `[n, k, moe_ffn]`.
    MoeExpertSilu,
    /// SiLU of the gates times up, `[n, k, moe_ffn]`.
    MoeExpertSwigl,
    /// Down projections, `[n, k, hidden]`, before the weights.
    MoeExpertOut,
    /// Down projection, or the weighted sum of the experts' results, `[n, hidden]`.
    FfnOut,
    /// The residual stream after the layer, `[n, hidden]`.
    PostFfnResidual,
    /// RMSNorm after the last layer, `[n, hidden]`.
    FinalNorm,
    /// Logits, `[rows asked for, vocab]`.
    LmHead,
}

/// What the rows and columns of a stage are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axes {
    /// `[row, channel]`.
    RowChannel,
    /// `[row, head, channel]`.
    RowHeadChannel,
    /// `[head, row, key]`.
    HeadRowKey,
    /// `[row, slot]`, slot `i` being the `i`-th of a row's chosen experts.
    RowSlot,
    /// `[row, slot, channel]`.
    RowSlotChannel,
}

impl Axes {
    /// Axis names, outermost first, as captures spell them.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::RowChannel => &["row", "channel"],
            Self::RowHeadChannel => &["row", "head", "channel"],
            Self::HeadRowKey => &["head", "row", "key"],
            Self::RowSlot => &["row", "slot"],
            Self::RowSlotChannel => &["row", "slot", "channel"],
        }
    }

    /// Which axis counts token positions.
    pub fn row_axis(self) -> usize {
        match self {
            Self::HeadRowKey => 1,
            _ => 0,
        }
    }
}

struct StageRow {
    stage: Stage,
    name: &'static str,
    aliases: &'static [&'static str],
    whole_model: bool,
    axes: Axes,
}

const fn row(stage: Stage, name: &'static str, aliases: &'static [&'static str]) -> StageRow {
    StageRow { stage, name, aliases, whole_model: false, axes: Axes::RowChannel }
}

const TABLE: [StageRow; 30] = [
    StageRow { whole_model: true, ..row(Stage::Embedding, "embedding", &[]) },
    row(Stage::AttnNorm, "attn_norm", &[]),
    row(Stage::QkvMatmul, "qkv_matmul", &[]),
    row(Stage::QkvBias, "qkv_bias", &[]),
    StageRow { axes: Axes::RowHeadChannel, ..row(Stage::QNorm, "q_norm", &[]) },
    StageRow { axes: Axes::RowHeadChannel, ..row(Stage::KNorm, "k_norm", &[]) },
    StageRow { axes: Axes::RowHeadChannel, ..row(Stage::QPostRope, "q_post_rope", &[]) },
    StageRow { axes: Axes::RowHeadChannel, ..row(Stage::KPostRope, "k_post_rope", &[]) },
    StageRow { axes: Axes::HeadRowKey, ..row(Stage::AttnScores, "attn_scores", &[]) },
    StageRow { axes: Axes::HeadRowKey, ..row(Stage::AttnSoftmax, "attn_softmax", &[]) },
    row(Stage::Attention, "attention", &[]),
    row(Stage::AttnOut, "attn_out", &[]),
    row(Stage::PostAttnResidual, "post_attn_residual", &[]),
    row(Stage::FfnNorm, "ffn_norm", &[]),
    row(Stage::FfnGate, "ffn_gate", &[]),
    row(Stage::FfnUp, "ffn_up", &[]),
    row(Stage::FfnSilu, "ffn_silu", &[]),
    row(Stage::FfnSwigl, "ffn_swigl", &["ffn_swiglu"]),
    row(Stage::MoeRouter, "moe_router", &[]),
    StageRow { axes: Axes::RowSlot, ..row(Stage::MoeRouterIndices, "moe_router_indices", &[]) },
    StageRow { axes: Axes::RowSlot, ..row(Stage::MoeRouterWeights, "moe_router_weights", &[]) },
    StageRow { axes: Axes::RowSlotChannel, ..row(Stage::MoeExpertGate, "moe_expert_gate", &[]) },
    StageRow { axes: Axes::RowSlotChannel, ..row(Stage::MoeExpertUp, "moe_expert_up", &[]) },
    StageRow { axes: Axes::RowSlotChannel, ..row(Stage::MoeExpertSilu, "moe_expert_silu", &[]) },
    StageRow {
        axes: Axes::RowSlotChannel,
        ..row(Stage::MoeExpertSwigl, "moe_expert_swigl", &["moe_expert_swiglu"])
    },
    StageRow { axes: Axes::RowSlotChannel, ..row(Stage::MoeExpertOut, "moe_expert_out", &[]) },
    row(Stage::FfnOut, "ffn_out", &["moe_ffn_out"]),
    row(Stage::PostFfnResidual, "post_ffn_residual", &["layer_output"]),
    StageRow { whole_model: true, ..row(Stage::FinalNorm, "final_norm", &[]) },
    StageRow { whole_model: true, ..row(Stage::LmHead, "lm_head", &["logits"]) },
];

impl Stage {
    /// All stages, in the order of computation.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|row| row.stage)
    }

    fn row(self) -> &'static StageRow {
        &TABLE[self as usize]
    }

    /// The canonical name, as it stands on disk and on the command line.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// Other names that are accepted for this stage.
    pub fn aliases(self) -> &'static [&'static str] {
        self.row().aliases
    }

    /// Whether the stage occurs once per model rather than once per layer.
    pub fn is_whole_model(self) -> bool {
        self.row().whole_model
    }

    /// Whether only layers with experts have this stage, or only those without; `None` if all have it.
    pub fn of_experts(self) -> Option<bool> {
        match self {
            Self::FfnGate | Self::FfnUp | Self::FfnSilu | Self::FfnSwigl => Some(false),
            _ => (Self::MoeRouter..=Self::MoeExpertOut).contains(&self).then_some(true),
        }
    }

    /// Whether the values are ids, which are equal or not, and never close.
    pub fn holds_ids(self) -> bool {
        self == Self::MoeRouterIndices
    }

    /// What the stage's axes mean.
    pub fn axes(self) -> Axes {
        self.row().axes
    }

    fn bit(self) -> u64 {
        1 << self as u8
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no stage has.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown stage `{name}`; the stages are: {}", Stage::all().map(Stage::name).collect::<Vec<_>>().join(", "))]
pub struct UnknownStage {
    /// The name as given.
    pub name: String,
}

impl FromStr for Stage {
    type Err = UnknownStage;

    fn from_str(name: &str) -> Result<Self, UnknownStage> {
        TABLE
            .iter()
            .find(|row| row.name == name || row.aliases.contains(&name))
            .map(|row| row.stage)
            .ok_or_else(|| UnknownStage { name: name.to_owned() })
    }
}

/// The name of one value of the forward pass: a stage, and the layer it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Site {
    /// The decoder layer, counted from 0; `None` for a stage of the whole model.
    pub layer: Option<u32>,
    /// The stage.
    pub stage: Stage,
}

impl Site {
    /// A stage of decoder layer `layer`.
    pub fn layer(layer: usize, stage: Stage) -> Self {
        debug_assert!(!stage.is_whole_model(), "{stage} belongs to the whole model");
        Self { layer: Some(layer as u32), stage }
    }

    /// A stage of the whole model.
    pub fn whole(stage: Stage) -> Self {
        debug_assert!(stage.is_whole_model(), "{stage} belongs to a layer");
        Self { layer: None, stage }
    }

    /// A key that sorts sites in the order of computation.
    pub fn order(self) -> (u64, Stage) {
        let place = match (self.layer, self.stage) {
            (Some(layer), _) => 1 + u64::from(layer),
            (None, Stage::Embedding) => 0,
            (None, _) => u64::MAX,
        };
        (place, self.stage)
    }
}

impl PartialOrd for Site {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Site {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "layers.{layer}.{}", self.stage),
            None => write!(f, "{}", self.stage),
        }
    }
}

/// A text that names no site.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` names no site; expected `layers.N.STAGE` or a stage of the whole model")]
pub struct UnknownSite {
    /// The name as given.
    pub name: String,
}

impl FromStr for Site {
    type Err = UnknownSite;

    fn from_str(name: &str) -> Result<Self, UnknownSite> {
        let parse = || {
            if let Some(rest) = name.strip_prefix("layers.") {
                let (layer, stage) = rest.split_once('.')?;
                let stage: Stage = stage.parse().ok()?;
                let layer = layer.parse().ok()?;
                (!stage.is_whole_model()).then_some(Self { layer: Some(layer), stage })
            } else {
                let stage: Stage = name.parse().ok()?;
                stage.is_whole_model().then_some(Self { layer: None, stage })
            }
        };
        parse().ok_or_else(|| UnknownSite { name: name.to_owned() })
    }
}

/// A set of sites: which values of a step somebody wants to see or replace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapSet {
    whole: u64,
    layers: Vec<u64>,
}

impl TapSet {
    /// No site at all.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether `site` is in the set: the one test that every op pays.
    #[inline]
    pub fn contains(&self, site: Site) -> bool {
        let mask = match site.layer {
            None => self.whole,
            Some(layer) => self.layers.get(layer as usize).copied().unwrap_or(0),
        };
        mask & site.stage.bit() != 0
    }

    /// Adds a site.
    pub fn insert(&mut self, site: Site) {
        match site.layer {
            None => self.whole |= site.stage.bit(),
            Some(layer) => {
                let layer = layer as usize;
                if self.layers.len() <= layer {
                    self.layers.resize(layer + 1, 0);
                }
                self.layers[layer] |= site.stage.bit();
            }
        }
    }

    /// The sites of either set.
    pub fn union(&self, other: &Self) -> Self {
        self.iter().chain(other.iter()).collect()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.whole == 0 && self.layers.iter().all(|&mask| mask == 0)
    }

    /// The sites, in the order of computation.
    pub fn iter(&self) -> impl Iterator<Item = Site> {
        let whole =
            |stage: Stage| (self.whole & stage.bit() != 0).then_some(Site { layer: None, stage });
        let layers = self.layers.iter().enumerate().flat_map(|(layer, &mask)| {
            Stage::all()
                .filter(move |stage| mask & stage.bit() != 0)
                .map(move |stage| Site { layer: Some(layer as u32), stage })
        });
        whole(Stage::Embedding)
            .into_iter()
            .chain(layers)
            .chain(whole(Stage::FinalNorm))
            .chain(whole(Stage::LmHead))
    }
}

impl FromIterator<Site> for TapSet {
    fn from_iter<I: IntoIterator<Item = Site>>(sites: I) -> Self {
        let mut set = Self::none();
        sites.into_iter().for_each(|site| set.insert(site));
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.stage as usize, i, "{}", row.name);
        }
    }

    #[test]
    fn every_name_and_alias_finds_its_stage() {
        for stage in Stage::all() {
            for name in stage.aliases().iter().chain([&stage.name()]) {
                assert_eq!(name.parse(), Ok(stage));
            }
        }
        assert!("ffn_silo".parse::<Stage>().is_err());
    }

    #[test]
    fn sites_round_trip_through_their_names() {
        for stage in Stage::all() {
            let layer = (!stage.is_whole_model()).then_some(17);
            let site = Site { layer, stage };
            assert_eq!(site.to_string().parse(), Ok(site));
        }
        for wrong in ["layers.3", "layers.x.attn_norm", "layers.0.lm_head", "attn_norm", ""] {
            assert!(wrong.parse::<Site>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_tap_set_lists_its_sites_in_the_order_of_computation() {
        let sites = [
            Site::whole(Stage::Embedding),
            Site::layer(0, Stage::AttnNorm),
            Site::layer(0, Stage::FfnOut),
            Site::layer(5, Stage::AttnNorm),
            Site::whole(Stage::FinalNorm),
            Site::whole(Stage::LmHead),
        ];
        let set: TapSet = sites.iter().rev().copied().collect();
        assert_eq!(set.iter().collect::<Vec<_>>(), sites);
        assert!(sites.is_sorted());
        assert!(set.contains(sites[3]) && !set.contains(Site::layer(4, Stage::AttnNorm)));
    }
}

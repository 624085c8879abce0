//! What is found out about one stage.

use apr_model::Site;
use serde::Serialize;

use crate::{Errors, Routing};

/// A stage, judged by itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageAudit {
    /// Which stage, of which layer.
    #[serde(serialize_with = "crate::site")]
    pub site: Site,
    /// What follows.
    pub finding: Finding,
    /// The numbers, over everything captured of the stage.
    #[serde(flatten)]
    pub errors: Errors,
    /// The cosine between captured and exact, and the ratio of their norms: a dropped scale shows in the second only.
    #[serde(serialize_with = "crate::number")]
    pub cosine: f64,
    /// `|captured| / |exact|`.
    #[serde(serialize_with = "crate::number")]
    pub norm_ratio: f64,
    /// The test that is furthest beyond, or nearest to, what it may be.
    pub worst: Test,
    /// The element that is furthest from what it may be.
    pub worst_element: Option<Test>,
    /// Elements compared.
    pub elements: u64,
    /// Captured elements that are NaN or infinite where the replay is not, or the other way round.
    pub not_finite: u64,
    /// The stages that the capture does not hold, between this one and the captured ones before: a fault may be in any of
    /// them.
    #[serde(serialize_with = "crate::sites")]
    pub span: Vec<Site>,
    /// How many times its bound the unexplained error of a row may be.
    pub row_limit: f64,
    /// The same for a head and for a channel.
    pub channel_limit: f64,
    /// Row by row.
    pub rows: Vec<RowAudit>,
    /// Head by head, where the stage has heads.
    pub heads: Vec<Errors>,
    /// The heads that are beyond their bound.
    pub heads_beyond: Vec<usize>,
    /// Expert by expert, where the stage is computed by experts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<ExpertAudit>,
    /// What was chosen, where the stage is a choice of experts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub routing: Option<Routing>,
    /// Channels beyond their bound: the worst ones, at most [`StageAudit::CHANNELS`] of them.
    pub channels: Vec<ChannelAudit>,
    /// How many channels are beyond it, of how many.
    pub channels_beyond: usize,
    /// Channels of the stage.
    pub channels_total: usize,
    /// The unexplained error over the channels in at most [`StageAudit::PROFILE`] bins of neighbours, relative L2.
    pub channel_profile: Vec<f64>,
    /// The same for the bound.
    pub bound_profile: Vec<f64>,
}

impl StageAudit {
    /// How many of the worst channels are listed.
    pub const CHANNELS: usize = 32;
    /// How many bins a profile over the channels has at most.
    pub const PROFILE: usize = 128;

    /// Whether this stage is wrong.
    pub fn is_fault(&self) -> bool {
        self.finding == Finding::Fault
    }

    /// Rows that are beyond their bound.
    pub fn rows_beyond(&self) -> impl Iterator<Item = &RowAudit> {
        self.rows.iter().filter(|row| row.beyond)
    }
}

/// What follows for a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// It does what the declared arithmetic says, to within its accumulation.
    Explained,
    /// It does not, but the error is of the size that the declared arithmetic makes, as on the other stages: an arithmetic
    /// close to the declared one.
    Close,
    /// It does something else.
    Fault,
}

/// A comparison of one group of elements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Test {
    /// Of which elements.
    pub group: Group,
    /// The difference in units of what it may be: above 1 is beyond.
    #[serde(serialize_with = "crate::number")]
    pub excess: f64,
}

/// A group of elements of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Group {
    /// All of them.
    Whole,
    /// A token's.
    Row {
        /// The step.
        step: usize,
        /// The position.
        position: usize,
    },
    /// A head's, over all rows.
    Head {
        /// The head.
        head: usize,
    },
    /// An expert's, over all rows that went to it.
    Expert {
        /// The expert.
        expert: usize,
    },
    /// A channel's, over all rows.
    Channel {
        /// The channel, counted over all heads.
        channel: usize,
    },
    /// One element.
    Element {
        /// The step.
        step: usize,
        /// The position of the row.
        position: usize,
        /// The head of a score.
        #[serde(skip_serializing_if = "Option::is_none")]
        head: Option<usize>,
        /// The expert that computed it.
        #[serde(skip_serializing_if = "Option::is_none")]
        expert: Option<usize>,
        /// The channel, counted over all heads; the key of a score; the slot of a chosen expert.
        column: usize,
        /// What was captured.
        #[serde(serialize_with = "crate::number")]
        captured: f64,
        /// What the declared arithmetic gives.
        #[serde(serialize_with = "crate::number")]
        expected: f64,
    },
}

/// One row of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RowAudit {
    /// The step that computed it.
    pub step: usize,
    /// Its position.
    pub position: usize,
    /// Its numbers.
    #[serde(flatten)]
    pub errors: Errors,
    /// Whether it is beyond its bound.
    pub beyond: bool,
}

/// One expert's part of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ExpertAudit {
    /// The expert.
    pub expert: usize,
    /// How many rows went to it.
    pub rows: usize,
    /// Its numbers, over these rows.
    #[serde(flatten)]
    pub errors: Errors,
    /// Whether it is beyond its bound.
    pub beyond: bool,
}

/// One channel of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChannelAudit {
    /// The channel, counted over all heads.
    pub channel: usize,
    /// Its numbers, over all rows.
    #[serde(flatten)]
    pub errors: Errors,
}

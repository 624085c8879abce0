//! What looking costs.

use serde::Serialize;

use crate::table::{bytes, lines, table};

/// A run in front of one observer, next to the run that nobody looks at.
#[derive(Clone, Debug, Serialize)]
pub struct ObserverLine {
    /// Who looks: `off`, `off again`, `one site`, `all sites`, `save all`, `audit`.
    pub arm: &'static str,
    /// Seconds of each repetition, in order.
    pub samples: Vec<f64>,
    /// The median of them.
    pub median: f64,
    /// The median of the ratios to the repetition of `off` before it.
    pub ratio: f64,
    /// The smallest of the ratios.
    pub ratio_min: f64,
    /// The largest of them.
    pub ratio_max: f64,
    /// Bytes that one repetition wrote, if it wrote any.
    pub bytes_written: Option<u64>,
}

pub(super) fn text(arms: &[ObserverLine]) -> String {
    let mut t = table(&["looking", "seconds", "ratio to off", "min", "max", "written"]);
    for arm in arms {
        t.add_row([
            arm.arm.to_owned(),
            format!("{:.3}", arm.median),
            format!("{:.3}", arm.ratio),
            format!("{:.3}", arm.ratio_min),
            format!("{:.3}", arm.ratio_max),
            arm.bytes_written.map_or(String::new(), bytes),
        ]);
    }
    format!("\n{}", lines(&t))
}

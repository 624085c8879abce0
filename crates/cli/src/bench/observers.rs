//! What looking costs: the same run in front of nobody and of the observers that `apr trace` has.

use std::{fs, path::Path, time::Instant};

use anyhow::{Context, Result};
use apr_audit::{Options, audit};
use apr_capture::{
    Capture, Dims, Precision, Provenance, Recorder, RecorderOptions, Rows, StepSize, Telemetry,
    check_space, estimate,
};
use apr_format::Checkpoint;
use apr_model::{Backend, Model, Observer, Site, Stage, TapSet, Unobserved};
use apr_report::bench::ObserverLine;

use super::measure::{self, Kind, Runs, median};
use crate::output::Progress;

/// Longer runs tell no more of what looking costs, but an audit of them takes minutes.
const MOST_PREFILL: usize = 64;
const MOST_DECODE: usize = 16;

/// Who looks in the repeated runs, in this order.
const ARMS: [&str; 5] = ["off", "off again", "one site", "all sites", "save all"];

/// Times the first prompt and the first generation of `runs`, or so much of them as tells enough, in front of each.
pub(super) fn measure<B: Backend>(
    model: &Model<B>,
    checkpoint: &Checkpoint,
    runs: &Runs,
) -> Result<Vec<ObserverLine>> {
    let prefill = runs.prefill.first().map_or(0, |&n| n.min(MOST_PREFILL));
    let decode = runs.decode.first().map_or(0, |&n| n.min(MOST_DECODE));
    let looked_at = LookedAt {
        model,
        checkpoint,
        prefill: runs.steps(Kind::Prefill, prefill, 0),
        decode: runs.steps(Kind::Decode, decode, prefill),
    };
    let place = tempfile::tempdir().context("cannot make a temporary directory")?;
    let capture = place.path().join("capture");
    looked_at.check_space(&capture)?;

    let progress = Progress::new((ARMS.len() * (1 + runs.repetitions) + 1) as u64, "observers");
    let mut seconds = vec![Vec::new(); ARMS.len()];
    for repetition in 0..=runs.repetitions {
        for (arm, seconds) in ARMS.iter().zip(&mut seconds) {
            let taken = looked_at.by(arm, &capture)?;
            if repetition > 0 {
                seconds.push(taken);
            }
            progress.advance();
        }
    }
    let start = Instant::now();
    audit(&Capture::open(&capture)?, checkpoint, &Options::default(), &mut |_| {})?;
    let audited = start.elapsed().as_secs_f64();
    progress.finish();

    let off = seconds[0].clone();
    let written = Some(directory_bytes(&capture)?);
    let mut lines: Vec<ObserverLine> = ARMS
        .into_iter()
        .zip(seconds)
        .map(|(arm, seconds)| line(arm, seconds, &off, written.filter(|_| arm == "save all")))
        .collect();
    lines.push(line("audit", vec![audited], &[median(&off)], None));
    Ok(lines)
}

/// A run, of which all arms see the same.
struct LookedAt<'m, B: Backend> {
    model: &'m Model<B>,
    checkpoint: &'m Checkpoint,
    prefill: Vec<StepSize>,
    decode: Vec<StepSize>,
}

impl<B: Backend> LookedAt<'_, B> {
    /// The seconds that it takes in front of `arm`; what is saved is at `capture` afterwards.
    fn by(&self, arm: &str, capture: &Path) -> Result<f64> {
        let all = self.model.all_taps();
        Ok(match arm {
            "one site" => {
                let middle = self.model.config().num_hidden_layers / 2;
                let one = [Site::layer(middle, Stage::FfnNorm)].into_iter().collect();
                self.statistics(one)?
            }
            "all sites" => self.statistics(all)?,
            "save all" => {
                let mut cache = self.model.cache(self.positions())?;
                let start = Instant::now();
                let options = RecorderOptions { force: true, ..RecorderOptions::new(all) };
                let provenance = Provenance::of(self.model, self.checkpoint, None);
                let dims = Dims::from(self.model.config());
                let mut recorder = Recorder::create(capture, provenance, dims, options)?;
                self.run(&mut cache, &mut recorder)?;
                recorder.finish()?;
                start.elapsed().as_secs_f64()
            }
            _ => self.timed(&mut Unobserved)?,
        })
    }

    fn statistics(&self, sites: TapSet) -> Result<f64> {
        self.timed(&mut Telemetry::new(sites))
    }

    fn timed(&self, observer: &mut dyn Observer) -> Result<f64> {
        let mut cache = self.model.cache(self.positions())?;
        let start = Instant::now();
        self.run(&mut cache, observer)?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn run(&self, cache: &mut apr_model::Cache<B>, observer: &mut dyn Observer) -> Result<()> {
        measure::run(self.model, Kind::Prefill, &self.prefill, cache, observer)?;
        measure::run(self.model, Kind::Decode, &self.decode, cache, observer)
    }

    fn steps(&self) -> impl Iterator<Item = StepSize> {
        self.prefill.iter().chain(&self.decode).copied()
    }

    fn positions(&self) -> usize {
        self.steps().map(|step| step.tokens).sum()
    }

    fn check_space(&self, capture: &Path) -> Result<()> {
        let dims = Dims::from(self.model.config());
        let all = self.model.all_taps();
        let bytes = estimate(&all, &Rows::All, Precision::F32, &dims, self.steps());
        // A new capture is written beside the last one, which it then replaces.
        Ok(check_space(capture, bytes.saturating_mul(2))?)
    }
}

fn line(
    arm: &'static str,
    samples: Vec<f64>,
    off: &[f64],
    bytes_written: Option<u64>,
) -> ObserverLine {
    let ratios: Vec<f64> = samples.iter().zip(off).map(|(arm, off)| arm / off).collect();
    ObserverLine {
        arm,
        median: median(&samples),
        samples,
        ratio: median(&ratios),
        ratio_min: ratios.iter().copied().fold(f64::INFINITY, f64::min),
        ratio_max: ratios.iter().copied().fold(0.0, f64::max),
        bytes_written,
    }
}

/// The bytes of all files in `directory`.
fn directory_bytes(directory: &Path) -> Result<u64> {
    let cannot_read = || format!("cannot read {}", directory.display());
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(cannot_read)? {
        bytes += entry.and_then(|entry| entry.metadata()).with_context(cannot_read)?.len();
    }
    Ok(bytes)
}

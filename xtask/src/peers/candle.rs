//! candle, by a small program of ours: `xtask/peers/candle`, a project of its own, so that nobody else builds candle.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use super::{
    Peer,
    build::{Workshop, output},
    measurement::{Lengths, Measurement, Setting},
};

#[derive(Debug)]
pub(super) struct Candle {
    bench: PathBuf,
    version: String,
}

impl Candle {
    pub(super) fn ready(workshop: &Workshop) -> Result<Self> {
        let (bench, version) = workshop.candle_bench()?;
        Ok(Self { bench, version })
    }
}

impl Peer for Candle {
    fn version(&self) -> &str {
        &self.version
    }

    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        let Lengths { prompt, generate, depth } = setting.lengths;
        let mut command = Command::new(&self.bench);
        command.arg(&setting.model).env("RAYON_NUM_THREADS", setting.threads.to_string());
        for (option, number) in [("-p", prompt), ("-n", generate), ("-d", depth), ("-r", 1)] {
            command.args([option, &number.to_string()]);
        }
        Measurement::all_of(&output(&mut command)?)
    }
}

//! This engine, by `apr bench`.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use super::{
    Peer,
    build::{Workshop, output, said},
    measurement::{Lengths, Measurement, Setting},
};

#[derive(Debug)]
pub(super) struct Apr {
    program: PathBuf,
    version: String,
}

impl Apr {
    /// The `apr` at this path, or one that is built.
    pub(super) fn ready(workshop: &Workshop, program: Option<&Path>) -> Result<Self> {
        let program = match program {
            Some(path) => path.to_owned(),
            None => workshop.apr()?,
        };
        let version = said(Command::new(&program).arg("--version"))?;
        let version = version.strip_prefix("apr ").unwrap_or(&version).to_owned();
        Ok(Self { program, version })
    }
}

impl Peer for Apr {
    fn version(&self) -> &str {
        &self.version
    }

    fn measure(&self, setting: &Setting) -> Result<Vec<Measurement>> {
        let Lengths { prompt, generate, depth } = setting.lengths;
        let mut command = Command::new(&self.program);
        command.arg("bench").arg(&setting.model).args(["--no-probe", "--json"]);
        for (option, number) in
            [("-t", setting.threads), ("-p", prompt), ("-n", generate), ("-d", depth), ("-r", 1)]
        {
            command.args([option, &number.to_string()]);
        }
        Measurement::all_of(&output(&mut command)?)
    }
}

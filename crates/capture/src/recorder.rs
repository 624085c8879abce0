//! The observer that writes a capture.

use std::{
    collections::HashSet,
    fmt,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

use apr_model::{Observer, ObserverError, Site, Stage, Step, TapSet, View};
use apr_tensor::DType;

use crate::{
    Dims, Error, Result, Rows,
    manifest::{self, Layout, Manifest, Provenance},
    output::OutputDir,
    step_file::{Planned, StepFile},
};

/// Whole steps of a capture that is still being written, one manifest entry per line.
pub(crate) const JOURNAL: &str = "steps.jsonl";

/// What to record, and how to store it.
#[derive(Clone, Debug)]
pub struct RecorderOptions {
    /// The values to record.
    pub sites: TapSet,
    /// The rows of them.
    pub rows: Rows,
    /// How they are stored.
    pub precision: Precision,
    /// In which files they are stored.
    pub layout: Layout,
    /// Whether a capture that stands at the output may be replaced.
    pub force: bool,
}

impl RecorderOptions {
    /// All rows of `sites`, as F32, in a new capture.
    pub fn new(sites: TapSet) -> Self {
        Self {
            sites,
            rows: Rows::All,
            precision: Precision::F32,
            layout: Layout::Safetensors,
            force: false,
        }
    }
}

/// The type that values are stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the types name themselves")]
pub enum Precision {
    #[default]
    F32,
    F64,
}

impl Precision {
    /// The type that values of `stage` are stored in: ids are integers in all files that can hold any.
    pub(crate) fn dtype(self, stage: Stage, layout: Layout) -> DType {
        match (self, layout) {
            _ if stage.holds_ids() && layout == Layout::Safetensors => DType::I32,
            (Self::F64, _) => DType::F64,
            (Self::F32, _) => DType::F32,
        }
    }
}

/// Records the values of each step it observes.
///
/// The capture is written under a temporary name and stands at its place after [`Recorder::finish`]. A recorder that
/// is dropped before leaves the steps that are whole under the temporary name, in a manifest that says that
/// it is incomplete; if there is none, it leaves nothing.
pub struct Recorder {
    output: Option<OutputDir>,
    journal: File,
    manifest: Manifest,
    dims: Dims,
    options: RecorderOptions,
    token_text: Option<Box<TokenText>>,
    step: Option<StepFile>,
}

type TokenText = dyn Fn(u32) -> String + Send;

impl fmt::Debug for Recorder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recorder")
            .field("output", &self.output)
            .field("options", &self.options)
            .field("steps", &self.manifest.steps.len())
            .finish_non_exhaustive()
    }
}

impl Recorder {
    /// Begins a capture that will stand at `output`, of a model of these dimensions.
    ///
    /// A site that the model does not have is refused here, where it can still be named, rather than missed later.
    pub fn create(
        output: &Path,
        mut provenance: Provenance,
        dims: Dims,
        options: RecorderOptions,
    ) -> Result<Self> {
        if options.sites.is_empty() {
            return Err(Error::NothingToRecord);
        }
        if let Some(site) = options.sites.iter().find(|&site| !dims.has(site)) {
            let stages: Vec<_> = dims.stages().map(|stage| stage.name()).collect();
            let layers = dims.num_hidden_layers;
            return Err(Error::NoSuchSite { site, layers, stages: stages.join(", ") });
        }
        if options.layout == Layout::Aprt && options.precision != Precision::F32 {
            let problem = "APRT files hold F32 only; record F32, or write safetensors";
            return Err(Error::Output { path: output.to_owned(), problem });
        }
        provenance.model.config.get_or_insert_with(|| dims.clone());
        let manifest = Manifest::begun(provenance, options.layout);

        let output = OutputDir::create(output, options.force)?;
        manifest.write(output.path())?;
        let path = output.path().join(JOURNAL);
        let journal = OpenOptions::new().append(true).create_new(true).open(&path);
        let journal = journal.map_err(Error::write(&path))?;
        let output = Some(output);
        Ok(Self { output, journal, manifest, dims, options, token_text: None, step: None })
    }

    /// Lets the capture say what text each input token stands for.
    pub fn with_token_text(mut self, text: impl Fn(u32) -> String + Send + 'static) -> Self {
        self.token_text = Some(Box::new(text));
        self
    }

    /// The number of steps recorded so far.
    pub fn steps(&self) -> usize {
        self.manifest.steps.len()
    }

    /// Where the steps are until the capture is complete, and stay if it never is.
    pub fn partial_path(&self) -> &Path {
        self.output.as_ref().expect("only `finish` and `drop` take the output").path()
    }

    /// Completes the capture, gives it its final name, and returns that.
    ///
    /// A site of which no step had a row that was asked for is an error; what was recorded of the others stays under the
    /// temporary name.
    pub fn finish(mut self) -> Result<PathBuf> {
        self.step = None;
        self.check_every_site_has_rows()?;
        let output = self.output.take().expect("only `finish` and `drop` take the output");
        if self.manifest.steps.is_empty() {
            let partial = output.path();
            fs::remove_dir_all(partial).map_err(Error::write(partial))?;
            return Err(Error::NoSteps { path: output.target().to_owned() });
        }
        if let (Layout::Aprt, [only]) = (self.options.layout, &mut self.manifest.steps[..]) {
            lift(output.path(), &only.file)?;
            only.file = ".".to_owned();
        }
        self.manifest.complete = true;
        self.manifest.write(output.path())?;
        let journal = output.path().join(JOURNAL);
        fs::remove_file(&journal).map_err(Error::write(&journal))?;
        output.publish()
    }

    fn check_every_site_has_rows(&self) -> Result<()> {
        let steps = &self.manifest.steps;
        let recorded: HashSet<&str> = steps
            .iter()
            .flat_map(|step| &step.tensors)
            .map(|tensor| tensor.name.as_str())
            .collect();
        let names = self.options.sites.iter().map(|site| site.to_string());
        let missing: Vec<_> = names.filter(|name| !recorded.contains(name.as_str())).collect();
        match &self.output {
            Some(output) if !steps.is_empty() && !missing.is_empty() => Err(Error::NoRows {
                path: output.path().to_owned(),
                rows: self.options.rows.clone(),
                missing: missing.join(", "),
            }),
            _ => Ok(()),
        }
    }

    /// What the coming step will show of the wanted sites, where any row of it is wanted.
    fn plan(&self, step: &Step<'_>) -> Vec<Planned> {
        let RecorderOptions { layout, precision, .. } = self.options;
        let dtype = |stage| precision.dtype(stage, layout);
        planned(&self.options.sites, &self.options.rows, dtype, &self.dims, step)
    }

    fn begin_step(&mut self, step: &Step<'_>) -> Result<()> {
        // A step that ended in an error elsewhere never came to its `end`.
        self.step = None;
        let output = self.output.as_ref().expect("only `finish` and `drop` take the output");
        let index = self.manifest.steps.len();
        let tensors = self.plan(step);
        self.step = Some(StepFile::create(output.path(), index, self.options.layout, tensors)?);
        Ok(())
    }

    fn end_step(&mut self, step: &Step<'_>) -> Result<()> {
        let Some(file) = self.step.take() else { return Ok(()) };
        let name = file.name();
        let tensors = file
            .close(step.index)?
            .into_iter()
            .map(|(planned, hash)| tensor_entry(&planned, hash))
            .collect();
        let end = step.first_position + step.tokens.len();
        let entry = manifest::Step {
            file: name,
            phase: step.phase.name().to_owned(),
            chunk: step.chunk,
            slot: 0,
            token_ids: step.tokens.to_vec(),
            positions: (step.first_position..end).collect(),
            tokens_text: self
                .token_text
                .as_ref()
                .map(|text| step.tokens.iter().map(|&id| text(id)).collect()),
            tensors,
        };
        let mut line = serde_json::to_vec(&entry).expect("a step's entry is plain data");
        line.push(b'\n');
        let journal = || self.output.as_ref().map(|output| output.path().join(JOURNAL));
        self.journal
            .write_all(&line)
            .map_err(|source| Error::Write { path: journal().unwrap_or_default(), source })?;
        self.manifest.steps.push(entry);
        Ok(())
    }
}

impl Observer for Recorder {
    fn wanted(&self) -> TapSet {
        self.options.sites.clone()
    }

    fn begin(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        Ok(self.begin_step(step)?)
    }

    fn value(&mut self, step: &Step<'_>, site: Site, view: View<'_>) -> Result<(), ObserverError> {
        match &mut self.step {
            Some(file) => Ok(file.put(step.index, site, view)?),
            None => {
                let problem = "was shown outside a step".to_owned();
                Err(Error::Unexpected { step: step.index, site, problem }.into())
            }
        }
    }

    fn end(&mut self, step: &Step<'_>) -> Result<(), ObserverError> {
        Ok(self.end_step(step)?)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(output) = &self.output
            && self.manifest.steps.is_empty()
        {
            self.step = None;
            // A failure leaves a directory that every reader refuses; there is nobody left to tell.
            let _ = fs::remove_dir_all(output.path());
        }
    }
}

/// The values that `step` will show and of which some row is wanted, in the order of computation.
pub(crate) fn planned(
    sites: &TapSet,
    rows: &Rows,
    dtype: impl Fn(Stage) -> DType,
    dims: &Dims,
    step: &Step<'_>,
) -> Vec<Planned> {
    let keys = step.first_position + step.tokens.len();
    sites
        .iter()
        .filter_map(|site| {
            let positions = step.positions(site);
            let rows = rows.select(positions.clone());
            (!rows.is_empty()).then(|| Planned {
                site,
                shown: dims.shape(site.stage, positions.len(), keys),
                first_position: positions.start + rows.start,
                rows,
                dtype: dtype(site.stage),
            })
        })
        .collect()
}

fn tensor_entry(planned: &Planned, hash: blake3::Hash) -> manifest::Tensor {
    let Planned { site, rows, first_position, dtype, .. } = planned;
    manifest::Tensor {
        name: site.to_string(),
        stage: site.stage.name().to_owned(),
        layer: site.layer,
        shape: planned.shape(),
        axes: site.stage.axes().names().iter().map(|&axis| axis.to_owned()).collect(),
        dtype: dtype.name().to_owned(),
        positions: (*first_position..first_position + rows.len()).collect(),
        blake3: Some(hash.to_hex().to_string()),
    }
}

/// Moves what is in `directory/name` into `directory`: a tree of one step has no level for steps.
fn lift(directory: &Path, name: &str) -> Result<()> {
    let step = directory.join(name);
    for entry in fs::read_dir(&step).map_err(Error::read(&step))? {
        let entry = entry.map_err(Error::read(&step))?;
        let to = directory.join(entry.file_name());
        fs::rename(entry.path(), &to).map_err(Error::write(&to))?;
    }
    fs::remove_dir(&step).map_err(Error::write(&step))
}

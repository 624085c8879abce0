//! A check-up of a file alone: what can be said of it without running the model.

use std::{cell::OnceCell, path::Path};

use apr_format::Checkpoint;
use apr_model::{Config, Role, role_of};
use apr_tensor::Stored;
use apr_tokenizer::Tokenizer;

use crate::{
    Break, Check, Checked, Error, Note, Outcome, Result, Watch,
    outcome::{self, Verdict},
    statistics::TensorFacts,
};

/// What came of the checks of a file.
#[derive(Clone, Debug)]
pub struct FileCheckup {
    /// The file; `None` if it cannot be read.
    pub checkpoint: Option<Checkpoint>,
    /// One entry per check, in the order in which they were made.
    pub checks: Vec<Checked>,
}

impl FileCheckup {
    /// 1 if something is broken; else 3 if not everything could be looked at; else 0.
    pub fn exit_code(&self) -> u8 {
        outcome::exit_code(&self.checks)
    }
}

/// Makes all checks of the file at `path` that need no run. `bind` says what config a model of it runs with.
///
/// An error means that the file could not be looked at; a file that is no whole model is broken.
pub fn check_file(
    path: &Path,
    bind: impl FnOnce(&Checkpoint) -> apr_model::Result<Config>,
    watch: &dyn Watch,
) -> Result<FileCheckup> {
    let checkpoint = match Checkpoint::open_damaged(path) {
        Ok(checkpoint) => checkpoint,
        Err(error @ apr_format::Error::Io { .. }) => return Err(Error::File(error)),
        Err(error) => {
            let checks = Check::of_file().map(|check| refused(check, path, &error)).collect();
            return Ok(FileCheckup { checkpoint: None, checks });
        }
    };
    let config = bind(&checkpoint);
    let session = FileSession::new(&checkpoint, config.as_ref(), watch);
    let make = |check| outcome::made(check, false, || session.verdict(check));
    let checks = Check::of_file().map(make).collect();
    drop(session);
    Ok(FileCheckup { checkpoint: Some(checkpoint), checks })
}

/// What comes of `check` where the file at `path` is refused.
fn refused(check: Check, path: &Path, error: &apr_format::Error) -> Checked {
    let outcome = || match (check, error) {
        (Check::Layout, apr_format::Error::Unsupported { .. }) => Outcome::not_measured(error),
        (Check::Layout, _) => Outcome::broken(error),
        (Check::Checksum, _) => match Checkpoint::open(path) {
            // A header that is wrong in itself is refused for its checksum first.
            Err(other) if other.to_string() != error.to_string() => Outcome::broken(other),
            _ => Outcome::not_measured("the file cannot be read: see layout"),
        },
        _ => Outcome::not_measured("the file cannot be read: see layout"),
    };
    outcome::made(check, false, || Err(outcome()))
}

/// What the checks of a file share. Everything is made when it is first needed.
pub(crate) struct FileSession<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) watch: &'a dyn Watch,
    /// What the config check says.
    config: Result<String, Outcome>,
    pub(crate) facts: OnceCell<Vec<TensorFacts>>,
    tokenizer: OnceCell<Result<Tokenizer, apr_tokenizer::Error>>,
}

impl<'a> FileSession<'a> {
    pub(crate) fn new(
        checkpoint: &'a Checkpoint,
        config: Result<&Config, &apr_model::Error>,
        watch: &'a dyn Watch,
    ) -> Self {
        let tensors = checkpoint.tensors().len();
        let config = config.map_err(unbound).map(|config| {
            let layers = config.num_hidden_layers;
            format!("{}, {layers} layers, {tensors} tensors", config.architecture)
        });
        let (facts, tokenizer) = Default::default();
        Self { checkpoint, watch, config, facts, tokenizer }
    }

    /// What comes of a check that needs no run.
    pub(crate) fn verdict(&self, check: Check) -> Result<Verdict, Outcome> {
        match check {
            Check::Checksum => self.checksum(),
            Check::Layout => self.layout(),
            Check::Config => {
                self.watch.begin(Check::Config, 0);
                self.config.clone().map(|looked_at| Verdict::new(Vec::new(), looked_at))
            }
            Check::Vocabulary => self.vocabulary(),
            Check::FiniteWeights => self.finite_weights(),
            Check::DeadWeights => self.dead_weights(),
            Check::DuplicateWeights => self.duplicate_weights(),
            Check::NormScale => self.norm_scale(),
            Check::RowScale => self.row_scale(),
            Check::BlockScale => self.block_scale(),
            Check::Tokenizer => self.round_trip(),
            Check::SpecialTokens => self.special_tokens(),
            Check::TokenIds => self.token_ids(),
            Check::ChatTemplate => self.chat_template(),
            run => unreachable!("{run} is no check of a file"),
        }
    }

    fn checksum(&self) -> Result<Verdict, Outcome> {
        let checksums = self.checkpoint.checksums();
        if checksums.is_empty() {
            let container = self.checkpoint.container();
            return Err(Outcome::not_applicable(format!("{container} files state no checksum")));
        }
        let covered = checksums.iter().map(|checksum| checksum.covered()).sum();
        self.watch.begin(Check::Checksum, covered);
        let mut breaks = Vec::new();
        for checksum in &checksums {
            let computed = checksum.compute(|bytes| self.watch.advance(bytes));
            let (what, at, stated) = (checksum.what, checksum.at, checksum.stated);
            if stated != computed {
                let what = format!(
                    "the checksum of {what}, at offset {at}, is {stated:#010x}, but its bytes have {computed:#010x}: \
                     copy or download the file again"
                );
                breaks.push(Break::Other { what });
            }
        }
        Ok(Verdict::new(breaks, format!("{} checksums of {covered} bytes", checksums.len())))
    }

    /// That the file was opened is most of it: what reading refuses is told by [`refused`].
    fn layout(&self) -> Result<Verdict, Outcome> {
        self.watch.begin(Check::Layout, 0);
        let Self { checkpoint, .. } = self;
        let mut notes = Vec::new();
        for gap in checkpoint.gaps() {
            let dirty = gap.bytes.iter().any(|&byte| byte != 0);
            let len = gap.bytes.len();
            let what = match (gap.is_padding, dirty) {
                (true, false) => continue,
                (true, true) => {
                    format!("the {len} bytes of padding at {} are not zeros", gap.start)
                }
                (false, _) => format!("{len} bytes at {} belong to no tensor", gap.start),
            };
            let place = match &gap.after {
                Some(tensor) => format!("after `{tensor}`"),
                None => "before the first tensor".to_owned(),
            };
            let file = gap.file.display();
            notes.push(Note::new(format!("{file}: {what}, {place}")));
        }
        let unreadable = checkpoint.unreadable().map(|(name, unreadable)| Note {
            tensor: Some(name.to_owned()),
            what: format!(
                "the type {} is unknown here, and so whether its size is right",
                unreadable.dtype
            ),
        });
        notes.extend(unreadable);
        let (tensors, files) = (checkpoint.tensors().len(), checkpoint.files().len());
        let looked_at =
            format!("{tensors} tensors in {files} {}", if files == 1 { "file" } else { "files" });
        Ok(Verdict { notes, ..Verdict::new(Vec::new(), looked_at) })
    }

    /// The embedding, if there is one that can be read.
    pub(crate) fn embedding(&self) -> Result<&'a Stored, Outcome> {
        let table = |(name, _): &(&str, _)| role_of(name) == Some(Role::TokenEmbd);
        let found = self.checkpoint.tensors().find(table);
        found
            .map(|(_, stored)| stored)
            .ok_or_else(|| Outcome::not_measured("the file has no embedding that can be read"))
    }

    /// The tokenizer, for checks that are of something else.
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer, Outcome> {
        self.read_tokenizer().map_err(|outcome| match outcome {
            Outcome::Broken { .. } => {
                Outcome::not_measured("the tokenizer cannot be read: see tokenizer")
            }
            other => other,
        })
    }

    pub(crate) fn read_tokenizer(&self) -> Result<&Tokenizer, Outcome> {
        let read = || Tokenizer::from_checkpoint(self.checkpoint);
        self.tokenizer.get_or_init(read).as_ref().map_err(|error| match error {
            apr_tokenizer::Error::NoTokenizer { .. } => {
                Outcome::not_applicable("the model comes without a tokenizer")
            }
            apr_tokenizer::Error::Unsupported { .. } => Outcome::not_measured(error),
            _ => Outcome::broken(error),
        })
    }
}

/// What it says of a file that its model cannot be bound.
fn unbound(error: &apr_model::Error) -> Outcome {
    use apr_model::Error::*;
    match error {
        // The file may be sound: it is this engine that lacks something.
        UnsupportedArchitecture { .. }
        | UnsupportedValue { .. }
        | UnsupportedType { .. }
        | WeightType { .. }
        | Format(apr_format::Error::UnreadableTensor { .. }) => Outcome::not_measured(error),
        TensorShape { name, expected, found, .. } => {
            let what = format!("the shape is {found}, but the metadata asks for {expected}");
            Outcome::of(vec![Break::Tensor { tensor: name.clone(), what }])
        }
        _ => Outcome::broken(error),
    }
}

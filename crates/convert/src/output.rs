//! Where a model is written: under a temporary name beside its own, which it gets when it is complete.
//!
//! Whatever goes wrong, what stands under the final name is what was there before.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use apr_format::Checkpoint;
use tempfile::{NamedTempFile, TempDir};

use crate::{Error, Plan, Result, Target};

/// What stands in the names of what is not complete yet.
const PARTIAL: &str = ".apr-convert-";

/// Where to write, and what may be replaced.
#[derive(Clone, Debug)]
pub struct Output {
    path: PathBuf,
    is_directory: bool,
    is_weights_alone: bool,
    force: bool,
}

impl Output {
    /// `path` is to be the model in the container `target`: a file, or for safetensors a directory, unless the name is that
    /// of a safetensors file. What is there is only replaced with `force`, and never if it belongs to `source`.
    pub fn new(path: &Path, target: Target, source: &Checkpoint, force: bool) -> Result<Self> {
        let is_file_name = path.extension().is_some_and(|extension| extension == "safetensors");
        let is_safetensors = target == Target::Safetensors;
        let (is_directory, is_weights_alone) =
            (is_safetensors && !is_file_name, is_safetensors && is_file_name);
        let output = Self { path: path.to_owned(), is_directory, is_weights_alone, force };
        if let Ok(own) = path.canonicalize() {
            let sources = source.files().iter().map(|file| file.path());
            for theirs in sources.chain([source.path()]) {
                let theirs = theirs.canonicalize().map_err(io_error(theirs))?;
                // A file in a directory that would be replaced, too.
                if theirs == own || is_directory && theirs.starts_with(&own) {
                    return Err(Error::OntoItself { path: output.path });
                }
            }
        }
        fs::read_dir(output.parent()).map_err(io_error(output.parent()))?;
        output.check_free()?;
        Ok(output)
    }

    /// Whether it is a Hugging Face directory.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// Whether it is one file of weights without a config.
    pub fn is_weights_alone(&self) -> bool {
        self.is_weights_alone
    }

    /// The final name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether what is under the final name may be replaced.
    fn check_free(&self) -> Result<()> {
        let metadata = match fs::symlink_metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(reason) => return Err(Error::Io { path: self.path.clone(), reason }),
        };
        let exists = |what| Error::Exists { path: self.path.clone(), what };
        let is_file = metadata.is_file() || metadata.is_symlink();
        if !is_file && !metadata.is_dir() {
            return Err(Error::NoFile { path: self.path.clone() });
        }
        match (metadata.is_dir(), self.is_directory) {
            (false, false) if self.force => Ok(()),
            (true, true) if is_empty(&self.path)? => Ok(()),
            (true, true) if !self.force => Err(exists("a directory")),
            (true, true) if self.path.join("config.json").is_file() => Ok(()),
            (true, _) => Err(Error::ForeignDirectory { path: self.path.clone() }),
            (false, _) => Err(exists("a file")),
        }
    }

    /// The directory that the final name is in.
    fn parent(&self) -> &Path {
        let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        parent.unwrap_or(Path::new("."))
    }

    /// Refuses what the file system has no room for.
    pub(crate) fn check_room(&self, plan: &Plan) -> Result<()> {
        let needed = plan.bytes();
        let available = fs4::available_space(self.parent()).map_err(io_error(self.parent()))?;
        match needed <= available {
            true => Ok(()),
            false => Err(Error::Full { path: self.path.clone(), needed, available }),
        }
    }

    /// The name under which the model is written until it is complete; whoever is interrupted removes what has it.
    pub fn partial(&self) -> PathBuf {
        self.parent().join(self.partial_name())
    }

    /// Hidden, and of this process: `.model.gguf.apr-convert-123`.
    fn partial_name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        format!(".{name}{PARTIAL}{}", std::process::id())
    }

    /// A file under the temporary name.
    pub(crate) fn temporary_file(&self) -> Result<NamedTempFile> {
        let name = self.partial_name();
        let mut builder = tempfile::Builder::new();
        builder.prefix(&name).rand_bytes(0);
        // As any other file: what the umask leaves.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        builder.tempfile_in(self.parent()).map_err(io_error(&self.path))
    }

    /// A directory under the temporary name.
    pub(crate) fn temporary_directory(&self) -> Result<TempDir> {
        self.directory_called(&self.partial_name())
    }

    fn directory_called(&self, name: &str) -> Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(name).rand_bytes(0);
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        builder.tempdir_in(self.parent()).map_err(io_error(&self.path))
    }

    /// Gives `complete` the final name.
    pub(crate) fn publish(&self, complete: Complete) -> Result<()> {
        // Somebody may have written there meanwhile.
        self.check_free()?;
        match complete {
            Complete::File(file) => {
                let result = match self.force {
                    true => file.persist(&self.path),
                    false => file.persist_noclobber(&self.path),
                };
                result
                    .map_err(|error| Error::Io { path: self.path.clone(), reason: error.error })?;
            }
            Complete::Directory(directory) => {
                // A directory can only be renamed onto an empty one.
                let old = match self.path.is_dir() && !is_empty(&self.path)? {
                    true => Some(self.moved_away()?),
                    false => None,
                };
                fs::rename(directory.path(), &self.path).map_err(io_error(&self.path))?;
                // It has another name now, under which nobody is to remove it.
                let _ = directory.keep();
                drop(old);
            }
        }
        sync_directory(self.parent())
    }

    /// What is under the final name, in a temporary directory to be removed with.
    fn moved_away(&self) -> Result<TempDir> {
        let attic = self.directory_called(&format!("{}-old", self.partial_name()))?;
        fs::rename(&self.path, attic.path().join("old")).map_err(io_error(&self.path))?;
        Ok(attic)
    }
}

/// A whole model under a temporary name; removed unless published.
#[derive(Debug)]
pub(crate) enum Complete {
    File(NamedTempFile),
    Directory(TempDir),
}

impl Complete {
    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Directory(directory) => directory.path(),
        }
    }
}

/// The error of a file operation at `path`.
pub(crate) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |reason| Error::Io { path: path.to_owned(), reason }
}

/// Makes the names in `directory` outlast a crash, where the system can.
pub(crate) fn sync_directory(directory: &Path) -> Result<()> {
    if cfg!(unix) {
        fs::File::open(directory).and_then(|file| file.sync_all()).map_err(io_error(directory))?;
    }
    Ok(())
}

fn is_empty(directory: &Path) -> Result<bool> {
    Ok(fs::read_dir(directory).map_err(io_error(directory))?.next().is_none())
}

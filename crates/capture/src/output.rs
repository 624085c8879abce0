//! An output directory that appears under its final name whole or not at all.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{Error, Result, manifest::MANIFEST};

/// A directory being written as `NAME.partial-PID` beside its final place.
#[derive(Debug)]
pub(crate) struct OutputDir {
    target: PathBuf,
    partial: PathBuf,
}

impl OutputDir {
    /// Begins a directory that will stand at `target`. What is there is not touched before [`OutputDir::publish`].
    pub(crate) fn create(target: &Path, force: bool) -> Result<Self> {
        let target = std::path::absolute(target).map_err(Error::write(target))?;
        check_target(&target, force)?;
        let partial = sibling(&target, "partial")?;
        if let Some(parent) = partial.parent() {
            fs::create_dir_all(parent).map_err(Error::write(parent))?;
        }
        match fs::create_dir(&partial) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let problem = "exists already: another capture is being written there, or was \
                               interrupted; remove it or give another output";
                Err(Error::Output { path: partial, problem })
            }
            other => other.map_err(Error::write(&partial)).map(|()| Self { target, partial }),
        }
    }

    /// Where the directory will stand.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the directory its final name, in place of what stands there.
    pub(crate) fn publish(self) -> Result<PathBuf> {
        let Self { target, partial } = self;
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(Error::write(to));
        let occupied = target.try_exists().map_err(Error::read(&target))?;
        if occupied {
            let old = sibling(&target, "old")?;
            rename(&target, &old)?;
            if let Err(error) = rename(&partial, &target) {
                rename(&old, &target)?;
                return Err(error);
            }
            fs::remove_dir_all(&old).map_err(Error::write(&old))?;
        } else {
            rename(&partial, &target)?;
        }
        Ok(target)
    }
}

fn check_target(target: &Path, force: bool) -> Result<()> {
    let refuse = |problem| Err(Error::Output { path: target.to_owned(), problem });
    if !target.try_exists().map_err(Error::read(target))? {
        return Ok(());
    }
    if !target.is_dir() {
        return refuse("exists and is not a directory; give another output");
    }
    let empty = fs::read_dir(target).map_err(Error::read(target))?.next().is_none();
    match (empty, force) {
        (true, _) => Ok(()),
        (false, false) => refuse("is not empty; give another output, or --force to replace it"),
        (false, true) if target.join(MANIFEST).is_file() => Ok(()),
        (false, true) => refuse("holds no manifest.json, and --force replaces captures only"),
    }
}

/// `NAME.KIND-PID` beside `target`: on the same file system, so that a rename is atomic.
fn sibling(target: &Path, kind: &str) -> Result<PathBuf> {
    let Some(name) = target.file_name() else {
        let problem = "has no name of its own; give the output a name";
        return Err(Error::Output { path: target.to_owned(), problem });
    };
    let mut sibling = OsString::from(name);
    sibling.push(format!(".{kind}-{}", std::process::id()));
    Ok(target.with_file_name(sibling))
}

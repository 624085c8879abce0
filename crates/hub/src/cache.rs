//! The cache that the hub's tools share, as `huggingface_hub` lays it out.
//!
//! ```text
//! models--ORG--NAME/blobs/CHECKSUM                   the bytes
//! models--ORG--NAME/snapshots/COMMIT/PATH            links to them
//! models--ORG--NAME/refs/REVISION                    what commit a branch or tag was
//! .locks/models--ORG--NAME/CHECKSUM.lock             who is writing
//! ```

use std::{
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
};

use hf_hub::{Repo, RepoType};

use crate::{Checksum, Error, Listing, ModelName, RemoteFile, Result, Revision, model::is_hex};

/// Folders within a snapshot; deeper than any model, and an end to links in circles.
const DEEPEST: usize = 16;

/// A cache.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

/// Where a file and what becomes of it is.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    /// The bytes, whole and right.
    pub(crate) blob: PathBuf,
    /// The bytes that are there so far.
    pub(crate) partial: PathBuf,
    /// Bytes that turned out to be wrong.
    pub(crate) corrupt: PathBuf,
    /// The file by its name.
    pub(crate) pointer: PathBuf,
    lock: PathBuf,
}

impl Cache {
    /// The cache in this directory, which need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.root
    }

    /// The directory of a model at a commit.
    pub fn snapshot(&self, model: &ModelName, commit: &str) -> PathBuf {
        hf_hub::Cache::new(self.root.clone()).repo(repo(model)).pointer_path(commit)
    }

    /// Whether the bytes of a file are there, by size.
    pub fn has(&self, listing: &Listing, file: &RemoteFile) -> bool {
        match &file.checksum {
            Some(checksum) => size(&self.place(listing, file, checksum).blob) == Some(file.size),
            None => {
                let snapshot = self.snapshot(&listing.model, &listing.commit);
                size(&snapshot.join(&file.path)) == Some(file.size)
            }
        }
    }

    /// What is in the cache of a model, without asking the hub.
    pub fn list(&self, model: &ModelName, revision: &Revision) -> Result<Listing> {
        let none = || Error::NotCached {
            cache: self.root.clone(),
            model: model.to_string(),
            revision: revision.to_string(),
        };
        let commit = match revision.is_commit() {
            true => revision.to_string(),
            false => fs::read_to_string(self.reference(model, revision)).map_err(|_| none())?,
        };
        let commit = commit.trim().to_owned();
        let snapshot = self.snapshot(model, &commit);
        if !is_hex(&commit, 40) || !snapshot.is_dir() {
            return Err(none());
        }
        let mut files = Vec::new();
        walk(&snapshot, "", DEEPEST, &mut files)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Listing { model: model.clone(), revision: revision.clone(), commit, files })
    }

    pub(crate) fn place(&self, listing: &Listing, file: &RemoteFile, checksum: &Checksum) -> Place {
        let digits = checksum.as_str();
        let cache = hf_hub::Cache::new(self.root.clone()).repo(repo(&listing.model));
        let beside = |end: &str| cache.blob_path(&format!("{digits}.{end}"));
        Place {
            blob: cache.blob_path(digits),
            partial: beside("incomplete"),
            corrupt: beside("corrupt"),
            pointer: cache.pointer_path(&listing.commit).join(&file.path),
            lock: self.locks(&listing.model).join(format!("{digits}.lock")),
        }
    }

    fn locks(&self, model: &ModelName) -> PathBuf {
        self.root.join(".locks").join(repo(model).folder_name())
    }

    fn reference(&self, model: &ModelName, revision: &Revision) -> PathBuf {
        self.root.join(repo(model).folder_name()).join("refs").join(revision.as_str())
    }

    /// Notes which commit a branch or tag is.
    pub(crate) fn write_reference(&self, listing: &Listing) -> Result<()> {
        if listing.revision.is_commit() {
            return Ok(());
        }
        let path = self.reference(&listing.model, &listing.revision);
        if fs::read_to_string(&path).is_ok_and(|commit| commit == listing.commit) {
            return Ok(());
        }
        make_parent(&path)?;
        let _lock = lock(&self.locks(&listing.model).join("refs.lock"), || {})?;
        let mut partial = path.clone().into_os_string();
        partial.push(".tmp");
        fs::write(&partial, &listing.commit)
            .and_then(|()| fs::rename(&partial, &path))
            .map_err(Error::write(&path))
    }

    /// Refuses to fetch what would not fit.
    pub(crate) fn check_space(&self, needed: u64) -> Result<()> {
        let absolute = std::path::absolute(&self.root).map_err(Error::read(&self.root))?;
        let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(&absolute);
        let available = fs4::available_space(existing).map_err(Error::read(existing))?;
        match available >= needed {
            true => Ok(()),
            false => Err(Error::NoSpace { path: self.root.clone(), needed, available }),
        }
    }
}

impl Place {
    /// How many of the bytes are there already.
    pub(crate) fn partial_size(&self) -> u64 {
        size(&self.partial).unwrap_or(0)
    }

    /// Keeps other processes from fetching the same file until the result is dropped. `wait` is told if one is at it.
    pub(crate) fn lock(&self, wait: impl FnOnce()) -> Result<File> {
        lock(&self.lock, wait)
    }

    /// Puts bytes that are wrong where they are no model.
    pub(crate) fn set_aside(&self, bytes: &Path) -> Result<()> {
        fs::rename(bytes, &self.corrupt).map_err(Error::write(&self.corrupt))
    }

    /// Gives the bytes their name in the snapshot.
    pub(crate) fn link(&self, path_in_snapshot: &str) -> Result<()> {
        make_parent(&self.pointer)?;
        let digits = self.blob.file_name().unwrap_or_default();
        let up = path_in_snapshot.split('/').count() + 1;
        let target: PathBuf = std::iter::repeat_n("..", up).collect();
        let target = target.join("blobs").join(digits);
        match fs::read_link(&self.pointer) {
            Ok(there) if there == target => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            // A link to other bytes, or no link.
            _ => fs::remove_file(&self.pointer).map_err(Error::write(&self.pointer))?,
        }
        // Without the right to make links (on Windows), a second name for the same bytes does as well.
        let linked =
            symlink(&target, &self.pointer).or_else(|_| fs::hard_link(&self.blob, &self.pointer));
        match linked {
            // Another process was faster; of the same commit, it meant the same bytes.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            linked => linked.map_err(Error::write(&self.pointer)),
        }
    }
}

/// Holds a lock file until the result is dropped. `wait` is told if somebody else does.
fn lock(path: &Path, wait: impl FnOnce()) -> Result<File> {
    make_parent(path)?;
    let file = File::create(path).map_err(Error::write(path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            wait();
            file.lock().map_err(Error::write(path))?;
        }
        // Some network file systems have no locks; the checksum still tells what two writers did.
        Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {}
        Err(TryLockError::Error(e)) => return Err(Error::write(path)(e)),
    }
    Ok(file)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(windows)]
fn symlink(target: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, link)
}

fn repo(model: &ModelName) -> Repo {
    Repo::new(model.to_string(), RepoType::Model)
}

/// The size of a file, through links.
pub(crate) fn size(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|metadata| metadata.len())
}

pub(crate) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(Error::write(parent))
}

/// The files under a snapshot. A link's target is named by its checksum.
fn walk(directory: &Path, prefix: &str, depth: usize, files: &mut Vec<RemoteFile>) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(Error::read(directory))? {
        let path = entry.map_err(Error::read(directory))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        let name = format!("{prefix}{name}");
        if let Some(size) = size(&path) {
            let target = fs::read_link(&path).ok();
            let digits = target.as_deref().and_then(Path::file_name).and_then(|n| n.to_str());
            let checksum = digits.and_then(Checksum::from_hex);
            files.push(RemoteFile { path: name, size, checksum });
        } else if path.is_dir() && depth > 0 {
            walk(&path, &format!("{name}/"), depth - 1, files)?;
        }
    }
    Ok(())
}

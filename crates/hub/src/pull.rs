//! Several files, into the cache: what is there is left, what is missing is fetched, and then the revision is noted.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{
    Checksum, Error, Hub, Listing, RemoteFile, Result,
    cache::{self, Place},
    transfer::Part,
};

/// What happens during [`Hub::pull`].
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// It is known what will be fetched.
    Planned {
        /// How many files.
        files: usize,
        /// Their size, with what is there of them from earlier attempts.
        bytes: u64,
    },
    /// A file is in the cache already.
    Cached(&'a RemoteFile),
    /// A file in the cache has other bytes than it should, and is fetched again.
    Damaged {
        /// The file.
        file: &'a RemoteFile,
        /// Where its bytes are now.
        kept: &'a Path,
    },
    /// Another process is fetching this file.
    Waiting(&'a RemoteFile),
    /// A file is fetched, from this offset on.
    Started {
        /// The file.
        file: &'a RemoteFile,
        /// How much of it was there from an earlier attempt.
        resumed: u64,
    },
    /// So many bytes of the file are there. They may be less than before.
    Received(u64),
    /// Something failed that may pass.
    Retrying {
        /// What failed.
        error: &'a Error,
        /// When it is tried again.
        wait: Duration,
    },
    /// A file is whole and right.
    Finished(&'a RemoteFile),
}

/// What is in the cache now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// The directory that holds the files by their names.
    pub directory: PathBuf,
    /// The files, in the order asked for.
    pub files: Vec<PulledFile>,
}

/// A file in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PulledFile {
    /// The file.
    pub file: RemoteFile,
    /// Whether nothing of it had to be fetched.
    pub cached: bool,
    /// The offset from which on it was fetched.
    pub resumed: u64,
}

impl Hub {
    /// Brings `files` of a listing into the cache. With `verify`, what is there already is read and summed too; without, only its
    /// size is looked at.
    pub fn pull(
        &self,
        listing: &Listing,
        files: &[RemoteFile],
        verify: bool,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<Pulled> {
        let mut places = Vec::new();
        for file in files {
            let checksum = file.checksum.as_ref().ok_or_else(|| Error::Answer {
                url: file.path.clone(),
                problem: "the list of files has no checksum of it".to_owned(),
            })?;
            let place = self.cache().place(listing, file, checksum);
            if let Some(kept) = set_damage_aside(file, checksum, &place, verify)? {
                watch(Event::Damaged { file, kept });
            }
            places.push((file, checksum, place));
        }
        let missing = || places.iter().filter(|(.., place)| !place.blob.exists());
        let sum = |sizes: &mut dyn Iterator<Item = u64>| sizes.fold(0, u64::saturating_add);
        let bytes = sum(&mut missing().map(|(file, ..)| file.size));
        let there = sum(&mut missing().map(|(file, _, place)| place.partial_size().min(file.size)));
        self.cache().check_space(bytes - there)?;
        watch(Event::Planned { files: missing().count(), bytes });
        let mut pulled = Vec::new();
        for (file, checksum, place) in &places {
            pulled.push(self.bring(listing, file, checksum, place, watch)?);
            place.link(&file.path)?;
        }
        // Last, so that a revision is never a commit of which only a part is there.
        self.cache().write_reference(listing)?;
        let directory = self.cache().snapshot(&listing.model, &listing.commit);
        Ok(Pulled { directory, files: pulled })
    }

    /// Brings one file into the cache.
    fn bring(
        &self,
        listing: &Listing,
        file: &RemoteFile,
        checksum: &Checksum,
        place: &Place,
        watch: &mut dyn FnMut(Event<'_>),
    ) -> Result<PulledFile> {
        let cached = |watch: &mut dyn FnMut(Event<'_>)| {
            watch(Event::Cached(file));
            Ok(PulledFile { file: file.clone(), cached: true, resumed: 0 })
        };
        if place.blob.exists() {
            return cached(watch);
        }
        let _lock = place.lock(|| watch(Event::Waiting(file)))?;
        // Whoever had the lock may have fetched it.
        if place.blob.exists() {
            return cached(watch);
        }
        let mut part = Part::open(file, checksum, place)?;
        let resumed = part.received();
        watch(Event::Started { file, resumed });
        let (mut failures, mut furthest) = (0, resumed);
        while !part.is_whole() {
            let received = part.receive(self, listing, &mut |n| watch(Event::Received(n)));
            let Err(error) = received else { break };
            if part.received() > furthest {
                (furthest, failures) = (part.received(), 0);
            }
            let tell = &mut |error: &Error, wait| watch(Event::Retrying { error, wait });
            self.pause(error, &mut failures, tell)?;
        }
        part.finish()?;
        watch(Event::Finished(file));
        Ok(PulledFile { file: file.clone(), cached: false, resumed })
    }
}

/// Whether the bytes in the cache are other than they should be; then they lose their name, and their new one is returned.
fn set_damage_aside<'a>(
    file: &RemoteFile,
    checksum: &Checksum,
    place: &'a Place,
    verify: bool,
) -> Result<Option<&'a Path>> {
    let sound = match cache::size(&place.blob) {
        None => true,
        Some(size) if size != file.size => false,
        Some(_) if !verify => true,
        Some(_) => {
            let mut hasher = checksum.hasher(file.size);
            hasher.update_from(&place.blob)?;
            hasher.finish() == checksum.as_str()
        }
    };
    if sound {
        return Ok(None);
    }
    place.set_aside(&place.blob)?;
    Ok(Some(&place.corrupt))
}

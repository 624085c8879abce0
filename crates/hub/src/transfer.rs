//! The bytes of one file: fetched from where an earlier attempt ended, summed on the way, named when they are right.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
};

use ureq::{Body, http::Response};

use crate::{
    Checksum, Error, Hub, Listing, RemoteFile, Result,
    cache::{self, Place},
    checksum::Hasher,
};

/// A file that is not all there yet.
pub(crate) struct Part<'a> {
    file: &'a RemoteFile,
    checksum: &'a Checksum,
    place: &'a Place,
    output: File,
    hasher: Hasher,
    received: u64,
}

impl<'a> Part<'a> {
    /// Goes on with what is there, if anything is.
    pub(crate) fn open(
        file: &'a RemoteFile,
        checksum: &'a Checksum,
        place: &'a Place,
    ) -> Result<Self> {
        let path = &place.partial;
        cache::make_parent(path)?;
        let output = OpenOptions::new().create(true).append(true).open(path);
        let output = output.map_err(Error::write(path))?;
        let received = output.metadata().map_err(Error::read(path))?.len();
        let hasher = checksum.hasher(file.size);
        let mut part = Self { file, checksum, place, output, hasher, received };
        match received > file.size {
            true => part.restart()?,
            false => part.hasher.update_from(path)?,
        }
        Ok(part)
    }

    /// How many of the bytes are there.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Whether all of them are.
    pub(crate) fn is_whole(&self) -> bool {
        self.received == self.file.size
    }

    fn restart(&mut self) -> Result<()> {
        self.output.set_len(0).map_err(Error::write(&self.place.partial))?;
        self.hasher = self.checksum.hasher(self.file.size);
        self.received = 0;
        Ok(())
    }

    /// Fetches what is missing. `tell` hears how much is there, now and then; it may be less than before, if the server cannot
    /// go on from within a file. After an error, what came is kept.
    pub(crate) fn receive(
        &mut self,
        hub: &Hub,
        listing: &Listing,
        tell: &mut dyn FnMut(u64),
    ) -> Result<()> {
        let response = hub.open(listing, &self.file.path, self.received)?;
        let start = start(&response, self.file.size).map_err(|problem| self.nonsense(problem))?;
        if start == 0 && self.received > 0 {
            self.restart()?;
        }
        if start != self.received {
            return Err(self.nonsense(format!(
                "bytes from {start} on were sent where {} were asked for",
                self.received
            )));
        }
        tell(self.received);
        // More than was listed would only be found out at the end of the disk.
        let mut body = response.into_body().into_reader().take(self.file.size - self.received);
        let mut buffer = vec![0; 1 << 17];
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) if self.is_whole() => return Ok(()),
                Ok(0) => return Err(self.interrupted(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(self.interrupted(e)),
            };
            self.output.write_all(&buffer[..n]).map_err(Error::write(&self.place.partial))?;
            self.hasher.update(&buffer[..n]);
            self.received += n as u64;
            tell(self.received);
        }
    }

    /// Gives the bytes their final name, if they are the hub's.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { file, checksum, place, output, hasher, .. } = self;
        let partial = &place.partial;
        // The name must not be on the disk before the bytes.
        output.sync_all().map_err(Error::write(partial))?;
        drop(output);
        let found = hasher.finish();
        if found != checksum.as_str() {
            place.set_aside(partial)?;
            return Err(Error::Corrupt {
                file: file.path.clone(),
                kept: place.corrupt.clone(),
                expected: checksum.as_str().to_owned(),
                found,
            });
        }
        fs::rename(partial, &place.blob).map_err(Error::write(&place.blob))
    }

    fn nonsense(&self, problem: String) -> Error {
        Error::Answer { url: self.file.path.clone(), problem }
    }

    fn interrupted(&self, source: io::Error) -> Error {
        let Self { file: RemoteFile { path, size, .. }, received, .. } = self;
        Error::Interrupted { file: path.clone(), received: *received, size: *size, source }
    }
}

/// The offset of the first byte of an answer, for a file of `size` bytes.
fn start(response: &Response<Body>, size: u64) -> Result<u64, String> {
    const PARTIAL: u16 = 206;
    if response.status().as_u16() != PARTIAL {
        return match response.body().content_length() {
            Some(length) if length != size => {
                Err(format!("{length} bytes were sent of a file that the hub lists with {size}"))
            }
            _ => Ok(0),
        };
    }
    let range = response.headers().get("content-range").and_then(|value| value.to_str().ok());
    let parsed = range.and_then(|text| {
        let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
        Some((range.split_once('-')?.0.parse().ok()?, total.parse::<u64>().ok()))
    });
    match parsed {
        Some((_, Some(total))) if total != size => {
            Err(format!("the server has {total} bytes of a file that the hub lists with {size}"))
        }
        Some((start, _)) => Ok(start),
        None => Err("a part of a file came without saying which (Content-Range)".to_owned()),
    }
}

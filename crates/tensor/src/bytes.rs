//! Shared, immutable bytes: a range of a memory map, or a buffer of our own.

use std::{fmt, ops::Deref, ops::Range, sync::Arc};

use memmap2::Mmap;

/// Bytes that are cheap to clone and to slice, whoever owns them.
#[derive(Clone)]
pub struct Bytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<Mmap>),
    Buffer(Arc<[u8]>),
    Static(&'static [u8]),
}

impl Bytes {
    /// The whole of a memory map.
    pub fn mapped(map: Arc<Mmap>) -> Self {
        let range = 0..map.len();
        Self { owner: Owner::Mapped(map), range }
    }

    /// Bytes that live as long as the program, such as an embedded model.
    pub fn from_static(bytes: &'static [u8]) -> Self {
        Self { owner: Owner::Static(bytes), range: 0..bytes.len() }
    }

    /// A part of these bytes; `None` if `range` reaches beyond them.
    pub fn slice(&self, range: Range<usize>) -> Option<Self> {
        if range.start > range.end || range.end > self.range.len() {
            return None;
        }
        let start = self.range.start + range.start;
        Some(Self { owner: self.owner.clone(), range: start..start + range.len() })
    }
}

impl Bytes {
    /// Tells the system that these bytes are not needed for now. Mapped ones are read from their file again when they are.
    pub fn release(&self) {
        #[cfg(unix)]
        if let Owner::Mapped(map) = &self.owner {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            // SAFETY: the map is of a file and only read, so pages that are dropped come back from the
            // file as they were.
            let advised =
                unsafe { map.unchecked_advise_range(advice, self.range.start, self.range.len()) };
            // It is advice: memory is all that is lost if it is not taken.
            let _ = advised;
        }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Owner::Buffer(bytes.into()), range }
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.owner {
            Owner::Mapped(map) => map,
            Owner::Buffer(buffer) => buffer,
            Owner::Static(bytes) => bytes,
        };
        &all[self.range.clone()]
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.owner {
            Owner::Mapped(_) => "mapped",
            Owner::Buffer(_) => "buffer",
            Owner::Static(_) => "static",
        };
        write!(f, "Bytes({kind}, {} bytes)", self.range.len())
    }
}

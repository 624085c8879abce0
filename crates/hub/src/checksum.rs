//! The two checksums of the hub: SHA-256 of large files, and git's own of the small ones.

use std::{fmt::Write, fs::File, io::Read, path::Path};

use sha1::{Digest, Sha1};
use sha2::Sha256;

use crate::{Error, Result, model::is_hex};

/// What the bytes of a file must come to, in hexadecimal. The cache names files by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// SHA-256 of the bytes: files in git's large file storage.
    Sha256(String),
    /// SHA-1 of a header and the bytes, as git names its objects.
    Git(String),
}

impl Checksum {
    /// The checksum that these digits are, by their number.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        if is_hex(text, 64) {
            Some(Self::Sha256(text.to_owned()))
        } else if is_hex(text, 40) {
            Some(Self::Git(text.to_owned()))
        } else {
            None
        }
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::Git(digits) => digits,
        }
    }

    /// A hasher of the same kind, for a file of `size` bytes.
    pub(crate) fn hasher(&self, size: u64) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(Sha256::new()),
            Self::Git(_) => {
                Hasher::Git(Sha1::new().chain_update(format!("blob {size}\0").as_bytes()))
            }
        }
    }
}

/// A checksum in the making.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Git(Sha1),
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git(hash) => hash.update(bytes),
        }
    }

    /// Takes in what a file holds.
    pub(crate) fn update_from(&mut self, path: &Path) -> Result<()> {
        let mut file = File::open(path).map_err(Error::read(path))?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer).map_err(Error::read(path))? {
                0 => return Ok(()),
                n => self.update(&buffer[..n]),
            }
        }
    }

    pub(crate) fn finish(self) -> String {
        match self {
            Self::Sha256(hash) => hex(&hash.finalize()),
            Self::Git(hash) => hex(&hash.finalize()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes any text");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_git_and_sha256sum() {
        let of = |checksum: &Checksum, bytes: &[u8]| {
            let mut hasher = checksum.hasher(bytes.len() as u64);
            hasher.update(bytes);
            hasher.finish()
        };
        // printf 'hello\n' | git hash-object --stdin
        let git = Checksum::from_hex("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        assert_eq!(of(&git, b"hello\n"), git.as_str());
        // printf 'hello\n' | sha256sum
        let sha = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        let sha = Checksum::from_hex(sha).unwrap();
        assert_eq!(of(&sha, b"hello\n"), sha.as_str());
        assert_eq!(Checksum::from_hex("../../x"), None);
    }
}

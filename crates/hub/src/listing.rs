//! What a repository holds at a revision, as the hub tells it.

use serde::Deserialize;

use crate::{Checksum, ModelName, Revision, model::is_hex};

/// The files of a model at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// The model.
    pub model: ModelName,
    /// The revision that was asked for.
    pub revision: Revision,
    /// The commit that it is now.
    pub commit: String,
    /// The files, by name.
    pub files: Vec<RemoteFile>,
}

/// A file of a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteFile {
    /// Its path in the repository: relative, with slashes, without `..`.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its checksum, if the hub or the cache knows it.
    pub checksum: Option<Checksum>,
}

#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Reads the hub's answer, or says what is wrong with it.
    pub(crate) fn parse(
        model: &ModelName,
        revision: &Revision,
        answer: &[u8],
    ) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(answer)
            .map_err(|e| format!("the list of files is not what a hub sends: {e}"))?;
        if !is_hex(&answer.sha, 40) {
            return Err("the commit is no hash".to_owned());
        }
        let mut files =
            answer.siblings.into_iter().map(Sibling::read).collect::<Result<Vec<_>, _>>()?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Self { model: model.clone(), revision: revision.clone(), commit: answer.sha, files })
    }
}

impl Sibling {
    fn read(self) -> Result<RemoteFile, String> {
        let Self { rfilename: path, size, blob_id, lfs } = self;
        if !is_safe(&path) {
            return Err(format!("a file has the unsafe name {path:?}"));
        }
        let (size, digits) = match lfs {
            Some(lfs) => (Some(lfs.size), Some(lfs.sha256)),
            None => (size, blob_id),
        };
        let Some(size) = size else {
            return Err(format!("the list of files does not say how large {path} is"));
        };
        let checksum = digits.as_deref().and_then(Checksum::from_hex);
        Ok(RemoteFile { path, size, checksum })
    }
}

/// Whether a path of a repository stays in the folder that it is put in, on every system.
fn is_safe(path: &str) -> bool {
    const LONGEST: usize = 1024;
    let good_part = |part: &str| !matches!(part, "" | "." | "..");
    path.len() <= LONGEST
        && !path.contains(['\\', ':'])
        && !path.chars().any(char::is_control)
        && path.split('/').all(good_part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(answer: &str) -> Result<Listing, String> {
        let model = "org/name".parse().unwrap();
        Listing::parse(&model, &Revision::default(), answer.as_bytes())
    }

    const COMMIT: &str = "0123456789012345678901234567890123456789";

    #[test]
    fn large_files_have_sha256_and_small_ones_gits_checksum() {
        let sha = "a".repeat(64);
        let listing = parse(&format!(
            r#"{{"sha": "{COMMIT}", "private": false, "siblings": [
                {{"rfilename": "model.safetensors", "size": 7, "blobId": "{COMMIT}",
                  "lfs": {{"sha256": "{sha}", "size": 7, "pointerSize": 134}}}},
                {{"rfilename": "config.json", "size": 5, "blobId": "{COMMIT}"}}]}}"#
        ))
        .unwrap();
        assert_eq!(listing.commit, COMMIT);
        assert_eq!(listing.files[0].checksum, Some(Checksum::Git(COMMIT.to_owned())));
        assert_eq!(listing.files[1].checksum, Some(Checksum::Sha256(sha)));
        assert_eq!(listing.files[1].size, 7);
    }

    #[test]
    fn a_listing_that_would_write_elsewhere_is_refused() {
        for bad in ["../x", "/x", "a//b", "a/../b", "C:/x", "a\\\\b", "a\\nb"] {
            let text = format!(
                r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "{bad}", "size": 1}}]}}"#
            );
            assert!(parse(&text).unwrap_err().contains("unsafe"), "{bad}");
        }
        assert!(parse(r#"{"sha": "../..", "siblings": []}"#).unwrap_err().contains("commit"));
        let unsized_ = format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "x"}}]}}"#);
        assert!(parse(&unsized_).unwrap_err().contains("how large"));
    }

    proptest! {
        #[test]
        fn safe_names_have_only_plain_components(path in "[a./\\\\:]{0,12}") {
            use std::path::{Component, Path};
            let plain = Path::new(&path).components().all(|c| matches!(c, Component::Normal(_)));
            prop_assert!(!is_safe(&path) || (plain && !path.is_empty()));
        }
    }
}

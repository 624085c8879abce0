//! What of a repository a model needs.
//!
//! Only names are looked at. A repository is one or more models: a directory as `transformers` saves it, and files that are
//! models by themselves, of which a repository often has one per quantisation.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Error, Listing, RemoteFile, Result};

/// What was asked for.
#[derive(Clone, Copy, Debug)]
pub enum Want<'a> {
    /// The model, if there is but one, or one in safetensors.
    Model,
    /// The model of this label: `Q4_K_M`, or `safetensors`.
    Label(&'a str),
    /// Files whose paths match one of these patterns, with `*` and `?`.
    Files(&'a [String]),
}

/// A model among those in a repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// What it is chosen by.
    pub label: String,
    /// Its files.
    pub files: Vec<RemoteFile>,
    /// Their size in bytes.
    pub bytes: u64,
    /// The file to open; the directory if none.
    entry: Option<String>,
}

/// Files to be pulled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// The files.
    pub files: Vec<RemoteFile>,
    /// The file to open; the directory if none.
    pub entry: Option<String>,
}

/// The label of a model in a directory of safetensors.
const DIRECTORY: &str = "safetensors";

/// Chooses what was asked for. Nothing is guessed: several models and no choice are an error that lists them.
pub fn choose(listing: &Listing, want: Want<'_>) -> Result<Selection> {
    let model = || listing.model.to_string();
    let names = || listing.files.iter().map(|file| file.path.clone()).collect::<Vec<_>>();
    let mut candidates = candidates(&listing.files);
    let selection = match want {
        Want::Files(patterns) => return matching(listing, patterns),
        _ if candidates.is_empty() => {
            return Err(Error::NoWeights { model: model(), files: names() });
        }
        Want::Label(label) => {
            let found = candidates.iter().position(|c| c.label.eq_ignore_ascii_case(label));
            match found {
                Some(at) => candidates.swap_remove(at),
                None => {
                    let (model, label) = (model(), label.to_owned());
                    return Err(Error::NoCandidate { model, label, candidates });
                }
            }
        }
        Want::Model => match candidates.iter().position(|c| c.label == DIRECTORY) {
            Some(at) => candidates.swap_remove(at),
            None if candidates.len() == 1 => candidates.swap_remove(0),
            None => return Err(Error::Choose { model: model(), candidates }),
        },
    };
    complete(listing, Selection { files: selection.files, entry: selection.entry })
}

/// The files that match any pattern; each pattern must match some.
fn matching(listing: &Listing, patterns: &[String]) -> Result<Selection> {
    for pattern in patterns {
        if !listing.files.iter().any(|file| matches(pattern, &file.path)) {
            return Err(Error::NoMatch {
                model: listing.model.to_string(),
                pattern: pattern.clone(),
                files: listing.files.iter().map(|file| file.path.clone()).collect(),
            });
        }
    }
    let wanted = |file: &&RemoteFile| patterns.iter().any(|p| matches(p, &file.path));
    let files: Vec<RemoteFile> = listing.files.iter().filter(wanted).cloned().collect();
    let entry = match &candidates(&files)[..] {
        [only] => only.entry.clone(),
        _ => None,
    };
    complete(listing, Selection { files, entry })
}

/// Refuses a model of which a part is not there.
fn complete(listing: &Listing, selection: Selection) -> Result<Selection> {
    let there: BTreeSet<_> = selection.files.iter().filter_map(|f| part(&f.path)).collect();
    for &Part { base, end, parts, .. } in &there {
        let missing = |&index: &u32| !there.contains(&Part { base, end, parts, index });
        if let Some(part) = (1..=parts).find(missing) {
            return Err(Error::MissingPart {
                place: format!("{} at {}", listing.model, listing.revision),
                name: format!("{base}{end}"),
                part,
                parts,
            });
        }
    }
    Ok(selection)
}

/// The models among these files.
fn candidates(files: &[RemoteFile]) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = directory(files).into_iter().collect();
    let mut groups: BTreeMap<String, Vec<RemoteFile>> = BTreeMap::new();
    for file in files.iter().filter(|file| is_whole_model(&file.path)) {
        let whole = part(&file.path).map(|part| format!("{}{}", part.base, part.end));
        groups.entry(whole.unwrap_or_else(|| file.path.clone())).or_default().push(file.clone());
    }
    let mut labels: BTreeMap<String, usize> = BTreeMap::new();
    for path in groups.keys() {
        *labels.entry(label(path)).or_default() += 1;
    }
    for (path, files) in groups {
        let short = label(&path);
        // Where two models are of the same type, their paths tell them apart.
        let label = if labels[&short] == 1 { short } else { path };
        let entry = files.iter().map(|file| file.path.clone()).min();
        found.push(Candidate { label, bytes: files.iter().map(|f| f.size).sum(), files, entry });
    }
    found
}

/// The model that `transformers` would load, with what belongs to it.
fn directory(files: &[RemoteFile]) -> Option<Candidate> {
    const SINGLE: &str = "model.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let has = |name: &str| files.iter().any(|file| file.path == name);
    let is_weights = |path: &str| match has(SINGLE) {
        true => path == SINGLE,
        // Beside these, repositories have the same weights under names of other programs.
        false => has(INDEX) && path.starts_with("model") && part(path).is_some(),
    };
    if !files.iter().any(|file| is_weights(&file.path)) {
        return None;
    }
    let wanted =
        |path: &str| is_weights(path) || is_companion(path) || (path == INDEX && !has(SINGLE));
    let files: Vec<_> = files.iter().filter(|file| wanted(&file.path)).cloned().collect();
    let bytes = files.iter().map(|file| file.size).sum();
    Some(Candidate { label: DIRECTORY.to_owned(), files, bytes, entry: None })
}

/// Whether this is config, tokenizer or chat template of a directory.
fn is_companion(path: &str) -> bool {
    const EXACT: [&str; 7] = [
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ];
    EXACT.contains(&path)
        || !path.contains('/')
            && (path.starts_with("tokenizer") || path.starts_with("chat_template"))
            && [".json", ".model", ".jinja"].iter().any(|end| path.ends_with(end))
}

/// Whether a file is (a part of) a model by itself, and no projector of images, nor a record of activations.
fn is_whole_model(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
    (name.ends_with(".gguf") || name.ends_with(".apr"))
        && !name.starts_with("mmproj")
        && !name.contains("imatrix")
}

/// One of several files that are one: `BASE-00001-of-00003.END`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Part<'a> {
    base: &'a str,
    end: &'a str,
    parts: u32,
    index: u32,
}

fn part(path: &str) -> Option<Part<'_>> {
    let (start, end) = path.split_at(path.rfind('.')?);
    let (rest, parts) = start.rsplit_once("-of-")?;
    let (base, index) = rest.rsplit_once('-')?;
    let number = |text: &str| {
        let plain = text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
        if plain { text.parse().ok() } else { None }
    };
    Some(Part { base, end, parts: number(parts)?, index: number(index)? })
}

/// The quantisation that a file's name ends in, or the name.
fn label(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    let starts = stem.match_indices(['-', '.', '_']).map(|(at, _)| at + 1);
    match std::iter::once(0).chain(starts).find(|&at| is_quantisation(&stem[at..])) {
        Some(at) if stem[..at].to_ascii_uppercase().ends_with("-UD-") => {
            format!("UD-{}", stem[at..].to_ascii_uppercase())
        }
        Some(at) => stem[at..].to_ascii_uppercase(),
        None => stem.to_owned(),
    }
}

fn is_quantisation(text: &str) -> bool {
    const WHOLE: [&str; 7] = ["F16", "F32", "BF16", "FP16", "FP32", "MXFP4", "MXFP4_MOE"];
    let upper = text.to_ascii_uppercase();
    let digits = upper.strip_prefix("IQ").or(upper.strip_prefix("TQ")).or(upper.strip_prefix("Q"));
    WHOLE.contains(&upper.as_str())
        || digits.is_some_and(|rest| {
            rest.starts_with(|c: char| c.is_ascii_digit())
                && rest.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        })
}

/// Whether `text` matches a pattern in which `*` is any text and `?` any character.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // Where the last star is, and how much of the text it has taken.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, t) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == '*')
}

#[cfg(test)]
mod tests;

//! What a file is, by its first bytes and never by its name.

use crate::{Error, File, Result, apr, gguf};

/// A kind of file that is read here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Gguf,
    Safetensors,
    Apr,
    /// A JSON text: an index of shards, if its name says so too.
    Json,
}

/// The kind of `file`; for everything else an error that says what it seems to be.
pub(crate) fn sniff(file: &File) -> Result<Kind> {
    let bytes: &[u8] = file.bytes();
    let not_a_model =
        |found, help| Err(Error::NotAModel { file: file.path().to_owned(), found, help });
    if bytes.is_empty() {
        return not_a_model("an empty file", "copy or download it again");
    }
    if bytes.starts_with(gguf::MAGIC) {
        return Ok(Kind::Gguf);
    }
    if bytes.starts_with(apr::MAGIC) {
        return Ok(Kind::Apr);
    }
    // A header of less than 4 GiB, then JSON: any of the magic numbers below could also be such a length.
    if bytes.get(8) == Some(&b'{') && bytes[4..8] == [0; 4] {
        return Ok(Kind::Safetensors);
    }
    for (magic, found, help) in OTHERS {
        if bytes.starts_with(magic) {
            return not_a_model(found, help);
        }
    }
    let head = &bytes[..bytes.len().min(512)];
    let text = head.trim_ascii_start();
    if text.first() == Some(&b'{') {
        return Ok(Kind::Json);
    }
    if [&b"<!doctype"[..], b"<html", b"<?xml"]
        .iter()
        .any(|tag| starts_with_ignoring_case(text, tag))
    {
        return not_a_model(
            "an HTML page",
            "the download was answered by a web page, such as a login or an error: download it again",
        );
    }
    if bytes.get(8) == Some(&b'{') {
        return Ok(Kind::Safetensors);
    }
    if is_text(head) {
        return not_a_model("a text file", "give the model file itself");
    }
    not_a_model(
        "unknown bytes",
        "if it is a model, it is damaged or of a format that is not read here",
    )
}

const TORCH: &str =
    "it may be a torch checkpoint: convert it to safetensors with the library that wrote it";
const OLD_GGML: &str = "convert the original model to GGUF with a current llama.cpp";

/// Other files that people have at hand: their magic number, their name, what to do.
const OTHERS: &[(&[u8], &str, &str)] = &[
    (
        b"version https://git-lfs",
        "a git-lfs pointer",
        "the file itself was not downloaded: run `git lfs pull`",
    ),
    (b"PK\x03\x04", "a zip archive (torch .bin/.pt or .npz)", TORCH),
    (b"\x80\x02", "a Python pickle", TORCH),
    (b"\x80\x03", "a Python pickle", TORCH),
    (b"\x80\x04", "a Python pickle", TORCH),
    (b"\x80\x05", "a Python pickle", TORCH),
    (b"\x93NUMPY", "a NumPy array", "it is one tensor, not a model"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors with the library that wrote it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (b"APRT", "a stage tensor of a capture", "it is one tensor, not a model"),
    (b"APRN", "an .apr file of version 1", "convert the original model again"),
    (b"APR1", "an .apr file of version 1", "convert the original model again"),
    (b"lmgg", "a ggml file from before GGUF", OLD_GGML),
    (b"fmgg", "a ggml file from before GGUF", OLD_GGML),
    (b"tjgg", "a ggml file from before GGUF", OLD_GGML),
];

fn starts_with_ignoring_case(text: &[u8], lower: &[u8]) -> bool {
    text.get(..lower.len()).is_some_and(|head| head.eq_ignore_ascii_case(lower))
}

fn is_text(head: &[u8]) -> bool {
    let control = |b: &u8| b.is_ascii_control() && !b.is_ascii_whitespace();
    // The end of `head` may cut a character.
    let valid = match std::str::from_utf8(head) {
        Ok(_) => true,
        Err(error) => error.error_len().is_none(),
    };
    valid && !head.iter().any(control)
}

//! Captures are directories of files, so each input is written to one; point TMPDIR at memory.

use std::{
    cell::LazyCell,
    fs,
    path::{Path, PathBuf},
};

use apr_capture::{Capture, Dims, OpenOptions};

/// Which file of a capture is fuzzed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the files name themselves")]
pub enum Form {
    Aprt,
    Npy,
    Npz,
    Safetensors,
    Manifest,
}

/// The tensors beside the manifest: what the seed describes.
pub const STEP: &[u8] = b"\x48\0\0\0\0\0\0\0\
    {\"embedding\":{\"dtype\":\"F32\",\"shape\":[2,8],\"data_offsets\":[0,64]}}       \
    ................................................................";

thread_local! {
    static DIRECTORY: LazyCell<PathBuf> = LazyCell::new(|| {
        let path = std::env::temp_dir().join(format!("fuzzed-{}", std::process::id()));
        fs::create_dir_all(path.join("aprt/layer-0")).expect("a temporary directory");
        fs::create_dir_all(path.join("npy")).expect("a temporary directory");
        fs::create_dir_all(path.join("capture")).expect("a temporary directory");
        fs::write(path.join("capture/step-0000.safetensors"), STEP).expect("a temporary file");
        path
    });
}

/// Opens a capture that `file` is part of, and reads all of it. Whatever comes of it, it must hold together.
/// Returns whether it is a capture.
pub fn open(form: Form, file: &[u8]) -> bool {
    DIRECTORY.with(|directory| {
        let (capture, path) = match form {
            Form::Aprt => ("aprt", "aprt/layer-0/attn_norm.bin"),
            Form::Npy => ("npy", "npy/embedding.npy"),
            Form::Npz => ("c.npz", "c.npz"),
            Form::Safetensors => ("c.safetensors", "c.safetensors"),
            Form::Manifest => ("capture", "capture/manifest.json"),
        };
        fs::write(directory.join(path), file).expect("a temporary file");
        read(&directory.join(capture))
    })
}

fn read(path: &Path) -> bool {
    let dims = Dims {
        num_hidden_layers: 2,
        hidden_size: 8,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 2,
        intermediate_size: 12,
        vocab_size: 16,
        attention_bias: true,
        qk_norm: false,
    };
    let options = OpenOptions { dims: Some(dims), allow_partial: true, ..OpenOptions::default() };
    let capture = match Capture::open_with(path, &options) {
        Ok(capture) => capture,
        Err(error) => {
            assert!(error.to_string().contains("fuzzed-"), "which file? {error}");
            return false;
        }
    };
    for site in capture.sites() {
        for step in 0..capture.steps().len() {
            if let Ok(tensor) = capture.tensor(step, site) {
                let elements: usize = tensor.shape().iter().product();
                assert_eq!(tensor.to_f64().len(), elements, "{site}");
            }
        }
        assert!(capture.rows(site).is_sorted() || capture.rows(site)[0].position.is_none());
    }
    true
}

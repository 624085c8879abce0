//! Damaged files are refused by name or read as what they have become; nothing panics, whatever the bytes.

mod support;

use std::{fs, path::Path};

use apr_capture::*;
use apr_model::{Site, Stage, TapSet};
use serde_json::json;
use support::*;

const MUTATIONS: u64 = 10_000;

/// Marsaglia's xorshift64: the same damage in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }

    /// `bytes` with a few of the things done to it that happen to files, and some that attackers do.
    fn damage(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        for _ in 0..=self.below(3) {
            let at = self.below(bytes.len());
            match self.below(6) {
                0 => bytes.truncate(at),
                1 => bytes.splice(at..at, [0xff; 4]).for_each(drop),
                2 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                3 if at < bytes.len() => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                4 => {
                    let end = at + self.below(bytes.len() - at);
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy).for_each(drop);
                }
                _ => {
                    // A number in text becomes one that overflows products, or just another.
                    let digit = |b: &u8| b.is_ascii_digit();
                    let Some(start) = bytes[at..].iter().position(digit) else { continue };
                    let start = at + start;
                    let len = bytes[start..].iter().take_while(|b| digit(b)).count();
                    let numbers = ["18446744073709551615", "4294967296", "0", "-1", "7", "1e9"];
                    let number = numbers[self.below(numbers.len())].bytes();
                    bytes.splice(start..start + len, number).for_each(drop);
                }
            }
        }
        bytes
    }
}

/// Damages `file` again and again and reads all of the capture at `capture`.
fn survive(file: &Path, capture: &Path, options: &OpenOptions) {
    let whole = fs::read(file).unwrap();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let (mut refused, name) = (0, capture.file_name().unwrap().to_string_lossy());
    for _ in 0..MUTATIONS {
        // A fresh file: overwriting one makes some file systems wait for the disk.
        fs::remove_file(file).unwrap();
        fs::write(file, random.damage(&whole)).unwrap();
        match Capture::open_with(capture, options) {
            Ok(read) => {
                for (step, site) in (0..read.steps().len())
                    .flat_map(|step| read.sites().into_iter().map(move |site| (step, site)))
                {
                    if let Ok(tensor) = read.tensor(step, site) {
                        let elements: usize = tensor.shape().iter().product();
                        assert_eq!(tensor.to_f64().len(), elements);
                    }
                }
            }
            Err(error) => {
                refused += 1;
                let text = error.to_string();
                assert!(text.contains(&*name), "the message names no file: {text}");
            }
        }
    }
    assert!(refused > MUTATIONS / 4, "only {refused} refused: the damage is too light to test");
    fs::write(file, whole).unwrap();
    assert!(Capture::open_with(capture, options).is_ok(), "the undamaged file reads");
}

fn small(out: &Path, layout: Layout) {
    let sites = TapSet::from_iter([
        Site::layer(0, Stage::AttnScores),
        Site::layer(0, Stage::QPostRope),
        Site::whole(Stage::FinalNorm),
    ]);
    let options = RecorderOptions { layout, ..RecorderOptions::new(sites) };
    let mut recorder = Recorder::create(out, provenance(), dims(), options).unwrap();
    run(&mut recorder, &dims(), &prefill(&[5, 6, 7])).unwrap();
    recorder.finish().unwrap();
}

fn with_dims() -> OpenOptions {
    OpenOptions { dims: Some(dims()), ..OpenOptions::default() }
}

#[test]
fn a_manifest_that_contradicts_itself_or_its_files_is_refused_with_the_claim() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cap");
    small(&out, Layout::Safetensors);
    let path = out.join("manifest.json");
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let norm = whole["steps"][0]["tensors"].as_array().unwrap().len() - 1;
    for (pointer, claim, word) in [
        (format!("/steps/0/tensors/{norm}/positions"), json!([0, 1, 9]), "the step's tokens"),
        (format!("/steps/0/tensors/{norm}/positions"), json!([0, 1]), "one for each of 3 rows"),
        (format!("/steps/0/tensors/{norm}/shape"), json!([3, 9]), "as the manifest says"),
        (format!("/steps/0/tensors/{norm}/dtype"), json!("F16"), "as the manifest says"),
        (format!("/steps/0/tensors/{norm}/axes"), json!(["channel", "row"]), "axes"),
        (format!("/steps/0/tensors/{norm}/stage"), json!("lm_head"), "stage and layer"),
        (format!("/steps/0/tensors/{norm}/name"), json!("embedding"), "stage and layer"),
        ("/steps/0/positions".to_owned(), json!([0, 1]), "one position for each of 3 tokens"),
        ("/steps/0/file".to_owned(), json!("../step"), "within the capture"),
        ("/steps/0/tensors".to_owned(), json!([]), "mentioned in the manifest"),
    ] {
        let mut manifest = whole.clone();
        *manifest.pointer_mut(&pointer).unwrap() = claim;
        fs::write(&path, manifest.to_string()).unwrap();
        let error = Capture::open(&out).unwrap_err().to_string();
        assert!(error.contains(word), "{pointer}: {error}");
    }
}

#[test]
fn a_damaged_manifest_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cap");
    small(&out, Layout::Safetensors);
    survive(&out.join("manifest.json"), &out, &OpenOptions::default());
}

#[test]
fn a_damaged_step_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cap");
    small(&out, Layout::Safetensors);
    let step = out.join("step-0000.safetensors");
    survive(&step, &out, &OpenOptions::default());
    let foreign = dir.path().join("cap.safetensors");
    fs::copy(&step, &foreign).unwrap();
    survive(&foreign, &foreign, &OpenOptions::default());
}

#[test]
fn a_damaged_aprt_file_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cap");
    small(&out, Layout::Aprt);
    fs::remove_file(out.join("manifest.json")).unwrap();
    survive(&out.join("layer-0/q_post_rope.bin"), &out, &with_dims());
}

/// Version 1 with two rows of the embedding.
fn npy() -> Vec<u8> {
    let dict = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 8), }\n";
    let mut file = b"\x93NUMPY\x01\0".to_vec();
    file.extend((dict.len() as u16).to_le_bytes());
    file.extend(dict.as_bytes());
    file.extend([0x3f; 64]);
    file
}

#[test]
fn a_damaged_npy_file_never_panics() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("cap");
    fs::create_dir(&out).unwrap();
    let file = out.join("embedding.npy");
    fs::write(&file, npy()).unwrap();
    survive(&file, &out, &with_dims());
}

#[test]
fn a_damaged_npz_file_never_panics() {
    use std::io::Write;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cap.npz");
    let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
    for (name, method) in [
        ("embedding.npy", zip::CompressionMethod::Deflated),
        ("final_norm.npy", zip::CompressionMethod::Stored),
    ] {
        let options = zip::write::SimpleFileOptions::default().compression_method(method);
        zip.start_file(name, options).unwrap();
        zip.write_all(&npy()).unwrap();
    }
    zip.finish().unwrap();
    survive(&path, &path, &OpenOptions::default());
}

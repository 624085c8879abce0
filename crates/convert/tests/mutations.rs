//! Damaged copies of what we write: every reader refuses them or reads them, and none panics.
#![allow(clippy::print_stdout, reason = "how many were refused is worth knowing")]

mod common;

use std::fs;

use apr_convert::{Options, Plan, Recipe, Target};
use apr_format::Checkpoint;
use apr_tensor::Bytes;
use apr_testkit::Mutants;
use apr_tokenizer::Tokenizer;
use common::{converted, fixture};

/// Of each container, in all.
const MUTANTS: usize = 10_000;

/// A mixture of experts and a model with interleaved heads and rotary factors.
const MODELS: [&str; 2] = ["tiny/qwen3-moe", "tiny/llama3-rope"];

/// Opens mutants of what each model is written as under the name `file`, and does with them what can be done without
/// running them.
fn survive(file: &str, recipe: Option<Recipe>, fix: fn(&mut [u8])) {
    let scratch = tempfile::tempdir().unwrap();
    let (mut refused, mut unusable) = (0, 0);
    for model in MODELS {
        let place = scratch.path().join(model);
        fs::create_dir_all(&place).unwrap();
        let written = converted(&fixture(model), place.join(file), recipe);
        let tensors: usize = written.tensors().map(|(_, stored)| stored.bytes().len()).sum();
        let weights = written.files()[0].path();
        let base = fs::read(weights).unwrap();
        let companions = companions(&written);
        let mut mutants = Mutants::new(base.len() as u64);
        for mutant in 0..MUTANTS / MODELS.len() {
            let mut bytes = base.clone();
            mutants.mutate(&mut bytes, base.len() - tensors);
            if mutant % 4 != 0 {
                fix(&mut bytes);
            }
            let opened = match companions.as_slice() {
                [] => Checkpoint::from_bytes(file, bytes.into()),
                companions => {
                    let weights = ("model.safetensors".to_owned(), Bytes::from(bytes));
                    Checkpoint::from_files(file, &[companions, &[weights]].concat())
                }
            };
            match opened {
                Err(error) => {
                    refused += 1;
                    assert!(error.to_string().contains(file), "mutant {mutant}: {error}");
                }
                Ok(checkpoint) => {
                    unusable += usize::from(look(&checkpoint, Target::ALL[mutant % 3]).is_err());
                }
            }
        }
    }
    println!("{file}: {refused} of {MUTANTS} refused on opening, {unusable} after it");
    assert!(refused > MUTANTS / 4 && refused + unusable < MUTANTS, "{refused} and {unusable}");
}

/// What is beside the weights of a directory.
fn companions(written: &Checkpoint) -> Vec<(String, Bytes)> {
    let files = fs::read_dir(written.path()).into_iter().flatten().map(|entry| entry.unwrap());
    let name = |file: &fs::DirEntry| file.file_name().into_string().unwrap();
    files
        .filter(|file| name(file) != "model.safetensors")
        .map(|file| (name(&file), fs::read(file.path()).unwrap().into()))
        .collect()
}

/// Reads what says how to run the model, and plans to convert it.
fn look(checkpoint: &Checkpoint, target: Target) -> Result<(), Box<dyn std::error::Error>> {
    match Plan::new(checkpoint, target, Options { lossy: true, ..Options::default() }) {
        // It has read the tokenizer.
        Ok(_) => Ok(()),
        Err(error) => {
            Tokenizer::from_checkpoint(checkpoint)?;
            Err(error.into())
        }
    }
}

#[test]
fn mutants_of_a_converted_gguf_are_refused_or_read() {
    survive("mutant.gguf", Some(Recipe::Q4_0), |_| ());
}

#[test]
fn mutants_of_a_converted_apr_file_are_refused_or_read() {
    survive("mutant.apr", None, |file| {
        if file.len() < 68 {
            return;
        }
        let mut header = crc32fast::Hasher::new();
        header.update(&file[..40]);
        header.update(&file[44..64]);
        file[40..44].copy_from_slice(&header.finalize().to_le_bytes());
    });
}

#[test]
fn mutants_of_converted_safetensors_are_refused_or_read() {
    survive("mutant", None, |_| ());
}

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

/// Opens mutants of what `file` of each model is written as, and does with them what can be done without running them.
fn survive(file: &str, recipe: Option<Recipe>, fix: fn(&mut [u8])) {
    let scratch = tempfile::tempdir().unwrap();
    let (mut refused, mut unbound) = (0, 0);
    for model in MODELS {
        let path = scratch.path().join(file);
        let tensors: usize = {
            let written = match file.ends_with("safetensors") {
                false => converted(&fixture(model), path.clone(), recipe),
                true => converted(&fixture(model), scratch.path().join("dir"), recipe),
            };
            if file.ends_with("safetensors") {
                fs::copy(written.files()[0].path(), &path).unwrap();
                fs::remove_dir_all(scratch.path().join("dir")).unwrap();
            }
            written.tensors().map(|(_, stored)| stored.bytes().len()).sum()
        };
        let base = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let mut mutants = Mutants::new(base.len() as u64);
        for mutant in 0..MUTANTS / MODELS.len() {
            let mut bytes = base.clone();
            mutants.mutate(&mut bytes, base.len() - tensors);
            if mutant % 4 != 0 {
                fix(&mut bytes);
            }
            match Checkpoint::from_bytes(file, Bytes::from(bytes)) {
                Err(error) => {
                    refused += 1;
                    assert!(error.to_string().contains(file), "mutant {mutant}: {error}");
                }
                Ok(checkpoint) => {
                    unbound += usize::from(look(&checkpoint, Target::ALL[mutant % 3]).is_err());
                }
            }
        }
    }
    println!("{file}: {refused} of {MUTANTS} refused on opening, {unbound} after it");
    assert!(refused > MUTANTS / 4 && refused < MUTANTS, "{refused} refused");
}

/// Reads what says how to run the model, and plans to convert it.
fn look(checkpoint: &Checkpoint, target: Target) -> Result<(), Box<dyn std::error::Error>> {
    let tokenizer = Tokenizer::from_checkpoint(checkpoint).map(drop);
    Plan::new(checkpoint, target, Options { lossy: true, ..Options::default() })?;
    Ok(tokenizer?)
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
    survive("mutant.safetensors", None, |_| ());
}

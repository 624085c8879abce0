//! What the fuzz targets assert.

pub mod capture;
pub mod tokenizer;

use apr_format::Checkpoint;
use apr_tensor::Bytes;

/// Opens `file` as a checkpoint. Whatever comes of it, it must hold together.
pub fn open(file: &[u8]) {
    const NAME: &str = "fuzzed";
    match Checkpoint::from_bytes(NAME, Bytes::from(file.to_vec())) {
        Ok(model) => {
            let data: usize = model.tensors().map(|(_, stored)| stored.bytes().len()).sum();
            assert!(data <= file.len(), "tensors overlap");
            for (name, stored) in model.tensors() {
                let expected = stored.dtype().tensor_bytes(stored.shape());
                assert_eq!(expected, Some(stored.bytes().len()), "{name}");
            }
        }
        Err(error) => assert!(error.to_string().starts_with(NAME), "which file? {error}"),
    }
}

/// Puts the checksums of an `.apr` file right, so that changes reach what is behind them.
pub fn fix_apr_checksums(file: &mut [u8]) {
    if file.len() < 68 {
        return;
    }
    let mut header = crc32fast::Hasher::new();
    header.update(&file[..40]);
    header.update(&file[44..64]);
    file[40..44].copy_from_slice(&header.finalize().to_le_bytes());
    let end = file.len() - 4;
    let footer = crc32fast::hash(&file[..end]);
    file[end..].copy_from_slice(&footer.to_le_bytes());
}

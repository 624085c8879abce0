#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    apr_fuzz::tokenizer::json(file);
});

#![no_main]

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    apr_fuzz::open(file);
    let mut file = file.to_vec();
    apr_fuzz::fix_apr_checksums(&mut file);
    apr_fuzz::open(&file);
});

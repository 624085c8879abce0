#![no_main]

use apr_fuzz::capture::{Form, open};

libfuzzer_sys::fuzz_target!(|file: &[u8]| {
    open(Form::Safetensors, file);
});

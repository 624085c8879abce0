//! Captures that apr-oracle wrote are read, every byte of them verified.

use apr_capture::Capture;
use apr_testkit::{TINY, golden};

#[test]
fn captures_of_hugging_face_models_are_read_and_verified() {
    for name in TINY {
        let golden = golden(&format!("tiny-{name}"));
        let capture = Capture::open(&golden.capture).unwrap();
        assert_eq!(capture.unknown(), [""; 0]);
        assert_eq!(capture.steps()[0].token_ids.as_ref(), Some(&golden.prompt_ids));
        let dims = capture.provenance().unwrap().model.config.clone().unwrap();
        assert_eq!(dims.qk_norm, name.starts_with("qwen3"));
        for step in 0..capture.steps().len() {
            for site in capture.sites().into_iter().filter(|&s| capture.info(step, s).is_some()) {
                let tensor = capture.tensor(step, site).unwrap();
                let keys = tensor.shape().last().copied().unwrap();
                assert_eq!(tensor.shape(), dims.shape(site.stage, tensor.rows(), keys), "{site}");
                assert!(tensor.to_f64().iter().all(|v| v.is_finite()), "{site}");
            }
        }
    }
}

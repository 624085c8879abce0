//! What is recorded is what was shown, and a capture is there whole or not at all.

mod support;

use std::{fs, path::Path};

use apr_capture::*;
use apr_model::{MoeConfig, Observer, Site, Stage, TapSet, Values, View};
use apr_tensor::DType;
use support::*;

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn every_value_reads_back_bit_for_bit_in_either_layout() {
    for layout in [Layout::Safetensors, Layout::Aprt] {
        let dir = tempfile::tempdir().unwrap();
        let out = record(&dir.path().join("c"), |options| options.layout = layout).unwrap();
        assert_eq!(names(dir.path()), ["c"], "nothing is left beside the capture");

        let capture = Capture::open(&out).unwrap();
        assert_eq!(capture.sites(), all_sites(&dims()).iter().collect::<Vec<_>>());
        let steps = [prefill(&[5, 6, 7]), decode(1, &[8], 3)];
        for (index, step) in steps.iter().enumerate() {
            assert_eq!(capture.steps()[index].token_ids.as_deref(), Some(step.tokens));
            for site in capture.sites() {
                let tensor = capture.tensor(index, site).unwrap();
                let (shape, values) = values(&dims(), step, site);
                assert_eq!((tensor.shape(), tensor.to_f32()), (&shape[..], values), "{site}");
                assert_eq!(tensor.positions().unwrap(), step.positions(site).collect::<Vec<_>>());
            }
        }
        assert_eq!(capture.provenance().unwrap().model.config.as_ref(), Some(&dims()));
    }
}

#[test]
fn rows_come_in_the_order_of_positions_across_steps() {
    let dir = tempfile::tempdir().unwrap();
    let out = record(&dir.path().join("c"), |_| ()).unwrap();
    let capture = Capture::open(&out).unwrap();
    let rows = capture.rows(Site::layer(1, Stage::AttnNorm));
    let places: Vec<_> = rows.iter().map(|r| (r.position.unwrap(), r.step, r.row)).collect();
    assert_eq!(places, [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]);
    let logits = capture.rows(Site::whole(Stage::LmHead));
    assert_eq!(logits.iter().map(|r| r.position).collect::<Vec<_>>(), [Some(2), Some(3)]);
}

#[test]
fn chosen_rows_are_those_of_the_whole_recording() {
    let dir = tempfile::tempdir().unwrap();
    let whole = Capture::open(record(&dir.path().join("all"), |_| ()).unwrap()).unwrap();
    for (rows, positions) in [(Rows::Last, &[2][..]), (Rows::Range(1..3), &[1, 2])] {
        let out = dir.path().join(rows.to_string());
        let out = record(&out, |options| options.rows = rows.clone()).unwrap();
        let part = Capture::open(&out).unwrap();
        for site in part.sites() {
            let Some(info) = part.info(0, site) else { continue };
            let expected: Vec<_> = positions
                .iter()
                .copied()
                .filter(|&p| site.stage != Stage::LmHead || p == 2)
                .collect();
            assert_eq!(info.positions().unwrap(), expected, "{site}");
            let (a, b) = (part.tensor(0, site).unwrap(), whole.tensor(0, site).unwrap());
            for (row, position) in expected.iter().enumerate() {
                let other = b.positions().unwrap().iter().position(|p| p == position).unwrap();
                for piece in 0..a.pieces() {
                    assert_eq!(a.piece_bytes(piece, row), b.piece_bytes(piece, other), "{site}");
                }
            }
        }
    }
}

#[test]
fn ids_are_kept_as_integers() {
    let moe = MoeConfig {
        num_experts: 9,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        norm_topk_prob: true,
        decoder_sparse_step: 1,
        mlp_only_layers: vec![0],
    };
    let dims = Dims { moe: Some(moe), ..dims() };
    let ids = |layer| Site::layer(layer, Stage::MoeRouterIndices);
    let dir = tempfile::tempdir().unwrap();
    let create = |name: &str, site, layout| {
        let options =
            RecorderOptions { layout, ..RecorderOptions::new([site].into_iter().collect()) };
        Recorder::create(&dir.path().join(name), provenance(), dims.clone(), options)
    };
    let error = create("dense", ids(0), Layout::Safetensors).unwrap_err().to_string();
    assert!(error.contains("layers.0.moe_router_indices"), "{error}");
    for (name, layout, dtype) in
        [("c", Layout::Safetensors, DType::I32), ("tree", Layout::Aprt, DType::F32)]
    {
        let mut recorder = create(name, ids(1), layout).unwrap();
        let step = prefill(&[5, 6]);
        recorder.begin(&step).unwrap();
        let view = View { shape: &[2, 2], values: Values::F32(&[8.0, 0.0, 3.0, 1.0]) };
        recorder.value(&step, ids(1), view).unwrap();
        recorder.end(&step).unwrap();
        let capture = Capture::open(recorder.finish().unwrap()).unwrap();
        let tensor = capture.tensor(0, ids(1)).unwrap();
        assert_eq!((tensor.dtype(), tensor.to_f64()), (dtype, vec![8.0, 0.0, 3.0, 1.0]));
    }
}

#[test]
fn doubles_are_kept_when_asked_for_and_rounded_when_not() {
    let site = Site::whole(Stage::Embedding);
    for (precision, dtype, expected) in
        [(Precision::F64, DType::F64, 0.1), (Precision::F32, DType::F32, f64::from(0.1f32))]
    {
        let dir = tempfile::tempdir().unwrap();
        let mut options = RecorderOptions::new(TapSet::from_iter([site]));
        options.precision = precision;
        let mut recorder =
            Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap();
        let step = prefill(&[5]);
        recorder.begin(&step).unwrap();
        let view = View { shape: &[1, 8], values: Values::F64(&[0.1; 8]) };
        recorder.value(&step, site, view).unwrap();
        recorder.end(&step).unwrap();
        let capture = Capture::open(recorder.finish().unwrap()).unwrap();
        let tensor = capture.tensor(0, site).unwrap();
        assert_eq!((tensor.dtype(), tensor.to_f64()), (dtype, vec![expected; 8]));
    }
}

#[test]
fn a_nan_keeps_its_payload() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::whole(Stage::Embedding);
    let options = RecorderOptions::new(TapSet::from_iter([site]));
    let mut recorder =
        Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap();
    let step = prefill(&[5]);
    recorder.begin(&step).unwrap();
    let values = [f32::from_bits(0xffc0_1234); 8];
    recorder.value(&step, site, View { shape: &[1, 8], values: Values::F32(&values) }).unwrap();
    recorder.end(&step).unwrap();
    let capture = Capture::open(recorder.finish().unwrap()).unwrap();
    let read = capture.tensor(0, site).unwrap().to_f32();
    assert!(read.iter().all(|v| v.to_bits() == 0xffc0_1234));
}

#[test]
fn a_value_that_never_came_is_an_error_and_not_a_hole() {
    let dir = tempfile::tempdir().unwrap();
    let sites = [Site::whole(Stage::Embedding), Site::whole(Stage::FinalNorm)];
    let options = RecorderOptions::new(TapSet::from_iter(sites));
    let mut recorder =
        Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap();
    let step = prefill(&[5]);
    recorder.begin(&step).unwrap();
    recorder
        .value(&step, sites[0], View { shape: &[1, 8], values: Values::F32(&[0.; 8]) })
        .unwrap();
    let error = recorder.end(&step).unwrap_err().to_string();
    assert!(error.contains("did not show final_norm"), "{error}");
    assert!(matches!(recorder.finish(), Err(Error::NoSteps { .. })));
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn rows_that_no_step_has_are_an_error_and_not_an_empty_success() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    let error = record(&out, |options| options.rows = Rows::Range(90..95)).unwrap_err();
    assert!(error.to_string().contains("90..95"), "{error}");
    assert!(!out.exists());

    // Logits exist for positions 2 and 3 only.
    let error = record(&dir.path().join("d"), |options| options.rows = Rows::Range(0..2));
    match error.unwrap_err() {
        Error::NoRows { missing, path, .. } => {
            assert_eq!(missing, "lm_head");
            let partial = OpenOptions { allow_partial: true, ..OpenOptions::default() };
            let rest = Capture::open_with(path, &partial).unwrap();
            assert_eq!(rest.tensor(0, Site::layer(0, Stage::AttnNorm)).unwrap().rows(), 2);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_value_of_another_shape_or_shown_twice_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let site = Site::whole(Stage::Embedding);
    let options = RecorderOptions::new(TapSet::from_iter([site]));
    let mut recorder =
        Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap();
    let step = prefill(&[5]);
    recorder.begin(&step).unwrap();
    let view = |shape| View { shape, values: Values::F32(&[0.; 8]) };
    let error = recorder.value(&step, site, view(&[8, 1])).unwrap_err().to_string();
    assert!(error.contains("[8, 1]") && error.contains("[1, 8]"), "{error}");
    recorder.value(&step, site, view(&[1, 8])).unwrap();
    assert!(recorder.value(&step, site, view(&[1, 8])).is_err());
}

#[test]
fn what_the_model_does_not_have_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let create = |sites: TapSet| {
        let options = RecorderOptions::new(sites);
        Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap_err()
    };
    let error = create([Site::layer(2, Stage::AttnNorm)].into_iter().collect()).to_string();
    assert!(error.contains("layers.2.attn_norm") && error.contains("2 layers"), "{error}");
    let error = create([Site::layer(0, Stage::QNorm)].into_iter().collect()).to_string();
    assert!(error.contains("qkv_bias") && error.contains("q_norm"), "{error}");
    assert!(matches!(create(TapSet::none()), Error::NothingToRecord));
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn an_existing_capture_is_replaced_only_by_force_and_only_when_the_new_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("c");
    record(&out, |_| ()).unwrap();
    assert!(matches!(record(&out, |_| ()), Err(Error::Output { .. })));

    let mut options = RecorderOptions::new(all_sites(&dims()));
    options.force = true;
    options.rows = Rows::Last;
    let interrupted = Recorder::create(&out, provenance(), dims(), options).unwrap();
    drop(interrupted);
    let rows =
        || Capture::open(&out).unwrap().info(0, Site::whole(Stage::Embedding)).unwrap().rows();
    assert_eq!(rows(), 3);

    record(&out, |options| (options.force, options.rows) = (true, Rows::Last)).unwrap();
    assert_eq!(rows(), 1);
    assert_eq!(names(dir.path()), ["c"]);

    let precious = dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis.tex"), "").unwrap();
    let error = record(&precious, |options| options.force = true).unwrap_err().to_string();
    assert!(error.contains("replaces captures only"), "{error}");
}

#[test]
fn an_interrupted_recording_keeps_its_whole_steps_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let options = RecorderOptions::new(all_sites(&dims()));
    let mut recorder =
        Recorder::create(&dir.path().join("c"), provenance(), dims(), options).unwrap();
    run(&mut recorder, &dims(), &prefill(&[5, 6, 7])).unwrap();
    let torn = decode(1, &[8], 3);
    recorder.begin(&torn).unwrap();
    drop(recorder);

    let [partial] = &names(dir.path())[..] else { panic!("one directory") };
    assert!(partial.starts_with("c.partial-"), "{partial}");
    let partial = dir.path().join(partial);
    let error = Capture::open(&partial).unwrap_err();
    assert!(matches!(error, Error::Incomplete { .. }), "{error}");

    // A writer that is killed may leave half a line.
    let journal = partial.join("steps.jsonl");
    let text = fs::read_to_string(&journal).unwrap();
    fs::write(&journal, format!("{text}{}", &text[..text.len() / 2])).unwrap();
    let options = OpenOptions { allow_partial: true, ..OpenOptions::default() };
    let capture = Capture::open_with(&partial, &options).unwrap();
    assert!(!capture.is_complete());
    assert_eq!(capture.steps().len(), 1);
    assert_eq!(capture.tensor(0, Site::whole(Stage::Embedding)).unwrap().rows(), 3);
}

#[test]
fn a_changed_byte_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let out = record(&dir.path().join("c"), |_| ()).unwrap();
    let file = out.join("step-0000.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let capture = Capture::open(&out).unwrap();
    assert!(capture.tensor(0, Site::whole(Stage::FinalNorm)).is_ok());
    let error = capture.tensor(0, Site::whole(Stage::LmHead)).unwrap_err();
    assert!(matches!(&error, Error::Damaged { name, .. } if name == "lm_head"), "{error}");
}

#[test]
fn one_step_is_an_aprt_tree_without_a_level_for_steps() {
    let dir = tempfile::tempdir().unwrap();
    let mut options = RecorderOptions::new(all_sites(&dims()));
    options.layout = Layout::Aprt;
    let out = dir.path().join("c");
    let mut recorder = Recorder::create(&out, provenance(), dims(), options).unwrap();
    run(&mut recorder, &dims(), &prefill(&[5, 6, 7])).unwrap();
    recorder.finish().unwrap();
    let top =
        ["embedding.bin", "final_norm.bin", "layer-0", "layer-1", "lm_head.bin", "manifest.json"];
    assert_eq!(names(&out), top);
    let norm = Aprt::read(&out.join("layer-1/attn_norm.bin")).unwrap();
    assert_eq!((norm.layer, norm.values.len()), (Some(1), 24));
    assert!(Capture::open(&out).is_ok());
}

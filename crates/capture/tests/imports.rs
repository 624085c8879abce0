//! What other programs write is read with the meaning that its names and shapes have, or refused.

mod support;

use std::{fs, io::Write, path::Path};

use apr_capture::*;
use apr_model::{Axes, Site, Stage};
use support::*;

/// A version 1 `.npy` file of F32 values.
fn npy(shape: &[usize], values: &[f32]) -> Vec<u8> {
    let dims: String = shape.iter().map(|d| format!("{d}, ")).collect();
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({dims}), }}\n");
    let mut file = b"\x93NUMPY\x01\0".to_vec();
    file.extend((dict.len() as u16).to_le_bytes());
    file.extend(dict.as_bytes());
    file.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    file
}

fn npz(path: &Path, arrays: &[(&str, Vec<u8>)], method: zip::CompressionMethod) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    for (name, bytes) in arrays {
        zip.start_file(format!("{name}.npy"), options).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn open(path: &Path, dims: Option<Dims>) -> Result<Capture> {
    Capture::open_with(path, &OpenOptions { dims, ..OpenOptions::default() })
}

fn at(layer: usize, stage: Stage) -> Site {
    Site::layer(layer, stage)
}

#[test]
fn a_bare_aprt_tree_gets_its_shapes_from_the_models_dimensions() {
    let dir = tempfile::tempdir().unwrap();
    let out = record(&dir.path().join("c"), |options| options.layout = Layout::Aprt).unwrap();
    let recorded = Capture::open(&out).unwrap();
    fs::remove_file(out.join("manifest.json")).unwrap();

    assert!(matches!(open(&out, None), Err(Error::NeedsDims { .. })));
    let bare = open(&out, Some(dims())).unwrap();
    assert_eq!((bare.steps().len(), bare.sites()), (2, recorded.sites()));
    for step in 0..2 {
        for site in bare.sites() {
            let (a, b) = (bare.tensor(step, site).unwrap(), recorded.tensor(step, site).unwrap());
            assert_eq!((a.shape(), a.bytes()), (b.shape(), b.bytes()), "{site}");
            assert_eq!(a.positions(), None, "a bare tree does not know them");
        }
    }
}

#[test]
fn an_embedding_in_layer_0_is_the_models() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("layer-0")).unwrap();
    let embedding = dir.path().join("layer-0/embedding.bin");
    for layer in [None, Some(0)] {
        Aprt { layer, values: vec![0.5; 16] }.write(&embedding).unwrap();
        let capture = open(dir.path(), Some(dims())).unwrap();
        assert_eq!(capture.sites(), [Site::whole(Stage::Embedding)]);
        assert_eq!(capture.tensor(0, capture.sites()[0]).unwrap().rows(), 2);
    }
    Aprt { layer: Some(3), values: vec![0.5; 16] }.write(&embedding).unwrap();
    assert!(open(dir.path(), Some(dims())).is_err(), "the header says another layer");
}

#[test]
fn a_count_that_is_no_number_of_rows_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("layer-1")).unwrap();
    let write = |name: &str, count| {
        let path = dir.path().join("layer-1").join(name);
        Aprt { layer: Some(1), values: vec![0.0; count] }.write(&path).unwrap();
    };
    write("attn_norm.bin", 24);
    write("attn_scores.bin", 4 * 3 * 5);
    let scores = open(dir.path(), Some(dims())).unwrap();
    let scores = scores.info(0, at(1, Stage::AttnScores)).unwrap();
    assert_eq!(scores.shape(), [4, 3, 5], "three rows, as the norm has");
    write("attn_scores.bin", 4 * 3 * 5 + 1);
    assert!(open(dir.path(), Some(dims())).is_err());
    write("attn_scores.bin", 4 * 3 * 5);
    write("ffn_gate.bin", 13);
    let error = open(dir.path(), Some(dims())).unwrap_err().to_string();
    assert!(error.contains("ffn_gate.bin") && error.contains("13"), "{error}");
}

#[test]
fn a_directory_of_npy_files_is_read_by_llama_cpps_names() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes| fs::write(dir.path().join(name), bytes).unwrap();
    write("ffn_inp-1.npy", npy(&[3, 8], &[1.5; 24]));
    write("result_norm.npy", npy(&[8], &[2.5; 8]));
    write("Qcur-0.npy", npy(&[3, 8], &[3.5; 24]));
    write("kq_mask.npy", npy(&[1], &[0.0]));
    let capture = open(dir.path(), Some(dims())).unwrap();
    let sites =
        [at(0, Stage::QPostRope), at(1, Stage::PostAttnResidual), Site::whole(Stage::FinalNorm)];
    assert_eq!(capture.sites(), sites);
    let shapes: Vec<_> =
        sites.iter().map(|&site| capture.info(0, site).unwrap().shape().to_vec()).collect();
    assert_eq!(shapes, [vec![3, 4, 2], vec![3, 8], vec![1, 8]]);
    assert_eq!(capture.unknown().len(), 1);
    assert!(capture.unknown()[0].contains("kq_mask"));

    let flat = open(dir.path(), None).unwrap();
    let q = flat.info(0, sites[0]).unwrap();
    assert_eq!((q.axes(), q.shape()), (Axes::RowChannel, &[3, 8][..]), "heads cannot be told");
}

#[test]
fn arrays_that_are_left_out_for_where_they_stand_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let step = dir.path().join("step-0000");
    fs::create_dir(&step).unwrap();
    for place in [&step.join("result_norm.npy"), &dir.path().join("ffn_inp-1.npy")] {
        fs::write(place, npy(&[1, 8], &[0.5; 8])).unwrap();
    }
    let stray = step.join("lm_head.bin");
    Aprt { layer: None, values: vec![0.5; 16] }.write(&stray).unwrap();

    let capture = open(dir.path(), Some(dims())).unwrap();
    assert_eq!(capture.sites(), [Site::whole(Stage::FinalNorm)]);
    let unknown = capture.unknown();
    assert_eq!(unknown.len(), 2);
    assert!(unknown[0].contains("ffn_inp-1.npy` is in no step"), "{unknown:?}");
    assert!(unknown[1].contains("lm_head.bin` is of an APRT tree"), "{unknown:?}");
}

#[test]
fn an_npz_of_module_outputs_is_read_with_projections_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.npz");
    let part = |width: usize, first: f32| {
        let values: Vec<f32> = (0..2 * width).map(|i| first + i as f32).collect();
        npy(&[1, 2, width], &values)
    };
    let arrays = [
        ("model.layers.0.self_attn.v_proj", part(1, 300.0)),
        ("model.layers.0.self_attn.q_proj", part(3, 100.0)),
        ("model.layers.0.self_attn.k_proj", part(2, 200.0)),
        ("model.layers.0.mlp.down_proj.input", npy(&[2, 12], &[0.25; 24])),
    ];
    for method in [zip::CompressionMethod::Stored, zip::CompressionMethod::Deflated] {
        npz(&path, &arrays, method);
        let capture = open(&path, Some(dims())).unwrap();
        assert_eq!(capture.sites(), [at(0, Stage::QkvBias), at(0, Stage::FfnSwigl)]);
        let qkv = capture.tensor(0, at(0, Stage::QkvBias)).unwrap();
        assert_eq!(qkv.shape(), [2, 6]);
        let rows = [100., 101., 102., 200., 201., 300., 103., 104., 105., 202., 203., 301.];
        assert_eq!(qkv.to_f32(), rows);
        assert_eq!(capture.tensor(0, at(0, Stage::FfnSwigl)).unwrap().to_f32(), [0.25; 24]);
    }
    npz(&path, &arrays[1..], zip::CompressionMethod::Stored);
    let capture = open(&path, Some(dims())).unwrap();
    assert_eq!(capture.sites(), [at(0, Stage::FfnSwigl)], "no part stands for the whole");
    assert!(capture.unknown()[0].contains("needs q, k and v"));
}

#[test]
fn a_foreign_safetensors_file_is_read_through_the_users_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dump.safetensors");
    let json = r#"{"blocks.1.gate":{"dtype":"F32","shape":[1,12],"data_offsets":[0,48]}}"#;
    let mut file = (json.len() as u64).to_le_bytes().to_vec();
    file.extend(json.as_bytes());
    file.extend((0..12u8).flat_map(|i| f32::from(i).to_le_bytes()));
    fs::write(&path, file).unwrap();

    let error = Capture::open(&path).unwrap_err().to_string();
    assert!(error.contains("--map"), "{error}");
    let map = dir.path().join("names.toml");
    fs::write(&map, "'blocks.{i}.gate' = 'ffn_gate'").unwrap();
    let options = OpenOptions { names: NameMap::read(&map).unwrap(), ..OpenOptions::default() };
    let capture = Capture::open_with(&path, &options).unwrap();
    let gate = capture.tensor(0, at(1, Stage::FfnGate)).unwrap();
    assert_eq!(gate.to_f32()[11], 11.0);
}

#[test]
fn two_arrays_for_one_stage_and_shapes_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.npz");
    let stored = zip::CompressionMethod::Stored;
    let gate = npy(&[1, 12], &[0.0; 12]);
    npz(&path, &[("ffn_gate-0", gate.clone()), ("layers.0.ffn_gate", gate)], stored);
    assert!(open(&path, None).unwrap_err().to_string().contains("and another"));
    npz(&path, &[("ffn_gate-0", npy(&[2, 3, 2], &[0.0; 12]))], stored);
    assert!(open(&path, None).unwrap_err().to_string().contains("[2, 3, 2]"));
}

#[test]
fn rows_without_values_are_refused_however_many_are_claimed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.npz");
    let empty = npy(&[1 << 60, 0], &[]);
    let parts = ["q_proj", "k_proj", "v_proj"].map(|p| format!("layers.0.self_attn.{p}"));
    for names in [vec!["layers.0.ffn_gate"], parts.iter().map(String::as_str).collect()] {
        let arrays: Vec<_> = names.iter().map(|name| (*name, empty.clone())).collect();
        npz(&path, &arrays, zip::CompressionMethod::Stored);
        let error = open(&path, Some(dims())).unwrap_err().to_string();
        assert!(error.contains("at least one value in a row"), "{error}");
    }
}

#[test]
fn a_bare_tree_can_be_read_with_the_dimensions_of_another_capture() {
    let dir = tempfile::tempdir().unwrap();
    let whole = record(&dir.path().join("whole"), |_| {}).unwrap();
    let bare = record(&dir.path().join("bare"), |o| o.layout = Layout::Aprt).unwrap();
    fs::remove_file(bare.join("manifest.json")).unwrap();

    let whole = Capture::open(whole).unwrap();
    assert_eq!(whole.dims(), Some(&dims()));
    let bare = open(&bare, whole.dims().cloned()).unwrap();
    assert_eq!((bare.sites(), bare.dims()), (whole.sites(), None));
}

#[test]
fn what_is_no_capture_is_refused_with_what_would_be() {
    let dir = tempfile::tempdir().unwrap();
    let error = Capture::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("no manifest.json"), "{error}");
    let file = dir.path().join("model.gguf");
    fs::write(&file, "GGUF").unwrap();
    assert!(Capture::open(&file).unwrap_err().to_string().contains(".npz"));
    assert!(matches!(Capture::open(dir.path().join("gone")), Err(Error::Read { .. })));
}

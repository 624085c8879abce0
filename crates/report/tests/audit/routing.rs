//! Rows that went to other experts than their router says.

use std::fs;

use apr_format::Checkpoint;
use apr_report::audit::Options;
use apr_testkit::{fixture, golden};

use crate::{Case, schema::assert_published};

/// The golden capture of tiny Qwen3-MoE with the ids of the second row of layer 0 being `ids`.
fn with_ids(ids: [i32; 2]) -> Case {
    let directory = tempfile::tempdir().unwrap();
    for file in fs::read_dir(golden("tiny-qwen3-moe").capture).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), directory.path().join(file.file_name())).unwrap();
    }
    let path = directory.path().join("step-0000.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&bytes[8..header]).unwrap();
    let tensor = &json["layers.0.moe_router_indices"];
    assert_eq!(tensor["dtype"], "I32");
    let first = header + tensor["data_offsets"][0].as_u64().unwrap() as usize + 8;
    let stored: Vec<u8> = ids.into_iter().flat_map(i32::to_le_bytes).collect();
    bytes[first..first + 8].copy_from_slice(&stored);
    fs::write(&path, bytes).unwrap();
    let path = directory.path().join("manifest.json");
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for tensor in manifest["steps"][0]["tensors"].as_array_mut().unwrap() {
        // What is changed on purpose is not to pass for damaged.
        tensor.as_object_mut().unwrap().remove("blake3");
    }
    fs::write(&path, manifest.to_string()).unwrap();
    let model = Checkpoint::open(fixture("tiny/qwen3-moe")).unwrap();
    Case::of(directory.path(), &model, false)
}

fn text(case: &Case) -> String {
    case.report().text(&Options { limit: 3, colour: false })
}

#[test]
fn a_row_that_went_elsewhere_is_told_with_both_choices_and_how_far_they_are_apart() {
    let sound = Case::of(
        &golden("tiny-qwen3-moe").capture,
        &Checkpoint::open(fixture("tiny/qwen3-moe")).unwrap(),
        false,
    );
    assert!(text(&sound).contains("MATCH"), "{}", text(&sound));
    let site = "layers.0.moe_router_indices".parse().unwrap();
    let routing = sound.audit.stage(site).unwrap().routing.as_ref().unwrap();
    assert_eq!((routing.experts, routing.per_row, routing.flipped), (8, 2, 0));
    assert!(routing.nearest.is_some());

    let wrong = with_ids([0, 1]);
    let flip = &wrong.audit.stage(site).unwrap().routing.as_ref().unwrap().flips[0];
    let ids = |ids: &[usize]| format!("{}, {}", ids[0], ids[1]);
    let text = text(&wrong);
    let told = format!("position 1: experts 0, 1, where the logits choose {}", ids(&flip.expected));
    assert!(text.contains(&told), "{text}");
    assert!(text.contains("times what rounding may do"), "{text}");
    assert!(text.contains("DIVERGES at layers.0.moe_router_indices"), "{text}");
}

#[test]
fn ids_that_are_of_no_expert_are_told_as_such() {
    let none = text(&with_ids([0, 99]));
    assert!(none.contains("; 99 is none of 8 experts"), "{none}");
    let twice = text(&with_ids([3, 3]));
    assert!(twice.contains("; 3 occurs twice"), "{twice}");
}

#[test]
fn json_and_the_page_hold_what_is_known_of_the_choice() {
    for ids in [[0, 1], [0, 99], [3, 3]] {
        let case = with_ids(ids);
        let json = serde_json::to_value(case.report()).unwrap();
        assert_published("audit", &json);
        let routing = json["stages"].as_array().unwrap().iter().find_map(|s| s.get("routing"));
        assert_eq!(routing.unwrap()["flipped"], 1);
        let page = apr_report::html::audit(&case.report());
        assert!(page.contains("moe_router_indices"));
    }
}

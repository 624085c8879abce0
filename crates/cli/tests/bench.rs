//! What is measured, what is counted, what is refused, and what is compared with llama-bench. Never how fast.

mod common;

use common::{Done, Scratch, apr, fixture};
use serde_json::{Value, json};

const MODEL: &str = "pycoder-3m/pycoder-3m-Q4_K_M.gguf";

/// What llama-bench printed: of this model prompts of 16, generation of 4 and both in one, at depths 0 and 8, on one thread; and
/// a prompt of another model.
const LLAMA_BENCH: &str = include_str!("common/llama-bench.json");

/// Runs short enough for a test, without the probe.
fn bench(args: &[&str]) -> Done {
    let model = fixture(MODEL);
    let short = ["bench", &model, "--no-probe", "-r", "1", "-t", "1"];
    apr(short.into_iter().chain(args.iter().copied()))
}

fn results(json: &Value) -> Vec<(&str, u64, u64, u64)> {
    let number = |row: &Value, key: &str| row[key].as_u64().unwrap();
    let rows = json["results"].as_array().unwrap();
    rows.iter()
        .map(|row| {
            let kind = row["kind"].as_str().unwrap();
            (kind, number(row, "tokens"), number(row, "depth"), number(row, "threads"))
        })
        .collect()
}

#[test]
fn each_length_at_each_depth_on_each_number_of_threads_is_a_row() {
    let model = fixture(MODEL);
    let lengths = ["-p", "8,5", "-n", "3", "-d", "6,0", "-t", "1,2", "-r", "3", "--chunk", "4"];
    let done = apr(["bench", &model, "--no-probe", "--json"].into_iter().chain(lengths)).expect(0);
    assert_eq!(done.stderr, "", "work as short as this shows no progress");
    let json = done.json();
    let mut expected = Vec::new();
    for threads in [1, 2] {
        for depth in [0, 6] {
            let rows = [("prefill", 8), ("prefill", 5), ("decode", 3)];
            expected.extend(rows.map(|(kind, tokens)| (kind, tokens, depth, threads)));
        }
    }
    assert_eq!(results(&json), expected);
    for row in json["results"].as_array().unwrap() {
        let samples: Vec<f64> =
            row["samples"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(samples.len(), 3, "the first run is not counted: {row}");
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("min") <= number("median") && number("median") <= number("max"), "{row}");
        assert!(samples.contains(&number("median")) && number("min") > 0.0, "{row}");
        assert!(row["read_share"].is_null(), "there is no peak that it could be a share of");
        assert!(row["read_peaks"].is_null(), "{row}");
    }
    assert_eq!(json["memory"]["cache_positions"], 14);
    assert_eq!((&json["schema"], &json["peaks"]), (&json!("apr-bench/1"), &Value::Null));
}

#[test]
fn a_run_counts_what_all_its_steps_read() {
    let json =
        bench(&["-p", "10", "-n", "3", "--chunk", "4", "-d", "2", "--json"]).expect(0).json();
    let work = |row: usize, key: &str| json["results"][row]["work"][key].as_u64().unwrap();
    let tensors = json["memory"]["tensor_bytes"].as_u64().unwrap();
    // Chunks of 4, 3 and 3 of which only the last has logits; then three tokens.
    assert_eq!((work(0, "steps"), work(1, "steps")), (3, 3));
    let embedding = tensors - (work(0, "weight_bytes") - tensors) / 2;
    assert!(embedding > 0 && work(0, "weight_bytes") < 3 * tensors, "the head is read once");
    assert_eq!(work(1, "weight_bytes"), 3 * tensors);
    let position = 4 * 2 * 128 * 2;
    assert_eq!(work(0, "kv_bytes"), (6 + 9 + 12) * position);
    assert_eq!(work(1, "kv_bytes"), (3 + 4 + 5) * position);
    assert_eq!(json["memory"]["cache_bytes"], 12 * position);
    assert_eq!(work(1, "int8_ops"), 3 * 7_340_032);
}

#[test]
fn the_probe_gives_shares_of_the_machines_own_peaks() {
    let model = fixture(MODEL);
    let args = ["bench", &model, "-p", "8", "-n", "2", "-t", "1", "-r", "3"];
    let json = apr(args.into_iter().chain(["--json"])).expect(0).json();
    let peaks = &json["peaks"]["by_threads"][0];
    for row in json["results"].as_array().unwrap() {
        let of = |value: &Value, key: &str| value[key].as_f64().unwrap();
        let numbers = |key: &str| -> Vec<f64> {
            row[key].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
        };
        // Each repetition against the mean of how fast the weights were read just before and just after it.
        let bytes =
            (of(&row["work"], "weight_bytes") + of(&row["work"], "kv_bytes")) / of(row, "tokens");
        let reads = numbers("read_peaks");
        assert_eq!(reads.len(), 4, "before the first repetition, and after each");
        let share = |(rate, reads): (&f64, &[f64])| rate * bytes / (reads[0] + reads[1]) * 2.0;
        let mut shares: Vec<f64> =
            numbers("samples").iter().zip(reads.windows(2)).map(share).collect();
        shares.sort_by(f64::total_cmp);
        assert!((of(row, "read_share") / shares[1] - 1.0).abs() < 1e-9, "{row}");
        assert!(reads.iter().all(|&read| read <= of(peaks, "read_bytes_per_second")), "{row}");
        let share = of(row, "int8_ops_per_second") / of(peaks, "int8_ops_per_second")
            + of(row, "float_ops_per_second") / of(peaks, "f32_ops_per_second");
        assert!((of(row, "compute_share") / share - 1.0).abs() < 1e-9, "{row}");
    }
}

#[test]
fn the_text_says_what_ran_where_and_with_what_result() {
    let done = bench(&["-p", "8", "-n", "2", "--isa", "scalar", "--kv", "f32"]).expect(0);
    for words in [
        "backend  cpu (scalar, activations native, kv F32)",
        "machine  ",
        "runs     1 repetition, chunks of 512",
        "tokens/s",
        "prefill       8      0        1",
        "decode        2      0        1",
        "from start to first token, of which",
        "cache ",
    ] {
        assert!(done.stdout.contains(words), "no {words:?} in\n{}", done.stdout);
    }
    if cfg!(target_os = "linux") {
        assert!(done.stdout.contains(" resident; file 2.3 MiB"), "{}", done.stdout);
        assert!(done.stdout.contains(" before, "), "{}", done.stdout);
    }
}

#[test]
fn a_length_of_0_leaves_a_part_out_and_two_leave_nothing() {
    let json = bench(&["-p", "0", "-n", "2", "--json"]).expect(0).json();
    assert_eq!(results(&json), [("decode", 2, 0, 1)]);
    let json = bench(&["-p", "3", "-n", "0", "--json"]).expect(0).json();
    assert_eq!(results(&json), [("prefill", 3, 0, 1)]);
    let done = bench(&["-p", "0", "-n", "0"]).expect(2);
    assert!(done.stdout.is_empty() && done.stderr.contains("-p 0 and -n 0"), "{}", done.stderr);
}

#[test]
fn what_does_not_fit_into_the_context_is_refused_before_anything_runs() {
    for (args, said) in [
        (["-p", "2049", "-n", "0", "-d", "0"], "-p 2049 with -d 0 needs 2049 positions"),
        (["-p", "0", "-n", "49", "-d", "2000"], "-n 49 with -d 2000 needs 2049 positions"),
    ] {
        let done = bench(&args).expect(2);
        assert_eq!(done.stdout, "");
        assert!(done.stderr.contains(said), "{}", done.stderr);
        assert!(done.stderr.contains("context holds 2048"), "{}", done.stderr);
    }
    bench(&["-p", "48", "-n", "0", "-d", "2000"]).expect(0);
}

#[test]
fn options_of_another_backend_are_refused() {
    for (args, said) in [
        (["--activations", "llama-cpp"], "--backend reference"),
        (["--kv", "bf16"], "f16 or f32"),
        (["--backend", "reference"], "unexpected argument"),
        (["--isa", "sse9"], "unknown instruction set"),
        (["--threads", "0"], "1 or more"),
    ] {
        let done = bench(&args).expect(2);
        assert!(done.stdout.is_empty() && done.stderr.contains(said), "{}", done.stderr);
    }
}

#[test]
fn rows_of_llama_bench_meet_their_partners_and_the_others_are_named() {
    let scratch = Scratch::new();
    let file = scratch.write("llama.json", LLAMA_BENCH);
    let args = ["-p", "16", "-n", "4,5", "-d", "0,8", "--compare", &file];
    let json = bench(&[&args[..], &["--json"]].concat()).expect(3).json();
    let pairs = json["comparison"]["pairs"].as_array().unwrap();
    let theirs: Value = serde_json::from_str(LLAMA_BENCH).unwrap();
    assert_eq!(pairs.len(), 4);
    for pair in pairs {
        let (prompt, generated) = if pair["kind"] == "prefill" { (16, 0) } else { (0, 4) };
        let mut rows = theirs.as_array().unwrap().iter();
        let row = rows.find(|row| {
            (&row["n_prompt"], &row["n_gen"], &row["n_depth"])
                == (&json!(prompt), &json!(generated), &pair["depth"])
        });
        // Of two samples the median is the mean, which it prints with fewer digits.
        let (speed, mean) = (pair["llama_cpp"].as_f64().unwrap(), &row.unwrap()["avg_ts"]);
        assert!((speed / mean.as_f64().unwrap() - 1.0).abs() < 1e-3, "{pair} {mean}");
        let ratio = pair["apr"].as_f64().unwrap() / speed;
        assert_eq!(pair["ratio"].as_f64().unwrap(), ratio);
    }
    let done = bench(&args).expect(3);
    for words in [
        "prompt 16 and generation 4 in one: apr measures prompts and generation apart",
        "prefill 16 at depth 0 on 1 thread: another model: its tensors have",
        "not compared: apr: decode 5 at depth 8 on 1 thread: ",
    ] {
        assert!(done.stdout.contains(words), "no {words:?} in\n{}", done.stdout);
    }
    assert_eq!(done.stdout.matches("not compared: ").count(), 2 + 1 + 2, "{}", done.stdout);
}

#[test]
fn a_comparison_in_which_every_row_has_a_partner_ends_with_0_and_one_without_any_with_3() {
    let rows: Vec<Value> = serde_json::from_str(LLAMA_BENCH).unwrap();
    let scratch = Scratch::new();
    let first = scratch.write("first.json", json!([rows[0]]).to_string());
    let done = bench(&["-p", "16", "-n", "0", "--compare", &first]).expect(0);
    assert!(done.stdout.contains("apr / llama.cpp"), "{}", done.stdout);
    assert!(!done.stdout.contains("not compared"), "{}", done.stdout);

    let lines = scratch.write("lines.jsonl", format!("{}\n{}\n", rows[0], rows[0]));
    bench(&["-p", "16", "-n", "0", "--compare", &lines]).expect(0);

    let mut other_cache = rows[0].clone();
    other_cache["type_k"] = json!("q8_0");
    for (other, why) in [
        (&other_cache, "its cache is q8_0, ours F16"),
        (&rows[1], "not measured; give -n 4 -d 0 -t 1"),
    ] {
        let file = scratch.write("other.json", json!([other]).to_string());
        let done = bench(&["-p", "16", "-n", "0", "--compare", &file]).expect(3);
        assert!(done.stdout.contains(why), "{}", done.stdout);
        assert!(done.stdout.ends_with("UNMEASURED: nothing was compared\n"), "{}", done.stdout);
    }
}

#[test]
fn what_llama_bench_did_not_print_is_refused_before_anything_runs() {
    let scratch = Scratch::new();
    for (content, said) in [
        ("| model | size |", "expected what `llama-bench -o json` prints"),
        ("[]", "has no rows"),
        ("[{\"n_prompt\": 1}]", "missing field"),
    ] {
        let file = scratch.write("theirs.json", content);
        let done = bench(&["--compare", &file]).expect(2);
        assert!(done.stdout.is_empty() && done.stderr.contains(said), "{}", done.stderr);
        assert!(done.stderr.contains("theirs.json"), "{}", done.stderr);
    }
    let done = bench(&["--compare", &scratch.path("missing.json")]).expect(2);
    assert!(done.stderr.contains("cannot read"), "{}", done.stderr);
}

#[test]
fn each_way_of_looking_has_its_ratio_to_the_run_that_nobody_looks_at() {
    let args = ["-p", "4", "-n", "2", "--observers", "-r", "2", "--json"];
    let model = fixture("tiny/qwen3-moe");
    let json =
        apr(["bench", &model, "--no-probe", "-t", "1"].into_iter().chain(args)).expect(0).json();
    let lines = json["observers"].as_array().unwrap();
    let arms: Vec<&str> = lines.iter().map(|line| line["arm"].as_str().unwrap()).collect();
    assert_eq!(arms, ["off", "off again", "one site", "all sites", "save all", "audit"]);
    for line in lines {
        let samples = if line["arm"] == "audit" { 1 } else { 2 };
        assert_eq!(line["samples"].as_array().unwrap().len(), samples, "{line}");
        let ratio = |key: &str| line[key].as_f64().unwrap();
        assert!(ratio("ratio_min") <= ratio("ratio") && ratio("ratio") <= ratio("ratio_max"));
        assert_eq!(line["bytes_written"].is_u64(), line["arm"] == "save all", "{line}");
    }
    assert_eq!(lines[0]["ratio"], 1.0);
}

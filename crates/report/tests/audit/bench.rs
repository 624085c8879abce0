use apr_report::bench::{
    BenchReport, Comparison, Load, Machine, Memory, ObserverLine, Pair, Peaks, PeaksLine,
    ResultLine, Unpaired, Work,
};

use crate::schema::assert_published;

/// A decode run at half of both peaks.
fn result() -> ResultLine {
    ResultLine {
        kind: "decode",
        tokens: 64,
        depth: 2048,
        threads: 2,
        samples: vec![40.0, 50.5, 60.0],
        median: 50.5,
        min: 40.0,
        max: 60.0,
        work: Work { steps: 64, weight_bytes: 1, kv_bytes: 2, int8_ops: 3, float_ops: 4 },
        read_bytes_per_second: 15e9,
        int8_ops_per_second: 80e9,
        float_ops_per_second: 20e9,
        read_peaks: Some(vec![30e9; 4]),
        read_share: Some(0.5),
        compute_share: Some(0.5),
    }
}

fn report() -> BenchReport {
    let pair = Pair {
        kind: "decode",
        tokens: 64,
        depth: 2048,
        threads: 2,
        apr: 50.5,
        llama_cpp: 25.25,
        ratio: 2.0,
    };
    BenchReport {
        schema: "apr-bench/1",
        model: "model.gguf".to_owned(),
        container: "gguf".to_owned(),
        architecture: "qwen2",
        backend: "cpu",
        activations: "native",
        kv: "F16",
        chunk: 512,
        repetitions: 3,
        plan: "0123456789abcdef".to_owned(),
        machine: Machine {
            cpu: Some("A CPU".to_owned()),
            cores: 2,
            isa: "avx512",
            load_before: Some(0.25),
            load_after: Some(1.5),
            others_cores: Some(0.75),
            busy: Some(true),
        },
        load: Load {
            open_seconds: 0.001,
            tokenizer_seconds: Some(0.25),
            weights_seconds: 1.5,
            first_token_seconds: 0.1,
            start_to_first_token_seconds: 1.851,
            prompt_tokens: 8,
            threads: 2,
        },
        memory: Memory {
            peak_resident_bytes: Some(3 << 30),
            file_bytes: 2 << 30,
            tensor_bytes: 2 << 30,
            cache_bytes: 24 << 20,
            cache_positions: 2112,
        },
        peaks: Some(Peaks {
            isa: "avx512",
            by_threads: vec![PeaksLine {
                threads: 2,
                read_bytes_per_second: 30e9,
                int8_ops_per_second: 939e9,
                f32_ops_per_second: 234e9,
            }],
        }),
        results: vec![result()],
        observers: Some(vec![ObserverLine {
            arm: "save all",
            samples: vec![2.0, 2.5],
            median: 2.25,
            ratio: 1.125,
            ratio_min: 1.0,
            ratio_max: 1.25,
            bytes_written: Some(1 << 20),
        }]),
        comparison: Some(Comparison {
            file: "llama.json".to_owned(),
            pairs: vec![pair],
            unpaired: vec![Unpaired {
                of: "llama.cpp",
                row: "prefill 512 at depth 0 on 2 threads".to_owned(),
                because: "not measured".to_owned(),
            }],
        }),
    }
}

/// The same where nothing optional was asked for and the system tells nothing.
fn bare() -> BenchReport {
    let mut bare = report();
    (bare.peaks, bare.observers, bare.comparison) = (None, None, None);
    bare.load.tokenizer_seconds = None;
    bare.memory.peak_resident_bytes = None;
    let (cores, isa) = (2, "scalar");
    bare.machine = Machine {
        cpu: None,
        cores,
        isa,
        load_before: None,
        load_after: None,
        others_cores: None,
        busy: None,
    };
    bare
}

#[test]
fn the_json_of_a_bench_is_what_the_published_schema_says() {
    for report in [report(), bare()] {
        assert_published("bench", &serde_json::to_value(report).unwrap());
    }
}

#[test]
fn the_text_of_a_bench_has_shares_ratios_and_what_was_not_compared() {
    let expected = "\
model    model.gguf (gguf, qwen2)
backend  cpu (avx512, activations native, kv F16)
machine  A CPU, 2 cores, load 0.25 before, 1.50 after
BUSY     other processes kept 0.75 cores busy meanwhile: the figures are too low, and vary
runs     3 repetitions, chunks of 512

        tokens  depth  threads  tokens/s    min    max   GB/s  of peak  Gop/s  of peak
decode      64   2048        2     50.50  40.00  60.00  15.00     50 %  100.0     50 %

peaks   threads  read GB/s  int8 Gop/s  f32 Gop/s
avx512        2      30.00       939.0      234.0

load     file 1.0 ms, tokenizer 250.0 ms, weights 1.50 s
first    1.85 s from start to first token, of which 100.0 ms for 8 prompt tokens on 2 threads
memory   at most 3.0 GiB resident; file 2.0 GiB; cache 24.0 MiB for 2112 positions

looking   seconds  ratio to off    min    max  written
save all    2.250         1.125  1.000  1.250  1.0 MiB

against  llama.json
        tokens  depth  threads    apr  llama.cpp  apr / llama.cpp
decode      64   2048        2  50.50      25.25             2.00
not compared: llama.cpp: prefill 512 at depth 0 on 2 threads: not measured
";
    let text = report().text();
    assert_eq!(text, expected, "{text}");
}

#[test]
fn what_is_not_known_of_a_machine_is_said_to_be_unknown() {
    let text = bare().text();
    for words in ["CPU unknown, 2 cores\n", "no tokenizer", "resident memory unknown"] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(!text.contains("BUSY") && !text.contains("peaks"), "{text}");
}

#[test]
fn a_row_without_a_partner_is_not_everything() {
    let mut comparison = report().comparison.unwrap();
    assert_eq!(comparison.exit_code(), 3);
    comparison.unpaired.clear();
    assert_eq!(comparison.exit_code(), 0);
    comparison.pairs.clear();
    assert_eq!(comparison.exit_code(), 3, "nothing was compared");
}

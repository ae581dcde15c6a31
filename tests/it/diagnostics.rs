//! `quintet selftest` and `quintet bench`: what they print, to the letter that other programs read.

use serde_json::Value;

use crate::harness::{references, run};

fn json_of<const N: usize>(arguments: [&str; N]) -> Value {
    let directory = tempfile::tempdir().unwrap();
    let ended = run(directory.path(), arguments).expect(0);
    assert_eq!(ended.stdout.lines().count(), 1, "one document: {}", ended.stdout);
    serde_json::from_str(&ended.stdout).unwrap()
}

#[test]
fn selftest_holds_kernels_to_the_oracle_and_steps_to_stored_losses() {
    let rows = json_of(["selftest", "--json"]);
    let rows = rows.as_array().unwrap();
    for row in rows {
        let keys: Vec<&str> = row.as_object().unwrap().keys().map(String::as_str).collect();
        for key in ["op", "dtype", "max_error", "tolerance", "passed"] {
            assert!(keys.contains(&key), "{row} lacks {key}");
        }
        let [error, tolerance] = ["max_error", "tolerance"].map(|key| row[key].as_f64().unwrap());
        assert!(error <= tolerance && row["passed"] == true, "{row}");
    }
    let count = |dtype: &str, is_step: bool| {
        let of_kind = |row: &&Value| {
            row["dtype"] == dtype && row["op"].as_str().unwrap().starts_with("train_step t5_v1_1") == is_step
        };
        rows.iter().filter(of_kind).count()
    };
    for dtype in ["f32", "bf16"] {
        assert_eq!(count(dtype, true), 5, "{dtype}");
        assert!(count(dtype, false) > 20, "{dtype}: {} operations", count(dtype, false));
    }
}

const STEP_KEYS: [&str; 11] = [
    "device",
    "precision",
    "parameters",
    "batch_size",
    "source_length",
    "target_length",
    "seconds_per_step",
    "tokens_per_second",
    "model_flops_per_step",
    "mfu",
    "peak_memory_bytes",
];

#[test]
fn bench_step_measures_a_directory() {
    let model = references().join("t5_v1_1");
    let sizes = ["--batch-size", "2", "--source-length", "9", "--target-length", "5", "--steps", "2"];
    for precision in ["fp32", "bf16"] {
        let mut arguments = vec!["bench", "step", "--model", model.to_str().unwrap(), "--precision", precision];
        arguments.extend(sizes);
        arguments.push("--json");
        let result = json_of::<15>(arguments.try_into().unwrap());
        for key in STEP_KEYS {
            assert!(result.get(key).is_some(), "{result} lacks {key}");
        }
        assert_eq!((&result["device"], &result["precision"]), (&"cpu".into(), &precision.into()));
        assert_eq!([&result["batch_size"], &result["source_length"], &result["target_length"]], [2, 9, 5]);
        assert_eq!(result["parameters"], 12_468);
        let number = |key: &str| result[key].as_f64().unwrap();
        for key in &STEP_KEYS[6..] {
            assert!(number(key) > 0.0, "{key} in {result}");
        }
        let tokens_per_second = 2.0 * (9.0 + 5.0) / number("seconds_per_step");
        assert!((number("tokens_per_second") / tokens_per_second - 1.0).abs() < 1e-9, "{result}");
    }
}

/// benchmarks/step_torch.py has the same lengths.
#[test]
fn bench_step_counts_the_real_tokens_of_ragged_examples() {
    let model = references().join("t5_v1_1");
    let sizes =
        ["--batch-size", "2", "--source-length", "16", "--target-length", "8", "--steps", "1", "--ragged", "--json"];
    let mut arguments = vec!["bench", "step", "--model", model.to_str().unwrap(), "--precision", "fp32"];
    arguments.extend(sizes);
    let result = json_of::<16>(arguments.try_into().unwrap());
    assert_eq!([&result["source_tokens"], &result["target_tokens"]], [19, 7]);
    let tokens_per_second = (19.0 + 7.0) / result["seconds_per_step"].as_f64().unwrap();
    assert!((result["tokens_per_second"].as_f64().unwrap() / tokens_per_second - 1.0).abs() < 1e-9, "{result}");
    assert_eq!(result["peak_flops_of"], "matrix product");
}

#[test]
fn bench_step_refuses_what_it_cannot_measure() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, said) in [
        (&["--model", "t5-tiny"][..], "--model t5-tiny: neither a directory nor one of t5-small"),
        (&["--model", "t5-small", "--batch-size", "0"], "--batch-size must be at least 1"),
        (&["--model", "t5-small", "--precision", "int8"], "--precision"),
    ] {
        let ended = run(directory.path(), ["bench", "step"].iter().chain(arguments)).expect(2);
        assert!(ended.error().contains(said), "{}", ended.stderr);
        assert_eq!(ended.stdout, "");
    }
}

//! Benchmarks over worker processes: that they run, add up right and say what they should. What they measure is the
//! machine's matter.

use serde_json::Value;

use crate::harness::{references, run};

fn rows(arguments: &[&str]) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let ended = run(directory.path(), arguments).expect(0);
    serde_json::from_str(&ended.stdout).unwrap()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("{key} of {row}"))
}

/// That sums are right is checked by the ranks, which fail otherwise.
#[test]
fn sums_are_measured_beside_a_plain_copy() {
    let line = "bench allreduce --world-size 3 --min-bytes 1000 --max-bytes 300000 --iterations 2 --device cpu --json";
    let rows = rows(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(
        rows.iter().map(|row| row["bytes"].as_u64().unwrap()).collect::<Vec<_>>(),
        [1000, 4000, 16000, 64000, 256_000]
    );
    for row in &rows {
        assert_eq!((row["backend"].as_str(), row["world_size"].as_u64()), (Some("tcp"), Some(3)));
        let algbw = number(row, "bytes") / number(row, "seconds") / 1e9;
        assert!((number(row, "algbw_gbps") / algbw - 1.0).abs() < 1e-9);
        assert!((number(row, "busbw_gbps") / algbw - 4.0 / 3.0).abs() < 1e-9);
        assert!(number(row, "copy_busbw_gbps") > 0.0);
    }
}

#[test]
fn scaling_is_measured_and_modelled_with_its_error() {
    let model = references().join("t5_v1_1");
    let svg = tempfile::NamedTempFile::new().unwrap();
    let mut arguments =
        vec!["bench", "scaling", "--model", model.to_str().unwrap(), "--svg", svg.path().to_str().unwrap()];
    arguments.extend("--workers 2 --steps 2 --sums 2 --nodes 8 --network-gbps 1,10 --device cpu --json".split(' '));
    arguments.extend("--batch-size 2 --source-length 12 --target-length 6".split(' '));
    let rows = rows(&arguments);
    let of = |kind: &str, mode: &str| -> Vec<&Value> {
        rows.iter().filter(|row| row["kind"] == kind && row["mode"] == mode).collect()
    };
    for mode in ["weak", "strong"] {
        let measured = of("measured", mode);
        assert_eq!(measured.iter().map(|row| row["workers"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(
            (number(measured[0], "efficiency"), number(measured[0], "exposed_communication_fraction")),
            (1.0, 0.0)
        );
        assert!(number(measured[1], "exposed_communication_fraction") > 0.0);
    }
    let modelled = of("modelled", "weak");
    assert_eq!(modelled.len(), 8, "1, 2, 4 and 8 nodes on two networks");
    for row in &modelled {
        assert!((0.0..=1.0).contains(&number(row, "efficiency")) && number(row, "held_out_error_max") > 0.0);
        assert!(number(row, "held_out_error_median") <= number(row, "held_out_error_max"));
    }
    let picture = std::fs::read_to_string(svg.path()).unwrap();
    assert!(picture.starts_with("<svg") && picture.matches("<polyline").count() == 4, "{picture}");
}

#[test]
fn a_lonely_sum_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let ended = run(directory.path(), ["bench", "allreduce", "--world-size", "1"]).expect(2);
    assert!(ended.error().contains("--world-size"), "{}", ended.error());
}

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;

use super::*;
use crate::dataset::Example;

fn config(settings: &str) -> DataConfig {
    toml::from_str(&format!("train = \"t.jsonl\"\ninput = \"in {{x}}\"\ntarget = \"{{y}}\"\n{settings}")).unwrap()
}

/// A folder with t.jsonl: x counts up, y = `class(x)`.
fn numbered(count: usize, class: impl Fn(usize) -> usize) -> tempfile::TempDir {
    let mut lines = String::new();
    for x in 0..count {
        writeln!(lines, "{{\"x\": {x}, \"y\": \"c{}\"}}", class(x)).unwrap();
    }
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("t.jsonl"), lines).unwrap();
    directory
}

fn example(input: &'static str, target: &'static str) -> Example<'static> {
    Example { input: input.into(), target: target.into() }
}

fn inputs(dataset: &Dataset) -> Vec<usize> {
    dataset.examples().map(|example| example.input.strip_prefix("in ").unwrap().parse().unwrap()).collect()
}

#[test]
fn renders_in_file_order() {
    let directory = numbered(3, |x| x);
    let splits = Splits::load(&config(""), directory.path(), 0).unwrap();
    assert!(splits.validation.is_none());
    assert_eq!(splits.train.len(), 3);
    assert_eq!(splits.train.example(0), example("in 0", "c0"));
    assert_eq!(splits.train.example(2), example("in 2", "c2"));
    assert_eq!(splits.train.texts().collect::<Vec<_>>(), ["in 0", "c0", "in 1", "c1", "in 2", "c2"]);
}

#[test]
fn the_fingerprint_tells_examples_apart() {
    let fingerprint = |lines: &str, settings: &str| {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("t.jsonl"), lines).unwrap();
        Splits::load(&config(settings), directory.path(), 0).unwrap().fingerprint()
    };
    let line = |x: &str, y: &str| format!("{{\"x\": {x:?}, \"y\": {y:?}}}\n");
    let (ab, d) = (line("ab", "c"), line("d", "e"));
    let fingerprints: BTreeSet<_> = [
        fingerprint(&format!("{ab}{d}"), ""),
        fingerprint(&format!("{}{d}", line("a", "bc")), ""),
        fingerprint(&format!("{d}{ab}"), ""),
        fingerprint(&ab, ""),
        fingerprint(&format!("{ab}{d}"), "validation_split = 0.5"),
        fingerprint(&format!("{ab}{d}"), "sample = 1"),
        fingerprint(&format!("{ab}{d}"), "source_prefix = \"x\""),
        fingerprint(&format!("{ab}{d}"), "num_shots = 1"),
    ]
    .into();
    assert_eq!(fingerprints.len(), 8);
    assert_eq!(fingerprint(&ab, ""), fingerprint(&ab, "max_examples = 1"));
    assert_eq!(fingerprint(&ab, "").len(), 64);
}

#[test]
fn a_split_has_the_exact_size_and_keeps_order() {
    for (count, fraction, expected) in [(100, 0.05, 5), (7, 0.5, 4), (2, 0.01, 1), (2, 0.99, 1), (50, 0.99, 49)] {
        let directory = numbered(count, |x| x % 3);
        let config = config(&format!("validation_split = {fraction}"));
        let splits = Splits::load(&config, directory.path(), 1).unwrap();
        let (train, validation) = (inputs(&splits.train), inputs(&splits.validation.unwrap()));
        assert_eq!(validation.len(), expected, "{fraction} of {count}");
        assert!(train.is_sorted() && validation.is_sorted());
        let all: BTreeSet<_> = train.into_iter().chain(validation).collect();
        assert!(all.into_iter().eq(0..count));
    }
}

#[test]
fn a_split_depends_on_the_seed_alone() {
    let directory = numbered(100, |x| x);
    let validation = |seed| {
        let splits = Splits::load(&config("validation_split = 0.3"), directory.path(), seed).unwrap();
        inputs(&splits.validation.unwrap())
    };
    assert_eq!(validation(1), validation(1));
    assert_ne!(validation(1), validation(2));
    // Neither the first nor the last 30, nor every third.
    let mean = validation(1).iter().sum::<usize>() as f64 / 30.0;
    assert!((35.0..65.0).contains(&mean), "{mean}");
}

#[test]
fn a_stratified_split_takes_the_same_share_of_every_class() {
    let directory = numbered(100, |x| if x < 80 { 0 } else { 1 });
    let config = config("validation_split = 0.1\nstratify_by = \"y\"");
    let splits = Splits::load(&config, directory.path(), 3).unwrap();
    let validation = inputs(&splits.validation.unwrap());
    assert_eq!(validation.iter().filter(|&&x| x < 80).count(), 8);
    assert_eq!(validation.len(), 10);
}

#[test]
fn classes_too_small_to_round_leave_neither_side_empty() {
    for (fraction, expected) in [(0.1, 1), (0.9, 5)] {
        let directory = numbered(6, |x| x);
        let config = config(&format!("validation_split = {fraction}\nstratify_by = \"y\""));
        let splits = Splits::load(&config, directory.path(), 0).unwrap();
        assert_eq!(splits.validation.unwrap().len(), expected);
    }
}

#[test]
fn a_validation_source_is_read_with_the_same_templates() {
    let directory = numbered(2, |x| x);
    fs::write(directory.path().join("v.csv"), "y,x\nb,a\n").unwrap();
    let splits = Splits::load(&config("validation = \"v.csv\""), directory.path(), 0).unwrap();
    assert_eq!(splits.validation.unwrap().example(0), example("in a", "b"));
    assert_eq!(splits.train.len(), 2);
}

#[test]
fn length_filters_count_characters_of_rendered_text() {
    let directory = tempfile::tempdir().unwrap();
    let lines = "{\"x\":\"é\",\"y\":\"\"}\n{\"x\":\"éé\",\"y\":\"b\"}\n{\"x\":\"ééé\",\"y\":\"bb\"}\n";
    fs::write(directory.path().join("t.jsonl"), lines).unwrap();
    let targets = |settings: &str| {
        let splits = Splits::load(&config(settings), directory.path(), 0)?;
        Ok::<_, Error>(splits.train.examples().map(|example| example.target.into_owned()).collect::<Vec<_>>())
    };
    assert_eq!(targets("max_source_characters = 5").unwrap(), ["", "b"]);
    assert_eq!(targets("min_source_characters = 5").unwrap(), ["b", "bb"]);
    assert_eq!(targets("min_target_characters = 1\nmax_target_characters = 1").unwrap(), ["b"]);
    let error = targets("min_source_characters = 50").unwrap_err();
    assert_eq!(error.to_string(), "data.train: the length filters (data.min/max_…_characters) drop all 3 examples");
    assert!(error.is_user_error());
}

#[test]
fn a_missing_field_is_located() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("t.jsonl"), "{\"x\": 1, \"y\": 2}\n{\"x\": 1, \"z\": 2}\n").unwrap();
    let message = |settings: &str| Splits::load(&config(settings), directory.path(), 0).unwrap_err().to_string();
    assert_eq!(message(""), "t.jsonl:2: no field \"y\"; the record has: x, z");
    fs::write(directory.path().join("t.jsonl"), "{\"x\": 1, \"y\": 2}\n").unwrap();
    assert_eq!(
        message("validation_split = 0.5\nstratify_by = \"class\""),
        "t.jsonl:1: no field \"class\"; the record has: x, y"
    );
    assert_eq!(
        message("validation_split = 0.5"),
        "data.validation_split: there is only one example; add data to split"
    );
}

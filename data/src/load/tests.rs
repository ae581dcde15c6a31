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

fn splits(directory: &tempfile::TempDir, settings: &str) -> Result<Splits> {
    Splits::load(&config(settings), directory.path(), 7)
}

fn byt5() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_spec(&crate::tokenizer::TokenizerSpec::ByT5, [].into_iter(), None).unwrap())
}

#[test]
fn filters_choose_records_for_training_and_validation() {
    let directory = numbered(10, |x| x % 2);
    let loaded = splits(&directory, "where = \"x > 3 and y == 'c1'\"\nvalidation = \"t.jsonl\"").unwrap();
    assert_eq!(inputs(&loaded.train), [5, 7, 9]);
    assert_eq!(inputs(&loaded.validation.unwrap()), [5, 7, 9]);
    let counts = SourceCounts { name: None, records: 10, filtered: 7, by_length: 0 };
    assert_eq!(loaded.counts, [counts]);
}

#[test]
fn useless_filters_are_named() {
    let directory = numbered(10, |x| x % 2);
    for (settings, message) in [
        (
            "where = \"z > 3 or x > 3\"",
            "data.where: names the field \"z\", which no record of data.train has; they have: x, y",
        ),
        ("where = \"x > 30\"", "data.where: keeps none of the 10 records of data.train: x > 30"),
        (
            "where = \"x > 3\"\nmin_source_characters = 50",
            "data.train: the length filters (data.min/max_…_characters) drop all 6 examples that data.where keeps",
        ),
        ("where = \"y > 3\"", "t.jsonl:1: data.where: the field \"y\" is \"c0\", which is no number"),
        ("sample = 11", "data.sample: 11 is more than the 10 examples there are"),
        ("num_shots = 10", "data.num_shots: 10 is more than the 9 other training examples"),
        (
            "label_names = { x = [\"a\", \"b\"] }",
            "t.jsonl:3: data.label_names: the field \"x\" is \"2\", neither a number from 0 to 1 nor one of the names",
        ),
    ] {
        let error = splits(&directory, settings).unwrap_err();
        assert_eq!(error.to_string(), message);
        assert!(error.is_user_error());
    }
}

#[test]
fn samples_are_of_the_asked_size_and_keep_order() {
    let directory = numbered(100, |x| x);
    assert_eq!(inputs(&splits(&directory, "max_examples = 4").unwrap().train), [0, 1, 2, 3]);
    let sample = inputs(&splits(&directory, "sample = 30").unwrap().train);
    assert!(sample.len() == 30 && sample.is_sorted() && sample[29] > 50, "{sample:?}");
    assert_eq!(sample, inputs(&splits(&directory, "sample = 0.3").unwrap().train));
    let other = Splits::load(&config("sample = 0.3"), directory.path(), 8).unwrap();
    assert_ne!(sample, inputs(&other.train));
    // What is held out comes from the sample.
    let loaded = splits(&directory, "sample = 30\nvalidation_split = 0.2").unwrap();
    let (train, validation) = (inputs(&loaded.train), inputs(&loaded.validation.unwrap()));
    assert_eq!((train.len(), validation.len()), (24, 6));
    let all: BTreeSet<_> = train.into_iter().chain(validation).collect();
    assert!(all.into_iter().eq(sample));
}

#[test]
fn classes_have_names() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("t.jsonl"), "{\"x\": 1, \"y\": 1}\n{\"x\": 2, \"y\": \"bad\"}\n").unwrap();
    let loaded = splits(&directory, "label_names = { y = [\"bad\", \"good\"] }").unwrap();
    assert_eq!(loaded.train.examples().map(|example| example.target.into_owned()).collect::<Vec<_>>(), ["good", "bad"]);
}

#[test]
fn shots_are_other_training_examples() {
    let directory = numbered(20, |x| x);
    fs::write(directory.path().join("v.csv"), "x,y\n3,c3\n99,c99\n").unwrap();
    let settings =
        "num_shots = 3\nshot_template = \"<{input}={target}>\"\nsource_prefix = \"P:\"\nvalidation = \"v.csv\"";
    let loaded = splits(&directory, settings).unwrap();
    let validation = loaded.validation.as_ref().unwrap();
    let mut chosen = BTreeSet::new();
    for (example, x) in loaded.train.examples().zip(0..).chain(validation.examples().zip([3, 99])) {
        let rest = example.input.strip_prefix("P:").unwrap().strip_suffix(&format!("in {x}")).unwrap();
        let shots: Vec<&str> = rest.split_inclusive('>').collect();
        let distinct: BTreeSet<&str> = shots.iter().copied().collect();
        assert_eq!((shots.len(), distinct.len()), (3, 3));
        for shot in shots {
            let (input, target) =
                shot.strip_prefix("<in ").unwrap().strip_suffix('>').unwrap().split_once('=').unwrap();
            // Neither itself nor, in validation, its double.
            assert_ne!(input, x.to_string());
            assert_eq!(target, format!("c{input}"));
            chosen.insert(input.to_owned());
        }
        assert_eq!(example.target, format!("c{x}"));
    }
    assert!(chosen.len() > 15, "{chosen:?}");
    let again = splits(&directory, settings).unwrap();
    assert!(loaded.train.examples().eq(again.train.examples()));
    let other = Splits::load(&config(settings), directory.path(), 8).unwrap();
    assert!(!loaded.train.examples().eq(other.train.examples()));
}

#[test]
fn of_a_prompt_that_is_too_long_shots_are_left_out() {
    let directory = numbered(20, |x| x);
    let settings = "num_shots = 3\nshot_template = \"<{input}={target}>\"\nmax_source_length = 30";
    let loaded = splits(&directory, settings).unwrap();
    let (order, tokenizer) = (Order::new(20, 0, false), byt5());
    let packer = crate::Packer::new(Arc::new(loaded.train), tokenizer.clone(), order, config(settings).limits());
    for position in 0..20 {
        let batch = packer.pack(0, position..position + 1).unwrap();
        let text = tokenizer.decode(&batch.source_ids);
        assert!(text.ends_with(&format!("in {position}")) && text.matches('<').count() == 2, "{text}");
    }
}

const MIXTURE: &str = "
[[mixture]]
name = \"a\"
train = \"t.jsonl\"
[[mixture]]
name = \"b\"
train = \"t.jsonl\"
input = \"b {x}\"
where = \"x >= 90\"
";

#[test]
fn a_mixture_has_the_examples_of_its_sources_in_its_proportions() {
    let directory = numbered(100, |x| x);
    let parse = |settings: &str| {
        let text = format!("input = \"in {{x}}\"\ntarget = \"{{y}}\"\nvalidation_split = 0.1\n{settings}{MIXTURE}");
        let config: DataConfig = toml::from_str(&text).unwrap();
        Splits::load(&config, directory.path(), 7)
    };
    let loaded = parse("").unwrap();
    assert_eq!((loaded.train.part_lens(), loaded.validation.as_ref().unwrap().len()), (vec![90, 9], 11));
    let names: Vec<_> = loaded.counts.iter().map(|counts| counts.name.as_deref()).collect();
    assert_eq!(names, [Some("a"), Some("b")]);
    assert!(loaded.train.example(89).input.starts_with("in ") && loaded.train.example(90).input.starts_with("b 9"));
    assert_eq!(loaded.order().slots(), [90, 9]);
    let limited = parse("mixture_limit = 30").unwrap();
    assert_eq!((limited.order().positions(), limited.order().examples()), (39, 99));
}

#[test]
fn what_was_tokenized_ahead_is_used_if_it_is_of_the_same() {
    let directory = numbered(50, |x| x);
    let tokenizer = byt5();
    let batch = |splits: &Splits, config: &DataConfig| {
        let order = splits.order();
        let positions = 0..order.positions();
        let packer = crate::Packer::new(Arc::new(splits.train.clone()), tokenizer.clone(), order, config.limits());
        packer.pack(1, positions).unwrap()
    };
    for (objective, whole) in [("", 2), ("max_source_length = 5", 2), ("num_shots = 2", 2)] {
        let mut config = config(&format!("validation_split = 0.2\n{objective}"));
        config.cache_dir = Some(format!("cache {objective}").into());
        let plain = Splits::load(&config, directory.path(), 7).unwrap().tokenized(&tokenizer).unwrap();
        let expected = batch(&plain, &config);
        let mut ahead = Splits::load(&config, directory.path(), 7).unwrap();
        assert_eq!(ahead.prepare(&tokenizer).unwrap(), (0, whole));
        assert_eq!(batch(&ahead, &config), expected);
        let mut again = Splits::load(&config, directory.path(), 7).unwrap();
        assert_eq!(again.prepare(&tokenizer).unwrap(), (whole, whole), "{objective}");
        assert_eq!(batch(&again, &config), expected);
        assert_eq!(again.fingerprint(), plain.fingerprint());
        // Other data, lengths, or prompts: stale.
        for stale in ["max_source_length = 4", "max_examples = 40", "source_prefix = \"x\"", "where = \"x > 1\""] {
            let mut other: DataConfig = self::config(&format!("validation_split = 0.2\n{stale}"));
            other.cache_dir.clone_from(&config.cache_dir);
            let mut splits = Splits::load(&other, directory.path(), 7).unwrap();
            let plain = splits.clone().tokenized(&tokenizer).unwrap();
            assert_eq!(batch(&plain, &other), {
                splits.prepare(&tokenizer).unwrap();
                batch(&splits, &other)
            });
        }
    }
}

#[test]
fn texts_are_concatenated_and_cut_for_span_corruption() {
    let directory = numbered(100, |x| x);
    let text = "train = \"t.jsonl\"\ninput = \"in {x}\"\nobjective = \"span_corruption\"\nmax_source_length = 30\n\
                validation_split = 0.2\ncache_dir = \"cache\"";
    let config: DataConfig = toml::from_str(text).unwrap();
    let loaded = Splits::load(&config, directory.path(), 7).unwrap();
    let tokenizer = byt5();
    let concatenated: String = loaded.train.texts().collect();
    let mut ahead = loaded.clone();
    let loaded = loaded.tokenized(&tokenizer).unwrap();
    // 32 tokens make inputs of 30.
    assert_eq!(loaded.train.len(), (concatenated.len() as u64).div_ceil(32));
    let order = loaded.order();
    let pack = |splits: &Splits, order: &Order, epoch| {
        let packer =
            crate::Packer::new(Arc::new(splits.train.clone()), tokenizer.clone(), order.clone(), config.limits());
        packer.pack(epoch, 0..order.positions()).unwrap()
    };
    let batch = pack(&loaded, &order, 0);
    let kept: usize = batch.source_ids.iter().chain(&batch.target_ids).filter(|&&id| (3..259).contains(&id)).count();
    assert_eq!(kept, concatenated.len(), "every token is in an input or a target, once");
    assert_ne!(pack(&loaded, &order, 1).source_ids, batch.source_ids);
    assert_eq!(ahead.prepare(&tokenizer).unwrap(), (0, 2));
    assert_eq!(pack(&ahead, &order, 0), batch);
    let shown = loaded.validation.unwrap();
    let example = shown.example(0);
    assert!(example.input.contains("<extra_id_0>") && example.target.starts_with("<extra_id_0>"), "{example:?}");
}

//! Data as the program reads it: mixtures and objectives give the same bits however they are computed, files may be
//! larger than memory, and what is prepared ahead is used.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};

use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Process, quintet, references, run};
use crate::jobs::Workspace;

/// What a job of the workspace trains on, put in the place of its own.
fn with_data(data: &str, evaluation: &str) -> Workspace {
    let workspace = Workspace::new();
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    let (head, rest) = job.split_once("[data]\n").unwrap();
    let (_, tail) = rest.split_once("[training]\n").unwrap();
    let (training, _) = tail.split_once("[evaluation]\n").unwrap();
    let training = training.replace("max_steps = 22", "max_steps = 60");
    workspace.write("job.toml", &format!("{head}[data]\n{data}\n[training]\n{training}[evaluation]\n{evaluation}\n"));
    workspace
}

/// The same weights for one to four workers, and after a stop in the middle of an epoch.
#[track_caller]
fn check_invariance(workspace: &Workspace) {
    let alone = workspace.trained("alone", "--workers 1").weights();
    for workers in 2..=4 {
        let output = format!("with-{workers}");
        assert!(workspace.trained(&output, &format!("--workers {workers}")).weights() == alone, "{workers} workers");
    }
    let mut process = workspace.start("stopped", "--workers 2");
    process.wait_for("step 10: checkpoint saved");
    process.signal(Signal::TERM);
    process.wait().expect(75);
    assert!(workspace.trained("stopped", "--resume --workers 3").weights() == alone, "resumed");
}

#[test]
fn a_mixture_is_the_same_for_any_number_of_workers_and_after_resuming() {
    let workspace = with_data(
        "mixture_temperature = 2.0
max_source_length = 40
max_target_length = 20
[[data.mixture]]
name = \"long\"
train = \"train.jsonl\"
validation = \"validation.jsonl\"
input = \"say: {source}\"
target = \"{target}\"
[[data.mixture]]
name = \"short\"
train = \"train.jsonl\"
input = \"copy: {source}\"
target = \"{source}\"
where = \"len(source) < 12\"",
        "metrics = [\"loss\"]",
    );
    check_invariance(&workspace);
}

#[test]
fn span_corruption_is_the_same_for_any_number_of_workers_and_after_resuming() {
    let data = "train = \"train.jsonl\"\nvalidation = \"validation.jsonl\"\ninput = \"{source}\"\n\
                objective = \"ul2\"\nmax_source_length = 24\nmax_target_length = 24";
    check_invariance(&with_data(data, "metrics = [\"exact_match\"]\nmax_new_tokens = 8"));
}

#[test]
fn what_is_prepared_ahead_is_used_and_changes_nothing() {
    let workspace = Workspace::new();
    let plain = workspace.trained("plain", "--workers 1").weights();
    let prepare = |settings: &[&str]| -> Value {
        let arguments = ["data", "prepare", "job.toml", "--output", "ahead", "--json"];
        let ended = run(workspace.path(), arguments.iter().chain(settings)).expect(0);
        serde_json::from_str(&ended.stdout).unwrap()
    };
    let report = prepare(&[]);
    assert_eq!((&report["sources_tokenized"], &report["examples"]), (&2.into(), &37.into()), "{report}");
    assert_eq!(prepare(&[])["sources_present"], 2);
    assert!(workspace.trained("ahead", "--workers 2").weights() == plain);
    // Another length is another cache; changed data too.
    assert_eq!(prepare(&["--set", "data.max_source_length=39"])["sources_tokenized"], 2);
    let lines = fs::read_to_string(workspace.path().join("train.jsonl")).unwrap();
    workspace.write("train.jsonl", &lines.replacen("bee", "bea", 1));
    let report = prepare(&[]);
    assert_eq!((&report["sources_tokenized"], &report["sources_present"]), (&1.into(), &1.into()), "{report}");
}

#[test]
fn a_file_larger_than_the_memory_is_read_all_the_same() {
    const LINES: usize = 400_000;
    const MEMORY_KILOBYTES: usize = 130_000;
    let workspace = Workspace::new();
    let mut file = BufWriter::new(File::create(workspace.path().join("large.jsonl")).unwrap());
    let text = "a bee sea dee ".repeat(32);
    for number in 0..LINES {
        writeln!(file, "{{\"source\": \"{number} {text}\", \"target\": \"{number}\"}}").unwrap();
    }
    let bytes = file.into_inner().unwrap().metadata().unwrap().len() as usize;
    assert!(bytes > 1400 * MEMORY_KILOBYTES, "{bytes} bytes are no test");
    // The kernel's limit on what a process may write to; a mapped file is not part of it.
    let script = format!("ulimit -d {MEMORY_KILOBYTES}; exec \"$0\" \"$@\"");
    let mut command = std::process::Command::new("bash");
    command.current_dir(workspace.path()).args(["-c", &script]).arg(quintet(workspace.path()).get_program());
    command.args(["data", "inspect", "job.toml", "--records", "1", "--output", "large"]);
    command.args(["--set", "data.train=large.jsonl", "--set", "data.validation_split=0.01"]);
    let job = fs::read_to_string(workspace.path().join("job.toml")).unwrap();
    workspace.write("job.toml", &job.replace("validation = \"validation.jsonl\"\n", ""));
    let ended = Process::start(&mut command).wait().expect(0);
    let counts = format!("{} training examples, {} positions an epoch, {} validation", 396_000, 396_000, 4000);
    assert!(ended.stderr.contains(&counts), "{}", ended.stderr);
}

#[test]
fn a_job_is_inspected() {
    let workspace = Workspace::new();
    let arguments = ["data", "inspect", "job.toml", "--set", "data.where=len(source) > 5", "--set", "data.num_shots=1"];
    let ended = run(workspace.path(), arguments).expect(0);
    let examples: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(examples.len(), 3);
    assert!(examples.iter().all(|example| example["input"].as_str().unwrap().matches("say: ").count() == 2));
    for line in ["37 records, less ", " by data.where and 0 by length", "source tokens: mean ", "at the limit of 40"] {
        assert!(ended.stderr.contains(line), "{line:?} is not in {}", ended.stderr);
    }
}

#[test]
fn a_folder_of_parquet_files_is_a_data_set() {
    let workspace = Workspace::new();
    let folder = workspace.path().join("reviews/data");
    fs::create_dir_all(&folder).unwrap();
    for (codec, name) in
        [("snappy", "train-00000-of-00002"), ("zstd", "train-00001-of-00002"), ("gzip", "test-00000-of-00001")]
    {
        let file = references().join("parquet").join(format!("{codec}.parquet"));
        fs::copy(file, folder.join(format!("{name}.parquet"))).unwrap();
    }
    for (source, records) in [("reviews", 120), ("reviews:train", 120), ("reviews:test", 60)] {
        let ended = run(workspace.path(), ["data", "inspect", source, "--records", "1"]).expect(0);
        assert!(ended.stderr.contains(&format!("{records} records")), "{source}: {}", ended.stderr);
    }
    run(workspace.path(), ["data", "export", "reviews:test", "--output", "test.jsonl"]).expect(0);
    let exported = fs::read_to_string(workspace.path().join("test.jsonl")).unwrap();
    let expected = fs::read_to_string(references().join("parquet/rows.jsonl")).unwrap();
    let parse = |text: &str| text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>();
    assert_eq!(parse(&exported), parse(&expected));
}

#[test]
fn the_benchmark_of_data_tells_speed_and_stalls() {
    let workspace = Workspace::new();
    let ended = run(workspace.path(), ["bench", "data", "job.toml", "--seconds", "0.2", "--json"]).expect(0);
    let rows: Vec<Value> = ended.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    assert!(
        rows[0]["consumption_tokens_per_second"].is_null() && rows[1]["consumption_tokens_per_second"] == 100_000.0
    );
    for row in &rows {
        let number = |key: &str| row[key].as_f64().unwrap();
        assert!(number("tokens_per_second") > 0.0 && number("tokens") > 0.0, "{row}");
        assert!((0.0..=1.0).contains(&number("stall_fraction")), "{row}");
    }
    let mut wrong = String::new();
    for (flag, value) in [("--threads", "0"), ("--tokens-per-second", "0"), ("--seconds", "0")] {
        let ended = run(workspace.path(), ["bench", "data", "job.toml", flag, value]).expect(2);
        writeln!(wrong, "{}", ended.error()).unwrap();
    }
    assert_eq!(wrong.lines().count(), 3);
}

//! Workers on machines that share no files with the coordinator's: started elsewhere, with another home.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::classification::{classifier_directory, edit_job};
use crate::harness::{Process, quintet, references};
use crate::jobs::{EXAMPLES, RunOutput, Workspace, words};

/// Several epochs, evaluations and checkpoints.
const STEPS: u64 = 22;

/// A machine of its own, as far as files go.
struct Machine(TempDir);

impl Machine {
    fn new() -> Self {
        Machine(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// A worker that joins by the coordinator's next token.
    fn worker(&self, coordinator: &mut Coordinator) -> Process {
        let mut command = quintet(self.path());
        command.args(["worker", "--coordinator", &coordinator.url, "--threads", "1"]);
        let token = coordinator.tokens.pop().unwrap();
        let variable = if token.starts_with("quintet1.") { "QUINTET_JOIN_TOKEN" } else { "QUINTET_RUN_TOKEN" };
        command.env(variable, token).env("HOME", self.path()).env_remove("XDG_CACHE_HOME");
        Process::start(&mut command)
    }

    /// The entries of the folder of caches whose names begin so.
    fn cached(&self, prefix: &str) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.path().join(".cache/quintet")) else { return Vec::new() };
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.is_dir() && path.file_name().unwrap().to_str().unwrap().starts_with(prefix)).collect()
    }
}

struct Coordinator {
    process: Process,
    url: String,
    /// For workers that are still to come.
    tokens: Vec<String>,
}

impl Coordinator {
    /// Over TLS where the address is not 127.0.0.1.
    fn start(workspace: &Workspace, address: &str, arguments: &str) -> Self {
        let mut command = quintet(workspace.path());
        command.args(["coordinator", "job.toml", "--output", "run", "--listen", address]).args(words(arguments));
        let mut process = Process::start(&mut command);
        let line = process.wait_for(" quintet worker --coordinator ");
        let words: Vec<&str> = line.split_whitespace().collect();
        let (url, (variable, value)) = (words[words.len() - 1].to_owned(), words[0].split_once('=').unwrap());
        let tokens = match variable {
            "QUINTET_RUN_TOKEN" => vec![value.to_owned(); 8],
            _ => fs::read_to_string(workspace.path().join(value)).unwrap().lines().map(str::to_owned).collect(),
        };
        Coordinator { process, url, tokens }
    }

    fn address(&self) -> String {
        self.url.split_once("://").unwrap().1.to_owned()
    }
}

/// A job that fine-tunes a model beside it.
fn fine_tuning(more: &str) -> Workspace {
    let workspace = Workspace::fine_tuning(Path::new("models/base"), more);
    copy(&references().join("byt5"), &workspace.path().join("models/base"));
    workspace
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// What a run leaves, but for times and numbers of workers.
#[track_caller]
fn assert_same(run: &RunOutput, local: &RunOutput) {
    assert!(run.weights() == local.weights(), "the weights differ");
    assert_eq!(run.column("loss"), local.column("loss"));
    assert_eq!(run.events("eval"), local.events("eval"));
    assert_eq!(run.checkpoints(), local.checkpoints());
    assert_eq!(run.lines("predictions.jsonl"), local.lines("predictions.jsonl"));
    for folder in ["model", "adapter"] {
        assert_eq!(names(&run.path(folder)), names(&local.path(folder)));
    }
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn workers_without_the_runs_files_get_them_from_the_coordinator_and_write_there() {
    let workspace = fine_tuning("");
    let settings = "training.save_total_limit=2";
    let local = workspace.trained("local", &format!("--workers 2 {settings}"));
    let mut coordinator = Coordinator::start(&workspace, "127.0.0.1:0", &format!("--workers 3 {settings}"));
    let (bare, other) = (Machine::new(), Machine::new());
    // Files of the same names, but not the same files.
    fs::write(other.path().join("train.jsonl"), "{\"source\": \"a\", \"target\": \"b\"}\n").unwrap();
    fs::copy(workspace.path().join("validation.jsonl"), other.path().join("validation.jsonl")).unwrap();
    copy(&workspace.path().join("models/base"), &other.path().join("models/base"));
    let workers = [&bare, &bare, &other].map(|machine| machine.worker(&mut coordinator));
    let ended = coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    let run = workspace.output("run");
    run.check_ledger(STEPS);
    assert_same(&run, &local);
    assert!(!run.path(".probe").exists());
    // Two workers wanted it, and one fetched it; nothing else stays.
    assert_eq!((bare.cached("model-").len(), bare.cached("").len()), (1, 1), "{:?}", bare.cached(""));
    assert_eq!((other.cached("").len(), names(other.path()).contains("run")), (0, false));
    let count = |text: &str| ended.stderr.lines().filter(|line| line.contains(text)).count();
    let said = &ended.stderr;
    assert_eq!(count("reads the model from here, had it from here before (models/base: no model in "), 1, "{said}");
    assert_eq!(count("reads the model from here"), 2, "{said}");
    assert_eq!(count("reads the data from here (train.jsonl: no such file"), 2, "{said}");
    assert_eq!(count("reads the data from here (this machine has other data)"), 1, "{said}");
    assert_eq!(count("writes through here (run is not shared)"), 3, "{said}");
}

#[test]
fn whoever_dies_the_run_goes_on_without_shared_files() {
    let workspace = fine_tuning("");
    let settings = "--workers 2 training.max_steps=160 training.save_steps=3 training.save_total_limit=3";
    let local = workspace.trained("local", settings);
    let mut coordinator = Coordinator::start(&workspace, "127.0.0.1:0", settings);
    let machines = [Machine::new(), Machine::new()];
    let mut workers = machines.each_ref().map(|machine| machine.worker(&mut coordinator));
    let run = workspace.output("run");
    // One after the other, so that each rank 0 is among them.
    for (victim, committed) in [(0, 15), (1, 40)] {
        assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), committed));
        workers[victim].signal(rustix::process::Signal::KILL);
        coordinator.process.wait_for("lost worker ");
        workers[victim] = machines[victim].worker(&mut coordinator);
    }
    assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), 65));
    let address = coordinator.address();
    coordinator.process.kill();
    let coordinator = Coordinator::start(&workspace, &address, &format!("--resume {settings}"));
    coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    run.check_ledger(160);
    assert_same(&run, &local);
    for machine in machines {
        assert_eq!((machine.cached("model-").len(), machine.cached("checkpoints").len()), (1, 0));
    }
}

#[test]
fn adapters_classes_and_the_model_of_toxicity_come_from_the_coordinator_too() {
    // What the adapter is trained further from, the machine does not have either.
    let first = fine_tuning("[lora]\nr = 4\n");
    let adapter = first.trained("first", "training.max_steps=2").path("adapter");
    let further = fine_tuning("[lora]\npretrained = \"adapter\"\n");
    copy(&adapter, &further.path().join("adapter"));
    // How many classes there are, all examples tell.
    let classes = Workspace::new();
    let lines = (0..EXAMPLES).map(|number| format!("{{\"source\": \"{number}\", \"target\": \"{}\"}}\n", number % 3));
    classes.write("train.jsonl", &lines.clone().collect::<String>());
    classes.write("validation.jsonl", &lines.take(9).collect::<String>());
    edit_job(&classes, |job| {
        job.replace("metrics = [\"exact_match\"]\nmax_new_tokens = 8", "metrics = [\"accuracy\"]")
            .replace("[model]", "[model]\ntask = \"sequence_classification\"")
    });
    // What measures toxicity.
    let judged = Workspace::new();
    copy(classifier_directory("byt5").path(), &judged.path().join("judge"));
    judged.write("judge/tokenizer_config.json", r#"{"tokenizer_class": "ByT5Tokenizer"}"#);
    edit_job(&judged, |job| {
        let toxicity = "metrics = [\"toxicity\"]\ntoxicity_model = \"judge\"\ntoxic_label = \"bad\"";
        job.replace("metrics = [\"exact_match\"]", toxicity)
    });
    for workspace in [&further, &classes, &judged] {
        let local = workspace.trained("local", "");
        let mut coordinator = Coordinator::start(workspace, "127.0.0.1:0", "--workers 1");
        let machine = Machine::new();
        let worker = machine.worker(&mut coordinator);
        coordinator.process.wait().expect(0);
        worker.wait().expect(0);
        assert_same(&workspace.output("run"), &local);
    }
}

#[test]
fn a_run_is_resumed_on_machines_that_have_never_seen_it() {
    let workspace = fine_tuning("[lora]\nr = 4\ntarget_modules = [\"q\", \"v\", \"wo\"]\n");
    let settings = "training.max_steps=60 training.save_steps=7 training.eval_steps=20 training.load_best_model_at_end=true training.save_total_limit=3";
    let local = workspace.trained("local", &format!("--workers 2 {settings}"));
    let run = workspace.output("run");
    let arguments = format!("--workers 2 {settings}");
    for (resume, code) in [("", 75), ("--resume", 0)] {
        // As between machines: by TLS.
        let mut coordinator = Coordinator::start(&workspace, "127.0.0.2:0", &format!("{resume} {arguments}"));
        let machines = [Machine::new(), Machine::new()];
        let workers = machines.each_ref().map(|machine| machine.worker(&mut coordinator));
        if code == 75 {
            assert!(coordinator.process.wait_for_lines(&run.path("ledger.jsonl"), 25));
            coordinator.process.signal(rustix::process::Signal::TERM);
        }
        coordinator.process.wait().expect(code);
        for worker in workers {
            worker.wait().expect(code);
        }
        for machine in machines {
            assert_eq!(machine.cached("checkpoints").len() + machine.cached("staging").len(), 0);
        }
    }
    run.check_ledger(60);
    // One more checkpoint was saved on the way.
    assert!(run.weights() == local.weights());
    assert_eq!(run.events("eval"), local.events("eval"));
}

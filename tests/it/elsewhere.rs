//! Workers on machines that share no files with the coordinator's: started elsewhere, with another home.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::harness::{Process, quintet, references};
use crate::jobs::Workspace;

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

    fn worker(&self, coordinator: &Coordinator) -> Process {
        let mut command = quintet(self.path());
        command.args(["worker", "--coordinator", &coordinator.url, "--threads", "1"]);
        command.env("QUINTET_RUN_TOKEN", &coordinator.token).env("HOME", self.path()).env_remove("XDG_CACHE_HOME");
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
    token: String,
}

impl Coordinator {
    fn start(workspace: &Workspace, arguments: &[&str]) -> Self {
        let mut command = quintet(workspace.path());
        command.args(["coordinator", "job.toml", "--output", "run"]).args(arguments);
        let mut process = Process::start(&mut command);
        let line = process.wait_for("QUINTET_RUN_TOKEN=");
        let words: Vec<&str> = line.split_whitespace().collect();
        let token = words[0].trim_start_matches("QUINTET_RUN_TOKEN=").to_owned();
        Coordinator { process, url: words[words.len() - 1].to_owned(), token }
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

#[test]
fn workers_without_data_and_model_read_them_from_the_coordinator() {
    let workspace = fine_tuning("");
    let local = workspace.trained("local", "--workers 2");
    let coordinator = Coordinator::start(&workspace, &["--workers", "3"]);
    let (bare, other) = (Machine::new(), Machine::new());
    // Files of the same names, but not the same files.
    fs::write(other.path().join("train.jsonl"), "{\"source\": \"a\", \"target\": \"b\"}\n").unwrap();
    fs::copy(workspace.path().join("validation.jsonl"), other.path().join("validation.jsonl")).unwrap();
    copy(&workspace.path().join("models/base"), &other.path().join("models/base"));
    let workers = [bare.worker(&coordinator), bare.worker(&coordinator), other.worker(&coordinator)];
    let ended = coordinator.process.wait().expect(0);
    for worker in workers {
        worker.wait().expect(0);
    }
    let run = workspace.output("run");
    run.check_ledger(STEPS);
    assert_eq!(run.column("loss"), local.column("loss"));
    assert_eq!(run.events("eval"), local.events("eval"));
    // Two workers wanted it, and one fetched it.
    assert_eq!((bare.cached("model-").len(), other.cached("model-").len()), (1, 0));
    let count = |text: &str| ended.stderr.lines().filter(|line| line.contains(text)).count();
    assert_eq!(
        count("reads the model from here, had it from here before (models/base: no model in "),
        1,
        "{}",
        ended.stderr
    );
    assert_eq!(count("reads the model from here"), 2, "{}", ended.stderr);
    assert_eq!(count("reads the data from here (train.jsonl: no such file"), 2, "{}", ended.stderr);
    assert_eq!(count("reads the data from here (this machine has other data)"), 1, "{}", ended.stderr);
}

//! A tiny job whose lengths divide nothing, and what its runs leave.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Ended, Process, quintet};

/// Examples of the job's training file.
pub(crate) const EXAMPLES: u64 = 37;
/// Examples of a step; the last step of an epoch has 7.
pub(crate) const GLOBAL_BATCH: u64 = 10;

const JOB: &str = r#"output_dir = "run"

[model]
architecture = { d_model = 16, d_kv = 4, d_ff = 24, num_layers = 2, num_decoder_layers = 1, num_heads = 3, feed_forward_proj = "gated-gelu", tie_word_embeddings = false }
tokenizer = "byt5"
dropout_rate = 0.1

[data]
train = "train.jsonl"
validation = "validation.jsonl"
input = "say: {source}"
target = "{target}"
max_source_length = 40
max_target_length = 20

[training]
max_steps = 22
global_batch_size = 10
micro_batch_size = 2
learning_rate = 1e-2
warmup_steps = 2
eval_steps = 11
save_steps = 5

[evaluation]
metrics = ["exact_match"]
max_new_tokens = 8
batch_size = 4
"#;

/// A directory with the job's files, in which runs are made.
pub(crate) struct Workspace {
    directory: TempDir,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        let workspace = Workspace { directory: tempfile::tempdir().unwrap() };
        workspace.write("job.toml", JOB);
        workspace.write("train.jsonl", &examples(EXAMPLES, 1));
        workspace.write("validation.jsonl", &examples(9, 2));
        workspace
    }

    /// The job for a model that exists, with `more` sections.
    pub(crate) fn fine_tuning(pretrained: &Path, more: &str) -> Self {
        let workspace = Self::new();
        let start = JOB.find("architecture").unwrap();
        let end = start + JOB[start..].find('\n').unwrap();
        let pretrained = format!("pretrained = {:?}", pretrained.display().to_string());
        workspace.write("job.toml", &format!("{}{pretrained}{}\n{more}", &JOB[..start], &JOB[end..]));
        workspace
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn write(&self, name: &str, content: &str) {
        fs::write(self.path().join(name), content).unwrap();
    }

    /// `quintet train job.toml --output OUTPUT`, and more arguments as one text, each `key=value` for `--set`.
    pub(crate) fn start(&self, output: &str, arguments: &str) -> Process {
        let mut command = quintet(self.path());
        command.args(["train", "job.toml", "--output", output]).args(words(arguments));
        Process::start(&mut command)
    }

    /// The same, to the end.
    pub(crate) fn train(&self, output: &str, arguments: &str) -> Ended {
        self.start(output, arguments).wait()
    }

    /// The same, which must go well; what it leaves.
    #[track_caller]
    pub(crate) fn trained(&self, output: &str, arguments: &str) -> RunOutput {
        self.train(output, arguments).expect(0);
        self.output(output)
    }

    pub(crate) fn output(&self, name: &str) -> RunOutput {
        RunOutput { directory: self.path().join(name) }
    }
}

/// `--workers 2 training.seed=3` as arguments.
pub(crate) fn words(arguments: &str) -> Vec<&str> {
    let argument = |word| if str::contains(word, '=') { vec!["--set", word] } else { vec![word] };
    arguments.split_whitespace().flat_map(argument).collect()
}

/// Texts of ragged lengths: the words of a line are those of a small congruential generator.
fn examples(count: u64, salt: u64) -> String {
    let mut state = salt;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut lines = String::new();
    for _ in 0..count {
        let words: Vec<&str> = (0..1 + next(9)).map(|_| ["a", "bee", "sea", "dee", "ü"][next(5) as usize]).collect();
        let target: String = words.iter().take(1 + next(4) as usize).map(|word| word.to_uppercase()).collect();
        lines += &json!({"source": words.join(" "), "target": target}).to_string();
        lines += "\n";
    }
    lines
}

/// What a run left.
pub(crate) struct RunOutput {
    directory: PathBuf,
}

impl RunOutput {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The final weights, the model's or the adapter's, as bytes.
    #[track_caller]
    pub(crate) fn weights(&self) -> Vec<u8> {
        let adapter = self.path("adapter/adapter_model.safetensors");
        fs::read(if adapter.exists() { adapter } else { self.path("model/model.safetensors") }).unwrap()
    }

    #[track_caller]
    pub(crate) fn lines(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// The events of one kind.
    #[track_caller]
    pub(crate) fn events(&self, kind: &str) -> Vec<Value> {
        self.lines("metrics.jsonl").into_iter().filter(|event| event["event"] == kind).collect()
    }

    /// A number of each step's `train` event.
    #[track_caller]
    pub(crate) fn column(&self, key: &str) -> Vec<f64> {
        self.events("train").iter().map(|event| event[key].as_f64().unwrap()).collect()
    }

    /// Names of the checkpoints, oldest first, and of whatever else lies beside them.
    pub(crate) fn checkpoints(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("checkpoints")) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Checks that the ledger holds `steps` steps, each once and in order, and each position of each epoch exactly once.
    #[track_caller]
    pub(crate) fn check_ledger(&self, steps: u64) {
        let ledger = self.lines("ledger.jsonl");
        let (mut epoch, mut position) = (0, 0);
        for (number, record) in (1..).zip(&ledger) {
            let end = (position + GLOBAL_BATCH).min(EXAMPLES);
            assert_eq!(record["step"], number, "{record}");
            assert_eq!(record["epoch"], epoch, "{record}");
            assert_eq!(record["positions"], json!([position, end]), "{record}");
            (epoch, position) = if end == EXAMPLES { (epoch + 1, 0) } else { (epoch, end) };
        }
        assert_eq!(ledger.len() as u64, steps);
    }
}

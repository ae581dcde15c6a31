//! The job file: typed, every unknown key an error that names the nearest known one.

use std::fs;
use std::path::{Path, PathBuf};

use quintet_coordinator::config::ClusterConfig;
use quintet_data::DataConfig;
use quintet_worker::{EvaluationConfig, LoraConfig, ModelSection, Precision, TrainingConfig, task};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::JobArguments;
use crate::device::Decision;
use crate::error::{Failure, Result};
use crate::hub;

/// A job, as in INTERFACE: the file's sections, each defined by the crate that uses it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Job {
    pub(crate) output_dir: PathBuf,
    pub(crate) model: ModelSection,
    pub(crate) data: DataConfig,
    #[serde(default)]
    pub(crate) training: TrainingConfig,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lora: Option<LoraConfig>,
    #[serde(default)]
    pub(crate) evaluation: EvaluationConfig,
    #[serde(default)]
    pub(crate) cluster: ClusterConfig,
}

impl Job {
    /// The job of a command line: the file, with its overrides, checked.
    pub(crate) fn load(arguments: &JobArguments) -> Result<Job> {
        let path = &arguments.job;
        let text = fs::read_to_string(path)
            .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
        let mut job = parse(path, &text)?;
        let mut table: toml::Table = text.parse().map_err(|error| describe(path, &text, &error))?;
        for assignment in &arguments.overrides {
            apply(&mut table, assignment)?;
            job = table.clone().try_into().map_err(|error: toml::de::Error| {
                Failure::bad_input(format!("--set {assignment}: {}", with_nearest_name(error.message())))
            })?;
        }
        if let Some(output) = &arguments.output {
            job.output_dir.clone_from(output);
        }
        job.data.cache_dir.get_or_insert_with(|| job.output_dir.join("cache"));
        if let Some(workers) = arguments.workers {
            job.cluster.workers = Some(workers);
        }
        if let Some(device) = arguments.device {
            job.cluster.device = device.into();
        }
        job.validate()
            .map_err(|failure| Failure { message: format!("{}: {}", path.display(), failure.message), ..failure })?;
        Ok(job)
    }

    /// Fills in what follows from the device: one worker for each GPU, and the precision, so that the run has one even if
    /// it is resumed on another device.
    pub(crate) fn settle(&mut self, device: &Decision) {
        self.cluster.device = device.as_wanted();
        if device.gpus > 0 {
            self.cluster.workers.get_or_insert(device.gpus as u32);
        }
        self.training.precision.get_or_insert(Precision::default_on(device.choice));
    }

    fn validate(&self) -> Result<()> {
        self.model.validate()?;
        self.data.validate()?;
        self.training.validate()?;
        if let Some(lora) = &self.lora {
            if self.model.pretrained.is_none() {
                return Err(Failure::bad_input("lora: an adapter needs a model that exists; give model.pretrained"));
            }
            lora.validate()?;
        }
        self.evaluation.validate()?;
        self.evaluation.validate_for(self.model.task)?;
        task::check_objective(self.model.task, self.data.objective)?;
        self.cluster.validate()?;
        Ok(())
    }

    /// The first setting that differs from `other` and changes what a run computes, for refusing to resume another job.
    pub(crate) fn conflict(&self, other: &Job) -> Option<String> {
        let (mine, theirs) = (numerics(self), numerics(other));
        difference("", &mine, &theirs)
    }

    /// Of all that decides the numbers, for checkpoints to carry.
    pub(crate) fn fingerprint(&self) -> String {
        blake3::hash(numerics(self).to_string().as_bytes()).to_hex().to_string()
    }
}

/// What of a job decides the numbers; the rest may change between a run and its continuation.
fn numerics(job: &Job) -> Value {
    let mut job = job.clone();
    job.output_dir = PathBuf::new();
    job.cluster = ClusterConfig::default();
    job.evaluation = EvaluationConfig::default();
    job.data.cache_dir = None;
    // Weights of a run under way are its checkpoint's, wherever the hub's branch has moved.
    job.model.pretrained = job.model.pretrained.map(|name| hub::without_commit(&name));
    let training = &mut job.training;
    (training.gradient_checkpointing, training.zero_stage) = (false, 0);
    // As jobs without one had it before there was another.
    training.precision = training.precision.filter(|&precision| precision != Precision::Fp32);
    training.logging_steps = 1;
    (training.eval_steps, training.save_steps, training.save_total_limit) = (None, None, None);
    // They decide when training ends, as max_steps of a job does not: it may go on with another patience.
    let usual = TrainingConfig::default();
    training.load_best_model_at_end = usual.load_best_model_at_end;
    training.metric_for_best_model = usual.metric_for_best_model;
    training.greater_is_better = usual.greater_is_better;
    training.early_stopping_patience = usual.early_stopping_patience;
    training.early_stopping_threshold = usual.early_stopping_threshold;
    serde_json::to_value(job).unwrap_or_default()
}

fn difference(key: &str, mine: &Value, theirs: &Value) -> Option<String> {
    if let (Value::Object(mine), Value::Object(theirs)) = (mine, theirs) {
        let keys = mine.keys().chain(theirs.keys().filter(|key| !mine.contains_key(*key)));
        return keys.into_iter().find_map(|name| {
            let path = if key.is_empty() { name.clone() } else { format!("{key}.{name}") };
            let absent = Value::Null;
            difference(&path, mine.get(name).unwrap_or(&absent), theirs.get(name).unwrap_or(&absent))
        });
    }
    (mine != theirs).then(|| format!("{key} is {mine}, and was {theirs}"))
}

pub(crate) fn parse(path: &Path, text: &str) -> Result<Job> {
    toml::from_str(text).map_err(|error| describe(path, text, &error))
}

/// `job.toml:12: unknown field …; did you mean …?`
fn describe(path: &Path, text: &str, error: &toml::de::Error) -> Failure {
    let line = error.span().map_or(String::new(), |span| {
        let line = text[..span.start.min(text.len())].matches('\n').count() + 1;
        format!(":{line}")
    });
    Failure::bad_input(format!("{}{line}: {}", path.display(), with_nearest_name(error.message())))
}

/// Of an unknown name, serde lists what it expected; the one that looks most like what was written is what was meant.
pub(crate) fn with_nearest_name(message: &str) -> String {
    let message = message.trim().replace('\n', " ");
    let Some((unknown, expected)) = message.split_once(", expected").filter(|_| message.starts_with("unknown ")) else {
        return message;
    };
    let quoted = |text: &str| -> Vec<String> { text.split('`').skip(1).step_by(2).map(str::to_string).collect() };
    let (unknown_names, candidates) = (quoted(unknown), quoted(expected));
    let nearest = unknown_names.first().and_then(|name| {
        let score = |candidate: &String| strsim::jaro_winkler(name, candidate);
        candidates.iter().filter(|candidate| score(candidate) > 0.7).max_by(|a, b| score(a).total_cmp(&score(b)))
    });
    let unknown = unknown.replace("unknown field", "unknown key");
    match nearest {
        Some(nearest) => format!("{unknown}; did you mean `{nearest}`?"),
        None => format!("{unknown}; known here: {}", candidates.join(", ")),
    }
}

/// Sets `section.key=value` in a table; the value is TOML, or a string where it is not.
fn apply(table: &mut toml::Table, assignment: &str) -> Result<()> {
    let wrong = || Failure::bad_input(format!("--set {assignment}: write section.key=value"));
    let (path, value) = assignment.split_once('=').ok_or_else(wrong)?;
    let value = format!("value = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|key| !key.is_empty()).ok_or_else(wrong)?;
    let mut table = table;
    for key in keys {
        let entry = table.entry(key.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        table = entry
            .as_table_mut()
            .ok_or_else(|| Failure::bad_input(format!("--set {assignment}: {key} is no section of the job file")))?;
    }
    table.insert(last.to_string(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "output_dir = 'runs/x'\n[model]\narchitecture = { d_model = 8 }\ntokenizer = 'byt5'\n[data]\ntrain = 'x.jsonl'\ninput = '{a}'\ntarget = '{b}'\n";

    #[test]
    fn an_unknown_key_names_the_line_and_the_nearest_key() {
        let text = format!("{JOB}[training]\nlearning_rat = 1e-3\n");
        let failure = parse(Path::new("job.toml"), &text).unwrap_err();
        assert_eq!(failure.exit_code, 2);
        assert_eq!(failure.message, "job.toml:10: unknown key `learning_rat`; did you mean `learning_rate`?");
    }

    #[test]
    fn a_wrong_type_names_the_line() {
        let text = format!("{JOB}[training]\nwarmup_steps = 'many'\n");
        let failure = parse(Path::new("job.toml"), &text).unwrap_err();
        assert_eq!(failure.message, "job.toml:10: invalid type: string \"many\", expected u64");
    }

    #[test]
    fn overrides_reach_nested_keys_and_new_sections() {
        let mut table: toml::Table = JOB.parse().unwrap();
        apply(&mut table, "training.learning_rate=1e-2").unwrap();
        apply(&mut table, "data.train=other.jsonl").unwrap();
        apply(&mut table, "model.architecture.d_model=16").unwrap();
        let job: Job = table.try_into().unwrap();
        assert_eq!(job.training.learning_rate, 1e-2);
        assert_eq!(job.data.train.entries(), ["other.jsonl"]);
        assert_eq!(job.model.architecture.unwrap()["d_model"], 16);
        assert_eq!(apply(&mut toml::Table::new(), "nothing").unwrap_err().exit_code, 2);
    }

    /// The job files below a folder.
    fn jobs_below(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let found = |path: PathBuf| match path.is_dir() {
            true => jobs_below(&path),
            false if path.extension().is_some_and(|extension| extension == "toml") => vec![path],
            false => Vec::new(),
        };
        entries.flat_map(found).collect()
    }

    #[test]
    fn every_example_is_a_valid_job() {
        let jobs = jobs_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples"));
        assert!(jobs.len() > 5, "{jobs:?}");
        for job in jobs {
            let loaded = Job::load(&JobArguments::new(&job, Vec::new()));
            assert!(loaded.is_ok(), "{}", loaded.unwrap_err().message);
        }
    }

    #[test]
    fn only_what_decides_the_numbers_conflicts() {
        let job = parse(Path::new("job.toml"), JOB).unwrap();
        let mut other = job.clone();
        other.cluster.workers = Some(4);
        other.training.save_steps = Some(10);
        other.output_dir = "elsewhere".into();
        assert_eq!(job.conflict(&other), None);
        other.training.seed = 7;
        assert_eq!(job.conflict(&other).unwrap(), "training.seed is 42, and was 7");
    }
}

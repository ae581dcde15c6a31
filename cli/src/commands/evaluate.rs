//! `quintet evaluate`: loss and metrics of a model on a file, or of predictions.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use quintet_data::{Classes, Dataset, Filter, Limits, SourceList, Splits, Template, Tokenizer};
use quintet_t5::{Model, Weights};
use quintet_worker::evaluation::EvaluationTask;
use quintet_worker::metrics::{self, Pair};
use quintet_worker::outbox::Outbox;
use quintet_worker::output::write_predictions;
use quintet_worker::toxicity::{self, ToxicityModel};
use quintet_worker::{EvaluationConfig, Metric, ModelTask, Task};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::args::{EvaluateArguments, GenerationFlags, JobArguments};
use crate::commands::{compare, open_model, print_json, require_decoder};
use crate::device;
use crate::error::{Failure, Result, exit};
use crate::hub;
use crate::job::{Job, with_nearest_name};
use crate::prepare::working_directory;

pub(crate) fn run(arguments: EvaluateArguments) -> Result<u8> {
    if !arguments.compare.is_empty() {
        let metrics = text_metrics(&arguments.metrics, &COMPARED)?;
        if metrics.contains(&Metric::Toxicity) {
            return Err(Failure::bad_input(
                "--metrics: toxicity is not compared; score each file of predictions by itself",
            ));
        }
        let table = compare::compare(&arguments.compare, &metrics)?;
        match arguments.json {
            true => print_json(&table),
            false => compare::print_table(&table),
        }
        return Ok(exit::DONE);
    }
    let result = match &arguments.predictions {
        Some(path) => score_predictions(path, &arguments)?,
        None => evaluate_model(&arguments)?,
    };
    if arguments.json {
        print_json(&result);
        return Ok(exit::DONE);
    }
    for (name, value) in result.as_object().into_iter().flatten() {
        match value {
            Value::Object(metrics) => metrics.iter().for_each(|(name, value)| println!("{name}: {value}")),
            value => println!("{name}: {value}"),
        }
    }
    Ok(exit::DONE)
}

/// The metrics of these names; `usual` ones without any.
fn parse_metrics(names: &[String], usual: &[Metric]) -> Result<Vec<Metric>> {
    if names.is_empty() {
        return Ok(usual.to_vec());
    }
    let parse = |name: &String| {
        serde_json::from_value(json!(name.trim()))
            .map_err(|error| Failure::bad_input(format!("--metrics: {}", with_nearest_name(&error.to_string()))))
    };
    names.iter().map(parse).collect()
}

/// What a comparison shows by default.
const COMPARED: [Metric; 5] = [Metric::ExactMatch, Metric::F1, Metric::Rouge1, Metric::RougeL, Metric::Bleu];

/// Those that texts alone can tell; `usual` ones without any.
fn text_metrics(names: &[String], usual: &[Metric]) -> Result<Vec<Metric>> {
    let metrics = parse_metrics(names, usual)?;
    match metrics.iter().find(|metric| !metric.needs_predictions()) {
        Some(metric) => Err(Failure::bad_input(format!(
            "--metrics: {} follows from a model's probabilities, not from texts; give --model instead of predictions",
            metric.name()
        ))),
        None => Ok(metrics),
    }
}

fn evaluate_model(arguments: &EvaluateArguments) -> Result<Value> {
    let asked = match &arguments.job {
        Some(path) => Asked::by_job(path, arguments.overrides.clone())?,
        None => Asked::by_flags(arguments)?,
    };
    if arguments.output.is_some() && !asked.config.metrics.iter().any(|metric| metric.needs_predictions()) {
        return Err(Failure::bad_input("--output: nothing predicts; add a metric of texts, such as exact_match"));
    }
    let Some(directory) = &arguments.model else {
        return Err(Failure::bad_input("give --model, or --predictions"));
    };
    let device = device::open(arguments.device)?;
    let loaded = open_model(&device, directory, arguments.adapter.as_deref(), arguments.tokenizer.as_deref())?;
    require_decoder(&loaded.model)?;
    let dataset = asked.examples.dataset(&loaded.tokenizer)?;
    let by_flags = arguments.job.is_none();
    let targets = if by_flags { "--target" } else { "data.target" };
    let classes = classes_of(&loaded.model, &dataset, targets)?;
    let config = match classes {
        Some(_) => for_classifier(asked.config, arguments)?,
        None => asked.config,
    };
    let task = Task::new(classes, &config, loaded.model.config(), Some(&loaded.directory))?;
    let toxicity = ToxicityModel::of(&config, &device).map_err(|error| named(error, by_flags))?;
    let task = EvaluationTask::new(&dataset, &loaded.tokenizer, asked.limits, &config, &task, toxicity.as_ref());
    let evaluation = task.summarize(task.evaluate_share(&loaded.model, Weights::from(&loaded.weights), 0, 1)?);
    if let Some(output) = &arguments.output {
        fs::create_dir_all(output)
            .map_err(|error| Failure::failed(format!("{}: cannot create: {error}", output.display())))?;
        write_predictions(&Outbox::shared(output.clone()), &evaluation.predictions)?;
    }
    Ok(json!({
        "loss": evaluation.loss,
        "examples": evaluation.examples,
        "target_tokens": evaluation.target_tokens,
        "metrics": to_map(evaluation.metrics),
    }))
}

/// What a model is asked, and how it is scored.
struct Asked {
    examples: Examples,
    limits: Limits,
    config: EvaluationConfig,
}

enum Examples {
    Dataset(Arc<Dataset>),
    /// Those that a job holds out.
    HeldOut(Box<Splits>),
}

impl Asked {
    fn by_flags(arguments: &EvaluateArguments) -> Result<Self> {
        let (Some(data), Some(input), Some(target)) = (&arguments.data, &arguments.input, &arguments.target) else {
            return Err(Failure::bad_input("give --data, --input and --target, or --job, or --predictions"));
        };
        let template = |name: &str, text: &str| {
            Template::parse(text).map_err(|error| Failure::bad_input(format!("--{name}: {error}")))
        };
        let (input, target) = (template("input", input)?, template("target", target)?);
        let sources = SourceList::from(data.as_str());
        let filter = arguments.condition.as_deref().map(Filter::parse).transpose();
        let filter = filter.map_err(|error| Failure::bad_input(format!("--where: {error}")))?;
        let dataset = Dataset::load(&sources, &input, &target, filter, &working_directory()?);
        let dataset = Arc::new(dataset.map_err(|error| {
            let failure = Failure::from(error);
            Failure { message: failure.message.replace("data.where", "--where"), ..failure }
        })?);
        let config = EvaluationConfig {
            metrics: parse_metrics(&arguments.metrics, &[Metric::Loss, Metric::ExactMatch])?,
            max_examples: arguments.max_examples,
            batch_size: arguments.batch_size,
            toxicity_model: toxicity_model("--toxicity-model", arguments.toxicity_model.as_ref())?,
            toxic_label: arguments.toxic_label.clone(),
            ..evaluation_of(&arguments.generation)
        };
        config.validate().map_err(|error| named(error, true))?;
        let limits =
            Limits { max_source_length: arguments.max_source_length, max_target_length: arguments.max_target_length };
        Ok(Asked { examples: Examples::Dataset(dataset), limits, config })
    }

    /// As the job's own evaluations are.
    fn by_job(path: &Path, overrides: Vec<String>) -> Result<Self> {
        let mut job = Job::load(&JobArguments::new(path, overrides))?;
        job.evaluation.toxicity_model =
            toxicity_model("evaluation.toxicity_model", job.evaluation.toxicity_model.as_ref())?;
        let splits = Splits::load(&job.data, &working_directory()?, job.training.seed)?;
        if splits.validation.is_none() {
            return Err(Failure::bad_input(format!(
                "{}: there is nothing to evaluate on; give data.validation or data.validation_split",
                path.display()
            )));
        }
        Ok(Asked { examples: Examples::HeldOut(Box::new(splits)), limits: job.data.limits(), config: job.evaluation })
    }
}

impl Examples {
    /// Masks of span corruption, for one, need the tokenizer.
    fn dataset(self, tokenizer: &Arc<Tokenizer>) -> Result<Arc<Dataset>> {
        match self {
            Examples::Dataset(dataset) => Ok(dataset),
            Examples::HeldOut(splits) => {
                let validation = splits.tokenized(tokenizer)?.validation;
                validation.map(Arc::new).ok_or_else(|| Failure::failed("the examples that were held out are gone"))
            }
        }
    }
}

/// The classes of a classifier, which those of the data must be, as `targets` makes them.
fn classes_of(model: &Model, dataset: &Dataset, targets: &'static str) -> Result<Option<Arc<Classes>>> {
    if !model.config().is_classifier() {
        return Ok(None);
    }
    let classes = Classes::new(model.config().labels());
    classes.check(dataset, targets)?;
    Ok(Some(Arc::new(classes)))
}

/// What a classifier can be asked for, as a job's.
fn for_classifier(mut config: EvaluationConfig, arguments: &EvaluateArguments) -> Result<EvaluationConfig> {
    let by_flags = arguments.job.is_none();
    if by_flags {
        config.metrics = parse_metrics(&arguments.metrics, &[Metric::Loss, Metric::Accuracy])?;
    }
    config.validate_for(ModelTask::SequenceClassification).map_err(|error| named(error, by_flags))?;
    Ok(config)
}

/// What is wrong with a key of `[evaluation]`, under the name of its flag, if flags asked.
fn named(error: quintet_worker::Error, by_flags: bool) -> Failure {
    match error {
        quintet_worker::Error::Config { key, problem } if by_flags => {
            let flag = key.trim_start_matches("evaluation.").replace('_', "-");
            Failure::bad_input(format!("--{flag}: {}", problem.replace("evaluation.", "--")))
        }
        other => other.into(),
    }
}

/// The directory of the classifier that measures toxicity, of this name.
fn toxicity_model(key: &str, name: Option<&String>) -> Result<Option<String>> {
    let Some(name) = name else { return Ok(None) };
    let model = hub::model(key, name, &working_directory()?)?;
    Ok(Some(model.directory.display().to_string()))
}

/// What the flags say about generation, as a job does.
pub(crate) fn evaluation_of(flags: &GenerationFlags) -> EvaluationConfig {
    EvaluationConfig {
        num_beams: flags.num_beams,
        max_new_tokens: flags.max_new_tokens,
        min_new_tokens: flags.min_new_tokens,
        length_penalty: flags.length_penalty,
        early_stopping: flags.early_stopping,
        no_repeat_ngram_size: flags.no_repeat_ngram_size,
        repetition_penalty: flags.repetition_penalty,
        do_sample: flags.do_sample,
        temperature: flags.temperature,
        top_k: flags.top_k,
        top_p: flags.top_p,
        seed: flags.seed,
        ..EvaluationConfig::default()
    }
}

fn to_map(scores: Vec<(&'static str, f64)>) -> Map<String, Value> {
    scores.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect()
}

/// What scoring needs of a line of `predictions.jsonl`.
#[derive(Deserialize)]
pub(crate) struct Line {
    pub(crate) prediction: String,
    pub(crate) target: String,
}

/// The lines of a file of predictions.
pub(crate) fn read_predictions(path: &Path) -> Result<Vec<Line>> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
    let parse = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|error| {
            let place = format!("{}:{}", path.display(), index + 1);
            Failure::bad_input(format!("{place}: no object with the strings \"prediction\" and \"target\": {error}"))
        })
    };
    let lines: Vec<Line> =
        text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(parse).collect::<Result<_>>()?;
    if lines.is_empty() {
        return Err(Failure::bad_input(format!("{}: holds no predictions", path.display())));
    }
    Ok(lines)
}

fn score_predictions(path: &Path, arguments: &EvaluateArguments) -> Result<Value> {
    let metrics = text_metrics(&arguments.metrics, &[Metric::ExactMatch])?;
    let lines = read_predictions(path)?;
    let pairs: Vec<Pair> =
        lines.iter().map(|line| Pair { prediction: &line.prediction, target: &line.target }).collect();
    let mut scores = metrics::scores(&metrics, &pairs, None);
    let config = EvaluationConfig {
        metrics,
        toxicity_model: toxicity_model("--toxicity-model", arguments.toxicity_model.as_ref())?,
        toxic_label: arguments.toxic_label.clone(),
        ..EvaluationConfig::default()
    };
    config.validate().map_err(|error| named(error, true))?;
    if config.toxicity_model.is_some() {
        let model = ToxicityModel::of(&config, &device::open(arguments.device)?).map_err(|error| named(error, true))?;
        let texts: Vec<&str> = lines.iter().map(|line| line.prediction.as_str()).collect();
        let probabilities = model.map(|model| model.probabilities(&texts)).transpose()?;
        scores.extend(toxicity::scores(&probabilities.unwrap_or_default()));
    }
    Ok(json!({"examples": pairs.len(), "metrics": to_map(scores)}))
}

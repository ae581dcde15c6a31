//! `quintet evaluate`: loss and metrics of a model on a file, or of predictions.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use quintet_data::{Classes, Dataset, Limits, SourceList, Template};
use quintet_t5::{Model, Weights};
use quintet_worker::evaluation::EvaluationTask;
use quintet_worker::metrics::{self, Pair};
use quintet_worker::{EvaluationConfig, Metric, ModelTask, Task};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::args::{EvaluateArguments, GenerationFlags};
use crate::commands::{compare, open_model, print_json, require_decoder};
use crate::device;
use crate::error::{Failure, Result, exit};
use crate::job::with_nearest_name;
use crate::prepare::working_directory;

pub(crate) fn run(arguments: EvaluateArguments) -> Result<u8> {
    if !arguments.compare.is_empty() {
        let table = compare::compare(&arguments.compare, &text_metrics(&arguments.metrics, &COMPARED)?)?;
        match arguments.json {
            true => print_json(&table),
            false => compare::print_table(&table),
        }
        return Ok(exit::DONE);
    }
    let result = match &arguments.predictions {
        Some(path) => score_predictions(path, &text_metrics(&arguments.metrics, &[Metric::ExactMatch])?)?,
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
    let (Some(directory), Some(data), Some(input), Some(target)) =
        (&arguments.model, &arguments.data, &arguments.input, &arguments.target)
    else {
        return Err(Failure::bad_input("give --model, --data, --input and --target, or --predictions"));
    };
    let template = |name: &str, text: &str| {
        Template::parse(text).map_err(|error| Failure::bad_input(format!("--{name}: {error}")))
    };
    let (input, target) = (template("input", input)?, template("target", target)?);
    let sources = SourceList::from(data.as_str());
    let dataset = Arc::new(Dataset::load(&sources, &input, &target, &working_directory()?)?);
    let mut config = EvaluationConfig {
        metrics: parse_metrics(&arguments.metrics, &[Metric::Loss, Metric::ExactMatch])?,
        max_examples: arguments.max_examples,
        batch_size: arguments.batch_size,
        ..evaluation_of(&arguments.generation)
    };
    config.validate()?;
    let loaded = open_model(
        &device::open(arguments.device)?,
        directory,
        arguments.adapter.as_deref(),
        arguments.tokenizer.as_deref(),
    )?;
    let limits =
        Limits { max_source_length: arguments.max_source_length, max_target_length: arguments.max_target_length };
    require_decoder(&loaded.model)?;
    let classes = classes_of(&loaded.model, &dataset)?;
    if classes.is_some() {
        config.metrics = parse_metrics(&arguments.metrics, &[Metric::Loss, Metric::Accuracy])?;
        check_for_classifier(&config)?;
    }
    let task = Task::new(classes, &config, loaded.model.config(), Some(&loaded.directory))?;
    let task = EvaluationTask::new(&dataset, &loaded.tokenizer, limits, &config, &task);
    let evaluation = task.summarize(task.evaluate_share(&loaded.model, Weights::from(&loaded.weights), 0, 1)?);
    Ok(json!({
        "loss": evaluation.loss,
        "examples": evaluation.examples,
        "target_tokens": evaluation.target_tokens,
        "metrics": to_map(evaluation.metrics),
    }))
}

/// The classes of a classifier, which those of the data must be.
fn classes_of(model: &Model, dataset: &Dataset) -> Result<Option<Arc<Classes>>> {
    if !model.config().is_classifier() {
        return Ok(None);
    }
    let classes = Classes::new(model.config().labels());
    classes.check(dataset, "--target")?;
    Ok(Some(Arc::new(classes)))
}

/// As a job's, under the names of the flags.
fn check_for_classifier(config: &EvaluationConfig) -> Result<()> {
    let in_flag = |error: quintet_worker::Error| match error {
        quintet_worker::Error::Config { key, problem } => {
            let flag = key.trim_start_matches("evaluation.").replace('_', "-");
            Failure::bad_input(format!("--{flag}: {problem}"))
        }
        other => other.into(),
    };
    config.validate_for(ModelTask::SequenceClassification).map_err(in_flag)
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

fn score_predictions(path: &Path, metrics: &[Metric]) -> Result<Value> {
    let lines = read_predictions(path)?;
    let pairs: Vec<Pair> =
        lines.iter().map(|line| Pair { prediction: &line.prediction, target: &line.target }).collect();
    Ok(json!({"examples": pairs.len(), "metrics": to_map(metrics::scores(metrics, &pairs, None))}))
}

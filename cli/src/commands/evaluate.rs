//! `quintet evaluate`: loss and metrics of a model on a file, or of predictions.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use quintet_data::{Dataset, Limits, SourceList, Template};
use quintet_t5::Weights;
use quintet_worker::evaluation::EvaluationTask;
use quintet_worker::metrics::{self, Tally};
use quintet_worker::{EvaluationConfig, Metric};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::args::EvaluateArguments;
use crate::commands::{open_model, print_json};
use crate::device;
use crate::error::{Failure, Result, exit};
use crate::prepare::working_directory;

pub(crate) fn run(arguments: EvaluateArguments) -> Result<u8> {
    let metrics = parse_metrics(&arguments.metrics)?;
    let result = match &arguments.predictions {
        Some(path) => score_predictions(path, &metrics)?,
        None => evaluate_model(&arguments, metrics)?,
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

fn parse_metrics(names: &[String]) -> Result<Vec<Metric>> {
    let parse = |name: &String| {
        serde_json::from_value(json!(name.trim())).map_err(|error| Failure::bad_input(format!("--metrics: {error}")))
    };
    names.iter().map(parse).collect()
}

fn evaluate_model(arguments: &EvaluateArguments, metrics: Vec<Metric>) -> Result<Value> {
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
    let config = EvaluationConfig {
        metrics,
        max_new_tokens: arguments.max_new_tokens,
        max_examples: arguments.max_examples,
        batch_size: arguments.batch_size,
        ..EvaluationConfig::default()
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
    let task = EvaluationTask::new(&dataset, &loaded.tokenizer, limits, &config);
    let evaluation = task.summarize(task.evaluate_share(&loaded.model, Weights::from(&loaded.weights), 0, 1)?);
    Ok(json!({
        "loss": evaluation.loss,
        "examples": evaluation.examples,
        "target_tokens": evaluation.target_tokens,
        "metrics": to_map(evaluation.metrics),
    }))
}

fn to_map(scores: Vec<(&'static str, f64)>) -> Map<String, Value> {
    scores.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect()
}

#[derive(Deserialize)]
struct Line {
    prediction: String,
    target: String,
}

fn score_predictions(path: &Path, metrics: &[Metric]) -> Result<Value> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::bad_input(format!("{}: cannot read: {error}", path.display())))?;
    let mut tally = Tally::default();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let line: Line = serde_json::from_str(line).map_err(|error| {
            let place = format!("{}:{}", path.display(), index + 1);
            Failure::bad_input(format!("{place}: no object with the strings \"prediction\" and \"target\": {error}"))
        })?;
        tally.add(&line.prediction, &line.target);
    }
    if tally.examples == 0 {
        return Err(Failure::bad_input(format!("{}: holds no predictions", path.display())));
    }
    Ok(json!({"examples": tally.examples, "metrics": to_map(metrics::scores(metrics, &tally))}))
}

//! A job file: its sections parse or are refused, and what parses is checked without a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use quintet_coordinator::config::ClusterConfig;
use quintet_data::DataConfig;
use quintet_worker::{EvaluationConfig, ModelSection, TrainingConfig};
use serde::Deserialize;

/// The sections of a job, each by the crate that uses it.
#[derive(Deserialize)]
struct Job {
    model: ModelSection,
    data: DataConfig,
    #[serde(default)]
    training: TrainingConfig,
    #[serde(default)]
    evaluation: EvaluationConfig,
    #[serde(default)]
    cluster: ClusterConfig,
}

fuzz_target!(|text: &str| {
    let Ok(job) = toml::from_str::<Job>(text) else { return };
    let _ = job.model.validate();
    let _ = job.data.validate();
    let _ = job.training.validate();
    let _ = job.evaluation.validate();
    let _ = job.cluster.validate();
});

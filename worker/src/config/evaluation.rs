//! `[evaluation]`: what is measured, and how predictions are generated.

use std::path::Path;

use quintet_t5::{EarlyStopping, Generation, GenerationOptions};
use serde::{Deserialize, Serialize};

use super::{ModelTask, check};
use crate::metrics::Metric;
use crate::{Error, Result};

/// `[evaluation]`. What it leaves open about generation, the model's `generation_config.json` may say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluationConfig {
    pub metrics: Vec<Metric>,
    /// 1 is greedy search, or sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_beams: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_new_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_new_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping: Option<EarlyStopping>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub no_repeat_ngram_size: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub do_sample: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Of sampling.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// The first so many examples; all without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_examples: Option<u64>,
    /// Examples computed at a time; has no effect on any score.
    pub batch_size: u32,
    /// The classifier that toxicity is measured by: a directory or a hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toxicity_model: Option<String>,
    /// Its class of what is toxic.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toxic_label: Option<String>,
}

impl Default for EvaluationConfig {
    fn default() -> Self {
        Self {
            metrics: vec![Metric::Loss],
            num_beams: None,
            max_new_tokens: None,
            min_new_tokens: None,
            length_penalty: None,
            early_stopping: None,
            no_repeat_ngram_size: None,
            repetition_penalty: None,
            do_sample: None,
            temperature: None,
            top_k: None,
            top_p: None,
            seed: None,
            max_examples: None,
            batch_size: 32,
            toxicity_model: None,
            toxic_label: None,
        }
    }
}

impl EvaluationConfig {
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn validate(&self) -> Result<()> {
        check("evaluation.batch_size", self.batch_size > 0, self.batch_size, "at least 1")?;
        if let Some(examples) = self.max_examples {
            check("evaluation.max_examples", examples > 0, examples, "at least 1; leave it out for all")?;
        }
        self.validate_toxicity()?;
        self.generation().check_ranges().map_err(evaluation_error)
    }

    fn validate_toxicity(&self) -> Result<()> {
        let wanted = self.metrics.contains(&Metric::Toxicity);
        let unused = |key: &str| {
            let problem = "has no effect without the metric toxicity; remove this, or add that to evaluation.metrics";
            Err(Error::config(format!("evaluation.{key}"), problem))
        };
        match (&self.toxicity_model, &self.toxic_label) {
            (None, _) if wanted => {
                Err(Error::config("evaluation.toxicity_model", "must name the classifier that toxicity is measured by"))
            }
            (Some(_), _) if !wanted => unused("toxicity_model"),
            (_, Some(_)) if !wanted => unused("toxic_label"),
            _ => Ok(()),
        }
    }

    /// The class of toxic texts.
    pub fn toxic_label(&self) -> &str {
        self.toxic_label.as_deref().unwrap_or("toxic")
    }

    /// Whether it fits the task; see [`EvaluationConfig::validate`] for the rest.
    ///
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn validate_for(&self, task: ModelTask) -> Result<()> {
        if task == ModelTask::Seq2Seq {
            return Ok(());
        }
        if let Some(metric) = self.metrics.iter().find(|metric| !metric.is_of_classes()) {
            let problem = format!("{} does not fit a classifier; loss, accuracy and macro_f1 do", metric.name());
            return Err(Error::config("evaluation.metrics", problem));
        }
        match self.generation_key() {
            Some(key) => Err(Error::config(format!("evaluation.{key}"), "a classifier generates no text; remove this")),
            None => Ok(()),
        }
    }

    /// The first key that is given and about generation.
    pub fn generation_key(&self) -> Option<String> {
        const OTHERS: [&str; 5] = ["metrics", "max_examples", "batch_size", "toxicity_model", "toxic_label"];
        let given = serde_json::to_value(self).ok()?;
        given.as_object()?.keys().find(|key| !OTHERS.contains(&key.as_str())).cloned()
    }

    /// What it says about generation. One prediction an example.
    pub fn generation(&self) -> GenerationOptions {
        GenerationOptions {
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            num_beams: self.num_beams,
            num_return_sequences: Some(1),
            length_penalty: self.length_penalty,
            early_stopping: self.early_stopping,
            no_repeat_ngram_size: self.no_repeat_ngram_size,
            repetition_penalty: self.repetition_penalty,
            do_sample: self.do_sample,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            seed: self.seed,
            ..GenerationOptions::default()
        }
    }

    /// How predictions are generated by a model of this configuration, which says what the job leaves open in the
    /// directory it came from.
    ///
    /// # Errors
    /// A user error that names the key.
    pub fn resolve_generation(&self, model: &quintet_t5::Config, directory: Option<&Path>) -> Result<Generation> {
        let defaults = directory.map(GenerationOptions::from_pretrained).transpose()?.unwrap_or_default();
        self.generation().or(defaults).resolve(model).map_err(evaluation_error)
    }
}

/// Under the name that the job has for it.
fn evaluation_error(error: quintet_t5::Error) -> Error {
    match error {
        quintet_t5::Error::Generation { key, problem } => Error::config(format!("evaluation.{key}"), problem),
        other => other.into(),
    }
}

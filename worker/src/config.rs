//! The sections of the job file that say what a worker does, with Hugging Face's names and
//! defaults. Every range is checked by `validate`, before anything is computed.

mod lora;
mod model;

use std::path::Path;

use quintet_data::TrainingLength;
use quintet_kernels::DType;
use quintet_t5::{EarlyStopping, Generation, GenerationOptions};
use serde::{Deserialize, Serialize};

pub use lora::LoraConfig;
pub use model::{ModelSection, ModelTask};

use crate::metrics::Metric;
use crate::optimizer::{Hyperparameters, OptimizerKind};
use crate::schedule::{Schedule, SchedulerType};
use crate::{DeviceChoice, Error, Result};

/// In which type the model computes; sums, master weights and the optimizer's state are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    Fp32,
    /// f32, of which a GPU's tensor cores may round the factors of products to 10 bits of mantissa.
    Tf32,
    Bf16,
    /// With dynamic loss scaling.
    Fp16,
}

impl Precision {
    /// Of jobs that name none.
    pub fn default_on(device: DeviceChoice) -> Self {
        match device {
            DeviceChoice::Cuda(_) => Self::Bf16,
            DeviceChoice::Cpu | DeviceChoice::Emulated => Self::Fp32,
        }
    }

    /// Of weights and activations.
    pub fn dtype(self) -> DType {
        match self {
            Self::Fp32 | Self::Tf32 => DType::F32,
            Self::Bf16 => DType::Bf16,
            Self::Fp16 => DType::F16,
        }
    }
}

/// `lr_scheduler_kwargs`, of the polynomial schedule only.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SchedulerKwargs {
    /// The last learning rate.
    pub lr_end: f64,
    pub power: f64,
}

impl Default for SchedulerKwargs {
    fn default() -> Self {
        Self { lr_end: 1e-7, power: 1.0 }
    }
}

/// `[training]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_train_epochs: Option<f64>,
    /// Examples in one optimizer step, over all workers.
    pub global_batch_size: u32,
    /// Examples in one forward and backward; the default is all of the global batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub micro_batch_size: Option<u32>,
    pub learning_rate: f64,
    pub lr_scheduler_type: SchedulerType,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr_scheduler_kwargs: Option<SchedulerKwargs>,
    pub warmup_steps: u64,
    pub optimizer: OptimizerKind,
    pub weight_decay: f64,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    /// 0 does not clip.
    pub max_grad_norm: f64,
    /// Without one: bf16 on a GPU, fp32 elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Precision>,
    pub gradient_checkpointing: bool,
    /// 1: the optimizer's state is sharded over the workers, as ZeRO-1 does it.
    #[serde(skip_serializing_if = "is_zero")]
    pub zero_stage: u32,
    pub label_smoothing_factor: f32,
    pub seed: u64,
    pub logging_steps: u64,
    /// Without one: evaluation at the end only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<u64>,
    /// Without one: a checkpoint at the end only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_steps: Option<u64>,
    /// Without one: all checkpoints stay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<u32>,
    /// The final model is that of the best evaluation, each of which leaves a checkpoint.
    pub load_best_model_at_end: bool,
    /// A metric's name, or `loss`, with or without `eval_` before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric_for_best_model: Option<String>,
    /// Without one: as the metric is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub greater_is_better: Option<bool>,
    /// The run ends after so many evaluations in a row that were no better than the best before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<u32>,
    /// By how much an evaluation must be better to count as such.
    pub early_stopping_threshold: f64,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            max_steps: None,
            num_train_epochs: None,
            global_batch_size: 8,
            micro_batch_size: None,
            learning_rate: 5e-5,
            lr_scheduler_type: SchedulerType::Linear,
            lr_scheduler_kwargs: None,
            warmup_steps: 0,
            optimizer: OptimizerKind::AdamW,
            weight_decay: 0.0,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            precision: None,
            gradient_checkpointing: false,
            zero_stage: 0,
            label_smoothing_factor: 0.0,
            seed: 42,
            logging_steps: 1,
            eval_steps: None,
            save_steps: None,
            save_total_limit: None,
            load_best_model_at_end: false,
            metric_for_best_model: None,
            greater_is_better: None,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
        }
    }
}

impl TrainingConfig {
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn validate(&self) -> Result<()> {
        self.validate_length()?;
        self.validate_batch()?;
        self.validate_optimizer()?;
        self.validate_schedule()?;
        let smoothing = self.label_smoothing_factor;
        check("training.label_smoothing_factor", (0.0..1.0).contains(&smoothing), smoothing, "at least 0 and below 1")?;
        let at_least_one = "at least 1";
        check("training.logging_steps", self.logging_steps > 0, self.logging_steps, at_least_one)?;
        for (key, value) in [
            ("training.eval_steps", self.eval_steps),
            ("training.save_steps", self.save_steps),
            ("training.save_total_limit", self.save_total_limit.map(u64::from)),
        ] {
            if let Some(value) = value {
                check(key, value > 0, value, "at least 1; leave it out for none")?;
            }
        }
        self.validate_selection()
    }

    fn validate_length(&self) -> Result<()> {
        if self.max_steps.is_some() && self.num_train_epochs.is_some() {
            return Err(Error::config("training.max_steps", "give either max_steps or num_train_epochs, not both"));
        }
        if let Some(steps) = self.max_steps {
            check("training.max_steps", steps > 0, steps, "at least 1")?;
        }
        if let Some(epochs) = self.num_train_epochs {
            check("training.num_train_epochs", epochs > 0.0 && epochs.is_finite(), epochs, "above 0")?;
        }
        Ok(())
    }

    fn validate_batch(&self) -> Result<()> {
        let (global, micro) = (self.global_batch_size, self.micro_batch_size());
        check("training.global_batch_size", global > 0, global, "at least 1")?;
        check("training.micro_batch_size", micro > 0, micro, "at least 1")?;
        if !global.is_multiple_of(micro) {
            let problem = format!("{micro} does not divide global_batch_size ({global}); choose a divisor");
            return Err(Error::config("training.micro_batch_size", problem));
        }
        Ok(())
    }

    fn validate_optimizer(&self) -> Result<()> {
        let rate = self.learning_rate;
        check("training.learning_rate", rate > 0.0 && rate.is_finite(), rate, "above 0")?;
        for (key, beta) in [("training.adam_beta1", self.adam_beta1), ("training.adam_beta2", self.adam_beta2)] {
            check(key, (0.0..1.0).contains(&beta), beta, "at least 0 and below 1")?;
        }
        let epsilon = self.adam_epsilon;
        self.validate_sharding()?;
        check("training.adam_epsilon", epsilon > 0.0 && epsilon.is_finite(), epsilon, "above 0")?;
        for (key, value) in
            [("training.weight_decay", self.weight_decay), ("training.max_grad_norm", self.max_grad_norm)]
        {
            check(key, value >= 0.0 && value.is_finite(), value, "at least 0")?;
        }
        Ok(())
    }

    fn validate_sharding(&self) -> Result<()> {
        let key = "training.zero_stage";
        let known = "0, or 1 to shard the optimizer's state; gradients and weights are not sharded";
        check(key, self.zero_stage <= 1, self.zero_stage, known)?;
        if self.zero_stage == 1 && self.optimizer == OptimizerKind::Adafactor {
            let problem = "adafactor keeps two vectors of a matrix, so that there is nothing to shard; leave it out";
            return Err(Error::config(key, problem));
        }
        Ok(())
    }

    /// Refuses what workers on this device cannot do.
    ///
    /// # Errors
    /// A user error that names the key and says what to do.
    pub fn check_device(&self, device: DeviceChoice) -> Result<()> {
        if self.zero_stage == 1 && device != DeviceChoice::Cpu {
            let problem = "the optimizer's state is sharded between workers on CPUs only; leave it out on GPUs";
            return Err(Error::config("training.zero_stage", problem));
        }
        Ok(())
    }

    fn validate_schedule(&self) -> Result<()> {
        if let Some(steps) = self.max_steps.filter(|&steps| self.warmup_steps > steps) {
            let problem = format!(
                "{} is more than max_steps ({steps}); the training would end inside its warm-up",
                self.warmup_steps
            );
            return Err(Error::config("training.warmup_steps", problem));
        }
        if self.warmup_steps > 0 && self.lr_scheduler_type == SchedulerType::Constant {
            return Err(Error::config(
                "training.warmup_steps",
                "the constant schedule has none; choose constant_with_warmup",
            ));
        }
        let Some(SchedulerKwargs { lr_end, power }) = self.lr_scheduler_kwargs else {
            return Ok(());
        };
        if self.lr_scheduler_type != SchedulerType::Polynomial {
            return Err(Error::config("training.lr_scheduler_kwargs", "only the polynomial schedule has any"));
        }
        let key = "training.lr_scheduler_kwargs.lr_end";
        check(key, (0.0..self.learning_rate).contains(&lr_end), lr_end, "at least 0 and below learning_rate")?;
        check("training.lr_scheduler_kwargs.power", power > 0.0 && power.is_finite(), power, "above 0")
    }

    /// The steps of a training on `examples` examples.
    ///
    /// # Errors
    /// A batch or length that makes no sense for them.
    pub fn steps(&self, examples: u64) -> Result<quintet_data::Schedule> {
        let (global, micro) = (u64::from(self.global_batch_size), u64::from(self.micro_batch_size()));
        Ok(quintet_data::Schedule::new(examples, global, micro, self.length())?)
    }

    /// `max_steps` or `num_train_epochs`; three epochs without either.
    pub fn length(&self) -> TrainingLength {
        match (self.max_steps, self.num_train_epochs) {
            (Some(steps), _) => TrainingLength::Steps(steps),
            (None, epochs) => TrainingLength::Epochs(epochs.unwrap_or(3.0)),
        }
    }

    pub fn micro_batch_size(&self) -> u32 {
        self.micro_batch_size.unwrap_or(self.global_batch_size)
    }

    /// Micro-batches of a full step.
    pub fn micro_batches(&self) -> u32 {
        self.global_batch_size / self.micro_batch_size()
    }

    /// The learning-rate schedule of a training of `total_steps` steps.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        let SchedulerKwargs { lr_end, power } = self.lr_scheduler_kwargs.unwrap_or_default();
        Schedule {
            kind: self.lr_scheduler_type,
            learning_rate: self.learning_rate,
            warmup_steps: self.warmup_steps,
            total_steps,
            lr_end,
            power,
        }
    }

    pub fn hyperparameters(&self) -> Hyperparameters {
        Hyperparameters {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
        }
    }
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

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

fn check(key: &'static str, holds: bool, value: impl std::fmt::Display, wanted: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::config(key, format!("is {value}, must be {wanted}")))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn training(value: Value) -> TrainingConfig {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_interface_example_is_understood() {
        let config = training(json!({
            "max_steps": 1000, "global_batch_size": 64, "micro_batch_size": 8, "learning_rate": 1e-3,
            "lr_scheduler_type": "linear", "warmup_steps": 50, "optimizer": "adamw", "weight_decay": 0.0,
            "max_grad_norm": 1.0, "precision": "bf16", "gradient_checkpointing": false,
            "label_smoothing_factor": 0.0, "seed": 42, "logging_steps": 1, "eval_steps": 200,
            "save_steps": 200, "save_total_limit": 3,
        }));
        config.validate().unwrap();
        assert_eq!(config.micro_batches(), 8);
        assert_eq!(config.length(), TrainingLength::Steps(1000));
        assert_eq!(config.schedule(1000).learning_rate_at(50), 1e-3);
        let again: TrainingConfig = serde_json::from_value(serde_json::to_value(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        for name in ["adamw", "adamw_scaled", "adafactor"] {
            training(json!({ "optimizer": name })).validate().unwrap();
        }
        for name in ["linear", "constant", "constant_with_warmup", "cosine", "inverse_sqrt", "polynomial"] {
            training(json!({ "lr_scheduler_type": name })).validate().unwrap();
        }
    }

    #[test]
    fn defaults_are_valid() {
        let config = training(json!({}));
        config.validate().unwrap();
        assert_eq!(config.length(), TrainingLength::Epochs(3.0));
        assert_eq!(config.micro_batch_size(), config.global_batch_size);
        EvaluationConfig::default().validate().unwrap();
    }

    #[test]
    fn every_bad_value_names_its_key() {
        for (bad, key) in [
            (json!({ "max_steps": 0 }), "training.max_steps"),
            (json!({ "max_steps": 1, "num_train_epochs": 1.0 }), "training.max_steps"),
            (json!({ "num_train_epochs": 0.0 }), "training.num_train_epochs"),
            (json!({ "global_batch_size": 0 }), "training.global_batch_size"),
            (json!({ "micro_batch_size": 0 }), "training.micro_batch_size"),
            (json!({ "global_batch_size": 8, "micro_batch_size": 3 }), "training.micro_batch_size"),
            (json!({ "micro_batch_size": 16 }), "training.micro_batch_size"),
            (json!({ "learning_rate": 0.0 }), "training.learning_rate"),
            (json!({ "learning_rate": -1e-3 }), "training.learning_rate"),
            (json!({ "adam_beta1": 1.0 }), "training.adam_beta1"),
            (json!({ "adam_beta2": -0.1 }), "training.adam_beta2"),
            (json!({ "adam_epsilon": 0.0 }), "training.adam_epsilon"),
            (json!({ "weight_decay": -1.0 }), "training.weight_decay"),
            (json!({ "max_grad_norm": -1.0 }), "training.max_grad_norm"),
            (json!({ "label_smoothing_factor": 1.0 }), "training.label_smoothing_factor"),
            (json!({ "logging_steps": 0 }), "training.logging_steps"),
            (json!({ "eval_steps": 0 }), "training.eval_steps"),
            (json!({ "save_steps": 0 }), "training.save_steps"),
            (json!({ "save_total_limit": 0 }), "training.save_total_limit"),
            (json!({ "early_stopping_patience": 0 }), "training.early_stopping_patience"),
            (json!({ "early_stopping_threshold": 0.1 }), "training.early_stopping_threshold"),
            (
                json!({ "early_stopping_patience": 1, "early_stopping_threshold": -0.1 }),
                "training.early_stopping_threshold",
            ),
            (json!({ "metric_for_best_model": "loss" }), "training.metric_for_best_model"),
            (
                json!({ "metric_for_best_model": "blue", "load_best_model_at_end": true }),
                "training.metric_for_best_model",
            ),
            (json!({ "greater_is_better": true }), "training.greater_is_better"),
            (json!({ "max_steps": 5, "warmup_steps": 6 }), "training.warmup_steps"),
            (json!({ "lr_scheduler_type": "constant", "warmup_steps": 6 }), "training.warmup_steps"),
            (json!({ "lr_scheduler_kwargs": {} }), "training.lr_scheduler_kwargs"),
            (
                json!({ "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": { "lr_end": 1.0 } }),
                "training.lr_scheduler_kwargs.lr_end",
            ),
            (
                json!({ "lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": { "power": 0.0 } }),
                "training.lr_scheduler_kwargs.power",
            ),
        ] {
            let error = training(bad.clone()).validate().expect_err(&bad.to_string());
            assert!(error.is_user_error());
            assert!(error.to_string().starts_with(&format!("{key}: ")), "{bad}: {error}");
        }
        for (bad, key) in [
            (json!({ "max_new_tokens": 0 }), "evaluation.max_new_tokens"),
            (json!({ "batch_size": 0 }), "evaluation.batch_size"),
            (json!({ "max_examples": 0 }), "evaluation.max_examples"),
            (json!({ "num_beams": 0 }), "evaluation.num_beams"),
            (json!({ "num_beams": 4, "do_sample": true }), "evaluation.do_sample"),
            (json!({ "top_p": 2.0 }), "evaluation.top_p"),
        ] {
            let config: EvaluationConfig = serde_json::from_value(bad).unwrap();
            assert!(config.validate().unwrap_err().to_string().starts_with(key));
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        for bad in [json!({ "learning_rat": 1.0 }), json!({ "optimizer": "sgd" })] {
            assert!(serde_json::from_value::<TrainingConfig>(bad).is_err());
        }
        assert!(serde_json::from_value::<EvaluationConfig>(json!({ "metrics": ["blue"] })).is_err());
        assert!(serde_json::from_value::<ModelSection>(json!({ "pretrain": "x" })).is_err());
    }

    #[test]
    fn a_model_is_pretrained_or_described() {
        let model = |value| serde_json::from_value::<ModelSection>(value).unwrap();
        for good in [
            json!({ "pretrained": "google/t5-v1_1-small" }),
            json!({ "architecture": {}, "tokenizer": "byt5", "dropout_rate": 0.0 }),
        ] {
            model(good).validate().unwrap();
        }
        for (bad, key) in [
            (json!({}), "model:"),
            (json!({ "pretrained": "x", "architecture": {} }), "model:"),
            (json!({ "architecture": {} }), "model.tokenizer:"),
            (json!({ "pretrained": "x", "dropout_rate": 1.0 }), "model.dropout_rate:"),
        ] {
            assert!(model(bad).validate().unwrap_err().to_string().starts_with(key));
        }
    }
}

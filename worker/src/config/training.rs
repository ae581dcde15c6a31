//! `[training]`: the steps, their batches and the optimizer.

use quintet_data::TrainingLength;
use serde::{Deserialize, Serialize};

use super::{Precision, check};
use crate::optimizer::{Hyperparameters, OptimizerKind};
use crate::schedule::{Schedule, SchedulerType};
use crate::{DeviceChoice, Error, Result};

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

//! The sections of the job file that say what a worker does, with Hugging Face's names and
//! defaults. Every range is checked by `validate`, before anything is computed.

mod evaluation;
mod lora;
mod model;
#[cfg(test)]
mod tests;
mod training;

use quintet_kernels::DType;
use serde::{Deserialize, Serialize};

pub use evaluation::EvaluationConfig;
pub use lora::LoraConfig;
pub use model::{ModelSection, ModelTask};
pub use training::{SchedulerKwargs, TrainingConfig};

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

fn check(key: &'static str, holds: bool, value: impl std::fmt::Display, wanted: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::config(key, format!("is {value}, must be {wanted}")))
}

//! Everything a rank does: the step loop, the replica and its optimizer, collectives, evaluation, checkpoints.
//!
//! Deliberately absent: any decision about who computes what or when a step counts (the coordinator's), anything printed,
//! the environment.

pub mod access;
pub mod adapter;
pub mod checkpoint;
pub mod classify;
pub mod collective;
pub mod config;
pub mod device;
pub mod error;
pub mod evaluation;
pub mod fetch;
pub mod gradient;
pub mod healing;
pub mod memory;
pub mod metrics;
pub mod optimizer;
pub mod outbox;
pub mod output;
pub mod rank;
pub mod remote;
pub mod replica;
pub mod saver;
pub mod scaler;
pub mod schedule;
mod selection;
pub mod session;
pub mod shards;
pub mod task;
pub mod toxicity;
mod transfer;

pub use config::{EvaluationConfig, LoraConfig, ModelSection, ModelTask, Precision, TrainingConfig};
pub use device::DeviceChoice;
pub use error::{Error, Result};
pub use metrics::Metric;
pub use task::Task;

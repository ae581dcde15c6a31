//! Everything a rank does: collectives, optimizers, schedules, checkpoints, metrics.

pub mod checkpoint;
pub mod collective;
pub mod config;
pub mod error;
pub mod metrics;
pub mod optimizer;
pub mod schedule;

pub use error::{Error, Result};

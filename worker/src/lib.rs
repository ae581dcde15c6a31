//! Everything a rank does: collectives, optimizers, schedules, checkpoints, metrics.

pub mod collective;
pub mod error;

pub use error::{Error, Result};

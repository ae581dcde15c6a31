//! The control plane of a run: which workers take part, which micro-batches each computes, when a
//! step is committed, and what the run leaves on disk.
//!
//! - [`state`]: the state machine, pure; everything that is decided is decided there.
//! - [`server`]: its shell, the gRPC server that workers connect to.
//! - [`files`]: the ledger and the metrics file; [`journal`]: what a coordinator that comes back goes on from.
//! - [`launch`]: worker processes, here and elsewhere.
//! - [`admission`], [`secret`]: what tells a run's workers from strangers; `gate` is the door.
//! - [`config`]: the `[cluster]` table of a job.
//!
//! Deliberately absent: tensors, devices, the model, the terminal, the environment.

pub mod admission;
pub mod config;
mod error;
pub mod files;
mod gate;
pub mod journal;
pub mod launch;
mod receive;
pub mod secret;
pub mod server;
pub mod share;
pub mod state;

pub use error::{Error, Result};

/// Exit codes of a run, as its users rely on them.
pub mod exit_code {
    /// Everything asked for was done.
    pub const DONE: u32 = 0;
    /// Something broke.
    pub const FAILURE: u32 = 1;
    /// Bad input or configuration: never worth a retry.
    pub const BAD_INPUT: u32 = 2;
    /// Too few workers are left.
    pub const TOO_FEW_WORKERS: u32 = 69;
    /// A numeric guard stopped the run.
    pub const NUMERIC_GUARD: u32 = 70;
    /// Preempted, saved, resumable.
    pub const PREEMPTED: u32 = 75;
}

//! Where the workers of a run come from. Each engine is a pure rendering of a plan to command lines or manifests,
//! which `--dry-run` shows; what runs command lines is [`LocalWorkers`] for workers on this machine, [`remote`] for all others.
//!
//! - [`environment`]: where a process stands, from the variables of schedulers and of `torchrun`.
//! - [`hosts`]: host files and lists.
//! - [`invitation`]: what a worker needs to join.
//! - [`ssh`], [`slurm`], [`kubernetes`]: renderings.

pub mod address;
pub mod command;
pub mod environment;
pub mod hosts;
pub mod invitation;
pub mod kubernetes;
mod local;
pub mod remote;
pub mod slurm;
pub mod ssh;

pub use local::{Death, LocalWorkers, Ticket};

//! The integration tests, one binary: layers against Hugging Face's numbers, then real processes.
#![expect(clippy::unwrap_used, reason = "all of this is tests, the functions beside them too")]
#![expect(clippy::print_stderr, reason = "a check that cannot be made here says so, and others what they measured")]

mod adapters;
mod bad_input;
mod bench;
mod chaos;
mod classification;
mod classifier_adapters;
mod classifier_uses;
mod data;
mod devices;
mod diagnostics;
mod docs;
mod elsewhere;
mod generation;
mod gpu;
mod harness;
mod hosts;
mod hub;
mod import;
mod invariance;
mod jobs;
mod json;
mod launch;
mod model_files;
mod nccl;
mod network;
mod parity;
mod random;
mod recipes;
mod recovery;
mod security;
mod selection;
mod sharding;
mod structure;

//! The integration tests, one binary: layers against Hugging Face's numbers, then real processes.

mod diagnostics;
mod harness;
mod invariance;
mod jobs;
mod model_files;
mod parity;
mod recovery;

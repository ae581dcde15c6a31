//! The integration tests, one binary: layers against Hugging Face's numbers, then real processes.

mod bad_input;
mod harness;
mod invariance;
mod jobs;
mod json;
mod recovery;

//! The integration tests, one binary: layers against Hugging Face's numbers, then real processes.

mod docs;
mod harness;
mod invariance;
mod jobs;
mod recovery;
mod structure;

//! The integration tests, one binary: layers against Hugging Face's numbers, then real processes.

mod harness;
mod model_files;
mod parity;

//! What tests share: where the reference data is, and how to run the program.

use std::path::{Path, PathBuf};

/// The models with stored numbers of Hugging Face's.
pub(crate) fn references() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/references")
}

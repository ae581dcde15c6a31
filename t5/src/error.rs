//! What can be wrong with a model's files, and what the device can refuse.

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    #[error("{}: tensor {tensor}: {message}", path.display())]
    Tensor { path: PathBuf, tensor: String, message: String },
    #[error("model configuration: {0}")]
    Config(String),
    /// An option of generation is out of its range, or at odds with another.
    #[error("generation: {key}: {problem}")]
    Generation { key: &'static str, problem: String },
    #[error("the model's logits are not finite; its weights are broken, or too large for this precision")]
    NotFinite,
    /// Writing failed: the disk, not the user.
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Device(#[from] quintet_kernels::Error),
}

impl Error {
    /// Whether the input is at fault (exit code 2), not the machine.
    pub fn is_user_error(&self) -> bool {
        matches!(self, Error::File { .. } | Error::Tensor { .. } | Error::Config(_) | Error::Generation { .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;

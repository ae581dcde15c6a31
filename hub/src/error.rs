//! What can go wrong, each in one line that says what to do.

use std::io;
use std::path::{Path, PathBuf};

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "{repository}: is not in the cache {}, and the hub may not be asked because HF_HUB_OFFLINE is set; download it once without",
        cache.display()
    )]
    Offline { repository: String, cache: PathBuf },
    #[error(
        "{repository}: cannot reach {endpoint}: {problem}; check the connection and HF_ENDPOINT, or name a directory"
    )]
    Unreachable { repository: String, endpoint: String, problem: String },
    #[error(
        "{repository}: no such repository at {endpoint}, or a private one: check its name, or set HF_TOKEN to a token that may read it"
    )]
    Unknown { repository: String, endpoint: String },
    #[error("{repository}: no such revision at {endpoint}")]
    UnknownRevision { repository: String, endpoint: String },
    #[error("{repository}: access is restricted; ask for it at {endpoint}/{name}, and set HF_TOKEN to your token", name = repository.split('@').next().unwrap_or_default())]
    Forbidden { repository: String, endpoint: String },
    #[error(
        "{repository}: {endpoint} answered with status {status} for {file}; try again later: what is downloaded stays"
    )]
    Status { repository: String, endpoint: String, file: String, status: u16 },
    #[error("{repository}: {endpoint} gave no sensible answer for {file}: {problem}")]
    Answer { repository: String, endpoint: String, file: String, problem: String },
    #[error(
        "{repository}: the connection broke at byte {bytes} of {total_bytes} of {file}: {problem}; run the same again to go on from there"
    )]
    Interrupted { repository: String, file: String, bytes: u64, total_bytes: u64, problem: String },
    #[error("{repository}: {file} as downloaded is damaged: {problem}; it was removed, try again")]
    Mismatch { repository: String, file: String, problem: String },
    #[error("{repository}: has no config.json, so it holds no model")]
    NoModel { repository: String },
    #[error("{repository}: has neither model.safetensors nor its index")]
    NoWeights { repository: String },
    #[error(
        "{repository}: has only pytorch_model.bin, a pickle file, which may run any code and is not read; convert it once, in Python: \
         AutoModelForSeq2SeqLM.from_pretrained(\"{repository}\").save_pretrained(\"DIR\"), and name DIR"
    )]
    OnlyPickle { repository: String },
    #[error("{file}: {problem}; remove it to download it again")]
    Damaged { file: String, problem: String },
    #[error("cannot {action} {}: {source}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
}

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::File { action, path, source }
    }

    /// Whether the same again would fail again: not what breaks on the way or on this machine. A hub that cannot be reached
    /// counts, because then the name is most likely meant to be a directory's.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::File { .. } | Self::Interrupted { .. } | Self::Mismatch { .. } => false,
            Self::Status { status, .. } => *status < 500,
            _ => true,
        }
    }
}

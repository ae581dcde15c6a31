//! What a machine can refuse: memory, a driver, a library, a compiler.

use std::path::PathBuf;

/// A failure of the device, never a mistake of the caller (those panic).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "out of memory on {device}: {requested_bytes} bytes wanted, {live_bytes} in use; lower micro_batch_size or turn on gradient_checkpointing"
    )]
    OutOfMemory { device: &'static str, requested_bytes: usize, live_bytes: usize },
    #[error("device emulated: no C++ compiler `{compiler}`: {reason}; install g++ (apt install g++), or set CXX")]
    NoCompiler { compiler: String, reason: String },
    #[error("the kernels of {module} do not compile:\n{log}")]
    Compile { module: String, log: String },
    #[error("cannot load the kernels of {module}: {reason}")]
    Load { module: String, reason: String },
    #[error("kernel {kernel} failed: {reason}")]
    Kernel { kernel: &'static str, reason: String },
    #[error("cannot keep compiled kernels in {}: {source}", path.display())]
    Cache { path: PathBuf, source: std::io::Error },
    #[error("{title} is missing: {files} {problem}; {remedy}")]
    MissingLibrary { title: &'static str, files: String, problem: String, remedy: String },
    #[error("{path}: {problem}")]
    UnfitLibrary { path: String, problem: String },
    #[error("no GPU that can be used: {reason}")]
    NoGpu { reason: String },
    #[error(
        "the NVIDIA driver is too old: it runs CUDA {found}, and at least {needed} is needed; update it (https://www.nvidia.com/drivers)"
    )]
    DriverTooOld { found: String, needed: String },
    #[error("CUDA: {action} failed: {reason}")]
    Cuda { action: String, reason: String },
    #[error("attention on a GPU takes heads of at most {most} numbers, and these have {head_size}; use --device cpu")]
    HeadSize { head_size: usize, most: usize },
    #[error("attention on a GPU tells apart distances up to {most}, and this bias up to {reach}; use --device cpu")]
    BiasReach { reach: usize, most: usize },
    #[error("a tensor of {rows} x {cols} is more than the 4294967295 elements of a GPU's tensors; use --device cpu")]
    TooManyElements { rows: usize, cols: usize },
    #[error("NCCL: {action} failed: {reason}")]
    Nccl { action: &'static str, reason: String },
    /// This GPU is well, and can go on in another communicator.
    #[error("NCCL: {problem}")]
    PeersLost { problem: String },
    /// What was waited for was declared void.
    #[error("NCCL: interrupted")]
    Void,
}

impl Error {
    /// True where the machine has to be changed, or another device chosen: trying again is no use. (Exit code 2.)
    pub fn is_user_error(&self) -> bool {
        matches!(
            self,
            Error::NoCompiler { .. }
                | Error::MissingLibrary { .. }
                | Error::UnfitLibrary { .. }
                | Error::NoGpu { .. }
                | Error::DriverTooOld { .. }
                | Error::HeadSize { .. }
                | Error::BiasReach { .. }
                | Error::TooManyElements { .. }
        )
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// For what writes a tensor to a file.
impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::other(error)
    }
}

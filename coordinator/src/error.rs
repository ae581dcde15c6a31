//! What can go wrong in the control plane.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Result of the control plane.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the `[cluster]` table makes no sense.
    #[error("cluster.{key}: {problem}")]
    Config {
        /// The key in the table.
        key: &'static str,
        /// What is wrong, and what is allowed.
        problem: String,
    },
    /// A fresh run would overwrite another.
    #[error(
        "{} holds a run already: continue it with --resume, or choose another output_dir",
        directory.display()
    )]
    RunExists {
        /// The run's output directory.
        directory: PathBuf,
    },
    /// The ledger or metrics file of a run to resume is not what we wrote.
    #[error("{}, line {line}: {problem}; the run cannot be resumed", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// The operating system refused something with a file.
    #[error("cannot {action} {}: {source}{}", path.display(), hint(source))]
    File {
        /// A verb: "append to".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A worker process could not be started.
    #[error("cannot start {}: {source}", executable.display())]
    Spawn {
        /// What was to be run.
        executable: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A command of an engine failed.
    #[error("{command} failed: {problem}")]
    Command {
        /// As a shell would read it.
        command: String,
        /// What it said, or how it ended.
        problem: String,
    },
    /// A list of hosts makes no sense.
    #[error("{place}: {problem}")]
    Hosts {
        /// The flag, or the file and line.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// An environment variable makes no sense.
    #[error("the variable {name} is {value:?}, which is no number; unset it or correct it")]
    Variable {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// The file by which a worker joins is not there, or is something else.
    #[error("{}: nobody has invited this worker: {problem}", path.display())]
    NoInvitation {
        /// The file.
        path: PathBuf,
        /// What was found.
        problem: String,
    },
    /// An object cannot be written as YAML: a bug.
    #[error("cannot write the manifest: {0}")]
    Yaml(String),
    /// The operating system has no random numbers.
    #[error("the system gives no random numbers for the run's secrets: {0}")]
    Random(String),
    /// Plain text would leave the machine.
    #[error(
        "listening on {0} would send the run in plain text over the network: \
         listen on 127.0.0.1, or accept the risk with --insecure-plaintext"
    )]
    NotLoopback(SocketAddr),
    /// The run's identities cannot be made or kept.
    #[error(transparent)]
    Identity(#[from] quintet_identity::Error),
    /// The listener is unusable.
    #[error("the coordinator's listener failed: {0}")]
    Listener(io::Error),
    /// The gRPC server broke.
    #[error("the coordinator's server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// The gRPC server ended before the run.
    #[error("the coordinator's server ended before the run")]
    ServerEnded,
}

impl Error {
    /// Whether input or configuration is at fault: never worth a retry.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Config { .. }
            | Self::RunExists { .. }
            | Self::Damaged { .. }
            | Self::NotLoopback(_)
            | Self::Hosts { .. }
            | Self::Variable { .. } => true,
            Self::Identity(error) => error.is_user_error(),
            _ => false,
        }
    }

    /// Whether somebody has to make room for the same to succeed.
    pub fn is_storage_full(&self) -> bool {
        matches!(self, Self::File { source, .. } if is_full(source))
    }

    /// For `map_err` on operations with a file.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File { action, path: path.to_owned(), source }
    }
}

fn is_full(source: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

fn hint(source: &io::Error) -> &'static str {
    if is_full(source) { "; make room, then go on with --resume" } else { "" }
}

//! What can go wrong in a worker.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value of the job file is out of range or contradicts another.
    #[error("{key}: {problem}")]
    Config { key: String, problem: String },

    /// A checkpoint is damaged, or belongs to something else.
    #[error("checkpoint file {}: {problem}", path.display())]
    Checkpoint { path: PathBuf, problem: String },

    /// The operating system refused a file operation (no such file, no permission, disk full).
    #[error("cannot {action} {}: {source}{}", path.display(), hint(source))]
    File { action: &'static str, path: PathBuf, source: io::Error },

    #[error("cannot listen on {address}: {source}; choose another address")]
    Listen { address: SocketAddr, source: io::Error },

    /// The mesh of generation `generation` did not come together in time. `unreachable` are the ranks whose machines do
    /// not answer, or refuse.
    #[error(
        "rank {rank} at {address} did not connect within {seconds:.1} s (generation {generation}); is its port reachable?"
    )]
    Rendezvous { rank: u32, address: SocketAddr, generation: u64, seconds: f64, unreachable: Vec<u32> },

    /// The connection ended: the rank died, or gave up because another one did.
    #[error("lost the connection to rank {rank}: {source}")]
    PeerLost { rank: u32, source: io::Error },

    /// The rank is connected but has not sent or accepted a byte for too long.
    #[error("rank {rank} was silent for {seconds:.1} s")]
    PeerSilent { rank: u32, seconds: f64 },

    /// A rank sent what the protocol does not allow here: a bug, or mixed versions.
    #[error("rank {rank} broke the collective protocol: {problem}")]
    Protocol { rank: u32, problem: String },

    /// The state that another rank handed over is not what it should be.
    #[error("rank {rank} could not hand over the state of the run: {problem}")]
    Healing { rank: u32, problem: String },

    /// The coordinator does not give what this machine lacks, or gives something else.
    #[error("cannot {action} through the coordinator: {problem}")]
    Remote { action: String, problem: String },

    /// No rank has a part of the state of the run.
    #[error("the state of the run is lost: {problem}")]
    StateLost { problem: String },

    #[error(transparent)]
    Data(#[from] quintet_data::Error),

    #[error(transparent)]
    Model(#[from] quintet_t5::Error),

    #[error(transparent)]
    Device(#[from] quintet_kernels::Error),

    #[error(transparent)]
    Session(#[from] crate::session::SessionError),

    /// Membership changed; the step in flight is void and a new generation begins.
    #[error("the collective was interrupted: the generation has changed")]
    Interrupted,
}

impl Error {
    /// True where the user's input must change (exit code 2); false for failures (exit code 1).
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Config { .. } | Self::Checkpoint { .. } => true,
            Self::Data(error) => error.is_user_error(),
            Self::Model(error) => error.is_user_error(),
            Self::Device(error) => error.is_user_error(),
            Self::Session(error) => error.is_user_error(),
            _ => false,
        }
    }

    /// Whether the work failed for want of another rank: this one is well, and can go on in a new generation.
    pub fn is_peer_failure(&self) -> bool {
        use Error::{Device, Healing, Interrupted, PeerLost, PeerSilent, Rendezvous};
        use quintet_kernels::Error::{PeersLost, Void};
        matches!(
            self,
            Rendezvous { .. }
                | PeerLost { .. }
                | PeerSilent { .. }
                | Healing { .. }
                | Interrupted
                | Device(PeersLost { .. } | Void)
        )
    }

    /// The ranks that do not answer, where that is the reason.
    pub fn unreachable(&self) -> &[u32] {
        match self {
            Self::Rendezvous { unreachable, .. } => unreachable,
            _ => &[],
        }
    }

    /// For `map_err` on a file operation: `File::open(path).map_err(Error::file("open", path))`.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    /// For `map_err` on a configuration check.
    pub(crate) fn config(key: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Config { key: key.into(), problem: problem.into() }
    }
}

fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            "; make room, then go on with --resume"
        }
        _ => "",
    }
}

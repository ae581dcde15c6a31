//! What can go wrong with identities.

use std::io;
use std::path::{Path, PathBuf};

/// Result of identities.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused something with a file.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// A verb: "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The authority's files are not what we wrote.
    #[error("{}: {problem}; the run's identity is lost, remove its directory to make another", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The operating system has no random numbers.
    #[error("the system gives no random numbers for the run's identities")]
    Random,
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A key or certificate does not serve for TLS.
    #[error("cannot set up TLS: {0}")]
    Tls(String),
    /// The authority's certificate is not the one that the token names.
    #[error("the certificate's authority is not the one that the join token names")]
    WrongAuthority,
}

impl Error {
    /// Whether input or configuration is at fault: never worth a retry.
    pub fn is_user_error(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn tls(error: impl std::fmt::Display) -> Self {
        Self::Tls(error.to_string())
    }
}

/// Why a token or certificate admits nobody.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// No token.
    #[error("this is no join token: it should be one line that begins with {PREFIX}", PREFIX = crate::token::PREFIX)]
    Unreadable,
    /// Not made by this run's authority.
    #[error("unknown join token: it belongs to another run, or was changed")]
    Unknown,
    /// Too late.
    #[error("the join token expired {seconds} s ago; `quintet tokens` makes another")]
    Expired {
        /// Since when.
        seconds: u64,
    },
    /// Somebody else was admitted by it.
    #[error("the join token was used before; each admits one worker, `quintet tokens` makes another")]
    Spent,
    /// The key to certify is no point of the curve.
    #[error("the public key to certify is malformed")]
    Key,
}

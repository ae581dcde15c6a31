use std::path::Path;

use crate::filter::FilterError;
use crate::template::TemplateError;

/// What can go wrong with data. Every message is one line that says where and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting of the job file is missing, out of range, or contradicts another one.
    #[error("{key}: {message}")]
    Setting {
        /// The key as in the job file, e.g. `data.train`.
        key: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// A template of the job file does not parse.
    #[error("{key}: {source}")]
    Template {
        /// The key as in the job file, e.g. `data.input`.
        key: &'static str,
        /// What is wrong with it.
        source: TemplateError,
    },
    /// A condition of the job file does not parse.
    #[error("data.where: {0}")]
    Filter(#[from] FilterError),
    /// A source as a whole cannot be used: missing, empty, of an unknown kind.
    #[error("{origin}: {message}")]
    Source {
        /// The file, or `builtin:NAME`.
        origin: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// One record of a source cannot be used.
    #[error("{origin}:{line}: {message}")]
    Record {
        /// The file, or `builtin:NAME`.
        origin: String,
        /// The line on which the record starts, from 1.
        line: u64,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tokenizer's files cannot be used, or a tokenizer cannot be trained as asked.
    #[error("tokenizer {tokenizer}: {message}")]
    Tokenizer {
        /// The tokenizer as the user named it.
        tokenizer: String,
        /// What is wrong and what to do.
        message: String,
    },
    /// A tokenizer that loaded failed on a text.
    #[error("tokenizing {text:?} failed: {message}")]
    Tokenize {
        /// The start of the text.
        text: String,
        /// What the tokenizer says.
        message: String,
    },
    /// The machine that has the data does not hand it over.
    #[error("the coordinator {problem}")]
    Origin {
        /// What it did.
        problem: String,
        /// It may do so later: it could not be reached.
        is_lost: bool,
    },
    /// The operating system refused a read or a write.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the user's input is at fault, so that a retry without a change is pointless (exit code 2), rather than
    /// the machine (exit code 1).
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Setting { .. }
            | Self::Template { .. }
            | Self::Filter(_)
            | Self::Source { .. }
            | Self::Record { .. }
            | Self::Tokenizer { .. } => true,
            Self::Tokenize { .. } | Self::Origin { .. } | Self::Io { .. } => false,
        }
    }

    pub(crate) fn setting(key: &'static str, message: impl Into<String>) -> Self {
        Self::Setting { key, message: message.into() }
    }

    pub(crate) fn source(origin: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Source { origin: origin.into(), message: message.into() }
    }

    pub(crate) fn tokenizer(tokenizer: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Tokenizer { tokenizer: tokenizer.into(), message: message.into() }
    }

    /// What comes from there is of no use.
    pub(crate) fn origin(problem: impl Into<String>) -> Self {
        Self::Origin { problem: problem.into(), is_lost: false }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }
}

//! Files that are compressed as a whole.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// By what a file is compressed, as its ending says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// Long reads, because a disk or a network answers few of them sooner than many.
const BUFFER_BYTES: usize = 1 << 18;

impl Compression {
    /// The path without the ending that says so.
    pub(super) fn of(path: &Path) -> (PathBuf, Self) {
        let compression = match path.extension().map(|ending| ending.to_ascii_lowercase()) {
            Some(ending) if ending == "gz" || ending == "gzip" => Self::Gzip,
            Some(ending) if ending == "zst" || ending == "zstd" => Self::Zstd,
            _ => return (path.to_owned(), Self::None),
        };
        (path.with_extension(""), compression)
    }

    pub(super) fn name(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Gzip => Some("gzip"),
            Self::Zstd => Some("zstd"),
        }
    }

    /// Opens a file to read what is in it. Files made of several compressed ones, one behind the other, are read to the
    /// last.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn open(self, path: &Path) -> Result<Box<dyn BufRead>> {
        let failed = |error| Error::io(path, error);
        let file = BufReader::with_capacity(BUFFER_BYTES, File::open(path).map_err(failed)?);
        Ok(match self {
            Self::None => Box::new(file),
            Self::Gzip => Box::new(BufReader::with_capacity(BUFFER_BYTES, flate2::bufread::MultiGzDecoder::new(file))),
            Self::Zstd => {
                let decoder = zstd::Decoder::with_buffer(file).map_err(failed)?;
                Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
            }
        })
    }
}

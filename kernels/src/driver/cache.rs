//! Compiled kernels on disk, by a hash of everything that went into them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::{Error, Result};

static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();

/// Where compiled kernels are kept from run to run. It must belong to this user alone, since what lies there is executed.
/// To be called before the first device is made; otherwise they are kept in the system's temporary directory.
pub fn set_cache_directory(directory: PathBuf) {
    let _ = DIRECTORY.set(directory);
}

/// The file of `extension` made from `inputs` by `make`, which writes it to the path that it is given. It is made once:
/// by this process, by an earlier one, or by another at the same time, whoever is first.
pub(crate) fn artifact(inputs: &[&[u8]], extension: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let directory = directory()?;
    let mut hasher = blake3::Hasher::new();
    for input in inputs {
        hasher.update(&(input.len() as u64).to_le_bytes()).update(input);
    }
    let hash = &hasher.finalize().to_hex()[..32];
    let path = directory.join(format!("{hash}.{extension}"));
    if !path.exists() {
        let unfinished = directory.join(format!("{hash}.{}.tmp", std::process::id()));
        make(&unfinished)?;
        fs::rename(&unfinished, &path).map_err(|source| Error::Cache { path: path.clone(), source })?;
    }
    Ok(path)
}

fn directory() -> Result<&'static Path> {
    static CHECKED: OnceLock<PathBuf> = OnceLock::new();
    if let Some(directory) = CHECKED.get() {
        return Ok(directory);
    }
    let directory = DIRECTORY.get().cloned().unwrap_or_else(temporary_directory);
    make_private(&directory).map_err(|source| Error::Cache { path: directory.clone(), source })?;
    Ok(CHECKED.get_or_init(|| directory))
}

fn temporary_directory() -> PathBuf {
    std::env::temp_dir().join("quintet-kernels")
}

/// Makes the directory, and refuses one of another user, who could have put code of his there.
#[cfg(unix)]
fn make_private(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let probe = directory.join(format!("{}.probe", std::process::id()));
    let ours = fs::File::create(&probe)?.metadata()?.uid();
    let found = fs::metadata(directory)?;
    fs::remove_file(&probe)?;
    if found.uid() != ours || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("the directory belongs to another user, or others may write to it"));
    }
    Ok(())
}

#[cfg(not(unix))]
fn make_private(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)
}

//! Artifacts of the coordinator's machine, fetched once for all workers of this one.
//!
//! ```text
//! CACHE/model-<digest>.lock       held by whoever fetches or removes
//! CACHE/model-<digest>.part/      what has come
//! CACHE/model-<digest>/           all of it, verified
//! ```
//! A directory is named by the digest of its files' names, lengths and digests, so that what is there is what is wanted.

#[cfg(test)]
mod tests;

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use quintet_proto::{HASH_BYTES, is_file_name, v1};

use crate::remote::Remote;
use crate::{Error, Result};

/// More files than any model has.
const FILES_MAX: usize = 1024;
/// Larger than any model: 64 TiB.
const BYTES_MAX: u64 = 64 << 40;

/// An artifact that is here.
#[derive(Debug)]
pub struct Fetched {
    pub directory: PathBuf,
    /// Bytes that came over the network for it: 0 where it was here already.
    pub bytes: u64,
    /// The directory, locked against removal.
    used: File,
}

impl Fetched {
    /// Removes it, unless another worker uses it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn remove(self) -> Result<()> {
        let _lock = lock(&self.directory)?;
        match self.used.try_lock() {
            Ok(()) => fs::remove_dir_all(&self.directory).map_err(Error::file("remove", &self.directory)),
            Err(_) => Ok(()),
        }
    }
}

/// Fetches an artifact into the folder of caches, unless it is there. Whoever else wants it waits.
///
/// # Errors
/// Those of [`Remote`]; [`Error::Remote`] where what comes is not what was listed; [`Error::File`].
pub fn fetch(remote: &Remote, artifact: &str, cache: &Path) -> Result<Fetched> {
    let files = remote.list(artifact)?;
    check(artifact, &files)?;
    fs::create_dir_all(cache).map_err(Error::file("create", cache))?;
    let directory = cache.join(format!("{}-{}", artifact.replace('/', "-"), &digest(&files).to_hex()[..32]));
    let _lock = lock(&directory)?;
    let bytes = match directory.is_dir() {
        true => 0,
        false => complete(remote, artifact, &files, &directory)?,
    };
    let used = File::open(&directory).map_err(Error::file("open", &directory))?;
    used.lock_shared().map_err(Error::file("lock", &directory))?;
    Ok(Fetched { directory, bytes, used })
}

/// For as long as the file is open, nobody else makes or removes the directory.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.with_extension("lock");
    let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::file("open", &path))?;
    file.lock().map_err(Error::file("lock", &path))?;
    Ok(file)
}

fn digest(files: &[v1::File]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(file.name.as_bytes()).update(b"\0").update(&file.bytes.to_le_bytes()).update(&file.digest);
    }
    hasher.finalize()
}

/// Refuses a list that leads out of its directory, or is no model's or checkpoint's.
fn check(artifact: &str, files: &[v1::File]) -> Result<()> {
    let problem = if files.is_empty() {
        "there are none".to_owned()
    } else if let Some(file) = files.iter().find(|file| !is_file_name(&file.name) || file.digest.len() != HASH_BYTES) {
        format!("{:?} is no file that could be kept here", file.name)
    } else if files.len() > FILES_MAX
        || files.iter().fold(0, |sum: u64, file| sum.saturating_add(file.bytes)) > BYTES_MAX
    {
        "they are too many or too large".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Remote { action: format!("fetch the files of {artifact}"), problem })
}

/// Fetches what is missing, and gives the directory its name when all of it is there.
fn complete(remote: &Remote, artifact: &str, files: &[v1::File], directory: &Path) -> Result<u64> {
    let part = directory.with_extension("part");
    fs::create_dir_all(&part).map_err(Error::file("create", &part))?;
    let mut bytes = 0;
    for file in files {
        bytes += fetch_file(remote, artifact, file, &part.join(&file.name))?;
    }
    File::open(&part).and_then(|part| part.sync_all()).map_err(Error::file("sync", &part))?;
    fs::rename(&part, directory).map_err(Error::file("rename", &part))?;
    Ok(bytes)
}

/// Goes on with what is there of a file, and verifies all of it.
fn fetch_file(remote: &Remote, artifact: &str, wanted: &v1::File, path: &Path) -> Result<u64> {
    let failed = || Error::file("write", path);
    let mut file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed())?;
    let mut hasher = blake3::Hasher::new();
    let mut there = file.metadata().map_err(failed())?.len();
    if there > wanted.bytes {
        file.set_len(0).map_err(failed())?;
        there = 0;
    }
    hasher.update_reader(&file).map_err(Error::file("read", path))?;
    file.seek(SeekFrom::Start(there)).map_err(failed())?;
    let mut length = there;
    if there < wanted.bytes {
        remote.read(artifact, &wanted.name, there, |data| {
            length += data.len() as u64;
            if length > wanted.bytes {
                return Err(other_content(artifact, wanted));
            }
            hasher.update(data);
            file.write_all(data).map_err(failed())
        })?;
    }
    if length != wanted.bytes || hasher.finalize().as_bytes() != wanted.digest.as_slice() {
        // The next attempt begins anew.
        file.set_len(0).map_err(failed())?;
        return Err(other_content(artifact, wanted));
    }
    file.sync_all().map_err(failed())?;
    Ok(length - there)
}

fn other_content(artifact: &str, wanted: &v1::File) -> Error {
    let problem = "what comes does not match its digest".to_owned();
    Error::Remote { action: format!("fetch {artifact}/{}", wanted.name), problem }
}

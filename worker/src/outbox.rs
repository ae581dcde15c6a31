//! Where a rank leaves what its run keeps: in the run's directory, or, on a machine that does not share it, in a folder of
//! its own, and from there, through the coordinator, in the run's directory all the same.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quintet_proto::v1;

use crate::checkpoint::{self, Loaded};
use crate::fetch;
use crate::remote::Remote;
use crate::{Error, Result};

/// Folders of workers under way, in the folder of caches.
const PREFIX: &str = "staging-";

/// A run's directory, as a rank sees it.
#[derive(Clone, Debug)]
pub struct Outbox {
    directory: PathBuf,
    through: Option<Arc<Through>>,
}

#[derive(Debug)]
struct Through {
    remote: Arc<Remote>,
    cache: PathBuf,
    _staging: Staging,
}

/// A folder that goes with its process, or is removed by the next one that comes.
#[derive(Debug)]
struct Staging {
    directory: PathBuf,
    /// Says that the process lives.
    _lock: File,
}

impl Staging {
    fn new(cache: &Path) -> Result<Self> {
        fs::create_dir_all(cache).map_err(Error::file("create", cache))?;
        remove_leftovers(cache)?;
        // The hasher's keys are the system's random numbers.
        let directory = cache.join(format!("{PREFIX}{:016x}", RandomState::new().build_hasher().finish()));
        fs::create_dir(&directory).map_err(Error::file("create", &directory))?;
        let lock = File::open(&directory).map_err(Error::file("open", &directory))?;
        lock.lock().map_err(Error::file("lock", &directory))?;
        Ok(Self { directory, _lock: lock })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The next process removes it otherwise.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Removes the folders of processes that were killed. One that has just been made and not been locked is not empty-handed
/// for long: it is left alone while nothing is in it.
fn remove_leftovers(cache: &Path) -> Result<()> {
    let entries = fs::read_dir(cache).map_err(Error::file("list", cache))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_staging = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        let is_empty = || fs::read_dir(&path).is_ok_and(|mut entries| entries.next().is_none());
        if is_staging && !is_empty() && File::open(&path).is_ok_and(|folder| folder.try_lock().is_ok()) {
            fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
    }
    Ok(())
}

impl Outbox {
    /// The run's directory itself.
    pub fn shared(output_dir: PathBuf) -> Self {
        Self { directory: output_dir, through: None }
    }

    /// The run's directory on the coordinator's machine; what is on its way lies in the folder of caches.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn through(remote: Arc<Remote>, cache: PathBuf) -> Result<Self> {
        let staging = Staging::new(&cache)?;
        let directory = staging.directory.clone();
        Ok(Self { directory, through: Some(Arc::new(Through { remote, cache, _staging: staging })) })
    }

    /// Where to write what is then published.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where to write checkpoints.
    pub fn checkpoints(&self) -> PathBuf {
        self.directory.join("checkpoints")
    }

    /// Puts a file or directory that was written into the run's directory, if it is not there already.
    ///
    /// # Errors
    /// [`Error::Remote`]; [`Error::Session`] where the coordinator does not come back; [`Error::File`].
    pub fn publish(&self, artifact: &str) -> Result<()> {
        self.through.as_ref().map_or(Ok(()), |through| through.publish(&self.directory, artifact, Vec::new()))
    }

    /// Publishes the checkpoint of a step, and removes all but `keep` of them, as [`checkpoint::prune`] does.
    ///
    /// # Errors
    /// As of [`Outbox::publish`].
    pub fn publish_checkpoint(&self, step: u64, keep: Option<usize>, best: Option<u64>) -> Result<()> {
        let Some(through) = &self.through else {
            return keep.map_or(Ok(()), |keep| checkpoint::prune(&self.checkpoints(), keep, best));
        };
        let name = checkpoint::name_of(step);
        let mut names: Vec<String> = through.remote.list("checkpoints")?.into_iter().map(|file| file.name).collect();
        names.push(name.clone());
        // Their numbers have leading zeros.
        names.sort_unstable_by_key(|name| (name.len(), name.clone()));
        names.dedup();
        let excess = keep.map_or_else(Vec::new, |keep| {
            let best = best.map(checkpoint::name_of).filter(|best| names.contains(best));
            checkpoint::excess(&names, keep, best.as_ref()).cloned().collect()
        });
        through.publish(&self.directory, &format!("checkpoints/{name}"), excess)
    }

    /// Hands the verified checkpoint of a step to `use_it`; where it is not on this machine, it is for so long.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], those of [`fetch::fetch`], and those of `use_it`.
    pub fn with_checkpoint<T>(&self, step: u64, use_it: impl FnOnce(Loaded) -> Result<T>) -> Result<T> {
        let Some(through) = &self.through else {
            return use_it(checkpoint::load(&checkpoint::path(&self.checkpoints(), step))?);
        };
        let artifact = format!("checkpoints/{}", checkpoint::name_of(step));
        let fetched = fetch::fetch(&through.remote, &artifact, &through.cache)?;
        let used = checkpoint::load(&fetched.directory).and_then(use_it);
        fetched.remove()?;
        used
    }
}

impl Through {
    fn publish(&self, directory: &Path, artifact: &str, removed: Vec<String>) -> Result<()> {
        let path = directory.join(artifact);
        if !path.exists() {
            return Ok(());
        }
        let paths = if path.is_dir() { files_of(&path)? } else { vec![path.clone()] };
        let files = paths.iter().map(|path| describe(path)).collect::<Result<_>>()?;
        self.remote.publish(artifact, files, &paths, removed)?;
        let is_removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        is_removed.map_err(Error::file("remove", &path))
    }
}

fn files_of(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect());
    let mut paths: Vec<PathBuf> = entries.map_err(Error::file("list", directory))?;
    paths.sort_unstable();
    Ok(paths)
}

fn describe(path: &Path) -> Result<v1::File> {
    let failed = || Error::file("read", path);
    let file = File::open(path).map_err(failed())?;
    let bytes = file.metadata().map_err(failed())?.len();
    let digest = blake3::Hasher::new().update_reader(file).map_err(failed())?.finalize();
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(v1::File { name, bytes, digest: digest.as_bytes().to_vec() })
}

//! Checkpoints: directories `step-00000200` that are complete by construction and verified
//! when read.
//!
//! A save writes beside (`.tmp-step-…`), syncs every file and the directory, then renames, so
//! that whenever the process or the machine stops, what carries the final name is whole.
//! `state.json` records length and BLAKE3 digest of the other files, and its own digest.

mod tensors;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::scaler::LossScaler;
use crate::{Error, Result};
pub use tensors::{NamedTensor, TensorFile};

const FORMAT_VERSION: u32 = 1;
const STATE_FILE: &str = "state.json";
const MODEL_FILE: &str = "model.safetensors";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const STEP_PREFIX: &str = "step-";
const TEMPORARY_PREFIX: &str = ".tmp-";

/// Where a training stands after a committed step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// Optimizer steps made.
    pub step: u64,
    /// The next example is number `position` of epoch `epoch`.
    pub epoch: u64,
    pub position: u64,
    pub seed: u64,
    /// Identifies the job: its data, model and the settings that must not change midway.
    pub job_fingerprint: String,
    /// BLAKE3 of the parameters' bytes, in hexadecimal.
    pub weights_digest: String,
    /// Of fp16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaler: Option<LossScaler>,
}

/// What a checkpoint holds. The tensors are borrowed and written as they are, without a copy of them all.
pub struct Snapshot<'a> {
    pub progress: Progress,
    pub model: &'a [NamedTensor<'a>],
    pub optimizer: &'a [NamedTensor<'a>],
}

/// A verified checkpoint.
#[derive(Debug)]
pub struct Loaded {
    pub path: PathBuf,
    pub progress: Progress,
    pub model: TensorFile,
    pub optimizer: TensorFile,
}

/// What [`latest`] found.
#[derive(Debug)]
pub struct Latest {
    pub checkpoint: Option<Loaded>,
    /// Newer checkpoints that are damaged, and how: worth a warning.
    pub skipped: Vec<Error>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    format_version: u32,
    progress: Progress,
    files: BTreeMap<String, FileRecord>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRecord {
    bytes: u64,
    blake3: String,
}

/// The content of `state.json`: the state, and the digest of its compact JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SealedState {
    state: State,
    blake3: String,
}

/// A new file that can be made durable.
trait Sink: Write {
    fn sync(&mut self) -> io::Result<()>;
}

impl Sink for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// How a save creates its files.
type Create<'a> = &'a dyn Fn(&Path) -> io::Result<Box<dyn Sink>>;

fn create_file(path: &Path) -> io::Result<Box<dyn Sink>> {
    Ok(Box::new(File::create_new(path)?))
}

pub(crate) fn name_of(step: u64) -> String {
    format!("{STEP_PREFIX}{step:08}")
}

/// Where the checkpoint of a step is, if there is one.
pub fn path(directory: &Path, step: u64) -> PathBuf {
    directory.join(name_of(step))
}

/// Writes the checkpoint of a step into `directory` (which is created) and returns its path.
///
/// If the same checkpoint is already there, intact, nothing is written; a damaged or different
/// one of that step is replaced.
///
/// # Errors
/// [`Error::File`], such as for a full disk; what was written is removed, and the checkpoints
/// that were there stay as they were.
pub fn save(directory: &Path, snapshot: &Snapshot) -> Result<PathBuf> {
    save_with(directory, snapshot, &create_file)
}

fn save_with(directory: &Path, snapshot: &Snapshot, create: Create) -> Result<PathBuf> {
    fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
    let name = name_of(snapshot.progress.step);
    let path = directory.join(&name);
    if load(&path).is_ok_and(|existing| existing.progress == snapshot.progress) {
        return Ok(path);
    }
    let temporary = directory.join(format!("{TEMPORARY_PREFIX}{name}"));
    remove_tree(&temporary)?;
    write_files(&temporary, snapshot, create).inspect_err(|_| {
        // The error that stopped the save is the one to report; the next start cleans up.
        let _ = fs::remove_dir_all(&temporary);
    })?;
    if path.exists() {
        retire(&path)?;
    }
    fs::rename(&temporary, &path).map_err(Error::file("rename", &temporary))?;
    sync_directory(directory)?;
    Ok(path)
}

/// Writes and syncs all files of a checkpoint into the new directory `path`.
fn write_files(path: &Path, snapshot: &Snapshot, create: Create) -> Result<()> {
    fs::create_dir(path).map_err(Error::file("create", path))?;
    let mut files = BTreeMap::new();
    for (name, tensors) in [(MODEL_FILE, snapshot.model), (OPTIMIZER_FILE, snapshot.optimizer)] {
        let record = write_file(&path.join(name), create, |sink| tensors::write(sink, tensors))?;
        files.insert(name.to_owned(), record);
    }
    let progress = snapshot.progress.clone();
    let state = State { format_version: FORMAT_VERSION, progress, files };
    let blake3 = seal(&state);
    let json =
        serde_json::to_vec_pretty(&SealedState { state, blake3 }).expect("strings and numbers always have a JSON form");
    write_file(&path.join(STATE_FILE), create, |sink| sink.write_all(&json))?;
    sync_directory(path)
}

fn write_file(
    path: &Path,
    create: Create,
    content: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<FileRecord> {
    let write = || {
        let mut sink = create(path)?;
        let mut hashing = Hashing { sink: &mut *sink, hasher: blake3::Hasher::new(), bytes: 0 };
        content(&mut hashing)?;
        let record = FileRecord { bytes: hashing.bytes, blake3: hashing.hasher.finalize().to_hex().to_string() };
        sink.sync()?;
        Ok(record)
    };
    write().map_err(Error::file("write", path))
}

/// Passes bytes on and records them.
struct Hashing<'a> {
    sink: &'a mut dyn Sink,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Hashing<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.sink.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

fn seal(state: &State) -> String {
    let json = serde_json::to_vec(state).expect("strings and numbers always have a JSON form");
    blake3::hash(&json).to_hex().to_string()
}

/// Opens the checkpoint `path` and verifies every byte of it.
///
/// # Errors
/// [`Error::Checkpoint`] names the file that is missing or damaged, and how.
pub fn load(path: &Path) -> Result<Loaded> {
    let state = load_state(&path.join(STATE_FILE))?;
    let open = |name: &str| {
        let path = path.join(name);
        let Some(record) = state.files.get(name) else {
            return Err(damaged(&path, format!("{STATE_FILE} does not list it")));
        };
        let file = TensorFile::open(&path)?;
        file.verify(record.bytes, &record.blake3)?;
        Ok(file)
    };
    let (model, optimizer) = (open(MODEL_FILE)?, open(OPTIMIZER_FILE)?);
    Ok(Loaded { path: path.to_owned(), progress: state.progress, model, optimizer })
}

fn load_state(path: &Path) -> Result<State> {
    let json = fs::read(path).map_err(|e| damaged(path, format!("cannot be read: {e}")))?;
    let sealed: SealedState =
        serde_json::from_slice(&json).map_err(|e| damaged(path, format!("is not a state: {e}")))?;
    if seal(&sealed.state) != sealed.blake3 {
        return Err(damaged(path, "does not match its digest".to_owned()));
    }
    let version = sealed.state.format_version;
    if version != FORMAT_VERSION {
        let problem = format!("has format version {version}, this program reads {FORMAT_VERSION}");
        return Err(damaged(path, problem));
    }
    Ok(sealed.state)
}

fn damaged(path: &Path, problem: String) -> Error {
    Error::Checkpoint { path: path.to_owned(), problem }
}

/// Opens the newest intact checkpoint in `directory`, which need not exist.
///
/// # Errors
/// If there are checkpoints and none is intact: what is wrong with the newest.
pub fn latest(directory: &Path) -> Result<Latest> {
    let mut skipped = Vec::new();
    for path in list(directory)?.iter().rev() {
        match load(path) {
            Ok(checkpoint) => {
                return Ok(Latest { checkpoint: Some(checkpoint), skipped });
            }
            Err(error) => skipped.push(error),
        }
    }
    if skipped.is_empty() {
        return Ok(Latest { checkpoint: None, skipped });
    }
    Err(skipped.swap_remove(0))
}

/// Removes all checkpoints but `keep`: that of step `best`, if there is one, and the newest. Where only one is to be kept
/// and these are two, both stay.
///
/// # Errors
/// [`Error::File`]; what remains is whole.
pub fn prune(directory: &Path, keep: usize, best: Option<u64>) -> Result<()> {
    let checkpoints = list(directory)?;
    let best = best.map(|step| path(directory, step)).filter(|path| checkpoints.contains(path));
    excess(&checkpoints, keep, best.as_ref()).try_for_each(|path| retire(path))
}

/// Of checkpoints, oldest first, those that [`prune`] removes; `best` is one of them.
pub(crate) fn excess<'a, T: PartialEq>(
    checkpoints: &'a [T],
    keep: usize,
    best: Option<&'a T>,
) -> impl Iterator<Item = &'a T> {
    assert!(keep > 0, "the newest checkpoint always stays");
    let is_newest = |count: usize, checkpoint| checkpoints.iter().rev().take(count).any(|newest| newest == checkpoint);
    let newest = match best {
        Some(best) if !is_newest(keep, best) => (keep - 1).max(1),
        _ => keep,
    };
    let excess = checkpoints.len().saturating_sub(newest);
    checkpoints[..excess].iter().filter(move |checkpoint| Some(*checkpoint) != best)
}

/// Removes what interrupted saves left. To be called before the first save of a process, by
/// the only one that saves into `directory`.
///
/// # Errors
/// [`Error::File`].
pub fn remove_leftovers(directory: &Path) -> Result<()> {
    entries(directory)?
        .into_iter()
        .filter(|(name, _)| name.starts_with(TEMPORARY_PREFIX))
        .try_for_each(|(_, path)| remove_tree(&path))
}

/// The checkpoints of `directory`, oldest first.
fn list(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut steps: Vec<(u64, PathBuf)> = entries(directory)?
        .into_iter()
        .filter_map(|(name, path)| Some((name.strip_prefix(STEP_PREFIX)?.parse().ok()?, path)))
        .collect();
    steps.sort_unstable();
    Ok(steps.into_iter().map(|(_, path)| path).collect())
}

/// Names and paths in `directory`; none if it does not exist.
fn entries(directory: &Path) -> Result<Vec<(String, PathBuf)>> {
    let read = || {
        fs::read_dir(directory)?
            .map(|entry| entry.map(|e| (e.file_name().to_string_lossy().into_owned(), e.path())))
            .collect::<io::Result<Vec<_>>>()
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(Error::file("list", directory)),
    }
}

/// Removes a checkpoint so that its name is gone before the first of its files is.
fn retire(path: &Path) -> Result<()> {
    let name = path.file_name().expect("a checkpoint has a name").to_string_lossy();
    let retired = path.with_file_name(format!("{TEMPORARY_PREFIX}retired-{name}"));
    remove_tree(&retired)?;
    fs::rename(path, &retired).map_err(Error::file("rename", path))?;
    remove_tree(&retired)
}

fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(Error::file("remove", path)),
    }
}

/// Makes the names in a directory durable.
fn sync_directory(path: &Path) -> Result<()> {
    File::open(path).and_then(|directory| directory.sync_all()).map_err(Error::file("sync", path))
}

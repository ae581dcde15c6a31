//! What a coordinator leaves to the one that comes after it: a small durable record.
//!
//! Two files that are written in turn, in place, each with a sequence number and a digest. The
//! newest whole one counts: a write that a crash cuts short leaves the other. An entry costs one
//! write and one sync, which no database comes below, and there is nothing to compact, to open in
//! a wrong version or to repair.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::secret::Secret;
use crate::state::Record;
use crate::{Error, Result};

const NAMES: [&str; 2] = ["coordinator-0.record", "coordinator-1.record"];
const MAGIC: [u8; 8] = *b"QUINTET1";
/// magic, sequence number, length of the content, digest of these and the content.
const HEADER_BYTES: usize = 8 + 8 + 8 + 32;
/// Far more than an entry takes.
const CONTENT_BYTES_MAX: u64 = 64 << 20;
/// Reserved at once, so that a disk that fills up later is no obstacle.
const RESERVED_BYTES: usize = 16 << 10;

/// By what workers and coordinator of a run know each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// What workers must present.
    pub run_token: Secret,
    /// By which ranks know each other in the collective.
    pub collective_token: Secret,
}

impl Identity {
    /// Of a new run.
    ///
    /// # Errors
    /// [`Error::Random`].
    pub fn generate() -> Result<Self> {
        Ok(Self { run_token: Secret::generate()?, collective_token: Secret::generate()? })
    }
}

/// The content of a slot.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Content {
    run_token: String,
    collective_token: String,
    /// None before the first generation.
    pub(crate) record: Option<Record>,
    /// Of a run that goes on from a checkpoint: the newest generation it had before, to which none may fall back.
    #[serde(default)]
    past_generation: u64,
    pub(crate) ledger: Tail,
    pub(crate) metrics: Tail,
}

/// The end of a file that grows: what of it may not be on disk yet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Tail {
    pub(crate) offset: u64,
    pub(crate) text: String,
}

impl Tail {
    /// What makes `wanted` of a file that holds `present`.
    pub(crate) fn between(present: &str, wanted: &str) -> Self {
        let lines = present.split_inclusive('\n').zip(wanted.split_inclusive('\n'));
        let common: usize = lines.take_while(|(a, b)| a == b).map(|(line, _)| line.len()).sum();
        Self { offset: common as u64, text: wanted[common..].to_owned() }
    }
}

impl Content {
    /// Of a run whose generations follow `past_generation`.
    pub(crate) fn new(identity: &Identity, past_generation: u64, ledger: Tail, metrics: Tail) -> Self {
        let (run_token, collective_token) = (identity.run_token.to_hex(), identity.collective_token.to_hex());
        Self { run_token, collective_token, record: None, past_generation, ledger, metrics }
    }

    /// The newest there was.
    pub(crate) fn generation(&self) -> u64 {
        self.record.as_ref().map_or(self.past_generation, |record| record.generation)
    }

    /// None where the file was written by somebody else.
    pub(crate) fn identity(&self) -> Option<Identity> {
        let run_token = Secret::from_hex(&self.run_token)?;
        Some(Identity { run_token, collective_token: Secret::from_hex(&self.collective_token)? })
    }
}

/// The record's files, open for writing.
#[derive(Debug)]
pub(crate) struct Journal {
    slots: [Slot; 2],
    sequence: u64,
}

#[derive(Debug)]
struct Slot {
    file: File,
    path: PathBuf,
}

impl Slot {
    /// The secrets in it are for the owner.
    fn open(path: PathBuf) -> Result<Self> {
        let open = || {
            let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path)?;
            let bytes = file.metadata()?.len();
            if bytes < RESERVED_BYTES as u64 {
                file.write_all_at(&vec![0; RESERVED_BYTES - bytes as usize], bytes)?;
                file.sync_all()?;
            }
            Ok(file)
        };
        let file = open().map_err(Error::file("write", &path))?;
        Ok(Self { file, path })
    }
}

impl Journal {
    /// Goes on in a directory's files with `content`, or makes new ones.
    ///
    /// # Errors
    /// [`Error::File`]; what was on record still is.
    pub(crate) fn open(directory: &Path, content: &Content) -> Result<Self> {
        let sequence = newest(directory)?.map_or(0, |(sequence, _)| sequence);
        let [first, second] = NAMES.map(|name| Slot::open(directory.join(name)));
        let mut journal = Self { slots: [first?, second?], sequence };
        File::open(directory).and_then(|names| names.sync_all()).map_err(Error::file("sync", directory))?;
        journal.write(content)?;
        Ok(journal)
    }

    /// The newest content of a directory's files, if there is a whole one.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn read(directory: &Path) -> Result<Option<Content>> {
        Ok(newest(directory)?.map(|(_, content)| content))
    }

    /// Makes `content` durable. After an error the content before still counts, and the same may
    /// be tried again.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn write(&mut self, content: &Content) -> Result<()> {
        let sequence = self.sequence + 1;
        let Slot { file, path } = &self.slots[(sequence % 2) as usize];
        let write = || {
            file.write_all_at(&encode(sequence, &serde_json::to_vec(content)?), 0)?;
            file.sync_data()
        };
        write().map_err(Error::file("write", path))?;
        self.sequence = sequence;
        Ok(())
    }

    /// Removes the record of a run that has ended in order: there is nothing to take over.
    ///
    /// # Errors
    /// [`Error::File`].
    pub(crate) fn remove(directory: &Path) -> Result<()> {
        NAMES.iter().try_for_each(|name| {
            let path = directory.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                result => result.map_err(Error::file("remove", &path)),
            }
        })
    }
}

fn newest(directory: &Path) -> Result<Option<(u64, Content)>> {
    let mut newest = None;
    for name in NAMES {
        let path = directory.join(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.map_err(Error::file("open", &path))?,
        };
        let slot = read_slot(&file);
        if slot.as_ref().map(|(sequence, _)| *sequence) > newest.as_ref().map(|(sequence, _)| *sequence) {
            newest = slot;
        }
    }
    Ok(newest)
}

fn encode(sequence: u64, json: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + json.len());
    bytes.extend(MAGIC);
    bytes.extend(sequence.to_le_bytes());
    bytes.extend((json.len() as u64).to_le_bytes());
    bytes.extend(digest(&bytes, json).as_bytes());
    bytes.extend(json);
    bytes
}

fn digest(header: &[u8], json: &[u8]) -> blake3::Hash {
    blake3::Hasher::new().update(header).update(json).finalize()
}

/// Sequence number and content of a file that is whole.
fn read_slot(file: &File) -> Option<(u64, Content)> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0).ok()?;
    let (head, sum) = header.split_at(24);
    let number = |range: std::ops::Range<usize>| head[range].try_into().ok().map(u64::from_le_bytes);
    let (sequence, length) = (number(8..16)?, number(16..24)?);
    if head[..8] != MAGIC || length > CONTENT_BYTES_MAX {
        return None;
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, HEADER_BYTES as u64).ok()?;
    if digest(head, &json).as_bytes() != sum {
        return None;
    }
    Some((sequence, serde_json::from_slice(&json).ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn content(step: u64) -> Content {
        let record = Record {
            generation: step + 1,
            committed_step: step,
            committed_generation: step,
            workers: 2,
            evaluate: false,
            save: true,
            finish: false,
            last_worker: 7,
        };
        let tail = Tail { offset: 3 * step, text: "line\n".to_owned() };
        let identity =
            Identity { run_token: Secret::from_bytes([1; 32]), collective_token: Secret::from_bytes([2; 32]) };
        Content { record: Some(record), ..Content::new(&identity, 0, tail.clone(), tail) }
    }

    #[test]
    fn the_newest_entry_counts() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Journal::read(directory.path()).unwrap(), None);
        for start in [0, 6] {
            let mut journal = Journal::open(directory.path(), &content(start)).unwrap();
            for step in start + 1..start + 6 {
                journal.write(&content(step)).unwrap();
                assert_eq!(Journal::read(directory.path()).unwrap(), Some(content(step)));
            }
        }
        assert_eq!(content(1).identity().unwrap().run_token, Secret::from_bytes([1; 32]));
        let metadata = fs::metadata(directory.path().join(NAMES[0])).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        Journal::remove(directory.path()).unwrap();
        Journal::remove(directory.path()).unwrap();
        assert_eq!(Journal::read(directory.path()).unwrap(), None);
    }

    #[test]
    fn a_write_cut_short_anywhere_leaves_the_entry_before() {
        let directory = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(directory.path(), &content(0)).unwrap();
        journal.write(&content(1)).unwrap();
        let sequence = journal.sequence + 1;
        let path = &journal.slots[(sequence % 2) as usize].path;
        let before = fs::read(path).unwrap();
        let next = encode(sequence, &serde_json::to_vec(&content(2)).unwrap());
        // But for the last bytes, which the two have in common.
        for written in 0..next.len() - 80 {
            fs::write(path, [&next[..written], &before[written..]].concat()).unwrap();
            assert_eq!(Journal::read(directory.path()).unwrap(), Some(content(1)), "{written} bytes");
        }
        // Nor does a bit that flips pass for an entry.
        for bit in (0..8 * next.len()).step_by(13) {
            let mut flipped = next.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(path, &flipped).unwrap();
            assert_eq!(Journal::read(directory.path()).unwrap(), Some(content(1)), "bit {bit}");
        }
    }
}
